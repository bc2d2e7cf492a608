"""Tokenizers and text streams: against the two libraries, and piece by piece against the whole."""
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from jaxllm.generate.text import TextStream, Tokenizer, load_stop_ids

BPE = Path(__file__).parents[1] / "bpe"      # bytes, with the pre-tokenizer and the special tokens of the releases
BPE_LIBRARY = tokenizers.Tokenizer.from_file(str(BPE / "tokenizer.json"))
TEXTS = {
    "zh": "打印机已经打开，请在菜单里选择“设置”。今天没有纸了！",
    "en": "The printer is on; open the menu, then choose \"Settings\". There's no paper left today.\n\n",
    "ja": "プリンターの電源が入っています。メニューから「設定」を選んでください。",
    "ko": "프린터가 켜져 있습니다. 메뉴에서 '설정'을 선택하십시오.",
    "fr": "L'imprimante est allumée ; ouvrez le menu, puis « Paramètres ». Où est le papier ?",
    "de": "Der Drucker läuft. Öffnen Sie das Menü, dann „Einstellungen“; größer wäre schöner.",
    "es": "¿Dónde está el papel? Abra el menú y elija «Configuración», señor.",
    "emoji": "ok 🙂👍🏽 👩‍👩‍👧‍👦 🇫🇷 𝄞 x",
}
# Leading spaces are dropped once, all of them, or not at all: three rules of sentencepiece for the start of a text.
SPACE_RULES = {
    "one": {"remove_extra_whitespaces": False},
    "all": {},
    "none": {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
}
exactly = settings(deadline=None, max_examples=150)      # no deadline: the machine is shared


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return Tokenizer.from_dir(BPE)


@pytest.fixture(scope="session")
def pieces_folders(tmp_path_factory) -> dict[str, Path]:
    """One small sentencepiece model with byte fallback for each rule of leading spaces."""
    folders = {}
    for rule, options in SPACE_RULES.items():
        folders[rule] = tmp_path_factory.mktemp(f"pieces_{rule}")
        with open(folders[rule] / "tokenizer.model", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter([TEXTS[key] for key in TEXTS if key != "emoji"] * 20), model_writer=file,
                vocab_size=500, hard_vocab_limit=False, byte_fallback=True, character_coverage=0.98, num_threads=1,
                normalization_rule_name="identity", control_symbols=["<|im_start|>", "<|im_end|>"],
                user_defined_symbols=["<think>", "▁▁"], minloglevel=3, **options)
    return folders


@pytest.fixture(scope="session", params=["bpe", *SPACE_RULES])
def tokenizer(request, bpe, pieces_folders) -> Tokenizer:
    """Every kind of tokenizer that streams are tested with."""
    return bpe if request.param == "bpe" else Tokenizer.from_dir(pieces_folders[request.param])


def cut(text: str, stops: list[str]) -> str:
    """`text` before the stop string that is complete first; the definition, letter by letter."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[:end - max(map(len, complete))]
    return text


def chunks(items: list, sizes: list[int]) -> list[list]:
    """`items` in pieces of the given sizes, the last size repeated."""
    out, rest, sizes = [], list(items), itertools.chain(sizes, itertools.repeat(sizes[-1]))
    while rest:
        size = next(sizes)
        out.append(rest[:size])
        rest = rest[size:]
    return out


# --- encode and decode

@pytest.mark.parametrize("language", TEXTS)
def test_round_trip(tokenizer, language):
    text = TEXTS[language]
    if tokenizer.vocabulary.strips_every_leading_space:      # that rule also drops spaces elsewhere, when encoding
        text = re.sub(" +", " ", text.strip(" "))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("rule", SPACE_RULES)
@pytest.mark.parametrize("language", TEXTS)
def test_sentencepiece_as_the_library(pieces_folders, rule, language):
    library = sentencepiece.SentencePieceProcessor(model_file=str(pieces_folders[rule] / "tokenizer.model"))
    ours = Tokenizer.from_dir(pieces_folders[rule])
    assert ours.encode(TEXTS[language]) == library.encode(TEXTS[language])
    assert ours.decode(library.encode(TEXTS[language])) == library.decode(library.encode(TEXTS[language]))
    assert ours.vocab_size == library.vocab_size()


@exactly
@given(st.data())
def test_random_tokens_as_tokenizers(bpe, data):
    """Also where bytes are not UTF-8: the first 300 ids are nearly all single bytes."""
    limit = data.draw(st.sampled_from([300, bpe.vocab_size]))
    tokens = data.draw(st.lists(st.integers(0, limit - 1), max_size=20))
    for skip in (True, False):
        assert bpe.decode(tokens, skip_special=skip) == BPE_LIBRARY.decode(tokens, skip_special_tokens=skip)


@pytest.mark.parametrize("rule", SPACE_RULES)
def test_random_tokens_as_sentencepiece(pieces_folders, rule):
    library = sentencepiece.SentencePieceProcessor(model_file=str(pieces_folders[rule] / "tokenizer.model"))
    ours = Tokenizer.from_dir(pieces_folders[rule])
    spaced = [token for token in range(ours.vocab_size) if library.id_to_piece(token).startswith("▁")]
    dice = random.Random(0)
    for ids in (range(ours.vocab_size), [*spaced, *range(6)], range(280)):       # any; leading spaces; bytes
        for _ in range(500):
            tokens = dice.choices(ids, k=dice.randrange(1, 10))
            heard = [token for token in tokens if not library.is_control(token)]  # control pieces are as good as absent
            assert ours.decode(tokens) == library.decode(heard), tokens


DECODERS = {
    "none": None, "metaspace": decoders.Metaspace(), "wordpiece": decoders.WordPiece(),
    "llama": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                decoders.Strip(" ", 1, 0)]),
    "byte_level": decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]),
}


def word_level(decoder) -> tokenizers.Tokenizer:
    words = ["[UNK]", "hello", "##a", ".", "n't", "é", "中", "a b", "▁", "▁a", "▁▁b", "Ġ", "ä¸"]
    library = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    if decoder is not None:
        library.decoder = decoder
    library.add_special_tokens(["<s>"])
    library.add_tokens(["<think>", "日本 é"])
    return library


@pytest.mark.parametrize("name", DECODERS)
def test_other_decoders_as_tokenizers(tmp_path, name):
    library = word_level(DECODERS[name])
    library.save(str(tmp_path / "tokenizer.json"))
    ours, dice = Tokenizer.from_dir(tmp_path), random.Random(0)
    for _ in range(1000):
        tokens = dice.choices(range(ours.vocab_size), k=dice.randrange(1, 8))
        for skip in (True, False):
            assert ours.decode(tokens, skip) == library.decode(tokens, skip_special_tokens=skip), tokens


def test_fallback_bytes_of_tokenizers(tmp_path):
    vocab = {"▁a": 0, "b": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    library = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    library.decoder = DECODERS["llama"]
    library.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_dir(tmp_path)
    for text in TEXTS.values():
        assert ours.decode(ours.encode(text)) == library.decode(ours.encode(text)) == text
    broken = [*ours.encode("é"), 0xE4 + 2, 0xB8 + 2, 1]      # a whole character, two bytes of three, a letter
    assert ours.decode(broken) == "é\ufffd\ufffdb"           # the library would mark all four bytes


@pytest.mark.parametrize("decoder", [
    decoders.BPEDecoder(), decoders.CTC(), decoders.Strip(" ", 0, 1), decoders.Replace("ab", "c"),
    decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]), decoders.Replace(tokenizers.Regex("a+"), "c"),
])
def test_decoder_that_cannot_stream(tmp_path, decoder):
    word_level(decoder).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: with the decoder .* cannot be streamed; supported: Byte"):
        Tokenizer.from_dir(tmp_path)


def test_special_tokens_of_json(bpe):
    tokens = bpe.encode("<|im_start|>user\nhi<|im_end|>")
    assert tokens[0] == 1 and tokens[-1] == 2
    assert bpe.decode(tokens) == "user\nhi"
    assert bpe.decode(tokens, skip_special=False) == "<|im_start|>user\nhi<|im_end|>"
    assert bpe.vocab_size == 8192
    assert bpe.encode("") == [] and bpe.decode([]) == ""


def test_special_tokens_of_sentencepiece(pieces_folders):
    ours = Tokenizer.from_dir(pieces_folders["none"])
    start, end = ours.vocabulary.token_id("<|im_start|>"), ours.vocabulary.token_id("<|im_end|>")
    tokens = ours.encode("<|im_start|>the menu<|im_end|>")
    assert tokens[0] == start and tokens[-1] == end and tokens[1:-1] == ours.encode("the menu")
    assert ours.decode(tokens) == "the menu"
    assert ours.decode(tokens, skip_special=False) == "<|im_start|>the menu<|im_end|>"
    assert ours.vocabulary.token_id("no such piece") is None


def test_added_tokens_and_template_settings_change_nothing(tmp_path):
    """A file may ask for truncation, padding and an added first token; a prompt is encoded as it is."""
    library = tokenizers.Tokenizer.from_file(str(BPE / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.post_processor = tokenizers.processors.TemplateProcessing("<think> $A", special_tokens=[("<think>", 3)])
    library.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_dir(tmp_path).encode(TEXTS["en"]) == Tokenizer.from_dir(BPE).encode(TEXTS["en"])


def test_tokens_may_be_numpy_integers(bpe):
    tokens = bpe.encode("The menu")
    assert bpe.decode(np.asarray(tokens, np.int32)) == "The menu"


def test_json_before_sentencepiece_before_none(tmp_path, pieces_folders):
    assert Tokenizer.from_dir(tmp_path) is None
    shutil.copy(pieces_folders["all"] / "tokenizer.model", tmp_path)
    assert Tokenizer.from_dir(tmp_path).vocab_size < 8192
    shutil.copy(BPE / "tokenizer.json", tmp_path)
    assert Tokenizer.from_dir(str(tmp_path)).vocab_size == 8192


def test_sentencepiece_is_imported_only_for_its_files():
    program = ("import sys; from jaxllm.generate.text import Tokenizer; "
               f"Tokenizer.from_dir({str(BPE)!r}); assert 'sentencepiece' not in sys.modules")
    subprocess.run([sys.executable, "-c", program], check=True)


# --- streams

def stream_pieces(tokenizer, blocks, stops) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stops)
    return [*map(stream.push, blocks), stream.finish()], stream


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_stream_of_each_language(tokenizer, language, size):
    tokens = tokenizer.encode(TEXTS[language])
    pieces, stream = stream_pieces(tokenizer, chunks(tokens, [size]), [])
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == "" and not stream.stopped           # nothing was kept back without need


@exactly
@given(st.data())
def test_stream_of_random_tokens_and_stops(tokenizer, data):
    """Any tokens, any blocks, any stop strings cut from the text itself: the pieces are the whole, cut."""
    limit = data.draw(st.sampled_from([300, tokenizer.vocab_size]))
    tokens = data.draw(st.lists(st.integers(0, limit - 1), max_size=30))
    text = tokenizer.decode(tokens)
    places = st.integers(0, max(len(text) - 1, 0))
    stops = [text[at:at + data.draw(st.integers(1, 6))] for at in data.draw(st.lists(places, max_size=3)) if text]
    blocks = chunks(tokens, data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)))
    pieces, stream = stream_pieces(tokenizer, blocks, stops)
    assert "".join(pieces) == cut(text, stops)
    assert stream.stopped == bool(stops)


@exactly
@given(text=st.text(), stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_stream_of_any_text(bpe, text, stops):
    tokens = bpe.encode(text)
    pieces, _ = stream_pieces(bpe, chunks(tokens, [1]), stops)
    assert "".join(pieces) == cut(bpe.decode(tokens), stops)


@exactly
@given(text=st.text("ab", max_size=40), stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=3))
def test_held_text_is_exactly_what_could_become_a_stop_string(bpe, text, stops):
    """Few letters make many near misses. After each token, only the longest end that begins a stop string is kept."""
    stream, tokens, out = TextStream(bpe, stops), bpe.encode(text), ""
    for i, token in enumerate(tokens):
        out += stream.push([token])
        so_far = bpe.decode(tokens[:i + 1])
        if stream.stopped:
            assert out == cut(so_far, stops)
            break
        begins = [so_far[at:] for at in range(len(so_far)) if any(stop.startswith(so_far[at:]) for stop in stops)]
        assert out == so_far.removesuffix(max(begins, key=len, default=""))


def test_no_piece_ends_inside_a_character(bpe):
    tokens = bpe.encode("🙂x")
    assert len(tokens) > 2                                   # the emoji itself is split, or this tests nothing
    stream = TextStream(bpe)
    pieces = [stream.push([token]) for token in tokens]
    assert pieces[0] == "" and "".join(pieces) == "🙂x" and [p for p in pieces if p] == ["🙂", "x"]


def test_unfinished_character_at_the_end(tokenizer):
    """One mark from byte-level BPE for the broken sequence, one for each byte from byte fallback."""
    tokens = tokenizer.encode("x🙂")[:-1]
    pieces, stream = stream_pieces(tokenizer, chunks(tokens, [1]), [])
    assert stream.finish() == ""                             # the rest comes once
    assert pieces[-1] == "\ufffd" * (1 if tokenizer.vocabulary.utf8_errors == "replace" else 3)
    assert "".join(pieces) == tokenizer.decode(tokens)


def test_stop_string_across_tokens(bpe):
    tokens = bpe.encode("The menu of the printer")
    assert not any("nu of t" in bpe.decode([token]) for token in tokens)
    pieces, stream = stream_pieces(bpe, chunks(tokens, [1]), ["nu of t"])
    assert "".join(pieces) == "The me" and stream.stopped
    assert stream.push(tokens) == "" and stream.finish() == ""


@pytest.mark.parametrize("stops, text, result", [
    (["aab"], "aaab", "a"),                  # the first attempt fails, a later one inside it succeeds
    (["bc", "abcd"], "abcd", "a"),           # the first to be complete, not the first to begin
    (["cd", "bcd"], "abcd", "a"),            # complete together: the longest
    (["。"], "上海是。好", "上海是"),
    (["\ufffd"], "a", "a"),
    (["abcd"], "xabc", "xabc"),              # never completed: the end gives it back
])
def test_which_stop_string(bpe, stops, text, result):
    for size in (1, 100):
        pieces, stream = stream_pieces(bpe, chunks(bpe.encode(text), [size]), stops)
        assert "".join(pieces) == result and stream.stopped == (result != text)


def test_stop_string_completed_by_the_end(bpe):
    """The replacement character of an unfinished one can itself complete a stop string."""
    pieces, stream = stream_pieces(bpe, [bpe.encode("x🙂")[:-1]], ["\ufffd"])
    assert "".join(pieces) == "x" and stream.stopped


def test_a_stream_keeps_little(tokenizer):
    """A token's cost cannot grow with the text where little of the text is kept: random bytes, a long stop string."""
    stream, dice = TextStream(tokenizer, ["ab" * 10]), random.Random(0)
    for _ in range(5000):
        stream.push([dice.randrange(tokenizer.vocab_size)])
        assert len(stream._held) < 20 and len(stream._detokenizer._utf8.getstate()[0]) <= 3


@pytest.mark.parametrize("stop", ["abc", [""], ["a", 3]])
def test_bad_stop(bpe, stop):
    with pytest.raises(ValueError, match="stop: expected a list of strings that are not empty"):
        TextStream(bpe, stop)


# --- bad ids, text, files

def test_ids_that_only_pad_the_embedding_are_silent(pieces_folders):
    for folder, text in ((BPE, "The menu"), (pieces_folders["one"], "the menu")):
        padded = Tokenizer.from_dir(folder, padded_to=9000)
        tokens = padded.encode(text)
        assert padded.decode([8999, *tokens[:1], 8500, *tokens[1:], 8192]) == text   # also before the first space
        assert padded.vocab_size < 9000
        with pytest.raises(ValueError, match="token id 9000 is not in the vocabulary"):
            padded.decode([9000])


def test_gap_in_the_ids(tmp_path):
    library = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 5}, unk_token="a"))
    library.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_dir(tmp_path)
    assert ours.vocab_size == 6 and ours.decode([3, 0, 3, 5]) == library.decode([3, 0, 3, 5]) == "a b"


