"""kv heads on a mesh whose tensor degree exceeds their number: kept once, repeated where they are computed with.

A model on such a mesh has each kv head degree / heads times (model.py). Were those copies trained, each with the part
of the gradient that its own query heads give, they would drift apart; so what is trained is the head itself, whose
gradient is the sum over its copies. It is also what a checkpoint holds, whatever the mesh.
"""
import functools
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.axes import make_abstract_mesh
from jaxllm.config import Config
from jaxllm.generate.load import abstract_model
from jaxllm.paths import parameter_path, parameters


def kept_once(model: Any, config: Config, num_mtp: int) -> Any:
    """The abstract module tree with each kv head once, on every place of `tensor` where that does not split them."""
    whole = _shapes(config, num_mtp)

    def leaf(path: tuple, computed: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape, sharding = whole[parameter_path(path)], computed.sharding
        if shape == computed.shape:
            return computed
        assert isinstance(sharding, NamedSharding)
        kept = PartitionSpec(*(axes if size == held else None for axes, size, held in
                               zip(sharding.spec, shape, computed.shape, strict=True)))
        return computed.update(shape=shape, sharding=NamedSharding(sharding.mesh, kept))
    return jax.tree_util.tree_map_with_path(leaf, model)


@functools.cache
def _shapes(config: Config, num_mtp: int) -> dict[str, tuple[int, ...]]:
    """Path -> shape where no head is repeated."""
    model = abstract_model(config, make_abstract_mesh(), jax.numpy.dtype("float32"), num_mtp)
    return {path: leaf.shape for path, leaf in parameters(model).items()}


def repeated(value: jax.Array, computed: jax.ShapeDtypeStruct) -> jax.Array:
    """`value` as it is, or if the model has its heads several times, in the shape and sharding that it computes with:
    each device takes the one head that it needs."""
    dims = [dim for dim, (held, size) in enumerate(zip(value.shape, computed.shape, strict=True)) if held != size]
    if not dims:
        return value
    (dim,), spec = dims, computed.sharding.spec
    copies, axis = computed.shape[dim] // value.shape[dim], spec[dim]

    def take(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) // copies, 1, dim)
    once = PartitionSpec(*(None if at == dim else axes for at, axes in enumerate(spec)))
    return jax.shard_map(take, in_specs=once, out_specs=spec)(jax.reshard(value, once))
