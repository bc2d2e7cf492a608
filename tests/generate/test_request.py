"""Requests: each that cannot be is refused by a ValueError that names it, and each that can be is fulfilled."""
import math
import re

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxllm.generate.request import Request, as_prompts, make_request

# Compiling takes long and the machine is shared. The same examples each time: CI should not fail by chance.
HYPOTHESIS = {"deadline": None, "derandomize": True, "database": None}
NUM_IDS = 96                # of the random model
HIGHEST = float(np.finfo(np.float32).max)

BAD_PROMPTS = [
    ("", "prompt 0 is empty: there is nothing to continue"),
    ([], "no prompts were given: expected a text, a list of token ids, or a non-empty list of them"),
    ((), "no prompts were given"),
    (np.array([]), "no prompts were given"),
    ([[]], "prompt 0 is empty"),
    (np.zeros((1, 0), int), "prompt 0 is empty"),
    (["a", "", "b"], "prompt 1 is empty"),
    ([[1], []], "prompt 1 is empty"),
    ([-1], "prompt 0: -1 is no token id; expected whole numbers from 0 to vocab_size - 1 = "),
    ([[0, 1], [2, 10**6]], "prompt 1: 1000000 is no token id"),
    ([2**80], f"prompt 0: {2**80} is no token id"),
    ([True], "prompt 0: True is no token id"),
    ([1, False], "prompt 0: False is no token id"),
    (np.array([True]), "prompt 0: True is no token id"),
    ([1, 2.0], "prompt 0: 2.0 is no token id"),
    (np.array([[1.5]]), "prompt 0: 1.5 is no token id"),
    ([math.nan], "prompt 0: nan is no token id"),
    ([1, "a"], "prompt 0: 'a' is no token id"),
    ([None], "prompt 0: None is no token id"),
    ([[[1]]], "prompt 0: [1] is no token id"),
    (["a", 1], "prompt 1 is 1: expected a text or a list of token ids"),
    (["a", None], "prompt 1 is None: expected a text or a list of token ids"),
    ([b"a"], "prompt 0 is b'a': expected a text or a list of token ids"),
    (b"a", "prompts = b'a': expected a text, a list of token ids, or a non-empty list of them"),
    (None, "prompts = None: expected"),
    (5, "prompts = 5: expected"),
    ({1: 2}, "prompts = {1: 2}: expected"),
    (np.array(5), "prompts = 5: expected"),
    ("a\ud83d", "half a surrogate pair at character 1"),
]
BAD_SETTINGS = [
    ({"max_new_tokens": bad}, f"max_new_tokens = {bad!r}: expected a whole number from 1 up")
    for bad in (0, -1, True, 1.5, 2.0, math.nan, "3", None, [3], np.float32(2))
] + [
    ({"temperature": bad}, f"temperature = {bad!r}: expected a number from 0 up, finite")
    for bad in (-1, -1e-9, math.nan, math.inf, -math.inf, 1e39, 10**400, True, "1", 1j, {0.5})
] + [
    ({"top_p": bad}, f"top_p = {bad!r}: expected a number above 0 and up to 1")
    for bad in (0, 0.0, -0.5, 1.0000001, 2, math.nan, math.inf, True, "1", b"1")
] + [
    ({"top_k": bad}, f"top_k = {bad!r}: expected a whole number from 1 up, or 0 for all")
    for bad in (-1, 2**31, 1.0, True, math.nan, "1")
] + [
    ({"seed": bad}, f"seed = {bad!r}: expected a whole number from 0 to 2^32-1")
    for bad in (-1, 2**32, 1.0, False, math.nan, "1", np.uint64(2**64 - 1))
] + [
    ({"stop": bad}, f"stop = {bad!r}: expected strings that are not empty")
    for bad in ("", [""], ["a", ""], [None], [1], 5, b"a", {"a"})
] + [
    ({name: bad}, f"{name} has {len(bad)} values for 1 prompts")
    for name in ("temperature", "top_k", "top_p", "seed") for bad in ([], [1, 1], (1, 1, 1), np.ones(2, int))
] + [
    ({"temperature": [None]}, "temperature = None: expected"),
    ({"temperature": [[1.0]]}, "temperature = [1.0]: expected"),
    ({"seed": [True]}, "seed = True: expected"),
]


def short(case):
    return repr(case)[:40]


@pytest.fixture(params=["generate", "stream"])
def ask(request, speaker):
    """Either way to ask for one prompt; nothing runs before everything is checked."""
    return getattr(speaker, request.param)


def refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call()
    assert type(error.value) is ValueError


