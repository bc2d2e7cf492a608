"""Prefill attention in interpret mode, against `attend_cached` as CPUs run it, which test_attention.py checks against
float64 numpy; and compiled for TPUs that are not here.
"""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracle import TOLERANCE, normal

from jaxllm.attention import attend_cached
from jaxllm.axes import make_mesh, spec
from jaxllm.cache import LayerCache
from jaxllm.kernels import prefill_attention
from jaxllm.kernels.prefill_attention import NOTHING, Part, attend_before
from jaxllm.splash import attend_by_splash

GARBAGE = np.float32(1e4)       # in slots that no query may see


@pytest.fixture
def small_blocks(monkeypatch):
    """So that few tokens make several blocks: the released shapes have 1024, and parts of 4096 slots."""
    for name, size in (("QUERIES", 128), ("KEYS", 128), ("SLOTS", 256)):
        monkeypatch.setattr(prefill_attention, name, size)


def compare(T, S, window, n, k, has_sinks, chunks, dtype="float32", mesh=None, slots=None,
            H=24, V=16):
    """Chunks of T tokens, of which each row takes a stated number, into one cache; both see what is left by theirs."""
    rng = np.random.default_rng(S + T)
    b = len(chunks[0])
    with jax.set_mesh(make_mesh(mesh)):
        rows, heads = spec("batch"), spec("batch", None, "heads", None)
        ours = jax.jit(partial(attend_by_splash, window if window and window <= S else None, interpret=True))
        theirs = jax.jit(attend_cached, static_argnames="window")
        shapes = (b, k, H, S), (b, k, S, V)
        cache, ours_cache = (LayerCache(*(
            jax.device_put(jnp.full(shape, GARBAGE, dtype), P(*spec("batch", "kv_heads"), *split))
            for shape, split in zip(shapes, ((None, axis), (axis, None)), strict=True))) for axis in (None, slots))
        sink = jax.device_put(normal(rng, n, std=2.0), spec("heads")) if has_sinks else None
        start_b = np.zeros(b, np.int32)
        for count in chunks:
            end_b = start_b + np.array(count, np.int32)
            q, new_k, new_v = (jax.device_put(normal(rng, b, T, *shape, dtype=dtype), heads)
                               for shape in ((n, H), (k, H), (k, V)))
            inputs = q, new_k, new_v, *(jax.device_put(x, rows) for x in (start_b, end_b))
            out, ours_cache = ours(*inputs, ours_cache, sink)
            expected, cache = theirs(*inputs, cache, window=window, sink_N=sink)
            is_real_bT = np.arange(T)[None] < (end_b - start_b)[:, None]
            assert out.dtype == dtype and out.shape == expected.shape and np.isfinite(np.asarray(out, np.float32)).all()
            # Both are within the tolerance of float64; each part of ours is rounded once more.
            limit = 2 * TOLERANCE[dtype] * np.abs(np.asarray(expected, np.float32)[is_real_bT]).max()
            np.testing.assert_allclose(np.asarray(out, np.float32)[is_real_bT],
                                       np.asarray(expected, np.float32)[is_real_bT], rtol=0, atol=limit)
            jax.tree.map(np.testing.assert_array_equal, ours_cache, cache)
            start_b = end_b


# of each row's T tokens how many count: from 0, from inside a block, from the edge of one, none, up to the last slot
FULL = [[9, 150, 128, 0, 1], [150, 0, 128, 3, 127], [150, 150, 44, 150, 150], [91, 100, 100, 150, 122]]


@pytest.mark.parametrize(("S", "n", "k", "has_sinks", "dtype"), [
    (400, 4, 4, False, "float32"), (400, 8, 2, True, "float32"), (512, 4, 1, False, "bfloat16")])
