"""Text files as a model reads them: what is counted, and every file that cannot be read."""
import gzip
import json
import lzma

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.documents import BATCH, Window, batches_of, cut_up, read_documents, windows_of
from jaxllm.generate.text import Tokenizer

NANO = "configs/mimo-nano"


def write(file, *records):
    file.write_bytes("".join(json.dumps(record) + "\n" for record in records).encode())
    return file


@given(st.integers(0, 200), st.integers(2, 50))
def test_every_token_is_counted_once_with_half_a_window_before_it(length, context):
    counted = []
    for window in windows_of(range(length), context):
        assert len(window.tokens) <= context
        counted += window.tokens[window.first:]
        assert all(token == 0 or token - window.tokens[0] >= min(token, context // 2)
                   for token in window.tokens[window.first:])
    assert counted == list(range(1, length))


def test_bytes_are_those_of_the_counted_tokens():
    """Of each document all but its first token; one of a single token does not count at all."""
    tokenizer = Tokenizer.from_dir(NANO)
    texts = ["Größe ändern", "文書を開く", "a", ""]
    text = cut_up("file", texts, tokenizer, 4096)
    ids = [tokenizer.encode(one) for one in texts]
    assert len(ids[2]) == 1
    assert text.tokens == len(ids[0]) + len(ids[1]) - 2
    assert text.nbytes == sum(len(tokenizer.piece(token, at_start=False)) for row in ids[:2] for token in row[1:])


@pytest.mark.parametrize("data", [1, 2, 3])
def test_batches_hold_every_window_once(data):
    rng = np.random.default_rng(0)
    windows = [(f"file{n % 3}", Window(rng.integers(1, 99, rng.integers(2, 5000)).tolist(), int(rng.integers(1, 3))))
               for n in range(60)]
    found, shapes = [], set()
    for batch in batches_of(windows, data):
        B, T = batch.tokens_BT.shape
        assert B % data == 0 and B * T <= max(BATCH, T) * data and T & (T - 1) == 0
        assert not batch.length_B[len(batch.files):].any()
        shapes.add((B, T))
        rows = zip(batch.files, batch.tokens_BT, batch.first_B, batch.length_B, strict=False)
        for file, tokens, first, length in rows:
            assert not tokens[length:].any()
            found.append((file, Window(tokens[:length].tolist(), int(first))))
    assert sorted(found, key=repr) == sorted(windows, key=repr) and len(shapes) <= 9


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl", bytes), ("a.jsonl.xz", lzma.compress),
                                            ("a.jsonl.gz", gzip.compress)])
def test_plain_and_packed_files(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(b'{"text": "one", "id": 1}\n{"text": ""}\n{"text": "zw\xc3\xb6lf"}'))
    assert read_documents(tmp_path / name) == ["one", "", "zwölf"]


@pytest.mark.parametrize(("content", "message"), [
    (b'{"text": "a"}\n{"text": \n', r"a.jsonl, line 2 is not valid JSON"),
    (b'{"text": "a"}\n\n', r"a.jsonl, line 2 is not valid JSON"),
    (b'{"text": "\xff"}\n', r"a.jsonl, line 1 is not valid JSON: .*utf-8"),
    (b'{"body": "a"}\n', r"a.jsonl, line 1: expected an object with a string 'text', found {\"body\": \"a\"}"),
    (b'{"text": 3}\n', r"a.jsonl, line 1: expected an object with a string 'text'"),
    (b'["a"]\n', r"a.jsonl, line 1: expected an object with a string 'text', found \[\"a\"\]"),
    (b'', r"a.jsonl holds no text; expected JSON lines"),
    (b'{"text": ""}\n', r"a.jsonl holds no text"),
])
def test_broken_lines(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / "a.jsonl")


@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_files_cut_short_or_of_another_kind(tmp_path, suffix, pack):
    file = tmp_path / f"a.jsonl{suffix}"
    for content in (pack(b'{"text": "a"}\n' * 1000)[:-12], b'{"text": "a"}\n'):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"a.jsonl{suffix} is not a whole {suffix} file"):
            read_documents(file)


def test_nothing_to_predict():
    with pytest.raises(ValueError, match="here: no document has two tokens or more"):
        cut_up("here", ["a"], Tokenizer.from_dir(NANO), 4096)
    with pytest.raises(ValueError, match="context = 1: .* expected 2 or more"):
        cut_up("here", ["a b c"], Tokenizer.from_dir(NANO), 1)
