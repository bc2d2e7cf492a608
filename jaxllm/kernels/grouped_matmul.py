"""The products of experts with their rows on a TPU, straight from packed weights: no decoded expert is ever in HBM.

Rows are sorted by expert and lie in tiles; a visit is an expert's rows within one tile (visits.py). The grid is tiles
of the output's columns x visits x tiles of the sum. A step decodes one tile of one expert's weights into VMEM, where it
is multiplied with that expert's rows only, in chunks, and added to a float32 tile of the output. An expert without rows
has no visit, so it is not read. Up to TILE_ROWS rows are one tile, so in decode each weight of the others is read once.

Four-bit codes give even and odd rows of the weight apart (decode_tile.py), so the same is done to the columns of x
(split_columns.py). The oracle is jaxllm/quant.py's `decode` and one product an expert.

Letters: R rows, e experts, D and I the weight's in- and out-dim, P the parts a weight's rows are decoded into.
"""
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxllm.kernels.decode_tile import factors, multiply, num_parts, spread_columns, stored_factors, values
from jaxllm.kernels.split_columns import join_columns, split_columns
from jaxllm.kernels.visits import lay_out
from jaxllm.quant import Packed

TILE_ROWS, TILE_D, TILE_I = 1024, 2048, 1024      # the most of each dim in VMEM; of D, half that in the gradient
CHUNK_ROWS = 128        # of an expert that are multiplied at once
PIECE_D = 1024          # decoded at once: 2338 bundles of v6e instructions for a tile of mxfp4 and 64 rows; 3368 if the
                        # tile is decoded whole before it is multiplied
VMEM_BYTES = 56 * 2**20       # v5e and v6e have 128 MiB, TPU7x has 64 MiB


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(x_RD: jax.Array, w: jax.Array | Packed, count_e: jax.Array, interpret: bool = False,
                   tiles: tuple[int, int, int] = (TILE_ROWS, TILE_D, TILE_I)) -> jax.Array:
    """Each expert's rows times its weight: float32 [R, I], 0 in rows past the last expert's.

    x_RD [R, D], bfloat16 or float32: rows sorted by expert. w [e, D, I]: bfloat16, or packed with 4-bit codes paired
    along D. count_e int32 [e]: the rows of each expert, with a sum of at most R. A weight is decoded into x's dtype;
    float32 is multiplied as such. The only gradient is that of x: w is frozen, even if it is a plain array.
    interpret: run on any platform, slowly. tiles: the most rows (a multiple of 16), D and I in VMEM.
    An I that 128 does not divide is dear: XLA then keeps w in another layout and copies it to this one.
    Errors: ValueError for shapes and dtypes other than these.
    """
    check(x_RD, w, count_e)
    return product(x_RD, w, count_e, False, interpret, tiles)


def _forward(x_RD: jax.Array, w: Any, count_e: jax.Array, interpret: bool, tiles: tuple[int, int, int]) -> Any:
    return grouped_matmul(x_RD, w, count_e, interpret, tiles), (w, count_e, jnp.zeros_like(x_RD, shape=(0,)))


