"""Prefill attention on a TPU: many new tokens to one another and to a layer's cache, by splash attention.

The kernel ships with JAX (jax.experimental.pallas.ops.tpu.splash_attention). Its masks are static, while the position
at which a row's new tokens start is data. So the softmax is taken in parts, each with a static mask and with segment
ids that hide what a row does not have, and the parts are joined by the logarithms of their sums, as in Flash-Decoding.
In a sliding layer one part holds all: the new tokens and the window before them. In a full layer the new tokens are one
part, and each block of slots in use another. A sink belongs to one part only.

The plain-JAX oracle is `jaxllm.attention.attend`. Splash multiplies q and k as they come, so q brings the scale
1 / sqrt(H); it gives XLA no estimate of its cost, so that is added (cost.py); and it writes each logarithm 128 times,
so that only some heads are on their way at once.

Letters as in jaxllm/axes.py, on one device, inside shard_map; besides, P = b * k, pairs of a row and a kv head.
"""
import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from jaxllm.kernels.cost import with_cost
from jaxllm.kernels.decode_attention import LANES, divisor

QUERIES = 1024          # of a block at most
KEYS = 1024             # of a block at most: what meets the queries at once, within the 16 MiB of VMEM of a kernel
SLOTS = 4096            # of a part of a cache: its output goes through HBM once, and its slots not in use cost time
LOGSUM_BYTES = 2**25    # that splash writes at once, if one pair's are not more
NOTHING = -1e30         # logarithm of the sum where nothing is seen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """The softmax of every query over some of the keys."""
    out_PGTV: jax.Array         # float32
    logsum_PGT: jax.Array       # float32, the natural logarithm of the sum of exp(scores), a sink's included

    @classmethod
    def empty_like(cls, other: "Part") -> "Part":
        """Of the same queries over no keys."""
        return cls(jnp.zeros_like(other.out_PGTV), jnp.full_like(other.logsum_PGT, NOTHING))

    def join(self, other: "Part") -> "Part":
        """The softmax over the keys of both; none may be in both."""
        logsum = jnp.logaddexp(self.logsum_PGT, other.logsum_PGT)
        ours, theirs = (part.out_PGTV * jnp.exp(part.logsum_PGT - logsum)[..., None] for part in (self, other))
        return Part(ours + theirs, logsum)

    def join_over(self, axis: str) -> "Part":
        """The softmax over the keys of all places along a mesh axis."""
        peak = jax.lax.pmax(self.logsum_PGT, axis)
        weight = jnp.exp(self.logsum_PGT - peak)
        out, total = jax.lax.psum((self.out_PGTV * weight[..., None], weight), axis)
        return Part(out / total[..., None], peak + jnp.log(total))


def attend_newest(q_PGTH: jax.Array, k_PHS: jax.Array, v_PSV: jax.Array, first_P: jax.Array, window: int | None,
                  sink_PG: jax.Array | None, *, interpret: bool = False) -> Part:
    """Attention of the last T of S tokens to all of them, causal and within `window`; a sink counts here.

    The S tokens stand at positions first_P + (0..S-1) (int32), of which negative ones do not exist.
    """
    T, S = q_PGTH.shape[2], v_PSV.shape[1]
    most = KEYS if window is None else min(2 * round_up(window, LANES), KEYS)
    blocks = fit(T, QUERIES), fit(S, most)
    queries, before = round_up(T, blocks[0]), S - T
    mask = masks.LocalMask((queries, round_up(before + queries, blocks[1])),
                           (None if window is None else window - 1, 0), before)
    exists_PS = None if before == 0 else first_P[:, None] + jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :] >= 0
    return run(mask, blocks, q_PGTH, k_PHS, v_PSV, exists_PS, sink_PG, interpret)


def attend_before(found: Part, q_PGTH: jax.Array, k_PHS: jax.Array, v_PSV: jax.Array, count_P: jax.Array, *,
                  interpret: bool = False) -> Part:
    """`found` joined with the attention of all T queries to the first count_P (int32, of any size) of S slots.

    Blocks of SLOTS that no row has are not read.
    """
    T, S = q_PGTH.shape[2], v_PSV.shape[1]
    size = min(S, SLOTS)
    blocks = fit(T, QUERIES), fit(size, KEYS)
    mask = masks.FullMask((round_up(T, blocks[0]), round_up(size, blocks[1])))

    def visit(i: jax.Array, found: Part) -> Part:
        begin = jnp.minimum(i * size, S - size)         # the last block is moved back to fit: its slots count once
        k, v = (jax.lax.dynamic_slice_in_dim(x, begin, size, dim) for x, dim in ((k_PHS, 2), (v_PSV, 1)))
        place_1s = jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :]
        slot_1s = begin + place_1s
        seen_Ps = (place_1s < size) & (slot_1s >= i * size) & (slot_1s < count_P[:, None])
        return found.join(run(mask, blocks, q_PGTH, k, v, seen_Ps, None, interpret))

    return jax.lax.fori_loop(0, pl.cdiv(jnp.clip(jnp.max(count_P), 0, S), size), visit, found)


