"""Causal attention with grouped queries, an optional sliding window and optional sinks.

A sink is one learned logit per query head that takes part in the softmax and adds no value (MiMo-V2-Flash report,
arXiv 2601.02780, eq. 1-4). Softmax is in float32 with the running maximum of FlashAttention (arXiv 2205.14135), so keys
can be visited block by block and no T x S matrix of a long context ever exists.
"""
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxllm.axes import attention_rows, spec
from jaxllm.cache import LayerCache, previous, slot_positions, write
from jaxllm.config import LayerSpec
from jaxllm.kernels.cache_write import MAX_TOKENS, write_cache
from jaxllm.kernels.decode_attention import decode_attention
from jaxllm.linear import einsum, param
from jaxllm.rope import apply_rope
from jaxllm.self_attention import NO_PEAK, attend_self

KEY_BLOCK = 1024        # keys per visit where there are more: bounds the scores to B*N*T*1024 float32
QUERY_BLOCK = 128       # queries per visit in a sliding layer: each block sees its own keys and window - 1 before them
LARGE = 2**16           # scores of a head, T * S, from which on a CPU does one row of the batch after the other


def attend(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSV: jax.Array, q_pos_BT: jax.Array, k_pos_BS: jax.Array,
           window: int | None, sink_N: jax.Array | None) -> jax.Array:
    """Attention output [B, T, N, V] in q's dtype.

    A query at position p sees the keys at positions p - window + 1 .. p, or 0 .. p if `window` is None; a negative key
    position means an empty slot. Query head n reads kv head n // (N/K); keys are not repeated.
    """
    rows = q_BTNH, k_BKHS, v_BKSV, q_pos_BT, k_pos_BS
    at_once = partial(attend_rows, window=window, sink_N=sink_N)
    if q_BTNH.shape[1] * v_BKSV.shape[2] < LARGE or q_BTNH.shape[0] == count_places(q_BTNH):
        return at_once(*rows)

    def in_turn(*rows: jax.Array) -> jax.Array:
        """One row of each device after the other, so that scores and what becomes of them stay in a CPU's cache."""
        return join(jax.lax.map(lambda row: at_once(*row), tuple(map(partial(cut, q_BTNH), rows))))
    return jax.lax.platform_dependent(*rows, cpu=in_turn, default=at_once)


