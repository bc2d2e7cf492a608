"""The gradient of a grouped product's weights on a TPU: of each expert, its rows of x times its rows of dy.

XLA's own (of `jax.lax.ragged_dot`) multiplies all rows once for each expert under a mask: 32 times the work for 32
experts (docs/log.md). Rows are sorted by expert, and a visit is an expert's rows within one tile (visits.py); those of
one expert come one after the other, and add to the tile of the output that stays in VMEM meanwhile. The oracle is one
product an expert.
"""
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxllm.kernels.grouped_matmul import CHUNK_ROWS, VMEM_BYTES, choose_tile
from jaxllm.kernels.visits import lay_out

TILE_ROWS, TILE_D, TILE_I = 512, 2048, 1024      # the most of each dim in VMEM


def grouped_outer(x_RD: jax.Array, dy_RI: jax.Array, count_e: jax.Array, interpret: bool = False,
                  tiles: tuple[int, int, int] = (TILE_ROWS, TILE_D, TILE_I)) -> jax.Array:
    """float32 [e, D, I]: the sum over each expert's rows of x times dy, of one dtype; 0 for an expert without rows.

    Rows are sorted by expert; count_e int32 [e] has a sum of at most R. Those past the last expert's are not read into
    it. interpret: run on any platform, slowly. tiles: the most rows (a multiple of 16), D and I in VMEM.
    """
    (R, D), I, e = x_RD.shape, dy_RI.shape[1], count_e.shape[0]
    rows = min(tiles[0], -(-R // 16) * 16)
    chunk = min(rows, CHUNK_ROWS)
    padded = max(rows, R)                   # a tile is no larger than its array
    x_RD, dy_RI = (jnp.pad(x, ((0, padded - R), (0, 0))) for x in (x_RD, dy_RI))
    visits = lay_out(count_e, padded, rows)
    tile_D, tile_I = choose_tile(D, tiles[1], 128), choose_tile(I, tiles[2], 128)

    def rows_of(dim: int) -> Any:
        def place(d: Any, i: Any, v: Any, used: Any, tile: Any, *_: Any) -> Any:
            return jnp.minimum(tile[v], used[0] - 1), (d, i)[dim]
        return place

    def of_out(d: Any, i: Any, v: Any, used: Any, tile: Any, expert: Any, *_: Any) -> Any:
        return expert[v], d, i

    out = jax.ShapeDtypeStruct((e, D, I), jnp.float32, manual_axis_type=jax.typeof(x_RD).mat)
    sums_eDI = pl.pallas_call(
        functools.partial(_kernel, chunk), out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5, grid=(-(-D // tile_D), -(-I // tile_I), visits.num),
            in_specs=[pl.BlockSpec((rows, tile_D), rows_of(0)), pl.BlockSpec((rows, tile_I), rows_of(1))],
            out_specs=pl.BlockSpec((None, tile_D, tile_I), of_out)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"),
                                             vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(flops=2 * R * D * I, transcendentals=0, bytes_accessed=(
            -(-I // tile_I) * x_RD.nbytes + -(-D // tile_D) * dy_RI.nbytes + 4 * e * D * I)),
        interpret=interpret, name="grouped_outer",
    )(visits.tiles_used[None], visits.tile_v, visits.expert_v, visits.begin_v, visits.end_v, x_RD, dy_RI)
    return jnp.where((count_e > 0)[:, None, None], sums_eDI, 0.0)      # no visit has written the others


def _kernel(chunk: int, used: Any, tile: Any, expert: Any, begin: Any, end: Any, x_ref: Any, dy_ref: Any,
            out_ref: Any) -> None:
    v = pl.program_id(2)
    begin_v, end_v = begin[v], end[v]

    @pl.when((v == 0) | (expert[v] != expert[jnp.maximum(v - 1, 0)]))
    def _() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    def add(number: jax.Array, _: None) -> None:
        first = pl.multiple_of(number * chunk, chunk)
        row = first + jax.lax.broadcasted_iota(jnp.int32, (chunk, 1), 0)
        is_own = (row >= begin_v) & (row < end_v)
        x, dy = (jnp.where(is_own, ref[pl.ds(first, chunk), :], jnp.zeros((), ref.dtype)) for ref in (x_ref, dy_ref))
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        out_ref[...] += jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())), precision=precision,
                                            preferred_element_type=jnp.float32)

    jax.lax.fori_loop(jax.lax.div(begin_v, chunk), jax.lax.div(end_v + chunk - 1, chunk), add, None)
