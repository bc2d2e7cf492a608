"""Attention against float64 numpy (oracle.py): every key at once there, blocks, rings and chunks here."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import check, normal, wide

from jaxllm import attention
from jaxllm.attention import KEY_BLOCK, QUERY_BLOCK, attend, attend_cached, attend_sliding
from jaxllm.axes import make_mesh, spec
from jaxllm.cache import empty_layer
from jaxllm.config import LayerSpec


@pytest.fixture(autouse=True)
def one_device():
    """The mesh in context: attention names shardings, so it needs one."""
    with jax.set_mesh(make_mesh()):
        yield


def attention_case(rng, dtype, B, T, S, N, K, H, V, has_sinks, query_std=1.5):
    """Random q [B, T, N, H], k [B, S, K, H], v [B, S, K, V] and sinks [N], in numpy."""
    q, k = normal(rng, B, T, N, H, dtype=dtype, std=query_std), normal(rng, B, S, K, H, dtype=dtype)
    return q, k, normal(rng, B, S, K, V, dtype=dtype), normal(rng, N, std=2.0) if has_sinks else None


def attend_rows(q, k, v, q_pos_BT, k_pos_BS, window, sink_N):
    """The oracle, row by row."""
    rows = zip(*wide(q, k, v), q_pos_BT, k_pos_BS, strict=True)
    sink = None if sink_N is None else sink_N.astype(np.float64)
    return np.stack([oracle.attend(*row, window, sink) for row in rows])


def as_stored(k_BSKH: np.ndarray, v_BSKV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In the layout of the cache: [B, K, H, S] and [B, K, S, V]."""
    return k_BSKH.transpose(0, 2, 3, 1), v_BSKV.transpose(0, 2, 1, 3)


