"""`Model`: prompts in, text and tokens out. The reciter (conftest.py) says what must come; the random model, how."""
import codecs
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from reciter import RECITAL, write_reciter

import jaxllm
from jaxllm.generate import engine

NANO = Path(__file__).parents[2] / "configs" / "mimo-nano"
LANGUAGES = ["今天上海是", "The menu of this printer", "プリンターの電源", "프린터가 ", "L'imprimante est",
             "Der Drucker läuft", "¿Dónde está"]


def expected(reciter, i, num, stops=()):
    """(text, tokens, finish_reason) of num tokens from piece i on, by growing the text one token at a time."""
    text, decoder = "", codecs.getincrementaldecoder("utf-8")("replace")
    for count, token in enumerate(reciter.tokens(i, num), 1):
        text += decoder.decode(reciter.pieces[token - reciter.first])
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
        if found:
            return text[:min(found)[1]], reciter.tokens(i, count), "stop"
    return text + decoder.decode(b"", final=True), reciter.tokens(i, num), "length"


def result(generation):
    return generation.text, generation.tokens, generation.finish_reason


def tokens_of(generations):
    return [generation.tokens for generation in generations]


# What comes back


def test_one_prompt_gives_one_result_and_a_list_a_list(reciter, speaker):
    one = speaker.generate("x\0", max_new_tokens=8)          # byte 0 leads to piece 0
    assert isinstance(one, jaxllm.Generation) and result(one) == expected(reciter, 0, 8)
    ids = [ord("x"), 0]
    for prompt in (ids, tuple(ids), np.array(ids), [np.int64(120), np.int32(0)]):
        assert speaker.generate(prompt, max_new_tokens=8) == one
    for prompts in (["x\0"], ("x\0",), [ids], [tuple(ids)], [np.array(ids)], np.array([ids])):
        assert speaker.generate(prompts, max_new_tokens=8) == [one]
    two = speaker.generate(["x\0", reciter.prompt(5)], max_new_tokens=8)
    assert two[0] == one and two[1].tokens == reciter.tokens(5, 8)


def test_the_whole_text_to_its_end(reciter, speaker):
    num = len(reciter.pieces)
    out = speaker.generate(reciter.prompt(0), max_new_tokens=num + 50)
    assert result(out) == (RECITAL, [*reciter.tokens(0, num), reciter.end], "stop")
    assert speaker.tokenizer.decode(out.tokens) == out.text


def test_max_new_tokens(reciter, speaker):
    for num in (1, 2, 9, 100):
        out = speaker.generate(reciter.prompt(0), max_new_tokens=num)
        assert (out.tokens, out.finish_reason) == (reciter.tokens(0, num), "length")
        assert out.text == reciter.text(out.tokens) == speaker.tokenizer.decode(out.tokens)
    assert speaker.generate(reciter.prompt(0)).tokens == reciter.tokens(0, 128)      # unless told


def test_rows_end_each_in_its_own_time(reciter, speaker):
    last = len(reciter.pieces)
    starts = [last - 1, 3, last - 20, 40, last - 10]
    out = speaker.generate([reciter.prompt(i) for i in starts], max_new_tokens=18)
    for i, generation in zip(starts, out, strict=True):
        ids = [*range(reciter.first + i, reciter.end), reciter.end][:18]
        reason = "stop" if ids[-1] == reciter.end else "length"
        assert (generation.tokens, generation.finish_reason) == (ids, reason)
    assert [generation.finish_reason for generation in out] == ["stop", "length", "length", "length", "stop"]


# Tokens are those of the model


