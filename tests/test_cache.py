"""The cache: its bytes, and that prefill in any chunks, decode, drafts and their rejection equal the full forward."""
import dataclasses

import jax
import numpy as np
import pytest
from hub_maker import tiny_config, write_hub

import jaxllm
from jaxllm.attention import KEY_BLOCK
from jaxllm.generate.step import place

WINDOW = 7
MAX_LEN = 48
NUM_TOKENS = 40
# float32 sums in another order, through 3 layers, at logits of standard deviation 2: up to 6e-6 was seen. A key too
# many or too few, or one in the wrong place, moves logits by 0.01 and more.
TOLERANCE = 2e-5


def write_model(folder, **changes):
    write_hub(folder, tiny_config(**{
        "hidden_size": 32, "num_hidden_layers": 3, "hybrid_layer_pattern": [0, 1, 1], "moe_layer_freq": [0, 0, 1],
        "head_dim": 12, "v_head_dim": 8, "swa_head_dim": 16, "swa_v_head_dim": 12, "partial_rotary_factor": 0.5,
        "intermediate_size": 32, "moe_intermediate_size": 16, "sliding_window": WINDOW, "sliding_window_size": WINDOW,
        "max_position_embeddings": 2048} | changes))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(folder):
    return jaxllm.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def tokens_BT():
    return np.random.default_rng(0).integers(0, 96, (4, NUM_TOKENS), np.int32)


@pytest.fixture(scope="module")
def full_BTW(model, tokens_BT):
    logits = model.logits(tokens_BT)
    assert 1.5 < logits.std() < 2.5            # the tolerance means nothing without the scale
    return logits


def new_cache(model, batch=4, max_len=MAX_LEN, in_flight=1):
    return jaxllm.init_cache(model.config, model.mesh, batch, max_len, in_flight, dtype=model.dtype)


def feed(model, cache, tokens_BT, count_B, T, full_BTW=None):
    """Gives the next count_B tokens of each row, in a call of T; checks their logits where full_BTW is given."""
    start_B = np.array(cache.length_B)         # a copy: the cache is donated
    count_B = np.asarray(count_B, np.int32)
    at_BT = np.minimum(start_B[:, None] + np.arange(T), tokens_BT.shape[1] - 1)
    chunk_BT = np.take_along_axis(tokens_BT, at_BT, axis=1)
    logits_BW, cache = jaxllm.prefill(model.transformer, cache, chunk_BT, count_B)
    np.testing.assert_array_equal(cache.length_B, start_B + count_B)
    if full_BTW is not None:
        rows = np.flatnonzero(count_B)
        np.testing.assert_allclose(np.asarray(logits_BW)[rows], full_BTW[rows, (start_B + count_B - 1)[rows]],
                                   rtol=0, atol=TOLERANCE)
    return np.asarray(logits_BW), cache


def truncate(model, cache, length_B):
    """The same cache with fewer tokens: what comes after a rejected draft."""
    length_B = np.asarray(length_B, np.int32)
    return dataclasses.replace(cache, length_B=place(model.transformer, length_B, "batch"))


# --- bytes

@pytest.mark.parametrize("in_flight", [1, 4])
@pytest.mark.parametrize("max_len", [5, 16, 1000])
@pytest.mark.parametrize(("mesh", "dtype", "full_heads", "sliding_heads"), [
    (None, "float32", 2, 4), ("tensor=4", "bfloat16", 4, 4), ("tensor=8", "float32", 8, 8),
    ("data=2,tensor=4", "float32", 4, 4)])
def test_bytes(folder, mesh, dtype, full_heads, sliding_heads, max_len, in_flight):
    """Counted from the arrays. One full layer of K 12 and V 8 wide, which grows, from 128 on by whole tiles; two
    sliding ones of 16 and 12."""
    config, mesh = jaxllm.Config.from_hub(folder), jaxllm.make_mesh(mesh)
    itemsize = {"float32": 4, "bfloat16": 2}[dtype]
    full = full_heads * {5: 5, 16: 16, 1000: 1024}[max_len] * (12 + 8)
    sliding = sliding_heads * min(max_len, WINDOW + in_flight - 1) * (16 + 12)
    expected = 4 * (full + 2 * sliding) * itemsize
    assert jaxllm.cache_bytes(config, 4, max_len, itemsize, in_flight, mesh.shape["tensor"]) == expected
    cache = jaxllm.init_cache(config, mesh, 4, max_len, in_flight, dtype=dtype)
    leaves = jax.tree.leaves(cache.layers)
    assert sum(x.nbytes for x in leaves) == expected
    # Every device holds its share and no more.
    assert sum(shard.data.nbytes for x in leaves for shard in x.addressable_shards) == expected
    assert {x.dtype for x in leaves} == {np.dtype(dtype)} and cache.length_B.shape == (4,)