JITTED = jax.jit(attend, static_argnames="window")
# Numbers of keys: a few; one block of them less one, exactly, and one more; not a multiple; several whole blocks.
KEYS = [1, 40, KEY_BLOCK - 1, KEY_BLOCK, KEY_BLOCK + 1, KEY_BLOCK * 5 // 2 + 3, 3 * KEY_BLOCK]


@pytest.mark.parametrize("num_keys", KEYS)
@pytest.mark.parametrize(("window", "has_sinks"), [(None, False), (None, True), (9, True), (KEY_BLOCK + 50, False)])
def test_attend(num_keys, window, has_sinks):
    """The T newest of S tokens; four query heads a kv head, H and V unequal."""
    T = min(num_keys, 6)
    q, k, v, sink = attention_case(np.random.default_rng(num_keys), "float32", 2, T, num_keys, 8, 2, 24, 16, has_sinks)
    k_pos = np.tile(np.arange(num_keys, dtype=np.int32), (2, 1))
    q_pos = k_pos[:, num_keys - T:]
    ours = JITTED(q, *as_stored(k, v), q_pos, k_pos, window=window, sink_n=sink)
    check(ours, attend_rows(q, k, v, q_pos, k_pos, window, sink), "float32")


@pytest.mark.parametrize("num_keys", [40, KEY_BLOCK * 5 // 2 + 3])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("N", "K", "H", "V"), [(4, 4, 8, 20), (6, 1, 16, 4)])
def test_attend_in_bfloat16(num_keys, window, N, K, H, V):
    q, k, v, sink = attention_case(np.random.default_rng(0), "bfloat16", 2, 5, num_keys, N, K, H, V, window)
    k_pos = np.tile(np.arange(num_keys, dtype=np.int32), (2, 1))
    ours = JITTED(q, *as_stored(k, v), k_pos[:, -5:], k_pos, window=window, sink_n=sink)
    check(ours, attend_rows(q, k, v, k_pos[:, -5:], k_pos, window, sink), "bfloat16")


@pytest.mark.parametrize("num_keys", [40, 2 * KEY_BLOCK + 100])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_attend_to_rows_of_different_lengths(num_keys, has_sinks):
    """Empty slots hold huge numbers, a row may be empty altogether, and a ring's keys stand in no order."""
    q, k, v, sink = attention_case(np.random.default_rng(0), "float32", 4, 3, num_keys, 4, 2, 8, 12, has_sinks)
    length = np.array([0, 2, 17, num_keys])
    k_pos = np.where(np.arange(num_keys)[None] < length[:, None], np.arange(num_keys), -1).astype(np.int32)
    q_pos = (length[:, None] + np.arange(-3, 0)).astype(np.int32)         # of the short rows some are before 0: padding
    k, v = (np.where((k_pos < 0)[..., None, None], np.float32(1e4), x) for x in (k, v))
    turned = [np.roll(x, 5, axis=1) for x in (k, v, k_pos)] if num_keys <= KEY_BLOCK else [k, v, k_pos]
    ours = JITTED(q, *as_stored(*turned[:2]), q_pos, turned[2], window=None, sink_n=sink)
    expected = attend_rows(q, k, v, q_pos, k_pos, None, sink)
    check(ours, expected, "float32")
    assert not ours[0].any() and not expected[0].any()        # who sees nothing gets zeros, not NaN


def test_full_attention_reads_no_blocks_past_the_queries():
    """Of three blocks only the first can be seen; the others hold NaN, which any arithmetic on them would spread."""
    S = 3 * KEY_BLOCK
    q, k, v, _ = attention_case(np.random.default_rng(0), "float32", 2, 4, S, 4, 2, 8, 8, False)
    k[:, KEY_BLOCK:], v[:, KEY_BLOCK:] = np.nan, np.nan
    k_pos = np.tile(np.arange(S, dtype=np.int32), (2, 1))
    q_pos = np.array([[0, 1, 2, 3], [7, 8, 9, KEY_BLOCK - 1]], np.int32)
    ours = JITTED(q, *as_stored(k, v), q_pos, k_pos, window=None, sink_n=None)
    seen = slice(KEY_BLOCK)
    check(ours, attend_rows(q, k[:, seen], v[:, seen], q_pos, k_pos[:, seen], None, None), "float32")


def sliding_lengths(window):
    block = max(window, QUERY_BLOCK)
    return [block // 2, block, 2 * block + 3]


@pytest.mark.parametrize(("window", "num"), [(w, T) for w in (1, 7, 128, 200) for T in sliding_lengths(w)])
def test_attend_sliding(window, num):
    """Below, at and above one block of queries; one row starts at 0, so that the keys before it do not exist."""
    S = window - 1 + num
    q, k, v, sink = attention_case(np.random.default_rng(num), "float32", 2, num, S, 4, 2, 8, 12, window != 7)
    start = np.array([0, 1000], np.int32)
    q_pos = start[:, None] + np.arange(num, dtype=np.int32)
    k_pos = start[:, None] + np.arange(-(window - 1), num, dtype=np.int32)
    k[0, :window - 1], v[0, :window - 1] = 1e4, 1e4
    run = jax.jit(attend_sliding, static_argnames="window")
    ours = run(q, *as_stored(k, v), start, window=window, sink_n=sink)
    check(ours, attend_rows(q, k, v, q_pos, k_pos, window, sink), "float32")


@pytest.mark.parametrize(("window", "in_flight", "dtype"), [
    (None, 1, "float32"), (7, 1, "float32"), (7, 4, "float32"), (40, 1, "float32"), (7, 4, "bfloat16")])
def test_attend_cached(window, in_flight, dtype):
    """Four rows come in chunks of 1, 4 and 12, right-padded, some with nothing in them; window 40 is never filled."""
    layer = LayerSpec(4, 2, 8, 12, 8, 1e4, window, True, False)
    counts = {12: [[1, 0, 8, 3], [12, 1, 0, 5]], 4: [[4, 3, 0, 4], [1, 1, 1, 0], [2, 4, 3, 4]], 1: [[1, 1, 0, 1]] * 3}
    q, k, v, sink = attention_case(np.random.default_rng(0), dtype, 4, 36, 36, 4, 2, 8, 12, True)
    cache = empty_layer(layer, 4, 32, in_flight, jnp.dtype(dtype))
    run = jax.jit(attend_cached, static_argnames="window")
    start_B, k_pos = np.zeros(4, np.int32), np.tile(np.arange(36, dtype=np.int32), (4, 1))
    for T, count_B in [(T, np.array(row, np.int32)) for T, rows in counts.items() for row in rows]:
        q_pos = start_B[:, None] + np.arange(T, dtype=np.int32)
        at = np.arange(4)[:, None], q_pos
        new = (jax.device_put(x[at], spec("attention_batch", None, "heads", None)) for x in (q, k, v))
        length_B = (jax.device_put(x, spec("attention_batch")) for x in (start_B, start_B + count_B))
        out, cache = run(*new, *length_B, cache, window=window, sink_N=jax.device_put(sink, spec("heads")))
        real = np.arange(T) < count_B[:, None]
        check(np.asarray(out)[real], attend_rows(q[at], k, v, q_pos, k_pos, window, sink)[real], dtype)
        start_B = start_B + count_B


def test_row_after_row_is_all_at_once(monkeypatch):
    """float32 sums of other orders, of values to 4."""
    monkeypatch.setattr(attention, "LARGE", 1)
    B, T = 4, 12
    q, k, v, sink = attention_case(np.random.default_rng(0), "float32", B, T, T, 4, 2, 6, 5, True)
    position = np.tile(np.arange(T, dtype=np.int32), (B, 1)) + np.arange(B, dtype=np.int32)[:, None]
    rows = q, *as_stored(k, v), position, position
    in_turn, at_once = (jax.jit(partial(function, window=7, sink_n=sink))
                        for function in (attention.attend_part, attention.attend_rows))
    assert "while" in in_turn.lower(*rows).as_text() and "while" not in at_once.lower(*rows).as_text()
    for ours, expected in zip(in_turn(*rows), at_once(*rows), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)
