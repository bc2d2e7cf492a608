"""Writing a few new tokens into a layer's cache in place, as one Pallas TPU kernel.

The plain-JAX oracle is `jaxllm.cache.write`. A TPU moves whole tiles between HBM and VMEM, so a token's slot is read
together with those around it, changed and written back: of K, whose slots lie along lanes, in tiles of 128 slots; of
V, whose slots lie along sublanes, in tiles of 16. The outputs are the inputs' memory, and what no tile covers is not
touched. T tokens next to each other touch the tile of the first and that of the last, which may be the same one.

The cache is pinned to HBM, as decode_attention's is, and the kernel copies the tiles itself: those of all rows and kv
heads of a grid step are on their way at the same time, since a copy of one is as short as its latency.

An S that is not made of tiles of 128 is one tile, however large: jaxllm.cache rounds up from 128 on. Kernels take
row-major arrays. On a TPU jax lays a cache out so if S is a multiple of 128; of others, if S is a multiple of 8 and
fills three quarters of its tiles of 128 (seen in programs compiled by libtpu 0.0.42). Elsewhere XLA copies the whole
cache before and after: round S up, or ask jit for `Layout((0, 1, 2, 3))`.

Letters as in jaxllm/axes.py, on one device, inside shard_map; besides, s = slots of a tile.
"""
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxllm.kernels.decode_attention import divisor

K_TILE = 128                # slots: the lanes of a vector register
V_TILE = 16                 # slots: the sublanes of a packed bfloat16 register
MAX_TOKENS = 8              # at most V_TILE, so that two tiles hold them
STEP_BYTES = 2**22          # of the tiles of a grid step at most, within the 16 MiB of VMEM that a kernel gets


def write_cache(k_bkHS: jax.Array, v_bkSV: jax.Array, k_bTkH: jax.Array, v_bTkV: jax.Array, start_b: jax.Array,
                end_b: jax.Array, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """The cache after tokens at positions start_b + (0..T-1), of which those at or past end_b (int32) are padding.

    Position p lies in slot p mod S; of more tokens than slots only the newest are written, and none at positions below
    0. The cache's memory is used again if the caller donates it, else XLA copies it first. T is at most 8. `interpret`
    runs the kernel without a TPU. ValueError where T is larger or the shapes do not belong together.
    """
    (b, k, H, S), V, T = k_bkHS.shape, v_bkSV.shape[-1], k_bTkH.shape[1]
    if v_bkSV.shape != (b, k, S, V) or k_bTkH.shape != (b, T, k, H) or v_bTkV.shape != (b, T, k, V):
        raise ValueError(f"cache k {k_bkHS.shape} and v {v_bkSV.shape} with tokens k {k_bTkH.shape} and v "
                         f"{v_bTkV.shape} must be [b, k, H, S], [b, k, S, V], [b, T, k, H] and [b, T, k, V]")
    if T > MAX_TOKENS:
        raise ValueError(f"{T} new tokens a row: this kernel writes at most {MAX_TOKENS}; use jaxllm.cache.write")
    k_tile, v_tile = (S if S % K_TILE else size for size in (K_TILE, V_TILE))
    k_visits, v_visits = (1 if T == 1 or size == S else 2 for size in (k_tile, v_tile))
    head_bytes = (k_visits * k_tile * H + v_visits * v_tile * V) * k_bkHS.dtype.itemsize
    pairs = max(STEP_BYTES // head_bytes, 1)
    heads = divisor(k, pairs)
    rows = divisor(b, pairs // heads) if heads == k else 1

    def new_index(i: jax.Array, head: jax.Array, *_: jax.Array) -> tuple:
        return i, head, 0, 0

    if not interpret:       # XLA may copy a cache that fits into VMEM there first, and all of it back
        k_bkHS, v_bkSV = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (k_bkHS, v_bkSV))
    in_hbm = [pl.BlockSpec(memory_space=pltpu.HBM)] * 2
    written = pl.pallas_call(
        change_tiles,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).mat)
                   for x in (k_bkHS, v_bkSV)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(b // rows, k // heads),
            in_specs=[pl.BlockSpec((rows, heads, T, size), new_index) for size in (H, V)] + in_hbm, out_specs=in_hbm,
            scratch_shapes=[pltpu.VMEM((rows, k_visits, heads, H, k_tile), k_bkHS.dtype),
                            pltpu.VMEM((rows, v_visits, heads, v_tile, V), v_bkSV.dtype),
                            pltpu.SemaphoreType.DMA((rows, k_visits)), pltpu.SemaphoreType.DMA((rows, v_visits))]),
        input_output_aliases={4: 0, 5: 1},      # counted with the two prefetched scalars
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0,
            bytes_accessed=b * k * (2 * head_bytes + T * (H + V) * k_bkHS.dtype.itemsize)),
        interpret=interpret, name="write_cache",
    )(start_b, end_b, k_bTkH.swapaxes(1, 2), v_bTkV.swapaxes(1, 2), k_bkHS, v_bkSV)
    # A program whose only results were the kernel's would not compile: XLA finds them unlike its pinned arguments.
    return tuple(written) if interpret else jax.lax.optimization_barrier(tuple(written))


