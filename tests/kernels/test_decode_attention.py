"""The decode kernels in interpret mode: attention against float64 numpy (oracle.py), writing against jaxllm.cache.

What no query may see is 1e4 wherever it lies: empty slots, slots of drafts taken back, positions behind every window.
"""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import check, normal, wide

from jaxllm.attention import attend_cached, attend_slots
from jaxllm.axes import make_mesh, spec
from jaxllm.cache import LayerCache, write
from jaxllm.kernels import cache_write, decode_attention
from jaxllm.kernels.cache_write import write_cache
from jaxllm.kernels.decode_attention import choose_step, find_block

GARBAGE = np.float32(1e4)


def attend(q, k, v, start_b, end_b, window, sink_n):
    """The kernel, compiled anew: tests change its constants."""
    run = partial(decode_attention.decode_attention, window=window, interpret=True)
    return jax.jit(run)(q, k, v, start_b, end_b, sink_n=sink_n)


def attention_case(dtype, start_b, end_b, T, S, window, n, k, H, V, has_sinks):
    """Arguments of decode_attention, and the oracle's output from the keys in order of position."""
    rng = np.random.default_rng(S + T)
    b, most = len(start_b), max(end_b)
    q, sink = normal(rng, b, T, n, H, dtype=dtype, std=1.5), normal(rng, n, std=2.0) if has_sinks else None
    keys, values = normal(rng, b, most, k, H, dtype=dtype), normal(rng, b, most, k, V, dtype=dtype)
    k_bSkH, v_bSkV = (np.full((b, S, k, size), GARBAGE, keys.dtype) for size in (H, V))
    out = []
    for row, (start, end) in enumerate(zip(start_b, end_b, strict=True)):
        seen = np.arange(0 if window is None else max(start - window + 1, 0), end)
        k_bSkH[row, seen % S], v_bSkV[row, seen % S] = keys[row, seen], values[row, seen]
        out.append(oracle.attend(*wide(q[row], keys[row, seen], values[row, seen]), start + np.arange(T), seen, window,
                                 *wide(sink)))
    start_b, end_b = np.array(start_b, np.int32), np.array(end_b, np.int32)
    stored = k_bSkH.transpose(0, 2, 3, 1), v_bSkV.transpose(0, 2, 1, 3)
    return (q, *stored, start_b, end_b, window, sink), np.stack(out)


@pytest.mark.parametrize(("T", "n", "k", "has_sinks", "S", "dtype"), [
    (1, 2, 2, False, 300, "float32"), (1, 4, 1, True, 300, "bfloat16"), (3, 8, 2, True, 384, "float32"),
    (8, 16, 1, False, 300, "float32"), (8, 32, 2, True, 300, "bfloat16"), (3, 1, 1, True, 40, "float32")])