def check_greedy(model, prompts, results):
    """Each new token is the argmax of a full forward pass over all before it. Of all rows in one pass: the padding on
    the right changes nothing, since attention is causal."""
    rows = [[*prompt, *generation.tokens] for prompt, generation in zip(prompts, results, strict=True)]
    longest = max(map(len, rows))
    logits_BTW = model.logits([[*row, *[0] * (longest - len(row))] for row in rows])
    for logits_TW, prompt, generation in zip(logits_BTW, prompts, results, strict=True):
        chosen = logits_TW[len(prompt) - 1:len(prompt) + len(generation.tokens) - 1]
        assert generation.tokens == chosen.argmax(-1).tolist()
        best = np.sort(chosen, axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > 1e-4      # two orders of a float32 sum differ by 2e-5 at most


def test_greedy_is_the_argmax_of_the_logits(tiny):
    """40 tokens, five turns of the ring of 8."""
    prompts = [[1, 2, 3, 4, 5], [17], [80, 7, 7, 80, 9, 11, 90, 12, 33, 2, 5]]
    results = tiny.generate(prompts, max_new_tokens=40)
    assert all(len(set(generation.tokens)) > 8 for generation in results)
    check_greedy(tiny, prompts, results)


def test_prompts_of_several_chunks(tiny):
    rng = np.random.default_rng(0)
    lengths = [1100, engine.CHUNK, engine.CHUNK + 1, 3, 2 * engine.CHUNK, 600]
    prompts = [rng.integers(0, 96, length).tolist() for length in lengths]
    check_greedy(tiny, prompts, tiny.generate(prompts, max_new_tokens=5))


ROWS = {"temperature": [0.0, 1.0, 0.8, 2.0, 0.0], "top_k": [0, 0, 20, 0, 3], "top_p": [1.0, 1.0, 1.0, 0.9, 0.5],
        "seed": [0, 11, 12, 13, 14]}
PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [5, 6, 7], [12, 13, 14], [15, 16, 17, 18]]


@pytest.fixture(scope="module")
def alone(tiny):
    """What each of PROMPTS gets by itself."""
    return [tiny.generate(prompt, max_new_tokens=12, **{name: values[i] for name, values in ROWS.items()}).tokens
            for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("mesh", [None, "data=2,expert=2,tensor=2"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 3, 1, 0]], ids=["forward", "shuffled"])
def test_a_row_gets_the_same_in_any_batch_on_any_mesh(tiny, tiny_folder, alone, mesh, order):
    """Logits differ by 2e-5 at most, which turns one draw in some thousands: none here."""
    model = tiny if mesh is None else jaxllm.load(tiny_folder, mesh=mesh)
    out = model.generate([PROMPTS[i] for i in order], max_new_tokens=12,
                         **{name: [values[i] for i in order] for name, values in ROWS.items()})
    assert tokens_of(out) == [alone[i] for i in order]


def test_settings_change_what_is_drawn(tiny, alone):
    drawn = tiny.generate([[5, 6, 7]] * 4, max_new_tokens=12, temperature=1.0, seed=[1, 2, 3, 1])
    first, second, third, again = tokens_of(drawn)
    assert first == again and first != second != third != first
    assert tiny.generate([5, 6, 7], max_new_tokens=12, top_k=1, seed=1).tokens == alone[0]       # greedy
    assert tiny.generate([5, 6, 7], max_new_tokens=12, top_p=1e-9, seed=1).tokens == alone[0]
    # top_k or top_p alone means temperature 1
    assert tiny.generate([5, 6, 7], max_new_tokens=12, top_k=96, seed=1).tokens == first
    assert tiny.generate([5, 6, 7], max_new_tokens=12, top_p=1.0, seed=1).tokens == first


def test_without_a_seed_each_call_draws_anew(tiny):
    one, two = (tiny.generate([5, 6, 7], max_new_tokens=12, temperature=1.0).tokens for _ in range(2))
    assert one != two       # equal by chance once in 10^10 or so


# What ends a text


@pytest.mark.parametrize("config_eos, generation_eos, stops", [
    (None, None, []), (300, None, [300]), ([300, 310], None, [300, 310]), (None, 305, [305]), (300, 290, [290, 300]),
    (None, [305, 280], [280, 305]), ([305], [305, 400], [305, 400]), (300, [], [300])])