@pytest.mark.parametrize("token", [-1, 8192, 10**12])
def test_id_out_of_range(bpe, token):
    for call in (lambda: bpe.decode([5, token]), lambda: TextStream(bpe).push([token])):
        with pytest.raises(ValueError, match=rf"token id {token} is not in the vocabulary .*padded_to=config"):
            call()


def test_tokenizer_larger_than_the_model():
    with pytest.raises(ValueError, match=r"tokenizer\.json: holds token ids up to 8191, .* model's vocab_size is 64"):
        Tokenizer.from_dir(BPE, padded_to=64)


@pytest.mark.parametrize("text, reason", [("a\ud83d", "half a surrogate pair at character 1"), (b"a", "found bytes"),
                                          (None, "found NoneType")])
def test_not_a_text(tokenizer, text, reason):
    with pytest.raises(ValueError, match=reason):
        tokenizer.encode(text)


@pytest.mark.parametrize("name, content, reason", [
    ("tokenizer.json", b"{", "not valid JSON"),
    ("tokenizer.json", b"\xff\xfe\xff", "not valid JSON"),
    ("tokenizer.json", b"[" * 100_000, "not valid JSON"),
    ("tokenizer.json", b"[]", "expected a JSON object, found list"),
    ("tokenizer.json", b'{"version": "1.0"}', "the tokenizers library cannot read it"),
    ("tokenizer.model", b"garbage", "sentencepiece cannot read it"),
    ("tokenizer.model", b"", "sentencepiece cannot read it"),
    ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "sentencepiece cannot read it"),
])
def test_broken_file(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))}: {reason}"):
        Tokenizer.from_dir(tmp_path)


