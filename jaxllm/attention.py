"""Causal attention with grouped queries, an optional sliding window and optional sinks.

A sink is one learned logit per query head that takes part in the softmax and adds no value (MiMo-V2-Flash report,
arXiv 2601.02780, eq. 1-4). Softmax is in float32 with the running maximum of FlashAttention (arXiv 2205.14135), so keys
can be visited block by block and no T x S matrix of a long context ever exists.

Functions whose arrays have lower case b, n and k, a device's share, run on one device, inside shard_map.
"""
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxllm.axes import along, attention_rows, spec
from jaxllm.cache import LayerCache, slot_positions, with_previous, write
from jaxllm.config import LayerSpec
from jaxllm.kernels.cache_write import MAX_TOKENS, write_cache
from jaxllm.kernels.decode_attention import decode_attention, decode_attention_part
from jaxllm.linear import einsum, param
from jaxllm.rope import apply_rope
from jaxllm.self_attention import NO_PEAK, as_varying, attend_self, in_turn
from jaxllm.splash import attend_by_splash

KEY_BLOCK = 1024        # keys per visit where there are more: bounds the scores to B*N*T*1024 float32
QUERY_BLOCK = 128       # queries per visit in a sliding layer: each block sees its own keys and window - 1 before them
LARGE = 2**16           # scores of a head, T * S, from which on a CPU does one row of the batch after the other


def attend(q_bTnH: jax.Array, k_bkHS: jax.Array, v_bkSV: jax.Array, q_pos_bT: jax.Array, k_pos_bS: jax.Array,
           window: int | None, sink_n: jax.Array | None) -> jax.Array:
    """Attention output [b, T, n, V] in q's dtype.

    A query at position p sees the keys at positions p - window + 1 .. p, or 0 .. p if `window` is None; a negative key
    position means an empty slot. Query head n reads kv head n // (N/K); keys are not repeated.
    """
    return attend_part(q_bTnH, k_bkHS, v_bkSV, q_pos_bT, k_pos_bS, window, sink_n)[0].astype(q_bTnH.dtype)


