"""How generation runs: what is compiled and when, how often the host looks, when the loop on the device ends."""
import math

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.generate import engine, step


class Looked(Exception):
    """Ends a call whose shapes have been seen."""


@pytest.fixture
def shapes(monkeypatch):
    """What a generation would compile for, without running it: (rows, cache slots, tokens of the first chunk)."""
    def shapes_of(model, prompts, max_new_tokens):
        seen = []
        monkeypatch.setattr(engine, "init_cache", lambda config, mesh, B, max_len, **_: seen.append((B, max_len)))

        def look(model, cache, tokens_BT, length_B):
            raise Looked(*seen[-1], tokens_BT.shape[1])
        monkeypatch.setattr(engine, "prefill", look)
        with pytest.raises(Looked) as error:
            model.generate(prompts, max_new_tokens=max_new_tokens)
        return error.value.args
    return shapes_of


@pytest.fixture
def turns(monkeypatch):
    """Grows by one each time the device samples: for the first token, and at each turn of its loop."""
    count = []
    sample = step.sample

    def counted(*args):
        jax.debug.callback(lambda: count.append(1))
        return sample(*args)
    monkeypatch.setattr(step, "sample", counted)
    for function in (step._start, step._advance):           # what they were compiled to does not count
        function.clear_cache()
    yield count
    for function in (step._start, step._advance):
        function.clear_cache()


def test_a_call_of_like_shape_compiles_nothing(speaker, compilations):
    with compilations() as compiled:
        speaker.generate(["x" * 20, "y" * 9, "z"], max_new_tokens=40)
    assert {"_prefill", "_start", "_advance"} <= {name.removeprefix("jit(").removesuffix(")") for name in compiled}
    with compilations() as compiled:
        speaker.generate(["x" * 20, "y" * 9, "z"], max_new_tokens=40)
        speaker.generate(["x" * 17, "y" * 24, "z", "w" * 3], max_new_tokens=33)         # of the same buckets
        speaker.generate([[1] * 31, [2], [3]], max_new_tokens=33)
        speaker.generate(["x" * 20, "y" * 9, "z"], max_new_tokens=40, stop=["absent"])   # the host looks in between
    assert compiled == []


def test_settings_are_data(speaker, compilations):
    """Other temperatures, truncations and seeds are no other programs; three kinds of batches are."""
    prompts, num = ["x" * 20, "y"], 40
    for settings in ({"temperature": 0.5, "seed": 1}, {"top_k": 5, "seed": 1}):
        with compilations() as compiled:
            speaker.generate(prompts, max_new_tokens=num, **settings)
        assert compiled
    with compilations() as compiled:
        speaker.generate(prompts, max_new_tokens=num, temperature=[0.0, 2.0], seed=[5, 6])
        speaker.generate(prompts, max_new_tokens=num, temperature=[1.0, 0.1], seed=None)
        speaker.generate(prompts, max_new_tokens=num, top_k=[0, 7], top_p=[0.5, 1.0], temperature=[3.0, 1.0])
        speaker.generate(prompts, max_new_tokens=num, top_p=0.9)
    assert compiled == []


def test_streams_share_programs(speaker, compilations):
    """Whatever the lengths within a bucket; and with generate of one prompt."""
    list(speaker.stream("x" * 20, max_new_tokens=40))
    with compilations() as compiled:
        list(speaker.stream("x" * 31, max_new_tokens=33))
        list(speaker.stream("y" * 17, max_new_tokens=47, stop=["absent"]))
        speaker.generate("z" * 20, max_new_tokens=44)
    assert compiled == []


def test_later_chunks_share_programs(speaker, compilations):
    speaker.generate([5] * (2 * engine.CHUNK - 1), max_new_tokens=100)
    with compilations() as compiled:
        speaker.generate([5] * (2 * engine.CHUNK - 90), max_new_tokens=120)
    assert compiled == []


def test_number_of_shapes(speaker, shapes):
    """Over all lengths up to 4096: ten chunk sizes; caches of every 32 slots up to 256, then four sizes an octave."""
    sizes = [*range(1, 64), *range(64, 3900, 13)]
    for num in (1, 64, 190):
        found = [shapes(speaker, [[0] * size], num) for size in sizes]
        for size, (B, max_len, T) in zip(sizes, found, strict=True):
            assert B == 1 and size + num <= max_len <= max(size + num + 31, 1.25 * (size + num))
            assert min(size, engine.CHUNK) <= T < 2 * size and T <= engine.CHUNK
        assert {T for _, _, T in found} == {1 << i for i in range(10)}
        assert len({max_len for _, max_len, _ in found}) <= 8 + 4 * 4


def test_a_cache_is_no_longer_than_the_model_allows(tiny, shapes):
    assert shapes(tiny, [[0] * 1000], 200)[1] == 1200 == tiny.config.max_position_embeddings


