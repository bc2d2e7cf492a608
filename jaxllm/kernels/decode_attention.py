"""Decode attention as one Pallas TPU kernel: a few new tokens of each row against a layer's cache, each byte read once.

The plain-JAX oracle is `jaxllm.attention.attend` with `k_pos = slot_positions(end, S)`. As there, the softmax is in
float32 with the running maximum of FlashAttention (arXiv 2205.14135). The grid goes over rows, kv heads and blocks of
slots; all T * G queries of a kv head meet a block together, since the block's bytes, not the arithmetic, are what a
decode step waits for (the argument of multi-query attention, arXiv 1911.02150, and of Flash-Decoding).

Rows differ in length. Their lengths are prefetched scalars, so that the index map of a block knows which blocks a row
has: for those past its end it names the first block of the next kv head or row, whose copy then runs early instead of
one that nobody needs, and the kernel does nothing. A ring is so short that one block holds all of it, and several
rows and kv heads go through in one step, because a step costs about as much as a copy of some hundred KiB. Which S keep
XLA from copying the cache first is said in cache_write.py.

Letters as in jaxllm/axes.py, on one device, inside shard_map; besides, P = pairs of a row and a kv head that share a
step, Q = T * G, s = slots of a block.
"""
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK_BYTES = 2**21         # of K and V a step at most: VMEM holds it twice, next to the scores, within 16 MiB
SCORE_BYTES = 2**20         # of a step's float32 scores at most, of which the compiler keeps a few copies
FEW_SLOTS = 512             # a block of a full cache holds at most these or a 16th of it: few are read for nothing
LANES = 128                 # of a vector register, so that blocks of more than one begin at multiples of it
NO_PEAK = -1e30             # a finite floor for the maximum: where nothing is seen the output is zero, not NaN
NOWHERE = 2**30             # where an empty slot is said to stand: after every query


def decode_attention(q_bTnH: jax.Array, k_bkHS: jax.Array, v_bkSV: jax.Array, start_b: jax.Array, end_b: jax.Array,
                     window: int | None, sink_n: jax.Array | None, *, interpret: bool = False) -> jax.Array:
    """Attention output [b, T, n, V] in q's dtype of T new tokens at positions start_b + (0..T-1).

    The cache holds them already: the positions below end_b (int32), p in slot p mod S; S is at least end_b if `window`
    is None. A query at position p sees the keys at positions p - window + 1 .. p, or 0 .. p if `window` is None; of a
    row with nothing in it the output is zero. Blocks of slots that a row does not have are not read. `interpret` runs
    the kernel without a TPU. ValueError where the shapes of q, k and v do not belong together.
    """
    return run(q_bTnH, k_bkHS, v_bkSV, start_b, end_b, window, sink_n, False, interpret)[0]


def decode_attention_part(q_bTnH: jax.Array, k_bkHS: jax.Array, v_bkSV: jax.Array, start_b: jax.Array,
                          end_b: jax.Array, window: int | None, *, interpret: bool = False
                          ) -> tuple[jax.Array, jax.Array]:
    """`decode_attention` in float32 to one part of a cache, and the logarithm of each query's sum, float32 [b, T, n].

    Positions count from the part's first slot on, so that start_b may be negative or past the end.
    """
    out_bTnV, *logsum = run(q_bTnH, k_bkHS, v_bkSV, start_b, end_b, window, None, True, interpret)
    return out_bTnV, logsum[0][..., 0]