def attend_part(q_bTnH: jax.Array, k_bkHS: jax.Array, v_bkSV: jax.Array, q_pos_bT: jax.Array, k_pos_bS: jax.Array,
                window: int | None, sink_n: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """`attend` in float32, and the logarithm of each query's sum [b, T, n], with which `join` adds other keys."""
    rows = q_bTnH, k_bkHS, v_bkSV, q_pos_bT, k_pos_bS
    at_once = partial(attend_rows, window=window, sink_n=sink_n)
    if q_bTnH.shape[1] * v_bkSV.shape[2] < LARGE or q_bTnH.shape[0] == 1:
        return at_once(*rows)
    return in_turn(at_once, *rows)


def attend_rows(q_bTnH: jax.Array, k_bkHS: jax.Array, v_bkSV: jax.Array, q_pos_bT: jax.Array, k_pos_bS: jax.Array,
                window: int | None, sink_n: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """`attend_part`, all rows at once."""
    (b, T, n, H), (k, S, V) = q_bTnH.shape, v_bkSV.shape[1:]
    q_bkGTH = q_bTnH.reshape(b, T, k, n // k, H).transpose(0, 2, 3, 1, 4)
    zero_bkGT = jnp.zeros_like(q_bkGTH[..., 0], jnp.float32)
    if sink_n is None:
        peak, total = zero_bkGT + NO_PEAK, zero_bkGT
    else:
        peak, total = zero_bkGT + sink_n.reshape(1, k, n // k, 1), zero_bkGT + 1.0

    def visit(first: jax.Array | int, size: int, state: tuple) -> tuple:
        """Softmax state (maximum, sum, weighted values) after the keys first .. first + size - 1, cut at S."""
        peak, total, out_bkGTV = state
        start = jnp.minimum(first, S - size) if size < S else 0
        k, v, k_pos = (jax.lax.dynamic_slice_in_dim(x, start, size, dim) if size < S else x
                       for x, dim in ((k_bkHS, 3), (v_bkSV, 2), (k_pos_bS, 1)))
        behind_bTS = q_pos_bT[:, :, None] - k_pos[:, None, :]
        seen_bTS = (behind_bTS >= 0) & (k_pos >= 0)[:, None, :]
        if window is not None:
            seen_bTS &= behind_bTS < window
        if size < S:    # the last block is moved back to fit; what it has in common with the one before counts once
            seen_bTS &= (start + jnp.arange(size, dtype=jnp.int32) >= first)[None, None, :]
        scores = einsum("bkgth,bkhs->bkgts", q_bkGTH, k) * (1 / math.sqrt(H))
        scores = jnp.where(seen_bTS[:, None, None], scores, -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights = jnp.exp(scores - new_peak[..., None])
        keep = jnp.exp(peak - new_peak)
        values = einsum("bkgts,bksv->bkgtv", weights.astype(v.dtype), v)
        values = values if out_bkGTV is None else out_bkGTV * keep[..., None] + values
        return new_peak, total * keep + weights.sum(-1), values

    if S <= KEY_BLOCK:
        peak, total, out = visit(0, S, (peak, total, None))
    else:
        num: jax.Array | int = -(-S // KEY_BLOCK)
        if window is None and T < S:      # slots of a cache, not all of them in use
            num = jnp.minimum(jnp.max(q_pos_bT) // KEY_BLOCK + 1, num)
        out = jnp.zeros_like(peak, shape=(*peak.shape, V))
        peak, total, out = jax.lax.fori_loop(0, num, lambda i, state: visit(i * KEY_BLOCK, KEY_BLOCK, state),
                                             (peak, total, out))
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return ((out / total[..., None]).transpose(0, 3, 1, 2, 4).reshape(b, T, n, V),
            (peak + jnp.log(total)).transpose(0, 3, 1, 2).reshape(b, T, n))


def join(out_bTnV: jax.Array, logsum_bTn: jax.Array, sink_n: jax.Array | None, axis: str) -> jax.Array:
    """Attention to all keys from each place's to those it has, along a mesh axis: a mean of the float32 outputs,
    weighted by their sums (Flash-Decoding's second step). A sink is in none of the parts: it counts once, here."""
    peak_bTn = jax.lax.pmax(logsum_bTn, axis)
    if sink_n is not None:
        peak_bTn = jnp.maximum(peak_bTn, sink_n[None, None])
    weight_bTn = jnp.exp(logsum_bTn - peak_bTn)
    out_bTnV, total_bTn = jax.lax.psum((out_bTnV * weight_bTn[..., None], weight_bTn), axis)
    if sink_n is not None:
        total_bTn += jnp.exp(sink_n[None, None] - peak_bTn)
    return out_bTnV / total_bTn[..., None]


def attend_sliding(q_bTnH: jax.Array, k_bkHS: jax.Array, v_bkSV: jax.Array, start_b: jax.Array, window: int,
                   sink_n: jax.Array | None) -> jax.Array:
    """As `attend`, for T queries at positions start_b + (0..T-1) and the window - 1 + T keys that end with theirs.

    Queries go in blocks, each with only the keys that its window can reach: work grows with T * window, not T * T.
    """
    b, T, n, H = q_bTnH.shape
    block = max(window, QUERY_BLOCK)
    reach = window - 1
    first_pos_b = start_b - reach
    if T <= block:
        q_pos = start_b[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
        k_pos = first_pos_b[:, None] + jnp.arange(T + reach, dtype=jnp.int32)[None]
        return attend(q_bTnH, k_bkHS, v_bkSV, q_pos, k_pos, window, sink_n)
    num = -(-T // block)
    pad = num * block - T
    q_bTnH, k_bkHS, v_bkSV = (jnp.pad(x, [(0, pad if dim == at else 0) for dim in range(4)])
                              for x, at in ((q_bTnH, 1), (k_bkHS, 3), (v_bkSV, 2)))

    def one(i: jax.Array) -> jax.Array:
        q, k, v = (jax.lax.dynamic_slice_in_dim(x, i * block, size, dim) for x, size, dim in (
            (q_bTnH, block, 1), (k_bkHS, block + reach, 3), (v_bkSV, block + reach, 2)))
        return attend_sliding(q, k, v, start_b + i * block, window, sink_n)

    out = jax.lax.map(one, jnp.arange(num, dtype=jnp.int32))       # [num, b, block, n, V]
    return out.transpose(1, 0, 2, 3, 4).reshape(b, num * block, n, v_bkSV.shape[-1])[:, :T]


class Attention(nnx.Module):
    """One layer's attention. `layer.num_kv_heads` counts kv heads as stored: repeated up to the tensor degree."""

    def __init__(self, D: int, layer: LayerSpec, value_scale: float, dtype: jnp.dtype, *, rngs: nnx.Rngs | None):
        N, K, H, V = layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.v_head_dim
        self.layer, self.value_scale = layer, value_scale
        self.q_DNH = param(rngs, (D, N, H), ("attention_embed", "heads", "head_dim"), dtype)
        self.k_DKH = param(rngs, (D, K, H), ("attention_embed", "kv_heads", "head_dim"), dtype)
        self.v_DKV = param(rngs, (D, K, V), ("attention_embed", "kv_heads", "head_dim"), dtype)
        self.o_NVD = param(rngs, (N, V, D), ("heads", "head_dim", "attention_embed"), dtype)
        self.sink_N = param(rngs, (N,), ("heads",), jnp.float32) if layer.has_sinks else None

    def __call__(self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], start_B: jax.Array, end_B: jax.Array,
                 cache: LayerCache | None, begin_BT: jax.Array | None = None
                 ) -> tuple[jax.Array, LayerCache | None]:
        """Output [B, T, D], split as the input is, and the cache with these tokens in it; `rope` holds their angles.

        Rows that lie apart are exchanged for parts of D along `expert`, then gathered, and the same way back.
        begin_BT, without a cache only: the place in the row before which a token sees nothing.
        """
        dtype, rows = x_BTD.dtype, attention_rows(x_BTD.shape[0])
        stream = jax.typeof(x_BTD).sharding.spec
        exchanged = P(*along(stream, "data", "tensor")[:2], *spec("attention_embed"))
        x_BTd = jax.reshard(jax.reshard(x_BTD, exchanged), spec("batch", None, "attention_embed"))
        heads = spec(rows, None, "heads", None)
        rope, start_B, end_B, begin_BT = jax.tree.map(
            lambda x: jax.reshard(x, spec(rows, *[None] * (x.ndim - 1))), (rope, start_B, end_B, begin_BT))
        q = apply_rope(einsum("btd,dnh->btnh", x_BTd, self.q_DNH[...], heads).astype(dtype), *rope)
        k = apply_rope(einsum("btd,dkh->btkh", x_BTd, self.k_DKH[...], heads).astype(dtype), *rope)
        v = einsum("btd,dkv->btkv", x_BTd, self.v_DKV[...], heads).astype(dtype)
        v *= jnp.asarray(self.value_scale, dtype)
        sink = None if self.sink_N is None else self.sink_N[...]
        out, cache = attend_cached(q, k, v, start_B, end_B, cache, self.layer.window, sink, begin_BT)
        out = jax.reshard(out, spec("batch", None, "heads", None))
        out_BTd = einsum("btnv,nvd->btd", out, self.o_NVD[...], exchanged).astype(dtype)
        return jax.reshard(out_BTd, stream), cache


def attend_cached(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKV: jax.Array, start_B: jax.Array, end_B: jax.Array,
                  cache: LayerCache | None, window: int | None, sink_N: jax.Array | None,
                  begin_BT: jax.Array | None = None) -> tuple[jax.Array, LayerCache | None]:
    """Attention of T new tokens to themselves and to the cache, and the cache with them in it.

    They stand at positions start_B + (0..T-1), those at or past end_B being padding; without a cache start_B is 0.
    """
    if cache is None:
        return attend_self(q_BTNH, k_BTKH, v_BTKV, window, sink_N, begin_BT), None
    T, slots = q_BTNH.shape[1], cache.num_slots
    inputs = q_BTNH, k_BTKH, v_BTKV, start_B, end_B, cache, sink_N
    kernel = partial(attend_by_splash, None if window is None or slots < window else window)
    if window is None or slots < window or slots >= window + T - 1:     # fewer than window: cut at the full length
        plain = partial(attend_slots, window)                           # all that can be seen is in the slots
        kernel = partial(attend_slots, window, by_kernel=True) if T <= MAX_TOKENS else kernel
    else:
        plain = partial(attend_past_slots, window)
    return jax.lax.platform_dependent(*inputs, default=plain, tpu=kernel)


def attend_slots(window: int | None, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKV: jax.Array, start_B: jax.Array,
                 end_B: jax.Array, cache: LayerCache, sink_N: jax.Array | None, *, by_kernel: bool = False,
                 interpret: bool = False) -> tuple[jax.Array, LayerCache]:
    """`attend_cached` where the slots hold all that the new tokens see, themselves included.

    Where slots are split over a mesh axis, each place counts positions from its first slot on, writes the tokens that
    fall among its own, attends to these slots, and what all found is joined. By Pallas kernels, for a few new tokens,
    the cache is written in place and read once.
    """
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (q_BTNH, cache))
    axis = specs[1].v_BKSV[2]

    def local(q: jax.Array, k: jax.Array, v: jax.Array, start_b: jax.Array, end_b: jax.Array, cache: LayerCache,
              sink_n: jax.Array | None) -> tuple[jax.Array, LayerCache]:
        if axis is not None:
            first = jax.lax.axis_index(axis) * cache.num_slots
            start_b, end_b = start_b - first, jnp.clip(end_b - first, 0, cache.num_slots)
        own_sink_n = sink_n if axis is None else None
        q, k, v, start_b, end_b, own_sink_n = as_varying((q, k, v, start_b, end_b, own_sink_n), cache.v_BKSV)
        if by_kernel:
            new = LayerCache(*write_cache(cache.k_BKHS, cache.v_BKSV, k, v, start_b, end_b, interpret=interpret))
            inputs = q, new.k_BKHS, new.v_BKSV, start_b, end_b, window
            if axis is None:
                return decode_attention(*inputs, own_sink_n, interpret=interpret), new
            part = decode_attention_part(*inputs, interpret=interpret)
        else:
            new = write(cache, k, v, start_b, end_b)
            q_pos_bT = start_b[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
            inputs = q, new.k_BKHS, new.v_BKSV, q_pos_bT, slot_positions(end_b, new.num_slots), window
            if axis is None:
                return attend(*inputs, own_sink_n), new
            part = attend_part(*inputs, None)
        return join(*part, sink_n, axis).astype(q.dtype), new
    return jax.shard_map(local, out_specs=specs, check_vma=not interpret)(
        q_BTNH, k_BTKH, v_BTKV, start_B, end_B, cache, sink_N)


def attend_past_slots(window: int, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKV: jax.Array, start_B: jax.Array,
                      end_B: jax.Array, cache: LayerCache, sink_N: jax.Array | None) -> tuple[jax.Array, LayerCache]:
    """`attend_cached` where tokens push out of a ring what others before them still see."""
    def local(q: jax.Array, k: jax.Array, v: jax.Array, start_b: jax.Array, end_b: jax.Array, cache: LayerCache,
              sink_n: jax.Array | None) -> tuple[jax.Array, LayerCache]:
        q, k, v, start_b, end_b, sink_n = as_varying((q, k, v, start_b, end_b, sink_n), cache.v_BKSV)
        keys, values = with_previous(cache, k, v, start_b, window - 1)
        return attend_sliding(q, keys, values, start_b, window, sink_n), write(cache, k, v, start_b, end_b)
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (q_BTNH, cache))
    return jax.shard_map(local, out_specs=specs)(q_BTNH, k_BTKH, v_BTKV, start_B, end_B, cache, sink_N)