def test_full_cache(T, n, k, has_sinks, S, dtype, monkeypatch):
    """Blocks of 128 slots, the last whole, partial or the only one; rows end in each of them, and some are empty."""
    monkeypatch.setattr(decode_attention, "FEW_SLOTS", 128)
    start = [0, S - T, 0, 0, min(128, S) - T, min(126, S - T), 5]
    end = [0, S, T, 1, min(128, S), min(126 + T, S), 5]
    case, expected = attention_case(dtype, start, end, T, S, None, n, k, 24, 16, has_sinks)
    assert choose_step(len(start), k, S, 40 * 4, 4 * T * n // k, True)[2] == min(S, 128)
    ours = attend(*case)
    check(ours, expected, dtype)                # its reasons stand beside oracle.TOLERANCE
    assert not np.asarray(ours[0]).any()        # who sees nothing gets zeros, not NaN


@pytest.mark.parametrize(("T", "n", "k", "has_sinks", "window", "S", "dtype"), [
    (1, 16, 1, True, 128, 128, "float32"), (8, 8, 2, True, 128, 135, "float32"), (8, 16, 1, True, 128, 135, "bfloat16"),
    (4, 2, 2, False, 128, 256, "float32"), (3, 4, 1, True, 7, 9, "bfloat16"), (3, 8, 2, False, 200, 300, "float32"),
    (3, 4, 1, True, 128, 40, "float32")])
def test_ring(T, n, k, has_sinks, window, S, dtype, monkeypatch):
    """Before the ring is full, when it wraps within the new tokens, and later; one may be shorter than its window."""
    if window == 200:                           # a ring of several blocks
        monkeypatch.setattr(decode_attention, "BLOCK_BYTES", 128 * 40 * 4)
    end = [0, T, 2, S - 1] + ([S, S + 2, 2 * S + 1, 5 * S] if window <= S else [])
    start = [max(e - (T if e != 2 * S + 1 else 1), 0) for e in end]
    case, expected = attention_case(dtype, start, end, T, S, window, n, k, 24, 16, has_sinks)
    ours = attend(*case)
    check(ours, expected, dtype)
    assert not np.asarray(ours[0]).any()


def test_each_block_in_use_is_copied_once():
    """A copy is made where a step's block is not the one before; a row with nothing in it has one block nevertheless.
    """
    end_b, k, S, block = np.array([0, 1000, 128, 129, 1, 0, 700], np.int32), 3, 1000, 128
    steps = np.stack(np.meshgrid(np.arange(7), np.arange(k), np.arange(8), indexing="ij"), -1).reshape(-1, 3)
    find = jax.vmap(lambda step: jnp.stack(find_block(*step, jnp.asarray(end_b), k, S, block)))
    visited = np.asarray(find(jnp.asarray(steps, jnp.int32)))
    copied = [tuple(step) for n, step in enumerate(visited) if n == 0 or (step != visited[n - 1]).any()]
    assert copied == [(row, head, i) for row, end in enumerate(end_b) for head in range(k)
                      for i in range(max(-(-end // block), 1))]
    in_use = steps[:, 2] < -(-end_b // block)[steps[:, 0]]
    np.testing.assert_array_equal(visited[in_use], steps[in_use])


def test_blocks_past_the_length_take_no_part():
    """NaN in all of them, which any arithmetic on them would spread."""
    S, T = 1500, 2
    case, expected = attention_case("float32", [510, 0, 3], [512, 0, 4], T, S, None, 4, 2, 8, 8, False)
    case[1][..., 512:], case[2][:, :, 512:] = np.nan, np.nan
    check(attend(*case), expected, "float32")


@pytest.mark.parametrize(("S", "T", "dtype"), [
    (5, 3, "float32"), (5, 8, "bfloat16"), (40, 8, "float32"), (128, 1, "bfloat16"), (128, 8, "float32"),
    (129, 8, "bfloat16"), (135, 1, "float32"), (135, 3, "bfloat16"), (135, 8, "float32"), (272, 8, "bfloat16"),
    (256, 1, "bfloat16"), (256, 8, "bfloat16"), (384, 8, "float32")])
def test_write(S, T, dtype, monkeypatch):
    """From slots around the edges of tiles, in rows that wrapped before or did not, T tokens or fewer or none."""
    if S in (129, 256):                         # one kv head a step, or a few rows; otherwise all go through at once
        monkeypatch.setattr(cache_write, "STEP_BYTES", {129: 1, 256: 2**15}[S])
    rng = np.random.default_rng(S)
    slots = sorted({edge + at for edge in (0, 16, 128, S) for at in (-7, -2, -1, 0) if 0 <= edge + at < S})
    b = len(slots)
    start_b = np.array(slots, np.int32) + S * rng.integers(0, 3, b, np.int32)
    end_b = start_b + np.where(np.arange(b) % 3, T, rng.integers(0, T + 1, b)).astype(np.int32)
    shapes = (b, 2, 6, S), (b, 2, S, 4), (b, T, 2, 6), (b, T, 2, 4)
    k, v, new_k, new_v = (jnp.asarray(normal(rng, *shape, dtype=dtype)) for shape in shapes)
    ours = jax.jit(partial(write_cache, interpret=True))(k, v, new_k, new_v, start_b, end_b)
    with jax.set_mesh(make_mesh()):             # `write` names shardings, so it needs one
        expected = write(LayerCache(k, v), new_k, new_v, start_b, end_b)
    np.testing.assert_array_equal(ours[0], expected.k_BKHS)
    np.testing.assert_array_equal(ours[1], expected.v_BKSV)


@pytest.mark.parametrize("mesh", [None, "data=2,expert=2,tensor=2"])
@pytest.mark.parametrize(("window", "S"), [(None, 64), (20, 23)])
def test_decoding_with_drafts_taken_back(window, S, mesh):
    """Steps of 4 tokens of which 1 to 4 are accepted, or of 1 to 4 tokens, against attend_cached, on each device."""
    rng = np.random.default_rng(0)
    b, n, k, H, V, T = 4, 8, 2, 12, 8, 4
    data, heads = spec("batch"), spec("batch", None, "heads", None)
    cache_spec = spec("batch", "kv_heads", None, None)
    with jax.set_mesh(make_mesh(mesh)):
        ours = jax.jit(partial(attend_slots, window, by_kernel=True, interpret=True))
        theirs = jax.jit(attend_cached, static_argnames="window")
        ours_cache = cache = LayerCache(*(jax.device_put(np.full(shape, GARBAGE), cache_spec)
                                          for shape in ((b, k, H, S), (b, k, S, V))))
        sink = jax.device_put(normal(rng, n), spec("heads"))
        length_b = np.zeros(b, np.int32)
        for _ in range(12):
            count_b, accepted_b = rng.integers(1, T + 1, (2, b), np.int32)
            start_b, end_b = (jax.device_put(x, data) for x in (length_b, length_b + count_b))
            q, new_k, new_v = (jax.device_put(normal(rng, b, T, *shape), heads) for shape in ((n, H), (k, H), (k, V)))
            out, ours_cache = ours(q, new_k, new_v, start_b, end_b, ours_cache, sink)
            expected, cache = theirs(q, new_k, new_v, start_b, end_b, cache, window=window, sink_N=sink)
            check(out, np.asarray(expected), "float32")         # both in float32, sums of other orders
            jax.tree.map(np.testing.assert_array_equal, ours_cache, cache)
            length_b = length_b + np.minimum(count_b, accepted_b)


@pytest.mark.parametrize(("mesh", "part", "b"), [("expert=8", 5, 1), ("expert=4,tensor=2", 256, 3),
                                                 ("data=2,expert=2,tensor=2", 300, 2)])
def test_slots_split_over_places(mesh, part, b, monkeypatch):
    """Steps across the borders of parts, of one block of slots or three, by kernels and by plain JAX. Rows stand in
    different parts, and one has nothing in it at first."""
    monkeypatch.setattr(decode_attention, "FEW_SLOTS", 128)
    places, (n, k, H, V, T) = make_mesh(mesh).shape["expert"], (4, 2, 12, 8, 4)
    rng, S = np.random.default_rng(0), places * part
    length_b = np.array([2 * part - 6, part - 3, 0][:b], np.int32)
    with jax.set_mesh(make_mesh(mesh)):
        data, heads = spec("batch"), spec("batch", None, "heads", None)
        ours = jax.jit(partial(attend_slots, None, by_kernel=True, interpret=True))
        theirs = jax.jit(attend_cached, static_argnames="window")
        places_of = spec("batch", "kv_heads", None, "slots"), spec("batch", "kv_heads", "slots", None)
        ours_cache = cache = LayerCache(*(jax.device_put(normal(rng, *shape), place) for shape, place in zip(
            ((b, k, H, S), (b, k, S, V)), places_of, strict=True)))
        sink = jax.device_put(normal(rng, n), spec("heads"))
        for _ in range(4):
            count_b = rng.integers(0, T + 1, b, np.int32)
            start_b, end_b = (jax.device_put(x, data) for x in (length_b, length_b + count_b))
            q, new_k, new_v = (jax.device_put(normal(rng, b, T, *shape), heads) for shape in ((n, H), (k, H), (k, V)))
            out, ours_cache = ours(q, new_k, new_v, start_b, end_b, ours_cache, sink)
            expected, cache = theirs(q, new_k, new_v, start_b, end_b, cache, window=None, sink_N=sink)
            check(out, np.asarray(expected), "float32")         # both in float32, sums of other orders
            jax.tree.map(np.testing.assert_array_equal, ours_cache, cache)
            length_b = length_b + count_b


def test_refused_shapes():
    (q, *case), _ = attention_case("float32", [0], [1], 1, 8, None, 2, 2, 4, 4, False)
    with pytest.raises(ValueError, match="multiple of k"):
        decode_attention.decode_attention(q[:, :, :1], *case)
    k, v, new = jnp.zeros((1, 1, 4, 16)), jnp.zeros((1, 1, 16, 4)), jnp.zeros((1, 9, 1, 4))
    with pytest.raises(ValueError, match="at most 8"):
        write_cache(k, v, new, new, *case[2:4])
    with pytest.raises(ValueError, match="must be"):
        write_cache(k, v[:, :, :8], new, new, *case[2:4])
