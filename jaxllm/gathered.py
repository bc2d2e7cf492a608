"""Parameters lie split over `data` too, in training (FSDP, arXiv 2304.11277) and when a model is loaded, and come
together where they are used.

Each is stored split along one more dim than the model computes with. A `Gathered` leaf stands in the module tree; to
read it is to gather it, and its gradient is scattered again. Where layers are rematerialised the gathered copies are
not kept for the backward pass either.
"""
import dataclasses
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.offloaded import Offloaded
from jaxllm.quant import Packed, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gathered:
    """A weight stored otherwise than it is computed with; `compute` is the sharding of each of its arrays then."""
    value: Weight
    compute: PartitionSpec = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of a plain one."""
        assert not dataclasses.is_dataclass(self.value)
        return self.value.dtype

    def __getitem__(self, index: EllipsisType) -> Weight:
        return jax.tree.map(lambda x: jax.reshard(x, self.compute), self.value)


def stored(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A parameter as it is stored: of its dims that leave even pieces, so that pairs of 4-bit codes stay whole, the
    one with the largest pieces is split over `data` too. Vectors stay as they are."""
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding)
    data, pieces = sharding.mesh.shape["data"], sharding.shard_shape(leaf.shape)
    free = [dim for dim, size in enumerate(pieces) if size % (2 * data) == 0]
    if data == 1 or leaf.ndim < 2 or not free:
        return leaf
    spec = list(sharding.spec) + [None] * (leaf.ndim - len(sharding.spec))
    dim = max(free, key=lambda dim: pieces[dim])
    axes = spec[dim] or ()
    spec[dim] = ((axes,) if isinstance(axes, str) else axes) + ("data",)
    return leaf.update(sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def gathered(value: Any, compute: PartitionSpec) -> Any:
    """The leaf to compute with for a stored `value`, which is as the model has it if its sharding is `compute`, or if
    only some of it is fetched."""
    same = isinstance(value, Offloaded) or all(jax.typeof(x).sharding.spec == compute for x in jax.tree.leaves(value))
    return value if same else Gathered(value, compute)


def anew(model: Any, state: Any) -> tuple[Any, Any]:
    """(model, state) as they are, for a step of a loop or one layer of many: what is gathered or decoded of the model
    is so once the state is there. A compiler would else do it before the loop, or for all layers before the first."""
    leaves, tree = jax.tree.flatten(model, is_leaf=lambda x: isinstance(x, Gathered | Packed | Offloaded))
    waiting = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Gathered | Packed)}
    if not waiting:
        return model, state
    waiting, state = jax.lax.optimization_barrier((waiting, state))
    return jax.tree.unflatten(tree, [waiting.get(i, leaf) for i, leaf in enumerate(leaves)]), state
