"""What a training step is given, of each device of a mesh: exact, from the shapes of the product's own plan of a run,
with one layer of each kind as in held.py.
"""
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from jaxllm.checkpoint.projections import ALL, LORA_A, LORA_B
from jaxllm.config import Config, LayerSpec
from jaxllm.info import KINDS, kind_of
from jaxllm.paths import parameters
from jaxllm.quant import Packed
from jaxllm.tpu.held import Held
from jaxllm.tpu.steps import Training
from jaxllm.train.memory import device_bytes
from jaxllm.train.optimizer import make_optimizer
from jaxllm.train.run import Run
from jaxllm.train.state import lay_out

ADAPTERS = "adapters"
ROWS = ("embed_WD", "gate_EDI", "up_EDI", "down_EID")


def run_of(work: Training, config: Config) -> Run:
    """The settings that are planned and compiled: the model's dtype, of bfloat16 with a float32 master of what is
    trained; each layer rematerialised; adapters of all projections; no MTP blocks."""
    if config.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype = {config.dtype!r} of the model: a step trains in float32 or bfloat16")
    lora = {"r": work.rank, "lora_alpha": 2 * work.rank, "target_modules": ALL} if work.rank else None
    dtype = cast(Literal["float32", "bfloat16"], config.dtype)
    return Run(output="planned", model="planned", data={"planned": 1.0}, steps=1000, context=work.context,
               batch=work.batch, dtype=dtype, master=dtype == "bfloat16" and not work.rank, remat=True, mtp_weight=0.0,
               lora=lora)


def optimizer_bytes(run: Run) -> tuple[int, int]:
    """(of each trained number, of all of them together), of the optimizer's state: what is trained is float32."""
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    leaves = jax.tree.leaves(jax.eval_shape(make_optimizer(run).init, {"one": one}))
    return (sum(x.dtype.itemsize for x in leaves if x.shape == one.shape),
            sum(x.dtype.itemsize for x in leaves if x.shape == ()))


def batch_bytes() -> int:
    """Of a token: its number, where its document begins, and whether it counts."""
    return sum(jnp.dtype(dtype).itemsize for dtype in (jnp.int32, jnp.int32, jnp.bool))


@dataclasses.dataclass(frozen=True)
class Part:
    """What one parameter takes of a device. Bytes, but for the numbers."""
    kind: str
    stored: int
    trained: int      # numbers of it that are trained
    used: int         # as the step computes with it
    summed: int       # its gradient where it is summed over `data`
    is_gathered: bool      # from its parts along `data`


class Trained:
    """The bytes of one model in training; `held` has its parameters as they are where it is only used."""

    def __init__(self, held: Held, work: Training):
        self.held, self.config, self.work, self.run = held, held.config, work, run_of(work, held.config)
        self.params = held.params if work.rank else {}
        self.parts = cache(self._parts)
        self.weights: Callable[[AbstractMesh], Any] = self.parts

    def _parts(self, mesh: AbstractMesh) -> dict[LayerSpec | None, list[Part]]:
        """Layer of each kind -> its parameters; None: those of no layer."""
        layers = list(self.held.count)
        found: dict[LayerSpec | None, list[Part]] = {layer: [] for layer in (None, *layers)}
        computed, held, trained, adapters = lay_out(self.run, self.held.small, mesh, self.params, 0)
        used = parameters(computed) | dict(adapters)
        for path, leaf in held.items():
            layer = layers[int(path.split(".")[1])] if path.startswith("layers.") else None
            found[layer].append(_part(path, leaf, used[path], path in trained, self.held.dtype))
        return found

    def times(self, layer: LayerSpec | None) -> int:
        return self.held.count[layer] if layer else 1

    def every(self, mesh: AbstractMesh) -> Iterator[tuple[int, Part]]:
        """(how many there are, one of them)"""
        return ((self.times(layer), part) for layer, parts in self.parts(mesh).items() for part in parts)

    def num_trained(self, mesh: AbstractMesh) -> int:
        """Of a device."""
        return sum(times * part.trained for times, part in self.every(mesh))

    def state(self, mesh: AbstractMesh) -> dict[str, int]:
        """Kind -> bytes of the step's arguments on a device."""
        found = dict.fromkeys([*(kind for kind, _ in KINDS), ADAPTERS], 0)
        for times, part in self.every(mesh):
            found[part.kind] += times * part.stored
        each, all_together = optimizer_bytes(self.run)
        return found | {"optimizer": each * self.num_trained(mesh) + all_together + 4,      # the number of the step
                        "batch": self.work.num_tokens // mesh.shape["data"] * batch_bytes()}


def _part(path: str, leaf: Any, used: jax.ShapeDtypeStruct, is_trained: bool, dtype: jnp.dtype) -> Part:
    kind = ADAPTERS if path.endswith((LORA_A, LORA_B)) else kind_of(path)
    stored, first = device_bytes(leaf), jax.tree.leaves(leaf)[0]
    assert isinstance(first.sharding, NamedSharding) and isinstance(used.sharding, NamedSharding)
    is_gathered = first.sharding.spec != used.sharding.spec
    data = first.sharding.mesh.shape["data"]
    numbers = math.prod(used.sharding.shard_shape(used.shape))
    # An adapter is float32 and rounded to what the model computes in before it is gathered.
    size = min(used.dtype.itemsize, dtype.itemsize) if kind == ADAPTERS else used.dtype.itemsize
    packed = stored * (data if is_gathered else 1)      # and is unpacked where it is multiplied
    # What is read by rows, and stacks of experts, have gradients in their own dtype; a product sums in float32.
    summed = numbers * (size if path.endswith(ROWS) else 4) if is_trained else 0
    return Part(kind, stored, math.prod(first.sharding.shard_shape(first.shape)) if is_trained else 0,
                packed if isinstance(leaf, Packed) else numbers * size, summed, is_gathered)
