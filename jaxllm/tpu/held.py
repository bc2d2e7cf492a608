"""What a model and a cache take of each device of a mesh, by kind, from shapes alone and in a fraction of a second.

Layers that are alike take alike, so the module tree is built with one layer of each kind, and counted as often as the
model has that kind. The numbers are those of the arrays that `load` and `init_cache` would make.
"""
import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from jaxllm.axes import splits_rows
from jaxllm.cache import num_slots, slot_places
from jaxllm.config import Config, LayerSpec
from jaxllm.gathered import stored
from jaxllm.generate.load import Params, abstract_model, as_stored
from jaxllm.generate.offload import is_experts
from jaxllm.info import KINDS, kind_of
from jaxllm.model import stored_layer
from jaxllm.offloaded import num_parts
from jaxllm.paths import parameters
from jaxllm.tpu.steps import Work
from jaxllm.train.memory import device_bytes


@dataclasses.dataclass(frozen=True)
class Stacks:
    """Experts where some are in host memory, which lie whole along `data`: of a device."""
    layers: int      # that have experts
    parts: int       # into which the mesh splits the experts of a layer
    each: int        # experts of a part
    expert: int      # bytes of one

    @property
    def moving(self) -> int:
        """Bytes beside those of the resident ones: of one that is used, one that comes, and where each of them is."""
        return 2 * self.expert + 3 * 4 * self.each * self.layers


class Held:
    """The bytes of one model, whose parameters are `params` (leaf -> shape and dtype)."""

    def __init__(self, name: str, config: Config, params: Params):
        self.name, self.config, self.dtype, self.all_params = name, config, jnp.dtype(config.dtype), params
        first: dict[LayerSpec, int] = {}
        for i, layer in enumerate(config.layers):
            first.setdefault(layer, i)
        self.count = Counter(config.layers)
        self.small = dataclasses.replace(
            config, num_hidden_layers=len(first), hybrid_layer_pattern=tuple(
                config.hybrid_layer_pattern[i] for i in first.values()),
            moe_layer_freq=tuple(config.moe_layer_freq[i] for i in first.values()))
        short = {f"layers.{i}": f"layers.{j}" for j, i in enumerate(first.values())}
        self.params = {self._renamed(leaf, short): held for leaf, held in params.items()
                       if not leaf.startswith("layers.") or leaf[:leaf.index(".", 7)] in short}
        self.weights: Callable[[AbstractMesh], dict[str, int]] = cache(self._weights)

    @staticmethod
    def _renamed(leaf: str, short: dict[str, str]) -> str:
        return re.sub(r"^layers\.\d+", lambda found: short[found[0]], leaf)

    def _weights(self, mesh: AbstractMesh) -> dict[str, int]:
        """Kind of parameter -> bytes on a device. ValueError for a mesh that the model cannot be split over."""
        found = dict.fromkeys([kind for kind, _ in KINDS], 0)
        layers = list(self.count)
        for path, leaf in parameters(abstract_model(self.small, mesh, self.dtype)).items():
            times = self.count[layers[int(path.split(".")[1])]] if path.startswith("layers.") else 1
            found[kind_of(path)] += times * device_bytes(as_stored(path, stored(leaf), self.params))
        return found

    def experts(self, mesh: AbstractMesh) -> Stacks:
        leaves = {path: leaf for path, leaf in parameters(abstract_model(self.small, mesh, self.dtype)).items()
                  if is_experts(path)}
        layer = {path.split(".")[1] for path in leaves}.pop()
        stacks = [as_stored(path, leaf, self.params) for path, leaf in leaves.items() if path.split(".")[1] == layer]
        parts = num_parts(jax.tree.leaves(stacks)[0])
        each = jax.tree.leaves(stacks)[0].shape[0] // parts
        return Stacks(sum(layer.is_moe for layer in self.config.layers), parts, each, device_bytes(stacks) // each)

    def cache(self, mesh: AbstractMesh, work: Work) -> int:
        """Bytes of a device's share of the cache."""
        rows = work.batch // (mesh.shape["data"] * (mesh.shape["expert"] if splits_rows(work.batch, mesh) else 1))
        places = {layer: slot_places(layer, work.batch, mesh) for layer in self.count}
        slots = {layer: num_slots(layer, work.context, work.in_flight, num) // num for layer, num in places.items()}
        return sum(rows * count * stored_layer(layer, mesh).num_kv_heads // mesh.shape["tensor"] * slots[layer]
                   * (layer.head_dim + layer.v_head_dim) * self.dtype.itemsize for layer, count in self.count.items())


def unread_experts(config: Config, num_tokens: int) -> float:
    """The share of experts that no token chooses, on average if all choices are equally likely."""
    return (1 - (config.num_experts_per_tok or 0) / (config.n_routed_experts or 1)) ** num_tokens


def unread_rows(config: Config, num_tokens: int) -> float:
    """The share of the embedding's rows that no token is, at least; none where the embedding is the head too."""
    return 0.0 if config.tie_word_embeddings else max(0.0, 1 - num_tokens / config.vocab_size)