@pytest.mark.parametrize("prompts, message", BAD_PROMPTS, ids=short)
def test_bad_prompts(speaker, prompts, message):
    refused(lambda: speaker.generate(prompts, max_new_tokens=2), message)


@pytest.mark.parametrize("prompt", ["", [], None, 5, [-1], [1.5], [[1]], ["a"], b"a"], ids=repr)
def test_bad_prompt_of_a_stream(speaker, prompt):
    """At once, not when the first piece is asked for. A list of prompts cannot be streamed."""
    refused(lambda: speaker.stream(prompt), "prompt 0")


@pytest.mark.parametrize("settings, message", BAD_SETTINGS, ids=short)
def test_bad_settings(ask, settings, message):
    refused(lambda: ask("a", **({"max_new_tokens": 2} | settings)), message)


def test_bad_value_for_one_of_several_prompts(speaker):
    refused(lambda: speaker.generate(["a", "b"], temperature=[1.0, -1.0]), "temperature = -1.0: expected")
    refused(lambda: speaker.generate(["a", "b"], seed=[1]), "seed has 1 values for 2 prompts")


def test_unknown_setting(ask):
    """As Python says it of any function."""
    with pytest.raises(TypeError, match="temprature"):
        ask("a", temprature=1.0)


def test_prompt_and_new_tokens_over_the_cache(tiny):
    most = tiny.config.max_position_embeddings
    message = (f"prompt 1 has 1000 tokens; with max_new_tokens = {most - 999} that is over max_position_embeddings = "
               f"{most}, the most a cache can hold")
    refused(lambda: tiny.generate([[1], [1] * 1000], max_new_tokens=most - 999), message)
    refused(lambda: tiny.generate([1], max_new_tokens=10**30), "prompt 0 has 1 tokens; with max_new_tokens = 1000000")
    assert len(tiny.generate([1] * (most - 4), max_new_tokens=4).tokens) == 4        # just so many fit


def test_no_tokenizer(tiny):
    """Only text is refused."""
    message = ("this model's folder has no tokenizer (tokenizer.json or tokenizer.model): give prompts as lists of "
               "token ids and read .tokens")
    for call in (lambda: tiny.generate("a"), lambda: tiny.generate([[1], "a"]), lambda: tiny.stream([1]),
                 lambda: tiny.chat([{"role": "user", "content": "a"}]), lambda: tiny.tokenizer):
        refused(call, message)
    refused(lambda: tiny.generate([1], stop="a"), "stop strings need a tokenizer, and this model's folder has none")
    out = tiny.generate([1, 2], max_new_tokens=4)
    assert out.text is None and len(out.tokens) == 4 and out.finish_reason == "length"


def test_settings_of_every_number_type(speaker):
    """One value or a list, from Python, numpy or JAX, say the same; None is the default."""
    def make(**settings):
        request = make_request(as_prompts(["a", "b"])[0], speaker.config, speaker.tokenizer, **settings)
        return [getattr(request, name).tolist() for name in ("temperature", "top_k", "top_p", "seed")]
    wanted = make(temperature=0.5, top_k=3, top_p=0.75, seed=9)
    assert wanted == [[0.5, 0.5], [3, 3], [0.75, 0.75], [9, 9]]
    assert wanted == make(temperature=[0.5, 0.5], top_k=(3, 3), top_p=np.array([0.75] * 2), seed=jnp.array([9, 9]))
    assert wanted == make(temperature=np.float32(0.5), top_k=np.int8(3), top_p=np.array(0.75), seed=np.uint32(9))
    assert make(temperature=1, top_p=1, seed=0) == [[1.0, 1.0], [0, 0], [1.0, 1.0], [0, 0]]
    assert make(top_k=None, top_p=None, temperature=None, seed=0, stop=None) == [[0.0, 0.0], [0, 0], [1.0, 1.0], [0, 0]]


NUMBERS = st.one_of(st.integers(), st.integers(-2, 3), st.floats(), st.floats(0, 1), st.booleans(), st.none(),
                    st.floats(width=32).map(np.float32), st.integers(-5, 5).map(np.int64))
JUNK = st.recursive(st.one_of(NUMBERS, st.text(max_size=3), st.binary(max_size=2)),
                    lambda inner: st.one_of(st.lists(inner, max_size=3), st.tuples(inner), st.sets(NUMBERS, max_size=2),
                                            st.dictionaries(st.integers(0, 2), inner, max_size=2)), max_leaves=6)


@hypothesis.settings(max_examples=300, **HYPOTHESIS)
@hypothesis.given(prompts=st.just(["a", [1]]) | st.just("a") | JUNK, settings=st.dictionaries(st.sampled_from(
    ["max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop"]), NUMBERS | JUNK, max_size=2))