def run(q_bTnH: jax.Array, k_bkHS: jax.Array, v_bkSV: jax.Array, start_b: jax.Array, end_b: jax.Array,
        window: int | None, sink_n: jax.Array | None, is_part: bool, interpret: bool) -> list[jax.Array]:
    """The output [b, T, n, V]; of a part in float32, and after it the logarithm of the sum [b, T, n, 1]."""
    (b, T, n, H), (k, S, V) = q_bTnH.shape, v_bkSV.shape[1:]
    if k_bkHS.shape != (b, k, H, S) or v_bkSV.shape[0] != b or n % k:
        raise ValueError(f"q {q_bTnH.shape}, k {k_bkHS.shape} and v {v_bkSV.shape} must be [b, T, n, H], [b, k, H, S] "
                         f"and [b, k, S, V] with n a multiple of k")
    G, itemsize = n // k, v_bkSV.dtype.itemsize
    Q = T * G
    rows, heads, block = choose_step(b, k, S, (H + V) * itemsize, 4 * Q, window is None)
    num_blocks = pl.cdiv(S, block)

    def k_index(row: jax.Array, head: jax.Array, i: jax.Array, _: jax.Array, end_b: jax.Array) -> tuple:
        row, head, i = (row, head, 0) if num_blocks == 1 else find_block(row, head, i, end_b, k, S, block)
        return row, head, 0, i

    def v_index(*at: jax.Array) -> tuple:
        row, head, _, i = k_index(*at)
        return row, head, i, 0

    def own_index(row: jax.Array, head: jax.Array, *_: jax.Array) -> tuple:
        return row, head, 0, 0

    def sink_index(row: jax.Array, head: jax.Array, *_: jax.Array) -> tuple:
        return head, 0, 0

    q_bkQH = q_bTnH.reshape(b, T, k, G, H).swapaxes(1, 2).reshape(b, k, Q, H)
    if not interpret:       # XLA may copy a cache that fits into VMEM there first, with all the slots not in use
        k_bkHS, v_bkSV = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (k_bkHS, v_bkSV))
    inputs = [q_bkQH, k_bkHS, v_bkSV]
    in_specs = [pl.BlockSpec((rows, heads, Q, H), own_index), pl.BlockSpec((rows, heads, H, block), k_index),
                pl.BlockSpec((rows, heads, block, V), v_index)]
    if sink_n is not None:
        sink_kQ1 = jnp.tile(sink_n.astype(jnp.float32).reshape(k, 1, G), (1, T, 1)).reshape(k, Q, 1)
        inputs.append(sink_kQ1)
        in_specs.append(pl.BlockSpec((heads, Q, 1), sink_index))
    P = rows * heads
    outputs = [(V, jnp.float32), (1, jnp.float32)] if is_part else [(V, q_bTnH.dtype)]
    found = pl.pallas_call(
        partial(visit_block, G=G, num_slots=S, window=window, has_sinks=sink_n is not None),
        out_shape=[jax.ShapeDtypeStruct((b, k, Q, size), dtype, manual_axis_type=jax.typeof(q_bTnH).mat)
                   for size, dtype in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(b // rows, k // heads, num_blocks), in_specs=in_specs,
            out_specs=[pl.BlockSpec((rows, heads, Q, size), own_index) for size, _ in outputs],
            scratch_shapes=[pltpu.VMEM((P, Q, size), jnp.float32) for size in (1, 1, V)]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * k * Q * S * (H + V), transcendentals=b * k * Q * S,
            bytes_accessed=b * k * (S + Q) * (H + V) * itemsize),
        interpret=interpret, name="decode_attention",
    )(start_b, end_b, *inputs)
    return [x.reshape(b, k, T, G, -1).swapaxes(1, 2).reshape(b, T, n, -1) for x in found]


def choose_step(b: int, k: int, S: int, slot_bytes: int, score_bytes: int, is_full: bool) -> tuple[int, int, int]:
    """Rows, kv heads and slots of one grid step, from the bytes of a slot and of its scores in one kv head.

    Either all slots, of several kv heads of a row or of all those of several rows, or of one kv head a power of two of
    slots, at least 128, of which the last block may be a partial one.
    """
    most = max(min(BLOCK_BYTES // slot_bytes, SCORE_BYTES // score_bytes), LANES)
    largest = min(most, max(FEW_SLOTS, S // 16)) if is_full else most
    if S > largest:
        return 1, 1, 2 ** (largest.bit_length() - 1)
    pairs = max(most // (pl.cdiv(S, LANES) * LANES), 1)
    heads = divisor(k, pairs)
    return divisor(b, pairs // heads) if heads == k else 1, heads, S


def find_block(row: jax.Array, head: jax.Array, i: jax.Array, end_b: jax.Array, k: int, num_slots: int,
               block: int) -> tuple:
    """Row, kv head and number of the block to have in VMEM at a step of one row and one kv head: its own, or, past the
    row's end, the first one that comes after; at the very end the last one stays."""
    last = jnp.maximum(pl.cdiv(jnp.minimum(end_b[row], num_slots), block), 1) - 1
    is_ahead = (i > last) & ((row < end_b.shape[0] - 1) | (head < k - 1))
    is_new_row = is_ahead & (head == k - 1)
    return (jnp.where(is_new_row, row + 1, row), jnp.where(is_new_row, 0, jnp.where(is_ahead, head + 1, head)),
            jnp.where(is_ahead, 0, jnp.minimum(i, last)))


def divisor(num: int, limit: int) -> int:
    """The largest divisor of `num` that is at most `limit`."""
    return max(d for d in range(1, min(num, limit) + 1) if num % d == 0)


def visit_block(start_ref, end_ref, q_ref, k_ref, v_ref, *refs, G: int, num_slots: int, window: int | None,
                has_sinks: bool) -> None:
    """One grid step: the softmax state after this block's slots, and the output after the last block.

    The state is the maximum and the sum [P, Q, 1] and the weighted values [P, Q, V]; without sinks it starts at
    nothing seen, with them at the sink alone.
    """
    sink_refs, (out_ref, *logsum_refs), (peak_ref, total_ref, values_ref) = (
        refs[:has_sinks], refs[has_sinks:-3], refs[-3:])
    (rows, heads, H, block), Q = k_ref.shape, q_ref.shape[2]
    P, i = rows * heads, pl.program_id(2)
    first_row = pl.program_id(0) * rows
    ends = [end_ref[first_row + row] for row in range(rows)]

    @pl.when(i == 0)
    def begin() -> None:
        peak_ref[...] = jnp.full(peak_ref.shape, NO_PEAK, jnp.float32)
        if has_sinks:
            peak_ref[...] = jnp.concatenate([sink_refs[0][...]] * rows)
        total_ref[...] = jnp.full(total_ref.shape, float(has_sinks), jnp.float32)
        values_ref[...] = jnp.zeros(values_ref.shape, jnp.float32)

    @pl.when(i * block < jnp.minimum(longest(ends), num_slots))
    def visit() -> None:
        slot_11s = i * block + jax.lax.broadcasted_iota(jnp.int32, (1, 1, block), 2)
        after_P1s = jnp.concatenate([
            locate(slot_11s, end, num_slots) - start_ref[first_row + row]
            for row, end in enumerate(ends) for _ in range(heads)])
        query_1Q1 = jax.lax.broadcasted_iota(jnp.int32, (1, Q, 1), 1)
        token_1Q1 = sum(((query_1Q1 >= t * G).astype(jnp.int32) for t in range(1, Q // G)), jnp.zeros_like(query_1Q1))
        behind_PQs = token_1Q1 - after_P1s
        seen_PQs = behind_PQs >= 0
        if window is not None:
            seen_PQs &= behind_PQs < window

        q_PQH, k_PHs, v_PsV = (ref[...].reshape(P, *ref.shape[2:]) for ref in (q_ref, k_ref, v_ref))
        if num_slots % block:       # what lies past the last slot may be NaN, and weight 0 times NaN is NaN
            slot_1s1 = i * block + jax.lax.broadcasted_iota(jnp.int32, (1, block, 1), 1)
            v_PsV = jnp.where(slot_1s1 < num_slots, v_PsV, jnp.zeros_like(v_PsV))
        scores_PQs = multiply("pqh,phs->pqs", q_PQH, k_PHs) * (1 / math.sqrt(H))
        scores_PQs = jnp.where(seen_PQs, scores_PQs, -jnp.inf)
        peak_PQ1 = peak_ref[...]
        new_peak_PQ1 = jnp.maximum(peak_PQ1, scores_PQs.max(-1, keepdims=True))
        weights_PQs = jnp.exp(scores_PQs - new_peak_PQ1)
        keep_PQ1 = jnp.exp(peak_PQ1 - new_peak_PQ1)
        peak_ref[...] = new_peak_PQ1
        total_ref[...] = total_ref[...] * keep_PQ1 + weights_PQs.sum(-1, keepdims=True)
        values_ref[...] = values_ref[...] * keep_PQ1 + multiply("pqs,psv->pqv", weights_PQs.astype(v_ref.dtype), v_PsV)

    @pl.when(i == pl.num_programs(2) - 1)
    def finish() -> None:
        total_PQ1 = jnp.maximum(total_ref[...], jnp.finfo(jnp.float32).tiny)
        out_ref[...] = (values_ref[...] / total_PQ1).astype(out_ref.dtype).reshape(out_ref.shape)
        for logsum_ref in logsum_refs:      # of a part
            logsum_ref[...] = (peak_ref[...] + jnp.log(total_PQ1)).reshape(logsum_ref.shape)


def longest(ends: list[jax.Array]) -> jax.Array:
    most = ends[0]
    for end in ends[1:]:
        most = jnp.maximum(most, end)
    return most


def locate(slot_11s: jax.Array, end: jax.Array, num_slots: int) -> jax.Array:
    """As `slot_positions` for one row, but NOWHERE for empty slots and slots that do not exist."""
    newest = end - 1
    newest_slot = jax.lax.rem(jnp.maximum(newest, 0), num_slots)
    position = newest - newest_slot + slot_11s
    position = jnp.where(slot_11s <= newest_slot, position, position - num_slots)
    return jnp.where((position >= 0) & (slot_11s < num_slots), position, NOWHERE)


def multiply(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Accumulated in float32, as `jaxllm.linear.einsum`."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)