def change_tiles(start_ref, end_ref, new_k_ref, new_v_ref, _k, _v, k_ref, v_ref, k_tiles_ref, v_tiles_ref, k_sems,
                 v_sems) -> None:
    """One grid step: every tile of its rows and kv heads that holds a new token is read, changed and written."""
    rows, heads, T = new_k_ref.shape[:3]
    num_slots = v_ref.shape[2]
    first_row, first_head = pl.program_id(0) * rows, pl.program_id(1) * heads
    arrays = (k_ref, k_tiles_ref, k_sems, new_k_ref, 2), (v_ref, v_tiles_ref, v_sems, new_v_ref, 1)

    def each_tile(do: Callable) -> None:
        """do(row, begin, held, tile, sem, new, axis): a row of the step, the slot at which its tile begins, that tile
        in HBM and in VMEM, the row's new tokens, and the tile's axis of slots."""
        def visit(row: jax.Array, _: None) -> None:
            start, end = jnp.maximum(start_ref[first_row + row], 0), end_ref[first_row + row]
            for cache_ref, tiles_ref, sems, new_ref, axis in arrays:
                size = tiles_ref.shape[2 + axis]
                first, last = find_tiles(start, end, T, num_slots, size)
                needed = (first, end > start), (last, (end > start) & (last != first))
                for n, (begin, is_needed) in enumerate(needed[:tiles_ref.shape[1]]):
                    slots = pl.ds(pl.multiple_of(begin, size), size) if size < num_slots else slice(None)
                    at = (slots,) if axis == 1 else (slice(None), slots)
                    held = cache_ref.at[first_row + row, pl.ds(first_head, heads), *at]
                    pl.when(is_needed)(partial(do, row, begin, held, tiles_ref.at[row, n], sems.at[row, n],
                                               new_ref.at[row], axis))
        jax.lax.fori_loop(0, rows, visit, None)

    def read(row, begin, held, tile, sem, new, axis) -> None:
        pltpu.make_async_copy(held, tile, sem).start()

    def change(row, begin, held, tile, sem, new, axis) -> None:
        pltpu.make_async_copy(held, tile, sem).wait()
        start, end = start_ref[first_row + row], end_ref[first_row + row]
        shape = [size if dim == axis else 1 for dim, size in enumerate(tile.shape)]
        slot_111 = begin + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        changed, tokens = tile[...], new[...] if axis == 1 else new[...].swapaxes(1, 2)
        for t in range(T):
            position = start + t
            is_kept = (position < end) & (position >= jnp.maximum(end - num_slots, 0))
            slot = jnp.where(is_kept, jax.lax.rem(position, num_slots), -1)
            changed = jnp.where(slot_111 == slot, jax.lax.slice_in_dim(tokens, t, t + 1, axis=axis), changed)
        tile[...] = changed
        pltpu.make_async_copy(tile, held, sem).start()

    def finish(row, begin, held, tile, sem, new, axis) -> None:
        pltpu.make_async_copy(tile, held, sem).wait()

    for do in (read, change, finish):
        each_tile(do)


def find_tiles(start: jax.Array, end: jax.Array, T: int, num_slots: int, size: int) -> tuple[jax.Array, jax.Array]:
    """The slots at which the first token's tile of `size` slots and the last one's begin."""
    first = jax.lax.rem(start, num_slots)
    last = first + jnp.clip(end - start, 1, min(T, num_slots)) - 1
    last = jnp.where(last < num_slots, last, last - num_slots)
    return first - jax.lax.rem(first, size), last - jax.lax.rem(last, size)
