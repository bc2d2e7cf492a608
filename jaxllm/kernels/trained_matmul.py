"""Grouped products with plain weights, which have gradients: experts that are trained, and adapters of frozen ones.

A TPU fills the last dim of an array up to 128 lanes, so a weight with less than that there (the first half of an
adapter) is taken with its dims swapped, and so is its gradient; XLA then keeps it so.
"""
import functools

import jax
import jax.numpy as jnp

from jaxllm.kernels.grouped_matmul import TILE_D, TILE_I, TILE_ROWS, product
from jaxllm.kernels.grouped_outer import grouped_outer

LANES = 128
Kept = tuple[jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def trained_matmul(x_RD: jax.Array, w_eDI: jax.Array, count_e: jax.Array, interpret: bool = False) -> jax.Array:
    """Each expert's rows times its weight: float32 [R, I], 0 in rows past the last expert's; as `grouped_matmul`, but w
    is of x's dtype and has a gradient too. With I below 128 the sums are rounded to x's dtype."""
    return multiply(x_RD, w_eDI, count_e, False, interpret).astype(jnp.float32)


def _forward(x_RD: jax.Array, w_eDI: jax.Array, count_e: jax.Array, interpret: bool) -> tuple[jax.Array, Kept]:
    return trained_matmul(x_RD, w_eDI, count_e, interpret), (x_RD, w_eDI, count_e)


def _backward(interpret: bool, kept: Kept, dy_RI: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """The output's gradient is rounded to x's dtype, as for packed weights."""
    x_RD, w_eDI, count_e = kept
    dy_RI = dy_RI.astype(x_RD.dtype)
    dx_RD = multiply(dy_RI, w_eDI, count_e, True, interpret)
    dw = (grouped_outer(dy_RI, x_RD, count_e, interpret).swapaxes(1, 2) if is_narrow(w_eDI) else
          grouped_outer(x_RD, dy_RI, count_e, interpret))
    return dx_RD.astype(x_RD.dtype), dw.astype(w_eDI.dtype), None


trained_matmul.defvjp(_forward, _backward)


def is_narrow(w_eDI: jax.Array) -> bool:
    return w_eDI.shape[2] < LANES < w_eDI.shape[1]


def multiply(x: jax.Array, w_eDI: jax.Array, count_e: jax.Array, is_transposed: bool, interpret: bool) -> jax.Array:
    """x [R, D] times w, or x [R, I] times w with D and I swapped."""
    if is_narrow(w_eDI):
        w_eDI, is_transposed = w_eDI.swapaxes(1, 2), not is_transposed
    tiles = TILE_ROWS, TILE_D // 2 if is_transposed else TILE_D, TILE_I
    return product(x, w_eDI, count_e, is_transposed, interpret, tiles)