def attend_rows(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSV: jax.Array, q_pos_BT: jax.Array, k_pos_BS: jax.Array,
                window: int | None, sink_N: jax.Array | None) -> jax.Array:
    """`attend`, all rows of the batch at once."""
    B, T, N, H = q_BTNH.shape
    K, S, V = v_BKSV.shape[1:]
    batch, _, heads, _ = jax.typeof(q_BTNH).sharding.spec
    q_BTKGH = jax.lax.reshape(q_BTNH, (B, T, K, N // K, H), out_sharding=P(batch, None, heads, None, None))
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    zero_BKGT = jnp.zeros_like(q_BKGTH[..., 0], jnp.float32)
    if sink_N is None:
        peak, total = zero_BKGT + NO_PEAK, zero_BKGT
    else:
        sink_KG = jax.lax.reshape(sink_N, (K, N // K), out_sharding=P(heads, None))
        peak, total = zero_BKGT + sink_KG[None, :, :, None], zero_BKGT + 1.0

    def visit(first: jax.Array | int, size: int, state: tuple) -> tuple:
        """Softmax state (maximum, sum, weighted values) after the keys first .. first + size - 1, cut at S."""
        peak, total, out_BKGTV = state
        start = jnp.minimum(first, S - size) if size < S else 0
        k, v, k_pos = (jax.lax.dynamic_slice_in_dim(x, start, size, dim) if size < S else x
                       for x, dim in ((k_BKHS, 3), (v_BKSV, 2), (k_pos_BS, 1)))
        behind_BTS = q_pos_BT[:, :, None] - k_pos[:, None, :]
        seen_BTS = (behind_BTS >= 0) & (k_pos >= 0)[:, None, :]
        if window is not None:
            seen_BTS &= behind_BTS < window
        if size < S:    # the last block is moved back to fit; what it has in common with the one before counts once
            seen_BTS &= (start + jnp.arange(size, dtype=jnp.int32) >= first)[None, None, :]
        scores = einsum("bkgth,bkhs->bkgts", q_BKGTH, k) * (1 / math.sqrt(H))
        scores = jnp.where(seen_BTS[:, None, None], scores, -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights = jnp.exp(scores - new_peak[..., None])
        keep = jnp.exp(peak - new_peak)
        values = einsum("bkgts,bksv->bkgtv", weights.astype(v.dtype), v)
        values = values if out_BKGTV is None else out_BKGTV * keep[..., None] + values
        return new_peak, total * keep + weights.sum(-1), values

    if S <= KEY_BLOCK:
        _, total, out = visit(0, S, (peak, total, None))
    else:
        num: jax.Array | int = -(-S // KEY_BLOCK)
        if window is None and T < S:      # slots of a cache, not all of them in use
            num = jnp.minimum(jnp.max(q_pos_BT) // KEY_BLOCK + 1, num)
        out = jnp.zeros_like(peak, shape=(*peak.shape, V), out_sharding=P(batch, heads, None, None, None))
        _, total, out = jax.lax.fori_loop(0, num, lambda i, state: visit(i * KEY_BLOCK, KEY_BLOCK, state),
                                          (peak, total, out))
    out_BKGTV = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return jax.lax.reshape(out_BKGTV.transpose(0, 3, 1, 2, 4), (B, T, N, V),
                           out_sharding=P(batch, None, heads, None)).astype(q_BTNH.dtype)


def count_places(x_B: jax.Array) -> int:
    """Over how many places of the mesh the rows of a batch are split."""
    sharding = jax.typeof(x_B).sharding
    axes = sharding.spec[0] or ()
    return math.prod(sharding.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def cut(like_B: jax.Array, x: jax.Array) -> jax.Array:
    """x [B, ...] as [b, B/b, ...]: b times one row of every place that the rows of `like_B` are split over."""
    num, (batch, *axes) = count_places(like_B), jax.typeof(x).sharding.spec
    shape = (num, x.shape[0] // num, *x.shape[1:])
    return jnp.moveaxis(jax.lax.reshape(x, shape, out_sharding=P(batch, None, *axes)), 1, 0)


def join(x: jax.Array) -> jax.Array:
    """The reverse of `cut`."""
    _, batch, *axes = jax.typeof(x).sharding.spec
    x = jnp.moveaxis(x, 0, 1)
    return jax.lax.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]), out_sharding=P(batch, *axes))


def attend_sliding(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSV: jax.Array, start_B: jax.Array, window: int,
                   sink_N: jax.Array | None) -> jax.Array:
    """As `attend`, for T queries at positions start_B + (0..T-1) and the window - 1 + T keys that end with theirs.

    Queries go in blocks, each with only the keys that its window can reach: work grows with T * window, not T * T.
    """
    B, T, N, H = q_BTNH.shape
    block = max(window, QUERY_BLOCK)
    reach = window - 1
    first_pos_B = start_B - reach
    if T <= block:
        q_pos = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
        k_pos = first_pos_B[:, None] + jnp.arange(T + reach, dtype=jnp.int32)[None]
        return attend(q_BTNH, k_BKHS, v_BKSV, q_pos, k_pos, window, sink_N)
    num = -(-T // block)
    pad = num * block - T
    q_BTNH, k_BKHS, v_BKSV = (jnp.pad(x, [(0, pad if dim == at else 0) for dim in range(4)])
                              for x, at in ((q_BTNH, 1), (k_BKHS, 3), (v_BKSV, 2)))

    def one(i: jax.Array) -> jax.Array:
        q, k, v = (jax.lax.dynamic_slice_in_dim(x, i * block, size, dim) for x, size, dim in (
            (q_BTNH, block, 1), (k_BKHS, block + reach, 3), (v_BKSV, block + reach, 2)))
        return attend_sliding(q, k, v, start_B + i * block, window, sink_N)

    out = jax.lax.map(one, jnp.arange(num, dtype=jnp.int32))       # [num, B, block, N, V]
    batch, _, heads, _ = jax.typeof(q_BTNH).sharding.spec
    out = jax.lax.reshape(out.transpose(1, 0, 2, 3, 4), (B, num * block, N, v_BKSV.shape[-1]),
                          out_sharding=P(batch, None, heads, None))
    return out[:, :T]


class Attention(nnx.Module):
    """One layer's attention. `layer.num_kv_heads` counts kv heads as stored: repeated up to the tensor degree."""

    def __init__(self, D: int, layer: LayerSpec, value_scale: float, dtype: jnp.dtype, *, rngs: nnx.Rngs):
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
        """Output [B, T, D] and the cache with these tokens in it; `rope` holds their angles.

        begin_BT, without a cache only: the place in the row before which a token sees nothing.
        """
        dtype, rows = x_BTD.dtype, attention_rows(x_BTD.shape[0])
        x_BTd, heads = jax.reshard(x_BTD, spec("batch", None, "attention_embed")), spec(rows, None, "heads", None)
        rope, start_B, end_B, begin_BT = jax.tree.map(
            lambda x: jax.reshard(x, spec(rows, *[None] * (x.ndim - 1))), (rope, start_B, end_B, begin_BT))
        q = apply_rope(einsum("btd,dnh->btnh", x_BTd, self.q_DNH[...], heads).astype(dtype), *rope)
        k = apply_rope(einsum("btd,dkh->btkh", x_BTd, self.k_DKH[...], heads).astype(dtype), *rope)
        v = einsum("btd,dkv->btkv", x_BTd, self.v_DKV[...], heads).astype(dtype)
        v *= jnp.asarray(self.value_scale, dtype)
        sink = None if self.sink_N is None else self.sink_N[...]
        out, cache = attend_cached(q, k, v, start_B, end_B, cache, self.layer.window, sink, begin_BT)
        out = jax.reshard(out, spec("batch", None, "heads", None))
        out_BTd = einsum("btnv,nvd->btd", out, self.o_NVD[...], spec("batch", None, "attention_embed")).astype(dtype)
        return jax.reshard(out_BTd, spec("batch", None, None)), cache


def attend_cached(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKV: jax.Array, start_B: jax.Array, end_B: jax.Array,
                  cache: LayerCache | None, window: int | None, sink_N: jax.Array | None,
                  begin_BT: jax.Array | None = None) -> tuple[jax.Array, LayerCache | None]:
    """Attention of T new tokens to themselves and to the cache, and the cache with them in it.

    They stand at positions start_B + (0..T-1), those at or past end_B being padding; without a cache start_B is 0.
    """
    if cache is None:
        return attend_self(q_BTNH, k_BTKH, v_BTKV, window, sink_N, begin_BT), None
    T, slots = q_BTNH.shape[1], cache.num_slots
    if window is None or slots < window or slots >= window + T - 1:     # fewer than window: cut at the full length
        inputs = q_BTNH, k_BTKH, v_BTKV, start_B, end_B, cache, sink_N  # all that can be seen is in the slots
        kernels = {"tpu": partial(attend_slots_by_kernel, window)} if T <= MAX_TOKENS else {}
        return jax.lax.platform_dependent(*inputs, default=partial(attend_slots, window), **kernels)
    new = write(cache, k_BTKH, v_BTKV, start_B, end_B)
    assert window is not None
    old = previous(cache, start_B, window - 1)
    k = jnp.concatenate([old.k_BKHS, k_BTKH.transpose(0, 2, 3, 1)], 3)
    v = jnp.concatenate([old.v_BKSV, v_BTKV.transpose(0, 2, 1, 3)], 2)
    return attend_sliding(q_BTNH, k, v, start_B, window, sink_N), new


def attend_slots(window: int | None, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKV: jax.Array, start_B: jax.Array,
                 end_B: jax.Array, cache: LayerCache, sink_N: jax.Array | None) -> tuple[jax.Array, LayerCache]:
    """`attend_cached` where the slots hold all that the new tokens see, themselves included."""
    new = write(cache, k_BTKH, v_BTKV, start_B, end_B)
    q_pos = start_B[:, None] + jnp.arange(q_BTNH.shape[1], dtype=jnp.int32)[None, :]
    k_pos = slot_positions(end_B, cache.num_slots)
    return attend(q_BTNH, new.k_BKHS, new.v_BKSV, q_pos, k_pos, window, sink_N), new


def attend_slots_by_kernel(window: int | None, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKV: jax.Array,
                           start_B: jax.Array, end_B: jax.Array, cache: LayerCache, sink_N: jax.Array | None,
                           interpret: bool = False) -> tuple[jax.Array, LayerCache]:
    """The same by Pallas kernels, for a few new tokens: the cache is written in place and read once."""
    def local(q: jax.Array, k: jax.Array, v: jax.Array, start_b: jax.Array, end_b: jax.Array, cache: LayerCache,
              sink_n: jax.Array | None) -> tuple[jax.Array, LayerCache]:
        new = LayerCache(*write_cache(cache.k_BKHS, cache.v_BKSV, k, v, start_b, end_b, interpret=interpret))
        out = decode_attention(q, new.k_BKHS, new.v_BKSV, start_b, end_b, window, sink_n, interpret=interpret)
        return out, new
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (q_BTNH, cache))
    return jax.shard_map(local, out_specs=specs, check_vma=not interpret)(
        q_BTNH, k_BTKH, v_BTKV, start_B, end_B, cache, sink_N)
