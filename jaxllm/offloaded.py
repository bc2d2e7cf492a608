"""Stacks of experts of which a stated number stays on each device; the others lie in host memory and come over when
they are chosen.

Host memory is a memory kind of arrays like any other (`pinned_host`): such an array is split over the mesh, each device
has its part in its own host's memory, and inside jit a slice of it is moved with `jax.device_put`. To compute on it
where it lies is an error.
"""
import dataclasses
import math
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.quant import Packed, Weight

HOST = "pinned_host"
GROUP = 8      # rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Offloaded:
    """A stack of E experts, split into P parts over the mesh, each of e of which r are resident."""
    resident: Weight | None      # [P * r, ...]; None if r is 0
    host: Weight                 # [P * (e - r), ...], rows of bytes in groups
    place_E: jax.Array           # int32, among its part's: below r in `resident`, from r on in `host`

    @property
    def num_resident(self) -> int:
        """Of P parts together; inside shard_map r."""
        return 0 if self.resident is None else self.resident.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stack that it stands for."""
        whole: Weight = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
            (self.place_E.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]), x.dtype), self.host)
        return whole.shape

    def __getitem__(self, index: EllipsisType) -> "Offloaded":
        """`weight[...]`, as modules read their parameters."""
        return self


def fetch(host: Weight, index: jax.Array) -> Weight:
    """host[index] on the device: only that expert crosses the bus."""
    def one(x: jax.Array) -> jax.Array:
        expert = jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)
        expert = jax.device_put(expert, jax.memory.Space.Device)
        return expert.reshape(-1, expert.shape[-1])

    if isinstance(host, Packed):
        return Packed(one(host.codes), one(host.scale), host.dim - 1)
    assert isinstance(host, jax.Array)
    return one(host)


def grouped(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """[E, n, m] of single bytes as [E, n / 8, 8, m], which are the same bytes in the same order.

    XLA's TPU compiler gives an argument of bytes another layout (tiles of 32 rows) than it computes with (of 8), and
    would bring a whole stack over, turn it, and take it back, each time that one expert is fetched (docs/log.md). With
    rows of 8 both are the same.
    """
    sharding = x.sharding
    assert isinstance(sharding, NamedSharding)
    rows = sharding.shard_shape(x.shape)[1]
    if x.dtype.itemsize > 1 or rows % GROUP:
        return x
    spec = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
    E, n, m = x.shape
    return x.update(shape=(E, n // GROUP, GROUP, m),
                    sharding=sharding.update(spec=PartitionSpec(*spec[:2], None, *spec[2:])))


def num_parts(leaf: Any) -> int:
    """Into how many parts the mesh splits dim 0 of an array, abstract or real."""
    return leaf.shape[0] // leaf.sharding.shard_shape(leaf.shape)[0]


def offload(leaf: Any, resident: int) -> Any:
    """The abstract stack (ShapeDtypeStruct, or Packed of those) as an `Offloaded` with `resident` experts of each part
    on the device; as it is if those are all.

    ValueError if `resident` is negative or more than a part has.
    """
    stack = jax.tree.leaves(leaf)[0]
    num, parts = stack.shape[0], num_parts(stack)
    if not 0 <= resident <= num // parts:
        raise ValueError(f"resident_experts = {resident}: a device has {num // parts} experts of each layer (of {num}, "
                         f"in {parts} parts over the mesh); expected 0 to {num // parts}")
    if resident == num // parts:
        return leaf

    def some(each: int) -> Any:
        return jax.tree.map(lambda x: x.update(shape=(parts * each, *x.shape[1:])), leaf)

    host = jax.tree.map(lambda x: grouped(x.update(sharding=x.sharding.with_memory_kind(HOST))),
                        some(num // parts - resident))
    place: Any = jax.ShapeDtypeStruct((num,), jnp.int32, sharding=NamedSharding(
        stack.sharding.mesh, PartitionSpec(stack.sharding.spec[0])))
    return Offloaded(some(resident) if resident else None, host, place)


def choose(count_E: np.ndarray, parts: int, resident: int) -> tuple[np.ndarray, np.ndarray]:
    """Which experts [parts * r] are resident, those of each part that were used most (the first of equals), and which
    are not [parts * (e - r)]; within a part in the order of their numbers."""
    order = np.argsort(-count_E.reshape(parts, -1), axis=1, kind="stable")
    first = np.arange(parts)[:, None] * order.shape[1]
    kept, others = (np.sort(some, axis=1) + first for some in np.split(order, [resident], axis=1))
    return kept.ravel(), others.ravel()


def places(resident: np.ndarray, others: np.ndarray, parts: int) -> np.ndarray:
    """int32 [E]: place_E of an `Offloaded` with these experts."""
    both = np.concatenate([resident.reshape(parts, -1), others.reshape(parts, -1)], axis=1)
    place = np.empty(both.size, np.int32)
    place[both.ravel()] = np.tile(np.arange(both.shape[1], dtype=np.int32), parts)
    return place


def check_host_memory(mesh: Mesh) -> None:
    """ValueError for devices that have no host memory of their own kind."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ValueError(f"resident_experts: {device.platform} devices have no {HOST} memory for the other experts "
                         f"({', '.join(kinds)}); load all experts onto the devices")


def on_device(tree: Any) -> list[Any]:
    """The arrays of a tree, real or abstract, that are not in host memory."""
    return [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != HOST]