def test_truncated_tokenizer_files(tmp_path, pieces_folders):
    for path in (BPE / "tokenizer.json", pieces_folders["all"] / "tokenizer.model"):
        folder = tmp_path / path.suffix[1:]
        folder.mkdir()
        (folder / path.name).write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ValueError, match=re.escape(path.name)):
            Tokenizer.from_dir(folder)


# --- stop ids

@pytest.mark.parametrize("content, config_eos, result", [
    (None, [5], (5,)),
    ({}, [5, 3], (3, 5)),
    ({"eos_token_id": None}, [], ()),
    ({"eos_token_id": 7}, [5], (5, 7)),
    ({"eos_token_id": [151643, 151645, 151672]}, [151645], (151643, 151645, 151672)),
])
def test_stop_ids(tmp_path, content, config_eos, result):
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert load_stop_ids(tmp_path, config_eos) == result


@pytest.mark.parametrize("content, reason", [
    ("{", "not valid JSON"), ("3", "expected a JSON object, found int"),
    *[(json.dumps({"eos_token_id": bad}), "eos_token_id is .*; expected a token id or a list")
      for bad in ("7", 1.0, -1, True, [1, "2"], [[1]], {"id": 1})],
])
def test_bad_stop_ids(tmp_path, content, reason):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"generation_config\.json: {reason}"):
        load_stop_ids(tmp_path, [0])
