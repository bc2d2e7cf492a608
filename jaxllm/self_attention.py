"""Causal attention of T tokens to one another, without a cache: what training and evaluation run.

A block of queries visits tiles of the keys that it can see, with the running maximum of FlashAttention (arXiv
2205.14135). The backward pass visits them again, and needs of the forward pass only its output and the logarithm of
each query's sum (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2): no T x T matrix is kept or ever exists.

Everything here is on one device, inside shard_map: b, n, k are its share of rows, query heads and kv heads, G = n/k.
"""
import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxllm.linear import einsum

ROWS = 512              # G * Q, rows of a product: from here on a CPU uses two cores for one
MIN_QUERIES = 128       # Q at least: each block also reads the window before it
TILE = 512              # keys of a tile in a full layer
ALIGN = 16              # keys before a block in a sliding layer are a multiple of this, as vectors are long
NO_PEAK = -1e30         # a finite floor for the maximum: where nothing is seen the output is zero, not NaN


def attend_self(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKV: jax.Array, window: int | None, sink_N: jax.Array | None,
                begin_BT: jax.Array | None = None) -> jax.Array:
    """Attention output [B, T, N, V] in q's dtype, of tokens at positions 0..T-1, padding at the end included.

    A query sees the `window` (None: all) newest positions up to its own, none of them before begin_BT (None: 0). Query
    head n reads kv head n // (N/K).
    """
    def local(q: jax.Array, *others: jax.Array | None) -> jax.Array:
        return attend_local(window, q, *as_varying(others, q))
    sharding = jax.typeof(q_BTNH).sharding.spec
    if begin_BT is None:
        begin_BT = jnp.zeros(q_BTNH.shape[:2], jnp.int32, out_sharding=P(sharding[0], None))
    return jax.shard_map(local, out_specs=sharding)(q_BTNH, k_BTKH, v_BTKV, sink_N, begin_BT)


