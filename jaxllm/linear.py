"""Weights, and products with them: how a parameter is declared, and in what precision it is used."""
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.axes import spec


def param(rngs: nnx.Rngs, shape: Sequence[int], names: Sequence[str | None], dtype: jnp.dtype,
          std: float = 0.02) -> nnx.Param:
    """A parameter split over the mesh in context as its logical names say; normal(0, std), constant 1 if std is 0."""
    sharding = spec(*names)
    if std == 0:
        return nnx.Param(jnp.ones(shape, dtype, out_sharding=sharding))
    value = jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=sharding)
    return nnx.Param((std * value).astype(dtype))


def einsum(equation: str, x: jax.Array, w: jax.Array, out_sharding: PartitionSpec | None = None) -> jax.Array:
    """`jnp.einsum` accumulated and returned in float32. Float32 operands are multiplied as such on every platform."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, w, precision=precision, preferred_element_type=jnp.float32,
                      out_sharding=out_sharding)


def matmul_in_parts(x_BTD: jax.Array, w_DW: jax.Array) -> jax.Array:
    """x @ w, float32 [B, T, W]; of float32 operands the sum over D is taken in four parts, which are then added.

    A CPU adds D products one after the other and rounds each time to the size of the sum so far. Where that sum is
    large, as in logits, this is the largest error of a float32 forward pass; four short sums have a third of it.
    """
    (B, T, D), W, parts = x_BTD.shape, w_DW.shape[1], 4
    if x_BTD.dtype != jnp.float32 or D % parts:
        return einsum("btd,dw->btw", x_BTD, w_DW)
    x_PBTd = x_BTD.reshape(B, T, parts, D // parts).transpose(2, 0, 1, 3)
    y_PBTW = einsum("pbtd,pdw->pbtw", x_PBTd, w_DW.reshape(parts, D // parts, W))
    return (y_PBTW[0] + y_PBTW[1]) + (y_PBTW[2] + y_PBTW[3])