def test_stop_ids(tmp_path, config_eos, generation_eos, stops):
    """A number, a list or nothing in config.json and generation_config.json; any of them stops."""
    reciter = write_reciter(tmp_path / "model")
    config = json.loads((reciter.folder / "config.json").read_text()) | {"eos_token_id": config_eos}
    (reciter.folder / "config.json").write_text(json.dumps(config))
    if generation_eos is not None:
        (reciter.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    model = jaxllm.load(reciter.folder)
    assert list(model.stop_ids) == stops
    out = model.generate(reciter.prompt(0), max_new_tokens=60)
    num = min([stop - reciter.first + 1 for stop in stops], default=60)
    assert out.tokens == reciter.tokens(0, num)
    assert out.finish_reason == ("stop" if stops else "length")
    assert out.text == reciter.text(out.tokens[:-1] if stops else out.tokens)        # the stop id has no text
    assert "".join(model.stream(reciter.prompt(0), max_new_tokens=60)) == out.text


# From the first to beyond the third block of 16; inside one token, over two and over many; in every script.
STOPS = [["上"], ["菜单"], ["The"], ["Settings"], ["Settings!"], ["\n\n"], ["プリンター"], ["가"], ["é »"],
         ["¿Dónde está"], ["🙂"], ["👩‍👩‍👧‍👦, then"], ["absent"], ["Settings!", "tings"],
         ["ings", "Settings"], ["absent", "\n", "!\n"]]


@pytest.mark.parametrize("stop", STOPS, ids=" ".join)
def test_stop_strings(reciter, speaker, stop):
    num = len(reciter.pieces)
    text, tokens, reason = expected(reciter, 0, num, stop)
    assert (reason == "stop") == (stop != ["absent"])
    out = speaker.generate(reciter.prompt(0), max_new_tokens=num, stop=stop)
    assert result(out) == (text, tokens, reason)
    assert "".join(speaker.stream(reciter.prompt(0), max_new_tokens=num, stop=stop)) == text


def test_stop_strings_lie_across_tokens(reciter):
    """So that the cases above are what they claim to be."""
    whole = [sum(piece in stop.encode() for piece in reciter.pieces) for [stop, *_] in STOPS]
    assert min(whole) == 0 and max(whole) >= 5             # pieces that lie in the string, besides its two ends
    cut = [piece for piece in reciter.pieces if "\ufffd" in piece.decode(errors="replace")]
    assert len(cut) > len(reciter.pieces) / 4              # and many pieces cut a character


def test_one_stop_string_needs_no_list(reciter, speaker):
    assert result(speaker.generate(reciter.prompt(0), max_new_tokens=60, stop="菜单")) == expected(
        reciter, 0, 60, ["菜单"])


def test_a_stop_string_in_the_prompt_is_no_stop(reciter, speaker):
    """Not whole, and not its first half with the second in the new text."""
    i = ord("t") % len(reciter.pieces)
    text, tokens, reason = expected(reciter, i, 30)
    start = "t" + text[:8]
    assert start not in text
    for stop in ("zap", start):
        out = speaker.generate("zap t", max_new_tokens=30, stop=stop)
        assert (out.tokens, out.finish_reason) == (tokens, reason)


def test_stop_at_the_limit(reciter, speaker):
    """The last token may complete a stop string; what only began to be one is text."""
    text, tokens, _ = expected(reciter, 0, 60, ["Settings"])
    exactly, short = (speaker.generate(reciter.prompt(0), max_new_tokens=num, stop="Settings")
                      for num in (len(tokens), len(tokens) - 1))
    assert result(exactly) == (text, tokens, "stop")
    assert result(short) == (reciter.text(tokens[:-1]), tokens[:-1], "length")
    assert short.text.startswith(text + "Se")


def test_rows_stop_each_at_its_own_string(reciter, speaker):
    stop = ["菜单", "Settings!", "프린터", "Où"]
    starts = [0, 30, 10, 45, 71]
    prompts = [reciter.prompt(i) for i in starts]
    out = speaker.generate(prompts, max_new_tokens=70, stop=stop)
    assert [result(generation) for generation in out] == [expected(reciter, i, 70, stop) for i in starts]


def test_an_irrelevant_stop_string_changes_nothing(speaker):
    """Blocks of 16 tokens with the host between them, or one loop on the device."""
    prompts, rows = ["a", "b", "c"], {"temperature": [0.0, 20.0, 20.0], "seed": [0, 1, 2]}
    free = speaker.generate(prompts, max_new_tokens=50, **rows)
    assert free == speaker.generate(prompts, max_new_tokens=50, stop=["no such text"], **rows)
    assert max(len(generation.tokens) for generation in free) > 3 * engine.BLOCK


# Streaming and chat


def test_stream_gives_pieces_as_they_come(reciter, speaker, advances):
    num = 100
    stream = speaker.stream(reciter.prompt(0), max_new_tokens=num)
    assert advances == []
    pieces = []
    for piece in stream:
        pieces.append(piece)
        assert len("".join(pieces).encode()) <= 6 * (1 + engine.BLOCK * len(advances))
    assert len(pieces) >= num / engine.BLOCK and all(pieces)
    assert "\ufffd" not in "".join(pieces[:-1])
    assert "".join(pieces) == speaker.generate(reciter.prompt(0), max_new_tokens=num).text


@pytest.mark.parametrize("start", [0, 1, 2, 3, 6, 9, 10, 11, 19])
def test_stream_never_cuts_a_character(reciter, speaker, start):
    """The borders between blocks fall on other tokens each time, many of which end inside a character."""
    pieces = list(speaker.stream(reciter.prompt(start), max_new_tokens=200))
    assert "".join(pieces) == b"".join(reciter.pieces[start:]).decode()      # strict: the start is no half character
    assert len(pieces) > 5


def test_stream_of_one_token(reciter, speaker):
    assert list(speaker.stream(reciter.prompt(0), max_new_tokens=1)) == [reciter.text(reciter.tokens(0, 1))]


def test_stream_that_is_left_early(reciter, speaker, advances):
    stream = speaker.stream(reciter.prompt(0), max_new_tokens=100)
    next(stream)
    stream.close()
    assert len(advances) <= 1


def test_stream_and_generate_in_seven_languages():
    """The embedded model's own text, likely and unlikely (which is full of half characters)."""
    model = jaxllm.load(NANO)
    for i, prompt in enumerate(LANGUAGES):
        for temperature in (0.5, 3.0):
            settings = {"max_new_tokens": 40, "temperature": temperature, "seed": i}
            pieces = list(model.stream(prompt, **settings))
            out = model.generate(prompt, **settings)
            assert "".join(pieces) == out.text == model.tokenizer.decode(out.tokens) and len(pieces) >= 2


def test_chat(tmp_path, reciter, speaker):
    """The template's text is the prompt: its last byte decides here."""
    shutil.copytree(reciter.folder, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}{{ tools | length if tools else '' }}"
        "{{ '' if enable_thinking is undefined else 'Y' if enable_thinking else 'N' }}")
    model = jaxllm.load(tmp_path / "chat")
    messages = [{"role": "user", "content": "hi"}]
    for settings, end in (({}, ">"), ({"enable_thinking": True}, "Y"), ({"enable_thinking": False}, "N"),
                          ({"tools": [{"name": "a"}, {"name": "b"}]}, "2")):
        out = model.chat(messages, max_new_tokens=9, **settings)
        assert out.tokens == reciter.tokens(ord(end) % len(reciter.pieces), 9)
    assert model.chat(messages, max_new_tokens=9, stop="a") == model.generate("[user]hi>", max_new_tokens=9, stop="a")
    prompts = []
    model.generate = lambda prompt, **settings: prompts.append((prompt, settings))
    model.chat(messages, temperature=0.5)
    assert prompts == [("[user]hi>", {"temperature": 0.5})]
