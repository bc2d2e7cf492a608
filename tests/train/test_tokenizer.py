"""Tokenizers of our own making: nothing is lost, ids are where they belong, the same text gives the same files."""
import gzip
import json
import lzma
import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxllm.cli.parser import Parser
from jaxllm.cli.tokenizer import add_tokenizer
from jaxllm.documents import cut_up
from jaxllm.generate.text import TextStream, Tokenizer, load_stop_ids
from jaxllm.train import tokenizer as training
from jaxllm.train.tokenizer import SMALLEST, SPECIAL, train_tokenizer

UDHR = Path(__file__).parents[2] / "configs" / "mimo-nano" / "udhr"
EN, ZH, KO = (UDHR / f"train.{language}.jsonl" for language in ("en", "zh", "ko"))
CODE = "def f(x):\n    if x:\n        return 12 * x\n\n\n" * 30
VOCAB = 1024
FILES = ("generation_config.json", "tokenizer.model", "tokenizer_config.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("tokenizer")
    (where / "code.txt").write_text(CODE)
    return train_tokenizer([EN, ZH, where / "code.txt"], where / "out", VOCAB)


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_dir(folder, padded_to=VOCAB)


def pieces(tokenizer: Tokenizer) -> list[bytes]:
    return [tokenizer.piece(token, at_start=False) for token in range(SMALLEST, VOCAB)]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- what it is

@settings(deadline=None, max_examples=300)
@given(st.text() | st.text(" \n\r\t▁▅a1é的\0\ufeff"))
@example("▁ ▁▁a▁\n▁")
@example("  two  spaces \n\n\n at \r\n both ends ")
@example("e\u0301 \ufb01 １２ \u2028 \U0010ffff <unk> <0x0A> " + "".join(SPECIAL))
def test_nothing_is_lost(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens, skip_special=False) == text
    assert training.UNKNOWN not in tokens


def test_special_tokens_are_single_ids(tokenizer):
    assert tokenizer.encode("".join(SPECIAL)) == list(range(len(SPECIAL)))
    assert tokenizer.vocabulary.special == {0, 1, 2}
    assert tokenizer.decode(range(len(SPECIAL))) == "".join(SPECIAL[3:])


def test_bytes_follow_and_all_ids_are_used(tokenizer):
    assert tokenizer.vocab_size == VOCAB
    assert b"".join(tokenizer.piece(token, False) for token in range(SMALLEST - 256, SMALLEST)) == bytes(range(256))


def test_how_pieces_are_cut(tokenizer):
    """Spaces and line breaks only before a word or alone, digits alone; runs of spaces are one piece."""
    texts = [piece.decode() for piece in pieces(tokenizer)]
    assert not [text for text in texts if " " in text.lstrip(" ") or "\n" in text.lstrip("\n")]
    assert not [text for text in texts if any(map(str.isdigit, text)) and len(text) > 1]
    assert {" the", " rights", "    ", "\n\n\n"} <= set(texts)
    assert any(len(text.strip()) > 1 and text.endswith((",", ".", "。")) for text in texts)


def test_it_shortens_text(tokenizer):
    for file in (EN, ZH):
        text = json.loads(file.read_text().splitlines()[2])["text"]
        assert len(tokenizer.encode(text)) < len(text.encode()) / 2


# --- with the rest of the package

def test_chat_template(folder, tokenizer):
    messages = [{"role": "user", "content": "Open the menu."},
                {"role": "assistant", "reasoning_content": "A call.", "content": "Yes.",
                 "tool_calls": [{"name": "open", "arguments": {"menu": "File"}}]},
                {"role": "tool", "content": "done"}]
    prompt = tokenizer.chat(messages, add_generation_prompt=True)
    tokens = tokenizer.encode(prompt)
    assert tokenizer.decode(tokens, skip_special=False) == prompt
    for token, name in enumerate(SPECIAL):
        assert tokens.count(token) == prompt.count(name)
    assert set(range(1, len(SPECIAL))) <= set(tokens)
    assert load_stop_ids(folder, ()) == (0, 2)


def test_streams_of_tokens(tokenizer):
    """Any tokens, broken characters too: pieces as they arrive are the whole."""
    dice = random.Random(0)
    for _ in range(50):
        tokens = dice.choices(range(VOCAB), k=20)
        stream = TextStream(tokenizer)
        assert "".join(stream.push([token]) for token in tokens) + stream.finish() == tokenizer.decode(tokens)


def test_documents(tokenizer):
    text = cut_up("f", ["All human beings are born free.\n人人生而自由。"], tokenizer, context=8)
    assert text.nbytes == len(b"All human beings are born free.\n") + 21 - len(tokenizer.piece(
        tokenizer.encode("All human beings are born free.")[0], at_start=True))


# --- how it is made

def test_same_text_same_files(tmp_path, folder):
    (tmp_path / "elsewhere.txt").write_text(CODE)
    again = train_tokenizer([EN, ZH, tmp_path / "elsewhere.txt"], tmp_path / "new" / "out", VOCAB)
    assert sorted(contents(again)) == list(FILES)
    assert contents(again) == contents(folder)
    assert list(again.parent.iterdir()) == [again]


@pytest.mark.parametrize(("name", "opener"), [("t.jsonl", open), ("t.jsonl.xz", lzma.open), ("t.json.gz", gzip.open)])
def test_json_lines_are_read_as_documents(tmp_path, name, opener):
    with opener(tmp_path / name, "wb") as file:
        file.write(EN.read_bytes())
    packed, plain = (contents(train_tokenizer([source], tmp_path / out, 400))
                     for source, out in ((tmp_path / name, "packed"), (EN, "plain")))
    assert packed == plain
    assert b'"text"' not in packed["tokenizer.model"] and b"source" not in packed["tokenizer.model"]


@pytest.mark.parametrize(("name", "opener"), [("t.txt", open), ("t", open), ("t.xz", lzma.open)])
def test_plain_text_is_one_document(tmp_path, name, opener):
    with opener(tmp_path / name, "wb") as file:
        file.write(CODE.encode())
    made = Tokenizer.from_dir(train_tokenizer([tmp_path / name], tmp_path / "out", 290))
    assert made.vocabulary.token_id("▁▁▁▁") is not None


def test_text_without_spaces_may_be_long(tmp_path):
    """sentencepiece gives up the process where a word has more than 65,535 characters."""
    (tmp_path / "t").write_text("人人生而自由，在尊严和权利上一律平等。" * 10_000)
    assert Tokenizer.from_dir(train_tokenizer([tmp_path / "t"], tmp_path / "out", 300)).vocab_size == 300


def test_shares(tmp_path):
    """A file's share decides how many of the learnt pieces are its own; half of each is nearly half and half."""
    def count_hangul(*shares: float) -> int:
        out = tmp_path / str(shares)
        made = Tokenizer.from_dir(train_tokenizer([EN, KO], out, 900, shares))
        return sum(any("가" <= letter <= "힣" for letter in made.vocabulary.piece(token, False).decode())
                   for token in range(SMALLEST, 900))
    few, half, many = count_hangul(9, 1), count_hangul(1, 1), count_hangul(1, 9)
    assert few < half < many
    assert count_hangul(0.5, 0.5) == half


def test_shares_are_of_bytes_and_of_nothing_twice():
    sentences = [["aa"] * 50, ["人"] * 100, ["b" * 10] * 100]
    drawn = training._draw(sentences, [1, 2, 5])
    assert [len("".join(some).encode()) for some in drawn] == [60 + 40, 201, 500]
    assert all(some.count(sentence) <= whole.count(sentence) for some, whole in zip(drawn, sentences, strict=True)
               for sentence in some)
    assert drawn == training._draw(sentences, [1, 2, 5])


def run(*arguments: str) -> None:
    parser = Parser(prog="jaxllm")
    add_tokenizer(parser.add_subparsers(required=True))
    args = parser.parse_args(["tokenizer", *arguments])
    args.run(args)


@pytest.mark.parametrize("order", [
    ("{en}", "{zh}", "--vocab", "800", "{out}"),
    ("{en}", "{zh}", "{out}", "--vocab=800"),
    ("--vocab", "800", "--shares", "2,1", "{en}", "{zh}", "{out}"),
])
def test_command(tmp_path, capsys, order):
    out = tmp_path / "out"
    run("train", *(word.format(en=EN, zh=ZH, out=out) for word in order))
    assert capsys.readouterr().out == f"{out}: 800 tokens from 2 files\n"
    assert Tokenizer.from_dir(out).vocab_size == 800


# --- bad input

@pytest.mark.parametrize(("arguments", "complaint"), [
    (("train", "text"), "arguments are required: OUT .see jaxllm tokenizer train --help"),
    (("train", "text", "out", "--vocab", "many"), "--vocab: invalid int value: 'many'"),
    (("train", "text", "out", "--shares", "1,x"), "--shares: invalid shares value: '1,x'"),
    (("train", "text", "out", "--vocabulary", "9"), "unrecognized arguments: --vocabulary"),
])
def test_bad_commands(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        run(*arguments)


@pytest.mark.parametrize(("options", "complaint"), [
    (dict(vocab_size=SMALLEST), "vocab_size = 266: 266 ids are special tokens and bytes; expected more"),
    (dict(vocab_size=-1), "vocab_size = -1"),
    (dict(vocab_size=270), r"vocab_size = 270 is too small .* allows \d{3} or more"),
    (dict(vocab_size=99_999), r"vocab_size = 99999 is too large .* allows at most \d{4}"),
    (dict(shares=[1, 2]), "2 shares for 1 files"),
    (dict(shares=[0]), "shares: 0; expected numbers above 0"),
    (dict(shares=[float("nan")]), "shares: nan"),
    (dict(shares=[float("inf")]), "shares: inf"),
])
def test_bad_options(tmp_path, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        train_tokenizer([EN], tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", ["least", "most"])
def test_the_limits_that_errors_name_are_right(tmp_path, limit):
    with pytest.raises(ValueError) as error:
        train_tokenizer([EN], tmp_path / "out", 270 if limit == "least" else 99_999)
    allowed, step = int(str(error.value).split()[-1 if limit == "most" else -3]), 1 if limit == "most" else -1
    with pytest.raises(ValueError, match=f"{allowed}"):
        train_tokenizer([EN], tmp_path / "out", allowed + step)
    assert Tokenizer.from_dir(train_tokenizer([EN], tmp_path / "out", allowed)).vocab_size == allowed


@pytest.mark.parametrize(("name", "content", "complaint"), [
    ("t.txt", b"", "t.txt holds no text"),
    ("t.txt", b"\n\n\n", "cannot learn from this text"),
    ("t.txt", b"ok \xff", "t.txt is no whole file of UTF-8 text"),
    ("t.txt.xz", b"no xz", "t.txt.xz is no whole file"),
    ("t.txt.gz", b"no gz", "t.txt.gz is no whole file"),
    ("t.txt.gz", gzip.compress(b"some text", mtime=0)[:-9], "t.txt.gz is no whole file"),
    ("t.jsonl", b"", "t.jsonl holds no text"),
    ("t.jsonl", b'{"text": ""}\n', "t.jsonl holds no text"),
    ("t.jsonl", b'{"text": "a"}\n{"content": "b"}\n', "t.jsonl, line 2: expected an object with a string 'text'"),
])
def test_bad_text(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        train_tokenizer([EN, tmp_path / name] if name == "t.jsonl" else [tmp_path / name], tmp_path / "out", 300)
    assert not (tmp_path / "out").exists()


def test_no_files(tmp_path):
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        train_tokenizer([], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="missing.txt"):
        train_tokenizer([tmp_path / "missing.txt"], tmp_path / "out")


@pytest.mark.parametrize("is_file", [True, False])
def test_what_is_there_stays(tmp_path, is_file):
    out = tmp_path / "out"
    there = out if is_file else out / "mine"
    there.parent.mkdir(exist_ok=True)
    there.write_text("precious")
    with pytest.raises(ValueError, match="out already holds something"):
        train_tokenizer([EN], out, 400)
    assert there.read_text() == "precious"


def test_an_empty_folder_will_do(tmp_path):
    (tmp_path / "out").mkdir()
    train_tokenizer([EN], tmp_path / "out", 400)
    assert sorted(contents(tmp_path / "out")) == list(FILES)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        train_tokenizer([EN], tmp_path / "out", 400)
    assert list(tmp_path.iterdir()) == []
