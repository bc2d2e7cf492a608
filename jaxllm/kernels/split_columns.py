"""Even and odd columns of an array apart, and together again, on a TPU: a product with ones and zeros.

To move every second of 128 lanes is dear for the vector unit and XLA does it in two passes through memory with a copy
of the array between them. The matrix unit does it on the way, and exactly: each sum has one term that is not 0.
"""
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

BLOCK = 256                    # columns that are reordered among themselves: two parts of 128 lanes
TILE = (256, 2048)


def split_columns(x_RD: jax.Array, num_rows: jax.Array, interpret: bool) -> jax.Array:
    """[2, R, D / 2]: column d is in part d mod 2. Rows from `num_rows` on, which is at least 1, may hold anything.

    D is even; of a D that 256 does not divide, XLA does it.
    """
    R, D = x_RD.shape
    if D % BLOCK:
        return x_RD.reshape(R, D // 2, 2).transpose(2, 0, 1)
    rows, columns = min(R, TILE[0]), _columns(D)

    def kernel(x_ref: Any, out_ref: Any) -> None:
        for block in range(columns // BLOCK):
            both = _reorder(x_ref[:, block * BLOCK:(block + 1) * BLOCK], 1)
            for part in range(2):
                out_ref[part, :, block * 128:(block + 1) * 128] = both[:, part * 128:(part + 1) * 128]

    return pl.pallas_call(
        kernel, grid=(jax.lax.div(num_rows + rows - 1, rows), D // columns),
        in_specs=[pl.BlockSpec((rows, columns), lambda r, d: (r, d))],
        out_specs=pl.BlockSpec((2, rows, columns // 2), lambda r, d: (0, r, d)),
        out_shape=jax.ShapeDtypeStruct((2, R, D // 2), x_RD.dtype, manual_axis_type=jax.typeof(x_RD).mat),
        cost_estimate=pl.CostEstimate(flops=2 * R * D * BLOCK, transcendentals=0, bytes_accessed=2 * x_RD.nbytes),
        interpret=interpret, name="split_columns")(x_RD)


def join_columns(even: jax.Array, odd: jax.Array) -> jax.Array:
    """Inside a kernel: [rows, columns / 2] and the same become [rows, columns], one column of each in turn."""
    half = 128 if even.shape[1] % 128 == 0 else even.shape[1]
    blocks = [jnp.concatenate([part[:, first:first + half] for part in (even, odd)], 1)
              for first in range(0, even.shape[1], half)]
    return jnp.concatenate([_reorder(block, 0) for block in blocks], 1)


def _columns(D: int) -> int:
    """The widest tile that divides D."""
    return max(size for size in range(BLOCK, TILE[1] + 1, BLOCK) if D % size == 0)


def _reorder(x: jax.Array, split_dim: int) -> jax.Array:
    """x [rows, columns] with its columns in two halves (1) or back in turn (0)."""
    size, half = x.shape[1], x.shape[1] // 2
    split, whole = (jax.lax.broadcasted_iota(jnp.int32, (size, size), dim) for dim in (split_dim, 1 - split_dim))
    is_same = whole == jnp.where(split < half, 2 * split, 2 * (split - half) + 1)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, is_same.astype(jnp.float32).astype(x.dtype), precision=precision,
                   preferred_element_type=jnp.float32).astype(x.dtype)