def run(mask: masks.Mask, blocks: tuple[int, int], q_PGTH: jax.Array, k_PHS: jax.Array, v_PSV: jax.Array,
        exists_PS: jax.Array | None, sink_PG: jax.Array | None, interpret: bool) -> Part:
    """Splash attention of each pair: a query sees a key if the mask says so and the key exists.

    blocks: queries and keys of a block. The mask's shape is that of the queries and keys filled up to whole ones.
    """
    (P, G, T, _), (T_padded, S_padded) = q_PGTH.shape, mask.shape
    sizes = splash.BlockSizes(*blocks, k_layout=splash.QKVLayout.SEQ_MINOR)
    kernel = splash.make_splash_mqa(masks.MultiHeadMask([mask] * G), block_sizes=sizes, save_residuals=True,
                                    head_shards=1, q_seq_shards=1, interpret=interpret)

    def pair(q_GTH: jax.Array, k_SH: jax.Array, v_SV: jax.Array, exists_S: jax.Array | None, sink_G: jax.Array | None
             ) -> tuple[jax.Array, tuple[jax.Array]]:
        segments = None if exists_S is None else splash.SegmentIds(jnp.ones((T_padded,), jnp.int32),
                                                                   exists_S.astype(jnp.int32))
        return kernel(q_GTH, k_SH, v_SV, segments, sink_G)

    def some(inputs: tuple) -> tuple[jax.Array, jax.Array]:
        cost = estimate(mask, blocks, *inputs[:4])
        out, (logsum,) = with_cost(jax.vmap(pair), cost, *inputs)
        return out[:, :, :T], logsum[:, :, :T]

    inputs = (pad(q_PGTH, 2, T_padded), pad(k_PHS, 2, S_padded).swapaxes(1, 2), pad(v_PSV, 1, S_padded), exists_PS,
              sink_PG)
    pairs = divisor(P, max(LOGSUM_BYTES // (4 * G * T_padded * LANES), 1))
    with jax.default_matmul_precision("highest" if q_PGTH.dtype == jnp.float32 else None):  # as jaxllm.linear.einsum
        found = jax.lax.map(some, jax.tree.map(lambda x: x.reshape(P // pairs, pairs, *x.shape[1:]), inputs))
    out, logsum = jax.tree.map(lambda x: x.reshape(P, *x.shape[2:]), found)
    return Part(out.astype(jnp.float32), logsum)


def estimate(mask: masks.Mask, blocks: tuple[int, int], q_PGTH: jax.Array, k_PSH: jax.Array, v_PSV: jax.Array,
             exists_PS: jax.Array | None) -> pl.CostEstimate:
    """Each query head reads the blocks of keys that a block of queries sees; queries and results move once."""
    (P, G, T, H), (S, V), (queries, keys) = q_PGTH.shape, v_PSV.shape[1:], blocks
    heads = P * G
    visits = heads * sum(bool(mask[slice(t, t + queries), slice(s, s + keys)].any())
                         for t in range(0, T, queries) for s in range(0, S, keys))
    segments = 0 if exists_PS is None else 4 * (heads * T * LANES + visits * keys * 8)
    return pl.CostEstimate(
        flops=2 * visits * queries * keys * (H + V), transcendentals=visits * queries * keys,
        bytes_accessed=(visits * keys + heads * T) * (H + V) * v_PSV.dtype.itemsize + 4 * heads * T * LANES + segments)


def fit(num: int, most: int) -> int:
    """The size of blocks for so many: a multiple of LANES, at most `most`."""
    return min(round_up(num, LANES), most)


def round_up(num: int, multiple: int) -> int:
    return -(-num // multiple) * multiple


def pad(x: jax.Array, dim: int, size: int) -> jax.Array:
    return jnp.pad(x, [(0, size - x.shape[dim] if at == dim else 0) for at in range(x.ndim)])