def _backward(interpret: bool, tiles: tuple[int, int, int], inputs: Any, dy_RI: jax.Array) -> Any:
    """As XLA has it for operands of x's dtype: the output's gradient is rounded to that dtype, then multiplied."""
    w, count_e, like_x = inputs
    halved = (tiles[0], tiles[1] // 2, tiles[2])
    dx_RD = product(dy_RI.astype(like_x.dtype), w, count_e, True, interpret, halved)
    return dx_RD, jax.tree.map(lambda _: None, w), None


grouped_matmul.defvjp(_forward, _backward)


def check(x_RD: jax.Array, w: jax.Array | Packed, count_e: jax.Array) -> None:
    """ValueError unless these are what `grouped_matmul` takes."""
    if x_RD.dtype not in (jnp.bfloat16, jnp.float32) or count_e.dtype != jnp.int32:
        raise ValueError(f"x must be bfloat16 or float32 and count int32, not {x_RD.dtype} and {count_e.dtype}")
    if len(w.shape) != 3 or x_RD.shape[1:] != w.shape[1:2] or count_e.shape != w.shape[:1]:
        raise ValueError(f"x {x_RD.shape}, w {w.shape} and count {count_e.shape} are not [R, D], [e, D, I] and [e]")
    if isinstance(w, Packed):
        if w.dim != 1 or w.scale.shape[0] != w.shape[0] or (w.kind != "fp8" and w.scale.shape[2] != w.shape[2]):
            raise ValueError(f"a packed w must be paired and grouped along dim 1 of {w.shape}, not dim {w.dim} with "
                             f"scales {w.scale.shape}")
        if not is_of_words(w):
            raise ValueError(f"D and groups must be whole words of codes: w {w.shape}, scales {w.scale.shape}")
    elif w.dtype != jnp.bfloat16:
        raise ValueError(f"w must be bfloat16 or packed, not {w.dtype}")


def is_of_words(w: Packed) -> bool:
    """Whether D and the groups of a packed w [e, D, I] are whole 32-bit words of codes, as a tile is decoded."""
    return w.shape[1] % 8 == 0 and (w.kind == "fp8" or w.shape[1] // w.scale.shape[1] % 4 == 0)


def choose_tile(size: int, most: int, unit: int) -> int:
    """How much of a dim is a tile: all of it, or a multiple of `unit`, one that divides it if there is."""
    if size <= max(most, unit):
        return size
    divisors = [tile for tile in range(unit, most + 1, unit) if size % tile == 0]
    return max(divisors, default=max(most // unit, 1) * unit)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is made for. Sizes of tiles: of rows, of D, of I."""
    D: int
    I: int
    rows: int
    tile_D: int
    tile_I: int
    chunk: int
    kind: str | None        # of a packed weight
    group: int              # rows of the weight to a scale
    columns: int            # columns to a scale
    dtype: jnp.dtype        # of the operands
    is_transposed: bool

    @property
    def parts(self) -> int:
        return num_parts(self.kind)

    @property
    def unit(self) -> int:
        """What a tile of D or a piece of one must be a multiple of: 128 lanes of x, 8 rows of scales."""
        return math.lcm(128 * self.parts, 8 * self.group)

    @property
    def piece(self) -> int:
        """How much of a tile of D is decoded at once."""
        sizes = range(self.unit, min(PIECE_D, self.tile_D) + 1, self.unit)
        return max((size for size in sizes if self.tile_D % size == 0), default=self.tile_D)

    @property
    def decodes(self) -> bool:
        """Whether a tile of the weight must be made before it can be multiplied."""
        return self.kind is not None or self.dtype != jnp.bfloat16 or self.D % self.tile_D + self.I % self.tile_I > 0


def plan(x: jax.Array, w: jax.Array | Packed, is_transposed: bool, tiles: tuple[int, int, int]) -> Plan:
    R, (_, D, I) = x.shape[0], w.shape
    kind, group, columns = None, 1, 1
    if isinstance(w, Packed):
        kind, group, columns = w.kind, D // w.scale.shape[1], I // w.scale.shape[2]
    rows = min(tiles[0], -(-R // 16) * 16 if R <= CHUNK_ROWS else -(-R // CHUNK_ROWS) * CHUNK_ROWS)
    whole = Plan(D, I, rows, D, I, min(rows, CHUNK_ROWS), kind, group, columns, x.dtype, is_transposed)
    return dataclasses.replace(whole, tile_D=choose_tile(D, tiles[1], whole.unit),
                               tile_I=choose_tile(I, tiles[2], 128))


def product(x: jax.Array, w: jax.Array | Packed, count_e: jax.Array, is_transposed: bool, interpret: bool,
            tiles: tuple[int, int, int]) -> jax.Array:
    """x [R, D] times w, float32; or x [R, I] times w with D and I swapped, in x's dtype."""
    R, e, p = x.shape[0], w.shape[0], plan(x, w, is_transposed, tiles)
    padded = max(p.rows, R)                   # a tile is no larger than its array
    x = jnp.pad(x, ((0, padded - R), (0, 0)))
    visits = lay_out(count_e, padded, p.rows)
    if not is_transposed:
        x = split_columns(x, visits.tiles_used * p.rows, interpret) if p.parts == 2 else x[None]
    num_D, num_I = -(-p.D // p.tile_D), -(-p.I // p.tile_I)
    num_out, num_sum = (num_D, num_I) if is_transposed else (num_I, num_D)

    # Tiles by step of the grid (n, v, k). An idle visit stays at those where the visit before it ended.
    def sum_tile(k: Any, v: Any, begin: Any, end: Any) -> Any:
        return jnp.where(end[v] > begin[v], k, num_sum - 1)

    def of_x(n: Any, v: Any, k: Any, used: Any, tile: Any, expert: Any, begin: Any, end: Any) -> Any:
        place = jnp.minimum(tile[v], used[0] - 1), sum_tile(k, v, begin, end)
        return place if is_transposed else (0, *place)

    def of_weight(n: Any, v: Any, k: Any, used: Any, tile: Any, expert: Any, begin: Any, end: Any) -> Any:
        k = sum_tile(k, v, begin, end)
        return (expert[v], n, k) if is_transposed else (expert[v], k, n)

    def of_blocks(*step: Any) -> Any:
        return *of_weight(*step)[:2], 0       # the scales of all columns

    def of_out(n: Any, v: Any, k: Any, used: Any, tile: Any, expert: Any, begin: Any, end: Any) -> Any:
        return tile[v], n

    part_D = p.tile_D // p.parts
    specs = [pl.BlockSpec((p.rows, p.tile_I) if is_transposed else (p.parts, p.rows, part_D), of_x),
             pl.BlockSpec((None, part_D, p.tile_I), of_weight)]
    scratch = [pltpu.VMEM((p.parts, p.rows, part_D), jnp.float32)] if is_transposed else []
    weights: tuple[jax.Array, ...] = (w.codes, w.scale) if isinstance(w, Packed) else (w,)
    if p.kind is not None:
        blocks, is_fp8 = p.tile_D // p.group, p.kind == "fp8"
        specs.append(pl.BlockSpec((None, blocks, p.I // p.columns), of_blocks) if is_fp8 else
                     pl.BlockSpec((None, blocks, p.tile_I), of_weight))
        is_words = not is_fp8 and p.dtype == jnp.bfloat16
        scratch.append(pltpu.VMEM((blocks, p.tile_I), jnp.int32 if is_words else jnp.float32))
    if p.decodes:
        scratch.append(pltpu.VMEM((p.parts, part_D, p.tile_I), p.dtype))
    out = jax.ShapeDtypeStruct((padded, p.D if is_transposed else p.I), p.dtype if is_transposed else jnp.float32,
                               manual_axis_type=jax.typeof(x).mat)
    weight_bytes = sum(array.nbytes for array in weights) // e * min(e, R)
    return pl.pallas_call(
        functools.partial(_kernel, p), out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5, grid=(num_out, visits.num, num_sum), in_specs=specs, scratch_shapes=scratch,
            out_specs=pl.BlockSpec((p.rows, p.tile_D if is_transposed else p.tile_I), of_out)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                                             vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(flops=2 * R * p.D * p.I, transcendentals=0, bytes_accessed=(
            x.nbytes + out.size * out.dtype.itemsize + weight_bytes)),
        interpret=interpret, name="grouped_matmul_transposed" if is_transposed else "grouped_matmul",
    )(visits.tiles_used[None], visits.tile_v, visits.expert_v, visits.begin_v, visits.end_v, x, *weights)[:R]


def _kernel(p: Plan, used: Any, tile: Any, expert: Any, begin: Any, end: Any, x_ref: Any, *refs: Any) -> None:
    """One step: a tile of an expert's weight, multiplied with its rows within a tile of rows.

    The first chunk of rows, in decode the only one, is multiplied with each piece of the weight as that is decoded, so
    that the vector and the matrix unit work at the same time; the others with all pieces together.
    """
    num_weights = 1 + (p.kind is not None)
    weight_refs, out_ref, scratch = refs[:num_weights], refs[num_weights], refs[num_weights + 1:]
    sum_ref = scratch[0] if p.is_transposed else out_ref
    n, v, k = (pl.program_id(axis) for axis in range(3))      # interpreting knows them only outside branches
    last_v, last_k = pl.num_programs(1) - 1, pl.num_programs(2) - 1
    tile_D, tile_I = (n, k) if p.is_transposed else (k, n)
    begin_v, end_v = begin[v], end[v]

    @pl.when((k == 0) & ((v == 0) | (tile[v] != tile[jnp.maximum(v - 1, 0)])))
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def add(chunk: jax.Array, first_d: Any, parts: list[jax.Array]) -> None:
        """Products of a chunk of rows with rows of the weight, from `first_d` of each of its parts on."""
        first, size = pl.multiple_of(chunk * p.chunk, p.chunk), parts[0].shape[0]
        row = first + jax.lax.broadcasted_iota(jnp.int32, (p.chunk, 1), 0)
        is_own, rows = (row >= begin_v) & (row < end_v), pl.ds(first, p.chunk)
        d = pl.ds(pl.multiple_of(first_d, size), size)
        if p.is_transposed:
            x = _within(x_ref[rows, :], 1, p.I - k * p.tile_I, p.I % p.tile_I > 0)
            for part, w in enumerate(parts):
                sum_ref[part, rows, d] += jnp.where(is_own, _dot(x, w, 1), 0.0)
        else:
            limit = p.D // p.parts - k * (p.tile_D // p.parts) - first_d
            sums = [_dot(_within(x_ref[part, rows, d], 1, limit, p.D % p.tile_D > 0), w, 0)
                    for part, w in enumerate(parts)]
            sum_ref[rows, :] += jnp.where(is_own, sum(sums[1:], sums[0]), 0.0)

    @pl.when(end_v > begin_v)
    def _() -> None:
        first_chunk, end_chunk = (jax.lax.div(row, p.chunk) for row in (begin_v, end_v + p.chunk - 1))
        if p.decodes:
            _decode(p, tile_D, tile_I, weight_refs, scratch[-2:], functools.partial(add, first_chunk))
            first_chunk += 1

        def multiply_chunk(chunk: jax.Array, _: None) -> None:
            add(chunk, 0, [scratch[-1][part] for part in range(p.parts)] if p.decodes else [weight_refs[0][...]])

        jax.lax.fori_loop(first_chunk, end_chunk, multiply_chunk, None)

    if p.is_transposed:
        @pl.when((k == last_k) & ((v == last_v) | (tile[v] != tile[jnp.minimum(v + 1, last_v)])))
        def _() -> None:
            parts = [sum_ref[part].astype(p.dtype) for part in range(p.parts)]
            out_ref[...] = join_columns(*parts) if p.parts == 2 else parts[0]


def _dot(x: jax.Array, w: jax.Array, w_dim: int) -> jax.Array:
    """Product over the last dim of x and this one of w."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, w, (((1,), (w_dim,)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)


def _decode(p: Plan, tile_D: jax.Array, tile_I: jax.Array, weight_refs: Any, scratch: Any,
            use: Callable[[jax.Array, list[jax.Array]], None]) -> None:
    """A tile of the weight as numbers of the operands' dtype, 0 past its dims' ends, where anything may have been read.

    use(first row within a part, the parts) is called with each piece of it.
    """
    codes_ref, factor_ref, decoded_ref = weight_refs[0], scratch[0], scratch[-1]
    groups, size = p.piece // p.group, p.piece // p.parts      # of a piece, and of each of its parts
    if p.kind is not None:
        scale = weight_refs[1][...]
        if p.kind == "fp8":
            scale = spread_columns(scale, tile_I * p.tile_I, p.tile_I, p.columns)
        factor_ref[...] = stored_factors(factors(scale, p.kind), p.kind, p.dtype)

    def decode_piece(piece: jax.Array, _: None) -> None:
        first = pl.multiple_of(piece * size, size)
        codes = codes_ref[pl.ds(first, size), :]
        if p.kind is None:
            parts = [codes.astype(p.dtype)]
        else:
            factor = factor_ref[pl.ds(pl.multiple_of(piece * groups, groups), groups), :]
            parts = [multiply(array, factor, p.dtype) for array in values(codes, p.kind)]
        limit = p.D // p.parts - tile_D * (p.tile_D // p.parts) - first
        parts = [_within(_within(array, 0, limit, p.D % p.tile_D > 0), 1, p.I - tile_I * p.tile_I, p.I % p.tile_I > 0)
                 for array in parts]
        for part, array in enumerate(parts):
            decoded_ref[part, pl.ds(first, size), :] = array
        use(first, parts)

    jax.lax.fori_loop(0, p.tile_D // p.parts // size, decode_piece, None)


def _within(x: jax.Array, dim: int, limit: jax.Array, may_exceed: bool) -> jax.Array:
    """x, 0 from `limit` on along dim."""
    if not may_exceed:
        return x
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, dim) < limit, x, jnp.zeros_like(x))