def test_junk_is_refused_or_makes_a_sound_request(speaker, prompts, settings):
    try:
        request = make_request(as_prompts(prompts)[0], speaker.config, speaker.tokenizer, **settings)
    except ValueError as error:
        hypothesis.event("refused")
        assert str(error)
        return
    hypothesis.event("made")
    check_sound(request, speaker.config)


def check_sound(request: Request, config):
    B = len(request.prompts)
    assert B and all(request.prompts)
    assert all(type(token) is int and 0 <= token < config.vocab_size for prompt in request.prompts for token in prompt)
    most = max(map(len, request.prompts)) + request.max_new_tokens
    assert type(request.max_new_tokens) is int and 1 <= request.max_new_tokens < most <= config.max_position_embeddings
    for name, dtype, lowest, highest in (("temperature", np.float32, 0, HIGHEST), ("top_k", np.int32, 0, 2**31 - 1),
                                         ("top_p", np.float32, 0, 1), ("seed", np.uint32, 0, 2**32 - 1)):
        values = getattr(request, name)
        assert values.shape == (B,) and values.dtype == dtype
        assert np.all((lowest <= values) & (values <= highest))
    assert all(isinstance(text, str) and text for text in request.stop)


def rows_of(values):
    """One value, or one for each of four prompts."""
    return st.one_of(values, st.lists(values, min_size=4, max_size=4))


# Four prompts of up to 8 tokens, one of them of more than 4, and 5 to 8 new tokens: three compiled batches in all.
PROMPT = st.lists(st.integers(0, NUM_IDS - 1), min_size=1, max_size=8)
FOUR_PROMPTS = st.tuples(st.lists(PROMPT, min_size=3, max_size=3), PROMPT.filter(lambda prompt: len(prompt) > 4)).map(
    lambda parts: [*parts[0], parts[1]])
SAMPLING = st.fixed_dictionaries({
    "max_new_tokens": st.integers(5, 8), "seed": rows_of(st.integers(0, 2**32 - 1)),
    "temperature": rows_of(st.one_of(st.just(0.0), st.floats(0, 3, width=32), st.floats(0, HIGHEST, width=32))),
}, optional={"top_k": rows_of(st.integers(0, 2**31 - 1) | st.integers(0, 9)),
             "top_p": rows_of(st.floats(0, 1, exclude_min=True))})


@hypothesis.settings(max_examples=40, **HYPOTHESIS)
@hypothesis.given(prompts=FOUR_PROMPTS, settings=SAMPLING, order=st.permutations(range(4)))
def test_any_request_is_fulfilled(tiny, prompts, settings, order):
    """Tokens in number and range; the same again for the same seed, and for the same rows in another order."""
    out = tiny.generate(prompts, **settings)
    for generation in out:
        assert len(generation.tokens) == settings["max_new_tokens"] and generation.finish_reason == "length"
        assert all(type(token) is int and 0 <= token < NUM_IDS for token in generation.tokens)
    assert tiny.generate(prompts, **settings) == out
    mixed = {name: [value[i] for i in order] if isinstance(value, list) else value for name, value in settings.items()}
    assert tiny.generate([prompts[i] for i in order], **mixed) == [out[i] for i in order]


@hypothesis.settings(max_examples=40, **HYPOTHESIS)
@hypothesis.given(prompts=st.lists(st.text("abcz 上🙂", min_size=1, max_size=8), min_size=4, max_size=4),
                  stop=st.lists(st.sampled_from(["s", "en", "菜", "\n\n", "プリ", "no such"]), max_size=3),
                  num=st.integers(5, 8), temperature=st.sampled_from([0.0, 30.0]), seed=st.integers(0, 99))
def test_text_and_tokens_of_any_request_agree(speaker, prompts, stop, num, temperature, seed):
    for out in speaker.generate(prompts, max_new_tokens=num, stop=stop, temperature=temperature, seed=seed):
        assert 1 <= len(out.tokens) <= num
        whole = speaker.tokenizer.decode(out.tokens)
        if out.finish_reason == "length":
            assert len(out.tokens) == num and out.text == whole and not any(text in whole for text in stop)
        elif out.tokens[-1] in speaker.stop_ids:
            assert out.text == whole
        else:
            assert whole.startswith(out.text) and any(whole.startswith(out.text + text) for text in stop)
            assert not any(text in out.text for text in stop)


def test_without_a_seed_each_row_draws_its_own(tiny):
    rows = tiny.generate([[1, 2, 3]] * 4, max_new_tokens=16, temperature=1.0)
    assert len({tuple(row.tokens) for row in rows}) == 4      # equal by chance: less than once in 10^10