def test_rings_do_not_grow(folder):
    """From max_len 100 to 100,096 only the full layer's bytes change; with no full layer, nothing does."""
    config = jaxllm.Config.from_hub(folder)
    short, long = (jaxllm.cache_bytes(config, 1, max_len, 4) for max_len in (100, 100_096))
    assert long - short == 2 * (100_096 - 100) * (12 + 8) * 4
    sliding = dataclasses.replace(config, hybrid_layer_pattern=(1, 1, 1))
    assert jaxllm.cache_bytes(sliding, 1, 100, 4) == jaxllm.cache_bytes(sliding, 1, 100_096, 4) == 3 * 4 * 7 * 28 * 4


# --- prefill and decode

@pytest.mark.parametrize("chunk", [1, 5, WINDOW - 1, WINDOW, WINDOW + 1, NUM_TOKENS])
def test_prefill_in_chunks(model, tokens_BT, full_BTW, chunk):
    """Rows of 37, 23, 9 and 1 tokens; the shorter get nothing in the later chunks. Then three tokens one by one."""
    length_B, cache = np.array([37, 23, 9, 1]), new_cache(model)
    for begin in range(0, 37, chunk):
        _, cache = feed(model, cache, tokens_BT, np.clip(length_B - begin, 0, chunk), chunk, full_BTW)
    for _ in range(3):
        _, cache = feed(model, cache, tokens_BT, [1, 1, 1, 1], 1, full_BTW)
    np.testing.assert_array_equal(cache.length_B, length_B + 3)


def test_decode_past_several_turns_of_the_ring(model, tokens_BT, full_BTW):
    """Token by token from rows that stand at different places in the ring; 30 steps are more than 4 turns of 7."""
    _, cache = feed(model, new_cache(model), tokens_BT, [1, 8, 5, 7], 8, full_BTW)
    for _ in range(30):
        start_B = np.array(cache.length_B)
        logits_BW, cache = jaxllm.decode(model.transformer, cache, tokens_BT[np.arange(4), start_B])
        np.testing.assert_allclose(logits_BW, full_BTW[np.arange(4), start_B], rtol=0, atol=TOLERANCE)