@pytest.mark.parametrize("mesh, data", [(None, 1), ("data=2", 2), ("data=3", 3), ("data=8", 8)])
def test_rows_of_a_batch(reciter, shapes, mesh, data):
    """A power of two for each part of the data axis."""
    model = jaxllm.load(reciter.folder, mesh=mesh)
    for num in range(1, 34):
        rows, rest = divmod(shapes(model, [[0]] * num, 1)[0], data)
        assert rest == 0 and rows & (rows - 1) == 0 and num <= rows * data < 2 * num + 2 * data


def test_batch_that_the_data_axis_does_not_divide(reciter):
    """Rows are added and taken away again."""
    model = jaxllm.load(reciter.folder, mesh="data=2")
    out = model.generate([reciter.prompt(i) for i in (0, 3, 9)], max_new_tokens=6)
    assert [generation.tokens for generation in out] == [reciter.tokens(i, 6) for i in (0, 3, 9)]
    assert model.generate(reciter.prompt(4), max_new_tokens=6).tokens == reciter.tokens(4, 6)


@pytest.mark.parametrize("num", [1, 2, 16, 17, 18, 33, 60])
def test_how_often_the_host_looks(reciter, speaker, advances, num):
    """Once for all tokens after the first; to stream, or for stop strings, once for each block of them."""
    prompt = reciter.prompt(0)
    speaker.generate(prompt, max_new_tokens=num)
    assert advances == ([num] if num > 1 else [])
    for run in (lambda: list(speaker.stream(prompt, max_new_tokens=num)),
                lambda: speaker.generate(prompt, max_new_tokens=num, stop="absent")):
        advances.clear()
        run()
        assert advances == [engine.BLOCK] * math.ceil((num - 1) / engine.BLOCK)


def test_the_loop_ends_when_all_rows_have_stopped(reciter, speaker, turns, advances):
    """By a stop id on the device, however many tokens were allowed; by a stop string at the end of its block."""
    last = len(reciter.pieces)

    def run(starts, **settings):
        turns.clear()
        advances.clear()
        out = speaker.generate([reciter.prompt(i) for i in starts], max_new_tokens=100, **settings)
        jax.effects_barrier()
        return [len(generation.tokens) for generation in out], len(turns)
    assert run([last - 4, last - 9]) == ([5, 10], 10) and advances == [100]
    assert run([last - 4, last - 1]) == ([5, 2], 5)
    assert run([last, last]) == ([1, 1], 1) and advances == []
    assert run([20, last - 4])[1] == 100                           # a row that goes on
    text = reciter.text(reciter.tokens(115, 20))
    assert text.index(text[-4:]) == len(text) - 4
    assert run([115, last - 4], stop=text[-4:]) == ([20, 5], 1 + 2 * engine.BLOCK) and len(advances) == 2


def test_rows_that_have_stopped_stay_as_they_are(reciter, speaker):
    """In blocks, where the host looks at rows that ended long ago."""
    last = len(reciter.pieces)
    starts = [last - 2, 0, last - 30, 40]
    out = speaker.generate([reciter.prompt(i) for i in starts], max_new_tokens=100, stop=["absent"])
    whole = [[*range(reciter.first + i, reciter.end), reciter.end][:100] for i in starts]
    assert [generation.tokens for generation in out] == whole


def test_what_a_step_gives_and_takes(tiny):
    """`advance` alone: as many tokens as asked for, the same in one call or in several; the old state is donated."""
    def begin():
        cache = jaxllm.init_cache(tiny.config, tiny.mesh, 2, 64, dtype=tiny.dtype)
        logits, cache = jaxllm.prefill(tiny.transformer, cache, np.int32([[1, 2, 3], [4, 5, 6]]))
        return step.start(tiny.transformer, cache, logits, sampling, stops, limit, 16, "greedy")

    def column(value, dtype):
        return step.place(tiny.transformer, np.full(2, value, dtype), "batch")
    sampling = step.Sampling(column(0, np.float32), column(0, np.int32), column(1, np.float32), column(0, np.uint32))
    stops, limit = step.place(tiny.transformer, np.array([-1]), None), column(12, np.int32)

    def go_on(state, steps):
        return step.advance(tiny.transformer, state, sampling, stops, steps, "greedy")
    first = begin()
    state = go_on(first, 3)
    assert state.count_B.tolist() == [4, 4] and state.cache.length_B.tolist() == [6, 6] and not state.done_B.any()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.cache)) and first.out_BT.is_deleted()
    state = go_on(go_on(state, 5), 100)
    assert state.count_B.tolist() == [12, 12] and state.done_B.all()
    once = go_on(begin(), 100)
    np.testing.assert_array_equal(state.out_BT, once.out_BT)
    assert not np.any(np.asarray(state.out_BT)[:, 12:])            # room beyond the limit stays empty
