"""Adapters on a model's devices (LoRA, arXiv 2106.09685): what shapes they have, how they begin, and where they go.

An adapter is two arrays for each adapted parameter, by path.lora_a and path.lora_b; checkpoint/projections.py says
which parameters can have one, and `targets` there which are meant by PEFT's names.
"""
import math
import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.checkpoint.projections import LORA_A, LORA_B, split_dims
from jaxllm.paths import parameter_path
from jaxllm.quant import Adapted, Packed

Tree = TypeVar("Tree")


def abstract_adapters(model: Any, ranks: Mapping[str, int], dtype: jnp.dtype
                      ) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of adapters, path of the parameter -> rank, for a model, abstract or not."""
    found = {}
    for key, leaf in jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda x: isinstance(x, Packed)):
        if (path := parameter_path(key)) not in ranks:
            continue
        sharding, r = jax.tree.leaves(leaf)[0].sharding, ranks[path]
        axes = [*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec))]
        (stack, ins, outs), (stack_axes, in_axes, out_axes) = split_dims(path, leaf.shape), split_dims(path, axes)
        for name, shape, spec in ((LORA_A, (*stack, *ins, r), (*stack_axes, *in_axes, None)),
                                  (LORA_B, (*stack, r, *outs), (*stack_axes, None, *out_axes))):
            found[path + name] = jax.ShapeDtypeStruct(
                shape, dtype, sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)))
    return found


def init_adapters(abstract: Mapping[str, jax.ShapeDtypeStruct], key: jax.Array) -> dict[str, jax.Array]:
    """As PEFT begins: lora_a uniform within 1 / sqrt(its in-dims), lora_b zero, so that the model is as it was.

    The same numbers on every mesh. To be called under jit, with the mesh in context.
    """
    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        assert isinstance(leaf.sharding, NamedSharding)
        if path.endswith(LORA_B):
            return jnp.zeros(leaf.shape, leaf.dtype, out_sharding=leaf.sharding.spec)
        bound = 1 / math.sqrt(math.prod(split_dims(path.removesuffix(LORA_A), leaf.shape[:-1])[1]))
        return jax.random.uniform(jax.random.fold_in(key, zlib.crc32(path.encode())), leaf.shape, jnp.float32,
                                  -bound, bound, out_sharding=leaf.sharding.spec).astype(leaf.dtype)
    return {path: draw(path, leaf) for path, leaf in abstract.items()}


def place(arrays: Mapping[str, np.ndarray], model: Any) -> dict[str, jax.Array]:
    """Adapters on the devices of a model, split as its weights; where it repeats kv heads, so are those of lora_b."""
    ranks = {path.removesuffix(LORA_A): array.shape[-1] for path, array in arrays.items() if path.endswith(LORA_A)}
    placed: dict[str, jax.Array] = {}
    for path, target in abstract_adapters(model, ranks, jnp.dtype("float32")).items():
        values = np.asarray(arrays[path], target.dtype)
        for dim, (wanted, held) in enumerate(zip(target.shape, values.shape, strict=True)):
            values = values if wanted == held else np.repeat(values, wanted // held, dim)
        placed[path] = jax.make_array_from_callback(target.shape, target.sharding, values.__getitem__)
    return placed


def adapt(model: Tree, adapters: Mapping[str, jax.Array], scale: float) -> Tree:
    """The model whose weights are base + scale * lora_a @ lora_b, for the bases and adapters that there are."""
    def is_weight(key: tuple, _: Any) -> bool:
        return bool(key) and getattr(key[-1], "name", None) == "value"      # of nnx.Param, whatever stands there

    def leaf(key: tuple, weight: Any) -> Any:
        path = parameter_path(key)
        if path + LORA_A not in adapters:
            return weight
        used.update((path + LORA_A, path + LORA_B))
        return Adapted(weight, adapters[path + LORA_A], adapters[path + LORA_B], scale)
    used: set[str] = set()
    adapted = jax.tree_util.tree_map_with_path(leaf, model, is_leaf=is_weight, is_leaf_takes_path=True)
    assert used == adapters.keys(), (used, adapters.keys())
    return adapted