def test_more_keys_than_one_block(model):
    """A cache of more slots than attention visits at a time, beside a short row."""
    num = KEY_BLOCK + 40
    tokens_BT = np.random.default_rng(1).integers(0, 96, (2, num), np.int32)
    full_BTW, cache = model.logits(tokens_BT), new_cache(model, 2, num)
    for count_B in ([num // 2, 30], [num - num // 2 - 3, 0]):
        _, cache = feed(model, cache, tokens_BT, count_B, num // 2, full_BTW)
    for _ in range(3):
        _, cache = feed(model, cache, tokens_BT, [1, 1], 1, full_BTW)


def test_on_a_mesh(folder, tokens_BT, full_BTW):
    """Rows over data, heads over tensor, the full layer's two kv heads repeated to four."""
    model = jaxllm.load(folder, mesh="data=2,tensor=4", dtype="float32")
    cache = new_cache(model, in_flight=2)
    for count_B in ([9, 4, 1, 0], [9, 9, 3, 2], [9, 9, 9, 9]):
        _, cache = feed(model, cache, tokens_BT, count_B, 9, full_BTW)
    for _ in range(4):
        _, cache = feed(model, cache, tokens_BT, [2, 2, 1, 2], 2, full_BTW)
    for x in jax.tree.leaves(cache.layers):
        assert x.sharding.spec[:2] == (("data", "expert"), "tensor")
        assert x.addressable_shards[0].data.nbytes * 8 == x.nbytes


def test_rows_without_tokens_stay_as_they_are(model, tokens_BT, full_BTW):
    _, cache = feed(model, new_cache(model), tokens_BT, [9, 9, 9, 9], 9)
    before = [np.array(x) for x in jax.tree.leaves(cache)]
    _, cache = feed(model, cache, tokens_BT, [0, 1, 0, 0], 1, full_BTW)
    _, cache = feed(model, cache, tokens_BT, [0, 3, 0, 0], 9, full_BTW)
    for old, new in zip(before, map(np.asarray, jax.tree.leaves(cache)), strict=True):
        np.testing.assert_array_equal(new[[0, 2, 3]], old[[0, 2, 3]])
        assert (new[1] != old[1]).any()
    feed(model, cache, tokens_BT, [1, 1, 1, 1], 1, full_BTW)


# --- several tokens in flight

def test_several_tokens_a_step(model, tokens_BT, full_BTW):
    _, cache = feed(model, new_cache(model, in_flight=4), tokens_BT, [8, 3, 1, 5], 8, full_BTW)
    for count_B in [[4, 4, 4, 4], [4, 1, 2, 3]] * 4:
        _, cache = feed(model, cache, tokens_BT, count_B, 4, full_BTW)


def reject_drafts(model, tokens_BT, full_BTW, in_flight):
    """Largest error of the logits after any of 8 rounds: four tokens go in, the last 1 to 3 are taken back."""
    rng, errors = np.random.default_rng(0), []
    _, cache = feed(model, new_cache(model, in_flight=in_flight), tokens_BT, [8, 3, 1, 5], 8)
    for _ in range(8):
        start_B, accepted_B = np.array(cache.length_B), rng.integers(1, 4, 4)
        drafts_BT = np.array(tokens_BT)
        for row, keep in zip(drafts_BT, start_B + accepted_B, strict=True):
            row[keep:] = (row[keep:] + 1) % 96
        _, cache = feed(model, cache, drafts_BT, [4, 4, 4, 4], 4)
        logits_BW, cache = feed(model, truncate(model, cache, start_B + accepted_B), tokens_BT, [1, 1, 1, 1], 1)
        errors.append(np.abs(logits_BW - full_BTW[np.arange(4), start_B + accepted_B]).max())
    return max(errors)


def test_rejected_drafts_leave_no_trace(model, tokens_BT, full_BTW):
    assert reject_drafts(model, tokens_BT, full_BTW, in_flight=4) < TOLERANCE


def test_drafts_need_their_slots(model, tokens_BT, full_BTW):
    """With a ring of the bare window the drafts overwrite keys that are needed again: the test above can fail."""
    assert reject_drafts(model, tokens_BT, full_BTW, in_flight=1) > 100 * TOLERANCE


# --- limits, donation

def test_an_overrun_row_gives_nan_and_the_others_do_not(model, tokens_BT, full_BTW):
    _, cache = feed(model, new_cache(model, max_len=12), tokens_BT, [12, 11, 3, 10], 12, full_BTW)
    for overrun in ([True, False, False, False], [True, True, False, False], [True, True, False, True]):
        start_B = np.array(cache.length_B)
        logits_BW, cache = feed(model, cache, tokens_BT, [1, 1, 1, 1], 1)
        np.testing.assert_array_equal(np.isnan(logits_BW).all(-1), overrun)
        for row in np.flatnonzero(~np.array(overrun)):
            np.testing.assert_allclose(logits_BW[row], full_BTW[row, start_B[row]], rtol=0, atol=TOLERANCE)


def test_a_prompt_longer_than_the_cache_gives_nan(model, tokens_BT, full_BTW):
    """By one token, by many, and not: the longest that fits; and a call wider than the cache with little in it."""
    logits_BW, cache = feed(model, new_cache(model, max_len=12), tokens_BT, [13, 30, 12, 2], 30)
    np.testing.assert_array_equal(np.isnan(logits_BW).all(-1), [True, True, False, False])
    np.testing.assert_allclose(logits_BW[2:], full_BTW[[2, 3], [11, 1]], rtol=0, atol=TOLERANCE)


def test_an_overrun_gives_nan_without_full_layers(tmp_path, tokens_BT):
    model = jaxllm.load(write_model(tmp_path, hybrid_layer_pattern=[1, 1, 1]), dtype="float32")
    logits_BW, _ = feed(model, new_cache(model, max_len=WINDOW - 2), tokens_BT, [6, 7, 5, 2], 7)
    np.testing.assert_array_equal(np.isnan(logits_BW).all(-1), [True, True, False, False])


def test_the_cache_is_donated(model, tokens_BT):
    """All of it, without a warning (warnings are errors here): the shapes are new, so the program is compiled here."""
    cache = new_cache(model, 3)
    _, new = jaxllm.prefill(model.transformer, cache, tokens_BT[:3, :2])
    assert all(x.is_deleted() for x in jax.tree.leaves(cache))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))
    _, newer = jaxllm.decode(model.transformer, new, tokens_BT[:3, 2])
    assert all(x.is_deleted() for x in jax.tree.leaves(new))
    with pytest.raises((RuntimeError, ValueError), match="deleted|donated"):
        jaxllm.decode(model.transformer, new, tokens_BT[:3, 3])
    assert not any(x.is_deleted() for x in jax.tree.leaves((newer, model.transformer)))


def test_a_batch_that_cannot_be_split_is_refused(folder):
    with pytest.raises(ValueError, match=r"batch = 3 .*data = 2.*multiple"):
        jaxllm.init_cache(jaxllm.Config.from_hub(folder), jaxllm.make_mesh("data=2"), 3, 16)
