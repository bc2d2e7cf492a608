"""FSDP: parameters lie split over `data` too, and come together where they are used.

Each is stored split along one more dim than the model computes with. A `Gathered` leaf stands in the module tree; to
read it is to gather it, and its gradient is scattered again. Where layers are rematerialised the gathered copies are
not kept for the backward pass either.
"""
import dataclasses
from types import EllipsisType
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.quant import Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gathered:
    """A weight stored otherwise than it is computed with; `compute` is the sharding of each of its arrays then."""
    value: Weight
    compute: PartitionSpec = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def __getitem__(self, index: EllipsisType) -> Weight:
        return jax.tree.map(lambda x: jax.reshard(x, self.compute), self.value)


def stored(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A parameter as it is stored: its largest free dim that `data` divides is split over it. Vectors stay whole."""
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding)
    data, spec = sharding.mesh.shape["data"], list(sharding.spec) + [None] * (leaf.ndim - len(sharding.spec))
    free = [dim for dim, size in enumerate(leaf.shape) if spec[dim] is None and size % data == 0]
    if data == 1 or leaf.ndim < 2 or not free:
        return leaf
    spec[max(free, key=lambda dim: leaf.shape[dim])] = "data"
    return leaf.update(sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def gathered(value: Any, computed: Any) -> Any:
    """The leaf to compute with for a stored `value`; `computed` is the same leaf as the model has it, abstract."""
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(computed)]
    if all(jax.typeof(x).sharding.spec == spec for x, spec in zip(jax.tree.leaves(value), specs, strict=True)):
        return value
    return Gathered(value, specs[0])