def as_varying(tree: Any, like: jax.Array) -> Any:
    """Arrays inside shard_map, as differing along every mesh axis that `like` differs along: what loops want."""
    axes = jax.typeof(like).mat.varying
    return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(axes - jax.typeof(x).mat.varying), to="varying"), tree)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How T queries, and the keys with `before` empty ones in front of them, are cut."""
    T: int
    G: int
    window: int | None

    @property
    def queries(self) -> int:
        return min(self.T, max(MIN_QUERIES, ROWS // self.G))

    @property
    def num_blocks(self) -> int:
        return -(-self.T // self.queries)

    @property
    def is_sliding(self) -> bool:
        return self.window is not None and self.window + self.queries < self.T

    @property
    def before(self) -> int:
        return -(-(self.window - 1) // ALIGN) * ALIGN if self.is_sliding and self.window else 0

    @property
    def keys(self) -> int:
        return self.before + self.queries if self.is_sliding else min(TILE, self.T)

    def num_tiles(self, block: jax.Array) -> jax.Array | int:
        """That a block of queries visits."""
        return 1 if self.is_sliding else ((block + 1) * self.queries - 1) // self.keys + 1

    def first_key(self, block: jax.Array, tile: jax.Array) -> jax.Array:
        return block * self.queries if self.is_sliding else tile * self.keys

    def pad_queries(self, x: jax.Array, dim: int) -> jax.Array:
        return pad(x, dim, 0, self.num_blocks * self.queries - self.T)

    def pad_keys(self, x: jax.Array, dim: int) -> jax.Array:
        last = self.num_blocks * self.queries
        size = last if self.is_sliding else -(-last // self.keys) * self.keys
        return pad(x, dim, self.before, size - self.T)

    def seen(self, block: jax.Array, tile: jax.Array, begin_bQ: jax.Array) -> jax.Array:
        """bool [b, 1, 1, Q, S]: which keys of a tile the queries of a block see."""
        query_Q1 = block * self.queries + jnp.arange(self.queries, dtype=jnp.int32)[:, None]
        key_1S = self.first_key(block, tile) - self.before + jnp.arange(self.keys, dtype=jnp.int32)[None, :]
        seen_QS = key_1S <= query_Q1
        if self.window is not None:
            seen_QS &= key_1S > query_Q1 - self.window
        return (seen_QS[None] & (key_1S[None] >= begin_bQ[:, :, None]))[:, None, None]


def pad(x: jax.Array, dim: int, before: int, after: int) -> jax.Array:
    return jnp.pad(x, [(before, after) if at == dim else (0, 0) for at in range(x.ndim)])


def cut(x: jax.Array, at: jax.Array, size: int, dim: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, at, size, dim)


def by_head(x_bTnH: jax.Array, k: int, tiles: Tiles) -> jax.Array:
    """[b, T, n, H] as [b, k, G, T, H], T padded to whole blocks."""
    b, T, n, H = x_bTnH.shape
    return tiles.pad_queries(x_bTnH.reshape(b, T, k, n // k, H).transpose(0, 2, 3, 1, 4), 3)


def by_token(x_NbkGQH: jax.Array, T: int) -> jax.Array:
    """The blocks of queries one after the other, [num, b, k, G, Q, H], as [b, T, n, H]."""
    num, b, k, G, Q, H = x_NbkGQH.shape
    return x_NbkGQH.transpose(1, 0, 4, 2, 3, 5).reshape(b, num * Q, k * G, H)[:, :T]


def forward(window: int | None, q_bTnH: jax.Array, k_bTkH: jax.Array, v_bTkV: jax.Array, begin_bT: jax.Array,
            sink_n: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Output [b, T, n, V] in q's dtype, and the logarithm of each query's sum, float32 [b, T, n]."""
    (T, n, H), (k, V) = q_bTnH.shape[1:], v_bTkV.shape[2:]
    tiles = Tiles(T, n // k, window)
    q, keys = by_head(q_bTnH, k, tiles), tiles.pad_keys(k_bTkH.transpose(0, 2, 3, 1), 3)
    values, begin = tiles.pad_keys(v_bTkV.transpose(0, 2, 1, 3), 2), tiles.pad_queries(begin_bT, 1)
    zero = jnp.zeros_like(q[..., :tiles.queries, 0], jnp.float32)
    start = ((zero + NO_PEAK, zero) if sink_n is None else (zero + sink_n.reshape(1, k, -1, 1), zero + 1.0))

    def block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_bkGQH, begin_bQ = (cut(x, i * tiles.queries, tiles.queries, dim) for x, dim in ((q, 3), (begin, 1)))

        def visit(j: jax.Array, state: Any) -> Any:
            peak, total, out = state
            at = tiles.first_key(i, j)
            scores = einsum("bkgqh,bkhs->bkgqs", q_bkGQH, cut(keys, at, tiles.keys, 3)) * (1 / math.sqrt(H))
            scores = jnp.where(tiles.seen(i, j, begin_bQ), scores, -jnp.inf)
            new_peak = jnp.maximum(peak, scores.max(-1))
            weights, keep = jnp.exp(scores - new_peak[..., None]), jnp.exp(peak - new_peak)
            found = einsum("bkgqs,bksv->bkgqv", weights.astype(values.dtype), cut(values, at, tiles.keys, 2))
            return new_peak, total * keep + weights.sum(-1), out * keep[..., None] + found

        out = jnp.zeros_like(zero, shape=(*zero.shape, V))
        peak, total, out = jax.lax.fori_loop(0, tiles.num_tiles(i), visit, (*start, out))
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return (out / total[..., None]).astype(q.dtype), peak + jnp.log(total)

    out, logsum = jax.lax.map(block, jnp.arange(tiles.num_blocks, dtype=jnp.int32))
    return by_token(out, T), by_token(logsum[..., None], T)[..., 0]


def backward(window: int | None, q_bTnH: jax.Array, k_bTkH: jax.Array, v_bTkV: jax.Array, begin_bT: jax.Array,
             logsum_bTn: jax.Array, delta_bTn: jax.Array, d_out_bTnV: jax.Array
             ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, in their dtypes. delta: the sum over V of output times its gradient."""
    (T, n, H), k = q_bTnH.shape[1:], k_bTkH.shape[2]
    tiles, scale = Tiles(T, n // k, window), 1 / math.sqrt(H)
    logsum, delta = (by_head(x[..., None], k, tiles) for x in (logsum_bTn, delta_bTn))
    q, d_out = by_head(q_bTnH, k, tiles), by_head(d_out_bTnV, k, tiles)
    keys, values = (tiles.pad_keys(x.transpose(0, 2, 3, 1), 3) for x in (k_bTkH, v_bTkV))
    begin = tiles.pad_queries(begin_bT, 1)

    def block(total: Any, i: jax.Array) -> tuple[Any, jax.Array]:
        q_bkGQH, d_out_bkGQV, logsum_bkGQ1, delta_bkGQ1 = (
            cut(x, i * tiles.queries, tiles.queries, 3) for x in (q, d_out, logsum, delta))
        begin_bQ = cut(begin, i * tiles.queries, tiles.queries, 1)
        # Turned before they are multiplied: to turn the scores' gradients instead takes a CPU twice as long.
        q_bkHGQ, d_out_bkVGQ = (x.transpose(0, 1, 4, 2, 3) for x in (q_bkGQH, d_out_bkGQV))

        def visit(j: jax.Array, state: Any) -> Any:
            d_keys, d_values, d_q = state
            at = tiles.first_key(i, j)
            k_bkHS, v_bkVS = cut(keys, at, tiles.keys, 3), cut(values, at, tiles.keys, 3)
            scores = einsum("bkgqh,bkhs->bkgqs", q_bkGQH, k_bkHS) * scale
            weights = jnp.exp(jnp.where(tiles.seen(i, j, begin_bQ), scores, -jnp.inf) - logsum_bkGQ1)
            d_scores = weights * (einsum("bkgqv,bkvs->bkgqs", d_out_bkGQV, v_bkVS) - delta_bkGQ1) * scale
            d_scores = d_scores.astype(q.dtype)
            found = (einsum("bkhgq,bkgqs->bkhs", q_bkHGQ, d_scores),
                     einsum("bkvgq,bkgqs->bkvs", d_out_bkVGQ, weights.astype(q.dtype)))
            d_keys, d_values = (jax.lax.dynamic_update_slice_in_dim(x, cut(x, at, tiles.keys, 3) + new, at, 3)
                                for x, new in zip((d_keys, d_values), found, strict=True))
            return d_keys, d_values, d_q + einsum("bkgqs,bkhs->bkgqh", d_scores, k_bkHS)

        d_keys, d_values, d_q = jax.lax.fori_loop(
            0, tiles.num_tiles(i), visit, (*total, jnp.zeros_like(q_bkGQH, jnp.float32)))
        return (d_keys, d_values), d_q

    start = tuple(jnp.zeros_like(x, jnp.float32) for x in (keys, values))
    total, d_q = jax.lax.scan(block, start, jnp.arange(tiles.num_blocks, dtype=jnp.int32))
    d_k, d_v = (x.transpose(0, 3, 1, 2)[:, tiles.before:tiles.before + T] for x in total)
    return by_token(d_q, T).astype(q.dtype), d_k.astype(k_bTkH.dtype), d_v.astype(v_bTkV.dtype)


def in_turn(function: Any, *rows: jax.Array) -> Any:
    """function(*rows); a CPU does one row after the other, so that what a row needs stays in its cache."""
    def one_by_one(*rows: jax.Array) -> Any:
        found = jax.lax.map(lambda row: function(*(x[None] for x in row)), rows)
        return jax.tree.map(lambda x: x[:, 0], found)
    return jax.lax.platform_dependent(*rows, cpu=one_by_one, default=function)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_local(window: int | None, q_bTnH: jax.Array, k_bTkH: jax.Array, v_bTkV: jax.Array, sink_n: jax.Array | None,
                 begin_bT: jax.Array) -> jax.Array:
    return _forward(window, q_bTnH, k_bTkH, v_bTkV, sink_n, begin_bT)[0]


def _forward(window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, sink_n: jax.Array | None, begin: jax.Array
             ) -> tuple[jax.Array, Any]:
    out, logsum = in_turn(partial(forward, window, sink_n=sink_n), q, k, v, begin)
    return out, (q, k, v, sink_n, begin, out, logsum)


def _backward(window: int | None, kept: Any, d_out_bTnV: jax.Array) -> tuple[Any, ...]:
    q, k, v, sink_n, begin, out, logsum_bTn = kept
    delta_bTn = (out.astype(jnp.float32) * d_out_bTnV.astype(jnp.float32)).sum(-1)
    d_q, d_k, d_v = in_turn(partial(backward, window), q, k, v, begin, logsum_bTn, delta_bTn, d_out_bTnV)
    d_sink_n = None if sink_n is None else -(jnp.exp(sink_n[None, None] - logsum_bTn) * delta_bTn).sum((0, 1))
    return d_q, d_k, d_v, d_sink_n, None


attend_local.defvjp(_forward, _backward)