def test_full_layer(S, n, k, has_sinks, dtype, small_blocks):
    """Rows that start and end anywhere, several blocks of queries, keys and slots, the last ones not whole."""
    assert max(map(sum, zip(*FULL, strict=True))) == 400
    compare(150, S, None, n, k, has_sinks, FULL, dtype)


@pytest.mark.parametrize(("T", "window", "S", "n", "k", "has_sinks", "dtype"), [
    (150, 128, 128, 8, 2, True, "float32"), (150, 128, 256, 4, 4, False, "float32"), (40, 9, 9, 4, 1, True, "bfloat16"),
    (300, 20, 23, 4, 2, True, "float32"), (20, 200, 256, 4, 2, False, "bfloat16"), (3, 5, 6, 2, 1, True, "float32")])
def test_sliding_layer(T, window, S, n, k, has_sinks, dtype, small_blocks):
    """Windows shorter and longer than a chunk, rings that hold the window alone or more, before and after they wrap."""
    chunks = [[min(T, count) for count in counts] for counts in
              ([T, 7, 0, 1], [T, T, 1, T - 1], [2, T, T, 0], [T, T, T, T])]
    compare(T, S, window, n, k, has_sinks, chunks, dtype)


def test_cut_before_the_window(small_blocks):
    """A ring of fewer slots than the window: rows are not longer than it."""
    compare(20, 50, 128, 4, 2, True, [[20, 3, 0], [20, 20, 10], [10, 20, 20]])


@pytest.mark.parametrize(("window", "has_sinks", "slots"), [
    (None, False, None), (20, True, None), (None, True, "expert")])
def test_on_a_mesh(window, has_sinks, slots, small_blocks):
    """Rows and heads split; the slots too, so that chunks begin, end or lie before, in and behind a device's."""
    compare(40, 80, window, 8, 2, has_sinks, [[25, 7, 0, 1], [3, 40, 40, 39], [40, 0, 20, 40]],
            mesh="data=2,expert=2,tensor=2", slots=slots)


NONE = Part(jnp.zeros((2, 4, 20, 16), jnp.float32), jnp.full((2, 4, 20), NOTHING, jnp.float32))


def slots_case():
    """Queries, and 300 slots of which two rows have all and 90; and the attention to the first `count` of some."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(normal(rng, 2, *shape, std=std)) for shape, std in (
        ((4, 20, 24), 0.25), ((24, 300), 1.0), ((300, 16), 1.0)))
    return q, k, v, jnp.array([300, 90]), jax.jit(partial(attend_before, NONE, interpret=True))


def test_what_no_row_has_is_not_read(small_blocks):
    """NaN in the blocks of slots past the longest row, which any arithmetic on them would spread."""
    q, k, v, _, run = slots_case()
    count = jnp.array([256, 3])
    found = run(q, k.at[..., 256:].set(jnp.nan), v.at[:, 256:].set(jnp.nan), count)
    jax.tree.map(np.testing.assert_array_equal, found, run(q, k, v, count))
    assert np.isfinite(found.out_PGTV).all()


def test_parts_are_one_softmax(small_blocks):
    """Slots in two pieces, as two devices may hold them, of which a row has none of the second: as all at once."""
    q, k, v, count, run = slots_case()
    whole, first = run(q, k, v, count), run(q, k[..., :140], v[:, :140], count)
    joined = first.join(run(q, k[..., 140:], v[:, 140:], count - 140))
    # float32: scores of up to 5 are off by some 2^-21, and so are the weights; sums are in another order
    np.testing.assert_allclose(joined.out_PGTV, whole.out_PGTV, rtol=0, atol=1e-5)
    np.testing.assert_allclose(joined.logsum_PGT, whole.logsum_PGT, rtol=0, atol=1e-5)
    scores = np.einsum("pgth,phs->pgts", q, k)
    scores[1, ..., 90:] = -np.inf
    np.testing.assert_allclose(whole.logsum_PGT, np.logaddexp.reduce(scores, -1), rtol=0, atol=1e-5)
