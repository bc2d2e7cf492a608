"""Weights that are no plain arrays but stand where one would: packed ones, and adapted ones.

A packed weight stays codes and scales in memory, sharded as a plain one, and becomes numbers just before a product;
jaxllm/codec.py says what its two arrays mean. What is decoded at once is one matrix of attention, of the dense MLP or
of the head, or one expert. An adapted weight is another with a product of two thin matrices added (LoRA, arXiv
2106.09685), which is never multiplied out.
"""
import dataclasses
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxllm.codec import kind_of

F8_TO_F16 = 2.0**8        # e4m3 bits in the place of float16's have an exponent bias of 15 instead of 7


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight as codes and scales; `dim` is where 4-bit codes are paired."""
    codes: jax.Array
    scale: jax.Array
    dim: int = dataclasses.field(metadata={"static": True})

    @property
    def kind(self) -> str:
        return kind_of(self.codes.dtype, self.scale.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it stands for."""
        pair = 1 if self.kind == "fp8" else 2
        return tuple(size * (pair if dim == self.dim else 1) for dim, size in enumerate(self.codes.shape))

    def __getitem__(self, index: EllipsisType) -> "Packed":
        """`weight[...]`, as modules read their parameters."""
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """base + scale * a @ b: `a` has the in-dims of the base and r, `b` has r and the out-dims, both after E in a stack.

    Their dims are split over the mesh as those of the base; r is not split.
    """
    base: "Weight"
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def __getitem__(self, index: EllipsisType) -> "Adapted":
        """`weight[...]`, as modules read their parameters: its parts are read alike."""
        return Adapted(self.base[...], self.a[...], self.b[...], self.scale)


Weight = jax.Array | Packed | Adapted


def decode(weight: jax.Array | Packed, dtype: jnp.dtype) -> jax.Array:
    """The numbers that a weight stands for: code times scale in float32, then as `dtype`."""
    if not isinstance(weight, Packed):
        return weight.astype(dtype)
    dims = [(parts, size // parts) for parts, size in zip(weight.scale.shape, weight.shape, strict=True)]
    axes = jax.typeof(weight.codes).sharding.spec
    split = [size for pair in dims for size in pair]
    values = _reshape(_values(weight), split, [axis for pair in axes for axis in (pair, None)])
    factors = jnp.expand_dims(_factors(weight), range(1, len(split), 2))
    return _reshape((values * factors).astype(dtype), weight.shape, axes)


def take(weight: Weight, index: jax.Array) -> Weight:
    """weight[index] of a stack, packed or adapted if the stack is."""
    def pick(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)

    if isinstance(weight, Adapted):
        return Adapted(take(weight.base, index), pick(weight.a), pick(weight.b), weight.scale)
    if isinstance(weight, Packed):
        return Packed(pick(weight.codes), pick(weight.scale), weight.dim - 1)
    return pick(weight)


def trained_part(weights: Sequence[Weight]) -> list[Any]:
    """What of each weight has a gradient: a plain array, the adapter of an adapted one, nothing of a packed one."""
    return [w if isinstance(w, jax.Array) else None if isinstance(w, Packed) else (w.a, w.b) for w in weights]


def with_trained_part(weights: Sequence[Any], trained: Sequence[Any]) -> tuple[Any, ...]:
    """The weights with that part of them replaced."""
    def one(weight: Any, part: Any) -> Any:
        if part is None:
            return weight
        return dataclasses.replace(weight, a=part[0], b=part[1]) if isinstance(part, tuple) else part
    return tuple(map(one, weights, trained))


def _values(weight: Packed) -> jax.Array:
    """float32 codes, in the shape of the weight."""
    if weight.kind == "fp8":
        return jax.lax.platform_dependent(weight.codes, cpu=_e4m3_by_bits, default=lambda x: x.astype(jnp.float32))
    shift = jnp.array([0, 4], jnp.uint8)      # for low and high nibble; stacking two arrays is four times slower on CPU
    shift = jnp.expand_dims(shift, [dim for dim in range(weight.codes.ndim + 1) if dim != weight.dim + 1])
    both = (jnp.expand_dims(weight.codes, weight.dim + 1) >> shift) & 15
    nibbles = _reshape(both, weight.shape, jax.typeof(weight.codes).sharding.spec)
    return _e2m1(nibbles) if weight.kind == "mxfp4" else ((nibbles ^ 8).astype(jnp.int32) - 8).astype(jnp.float32)


def _e2m1(nibble: jax.Array) -> jax.Array:
    """float32 of e2m1 codes: exponent and mantissa bit go to their places in a float32; below 1 there is only 0.5."""
    size = (nibble & 7).astype(jnp.int32)
    normal = jax.lax.bitcast_convert_type((size << 22) + (126 << 23), jnp.float32)
    size = jnp.where(size < 2, size.astype(jnp.float32) * 0.5, normal)
    return jnp.where(nibble < 8, size, -size)


def _e4m3_by_bits(codes: jax.Array) -> jax.Array:
    """float32 of e4m3 codes that are numbers, by way of float16: several times as fast as XLA's cast on a CPU."""
    bits = jax.lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.uint16)
    half = jax.lax.bitcast_convert_type(((bits & 0x7F) << 7) | ((bits & 0x80) << 8), jnp.float16)
    return half.astype(jnp.float32) * F8_TO_F16


def _factors(weight: Packed) -> jax.Array:
    """float32 scales, in the shape of the scale."""
    if weight.kind != "mxfp4":
        return weight.scale.astype(jnp.float32)
    return jax.lax.bitcast_convert_type(weight.scale.astype(jnp.uint32) << 23, jnp.float32)


def _reshape(x: jax.Array, shape: Sequence[int], axes: Sequence[Any]) -> jax.Array:
    """x in another shape, its dims split over these mesh axes; inside shard_map, where none is, as any array."""
    sharding = P(*axes) if any(axis is not None for axis in axes) else None
    return jax.lax.reshape(x, shape, out_sharding=sharding)
