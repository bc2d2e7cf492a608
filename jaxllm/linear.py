"""Weights, and products with them: how a parameter is declared, and in what precision it is used, packed or not."""
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.axes import spec
from jaxllm.quant import Packed, Weight, decode

TILE = 2**20     # numbers; of 2^17, 2^19 and 2^20 the fastest on two cores with 1 MiB of cache each


def param(rngs: nnx.Rngs, shape: Sequence[int], names: Sequence[str | None], dtype: jnp.dtype,
          std: float = 0.02) -> nnx.Param:
    """A parameter split over the mesh in context as its logical names say; normal(0, std), constant 1 if std is 0."""
    sharding = spec(*names)
    if std == 0:
        return nnx.Param(jnp.ones(shape, dtype, out_sharding=sharding))
    value = jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=sharding)
    return nnx.Param((std * value).astype(dtype))


def einsum(equation: str, x: jax.Array, w: Weight, out_sharding: PartitionSpec | None = None) -> jax.Array:
    """`jnp.einsum` accumulated and returned in float32. Float32 operands are multiplied as such on every platform.

    A packed weight is decoded into x's dtype here, and nowhere earlier.
    """
    if isinstance(w, Packed):
        w = decode(w, x.dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, w, precision=precision, preferred_element_type=jnp.float32,
                      out_sharding=out_sharding)


def matmul(x_MD: jax.Array, w_DI: Weight) -> jax.Array:
    """x @ w, float32 [M, I], on one device. A large packed w is decoded piece by piece along D.

    A piece of TILE decoded numbers stays in a CPU's cache until it is multiplied, which halves the time of an expert of
    4096 x 2048, and no more than that is ever decoded at once.
    """
    if not isinstance(w_DI, Packed):
        return einsum("md,di->mi", x_MD, w_DI.astype(x_MD.dtype))
    D, I = w_DI.shape
    blocks = w_DI.scale.shape[0]
    pieces = next(n for n in range(1, blocks + 1) if blocks % n == 0 and (D // n * I <= TILE or n == blocks))
    if pieces == 1:
        return einsum("md,di->mi", x_MD, w_DI)

    def add(n: jax.Array, y_MI: jax.Array) -> jax.Array:
        x, codes, scale = (jax.lax.dynamic_slice_in_dim(array, n * (size // pieces), size // pieces, dim)
                           for array, size, dim in ((x_MD, D, 1), (w_DI.codes, w_DI.codes.shape[0], 0),
                                                    (w_DI.scale, blocks, 0)))
        return y_MI + einsum("md,di->mi", x, Packed(codes, scale, w_DI.dim))

    zero_MI = jnp.zeros_like(x_MD, jnp.float32, shape=(x_MD.shape[0], I))
    return jax.lax.fori_loop(0, pieces, add, zero_MI)


def matmul_in_parts(x_BTD: jax.Array, w_DW: Weight) -> jax.Array:
    """x @ w, float32 [B, T, W]; of float32 operands the sum over D is taken in four parts, which are then added.

    A CPU adds D products one after the other and rounds each time to the size of the sum so far. Where that sum is
    large, as in logits, this is the largest error of a float32 forward pass; four short sums have a third of it.
    """
    (B, T, D), W, parts = x_BTD.shape, w_DW.shape[1], 4
    if x_BTD.dtype != jnp.float32 or D % parts:
        return einsum("btd,dw->btw", x_BTD, w_DW)
    x_PBTd = x_BTD.reshape(B, T, parts, D // parts).transpose(2, 0, 1, 3)
    w_DW = decode(w_DW, x_BTD.dtype)
    y_PBTW = einsum("pbtd,pdw->pbtw", x_PBTd, w_DW.reshape(parts, D // parts, W))
    return (y_PBTW[0] + y_PBTW[1]) + (y_PBTW[2] + y_PBTW[3])
