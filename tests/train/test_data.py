"""The stream of training batches: the same for any number of processes and after any stop, in the shares asked for."""
import gzip
import json
import lzma
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.generate.text import Tokenizer
from jaxllm.train.data import batches

TOKENIZER = Tokenizer.from_dir("configs/mimo-nano")
END = TOKENIZER.encode("<|endoftext|>")[0]
WORDS = "the file opens and closes a window with two pages of text , which you can print or save".split()
FIELDS = ("tokens_BT", "begin_BT", "counted_BT")


def write(file, texts):
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def speak(seed, num_texts, longest):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(num_texts)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of which one has long documents and few, and the other many short ones, all in digits."""
    folder = tmp_path_factory.mktemp("data")
    return (write(folder / "long.jsonl", speak(0, 6, 200)),
            write(folder / "short.jsonl", [" ".join(map(str, range(n % 5, n % 7 + 5))) for n in range(90)]))


def open_rows(files, **changes):
    return batches({files[0]: 0.7, files[1]: 0.3}, TOKENIZER, **dict(context=32, batch=4, seed=3) | changes)


def take(rows, number):
    return [next(rows) for _ in range(number)]


def same(some, others):
    return len(some) == len(others) and all(
        np.array_equal(getattr(one, field), getattr(other, field))
        for one, other in zip(some, others, strict=True) for field in FIELDS)


def test_a_batch_is_rows_of_context_tokens(files):
    batch = next(open_rows(files))
    assert [getattr(batch, field).shape for field in FIELDS] == [(4, 32)] * 3
    assert [getattr(batch, field).dtype for field in FIELDS] == [np.int32, np.int32, np.bool_]


def test_the_seed_decides_the_order(files):
    assert same(take(open_rows(files), 20), take(open_rows(files), 20))
    assert not same(take(open_rows(files), 3), take(open_rows(files, seed=4), 3))


@pytest.fixture(scope="module")
def undisturbed(files):
    """The states before each of 120 steps, as JSON, and what came."""
    rows = open_rows(files)
    return list(zip(*((json.dumps(rows.state()), next(rows)) for _ in range(120)), strict=True))


@settings(max_examples=20, deadline=None)      # files are read each time
@given(stops=st.lists(st.tuples(st.integers(0, 116), st.integers(0, 3)), min_size=1, max_size=4))
def test_after_any_stops_the_stream_is_what_it_would_have_been(files, undisturbed, stops):
    states, wanted = undisturbed
    rows = open_rows(files)
    for begin, number in stops:
        rows.restore(json.loads(states[begin]))
        assert json.dumps(rows.state()) == states[begin]
        assert same(take(rows, number), wanted[begin:begin + number])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_rows_of_a_step(files, processes):
    """In order, so that a batch over all devices is the same array whoever holds them."""
    parts = [open_rows(files, process=p, processes=processes) for p in range(processes)]
    for whole in take(open_rows(files), 30):
        rows = [next(part) for part in parts]
        for field in FIELDS:
            assert np.array_equal(np.concatenate([getattr(row, field) for row in rows]), getattr(whole, field))


def test_another_number_of_processes_goes_on(files):
    two = open_rows(files, process=1, processes=2)
    take(two, 7)
    one = open_rows(files)
    one.restore(two.state())
    assert np.array_equal(next(one).tokens_BT[2:], next(two).tokens_BT)


def test_shares_are_of_tokens(files):
    words = set(TOKENIZER.encode(" ".join(WORDS))) - set(TOKENIZER.encode(" ".join(map(str, range(12)))))
    found = Counter()
    for batch in take(open_rows(files), 400):
        for tokens, begin in zip(batch.tokens_BT, batch.begin_BT, strict=True):
            tokens = tokens[begin <= np.arange(32)].tolist()
            found[bool(words & set(tokens))] += len(tokens)
    assert found[True] / found.total() == pytest.approx(0.7, abs=0.02)


def test_an_epoch_has_every_token_once_and_the_next_in_another_order(files):
    rows = batches({files[0]: 1}, TOKENIZER, context=16, batch=1, seed=0)
    ids = [[*TOKENIZER.encode(text), END] for text in speak(0, 6, 200)]
    assert rows.num_tokens == sum(map(len, ids))
    targets = Counter(token for document in ids for token in document[1:])
    num_rows = -(-(rows.num_tokens - 1) // 15)
    epochs = [take(rows, num_rows) for _ in range(3)]
    for epoch in epochs:
        assert Counter(np.concatenate([row.tokens_BT[row.counted_BT] for row in epoch]).tolist()) == targets
    orders = [[tuple(row.tokens_BT[0].tolist()) for row in epoch] for epoch in epochs]
    assert len(set(map(tuple, orders))) == len(set(map(frozenset, orders))) == 3      # and cut at other places


def test_documents_end_and_do_not_see_each_other(files):
    """Wherever a document ends, its last token counts, and what follows begins anew and does not count."""
    ends = 0
    for batch in take(open_rows(files), 50):
        for row, place in zip(*np.nonzero(batch.tokens_BT[:, :-1] == END), strict=True):
            if batch.begin_BT[row, place] > place:
                continue
            assert batch.counted_BT[row, place] == (batch.begin_BT[row, place] < place)
            assert batch.begin_BT[row, place + 1] in (place + 1, 32) and not batch.counted_BT[row, place + 1]
            ends += 1
    assert ends > 50


def test_long_documents_are_not_read_in_one_go(tmp_path):
    """Rows are shuffled too: those of one long document do not follow each other."""
    ids = TOKENIZER.encode(text := " ".join(map(str, range(1000))))
    rows = batches({write(tmp_path / "long.jsonl", [text]): 1}, TOKENIZER, context=10, batch=1, seed=0)
    places = {tuple(ids[n:n + 10]): n for n in range(0, len(ids) - 10, 9)}
    found = [places[row] for batch in take(rows, len(places)) if (row := tuple(batch.tokens_BT[0].tolist())) in places]
    steps = np.diff(found)
    assert len(found) > 0.9 * len(places) and (steps == 9).mean() < 0.1


def test_compressed_files_and_patterns(tmp_path, files):
    content = [Path(file).read_bytes() for file in files]
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(content[0]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content[1]))
    (tmp_path / "one.jsonl").write_bytes(b"".join(content))
    both, one = (batches({str(tmp_path / name): 1}, TOKENIZER, context=32, batch=2, seed=0)
                 for name in ("[ab].jsonl.*", "one.jsonl"))
    assert same(take(both, 20), take(one, 20)) and both.num_tokens == one.num_tokens


@pytest.mark.parametrize(("changes", "message"), [
    ({"context": 1}, "context = 1: expected 2 or more"), ({"batch": 0}, "batch = 0: expected 1 or more"),
    ({"seed": -1}, "seed = -1: expected 0 or more"),
    ({"format": "chats"}, "format = 'chats': expected 'text' or 'chat'"),
    ({"on_broken": "no"}, "on_broken = 'no': expected 'stop' or 'skip'"),
    ({"processes": 3}, "batch = 4: 3 processes cannot have equally many"),
    ({"process": 2, "processes": 2}, "there is no process 2"), ({"processes": 0}, "batch = 4: 0 processes")])
def test_arguments(files, changes, message):
    with pytest.raises(ValueError, match=message):
        open_rows(files, **changes)


@pytest.mark.parametrize(("data", "message"), [
    ({}, "data is empty"), ({"a": 0.0}, "data: a has a share of 0.0"), ({"a": -1}, "data: a has a share of -1"),
    ({"a": float("nan")}, "share of nan"), ({"a": float("inf")}, "share of inf"),
    ({"no/such/*.jsonl": 1}, r"data: there is no file no/such/\*.jsonl, nor any that fits it")])
def test_data(data, message):
    with pytest.raises(ValueError, match=message):
        batches(data, TOKENIZER, context=8, batch=1, seed=0)


BROKEN = [(b"{", "the record is not valid JSON"), (b"\xff", "the record is not valid JSON"),
          (b'{"txt": 1}', "the record: expected an object with a string 'text', found {\"txt\": 1}"),
          (b'{"text": "\\ud800"}', "the text holds half a surrogate pair")]


@pytest.mark.parametrize(("line", "message"), BROKEN)
def test_a_broken_record_is_named_or_skipped(tmp_path, line, message):
    file = tmp_path / "some.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "better"}\n')
    small = dict(context=8, batch=1, seed=0)
    with pytest.raises(ValueError, match=f"some.jsonl, line 2: {message}"):
        batches({str(file): 1}, TOKENIZER, **small)
    rows = batches({str(file): 1}, TOKENIZER, on_broken="skip", **small)
    assert len(rows.skipped) == 1 and f"{file}, line 2: {message}" in rows.skipped[0]
    assert rows.num_tokens == 2 + len(TOKENIZER.encode("good")) + len(TOKENIZER.encode("better"))


@pytest.mark.parametrize(("content", "message"), [
    (b"", "holds nothing to learn from: no text"), (b'{"text": ""}\n', "holds nothing to learn from: no text"),
    (b"1\n2\n", "all records are broken, 2 of them; the first: .*, line 1: the record: expected")])
def test_nothing_to_learn_from(tmp_path, content, message):
    (tmp_path / "none.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"data: .*none.jsonl .*{message}"):
        batches({str(tmp_path / "none.jsonl"): 1}, TOKENIZER, context=8, batch=1, seed=0, on_broken="skip")


@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_a_file_that_is_cut_short_is_never_skipped(tmp_path, suffix, pack):
    file = tmp_path / f"some.jsonl{suffix}"
    file.write_bytes(pack(b'{"text": "some words"}\n' * 99)[:-9])
    with pytest.raises(ValueError, match=f"some.jsonl{suffix} is not a whole {suffix} file"):
        batches({str(file): 1}, TOKENIZER, context=8, batch=1, seed=0, on_broken="skip")


def test_a_tokenizer_without_an_end_of_text(files):
    tokenizer = types.SimpleNamespace(vocabulary=types.SimpleNamespace(token_id=lambda name: None))
    with pytest.raises(ValueError, match=r"no token to end a document with; expected one of <\|endoftext\|>, </s>"):
        batches({files[0]: 1}, tokenizer, context=8, batch=1, seed=0)


@pytest.mark.parametrize("changes", [{"context": 16}, {"batch": 8}, {"seed": 4}])
def test_a_state_of_another_run_is_refused(files, changes):
    (key, value), = changes.items()
    state = open_rows(files, **changes).state()
    with pytest.raises(ValueError, match=f"the data has changed since the checkpoint: {key} was {value}, now it is"):
        open_rows(files).restore(state)


def test_a_state_of_other_text_is_refused(tmp_path, files):
    state = open_rows(files).state()
    other = write(tmp_path / "short.jsonl", ["something else"])
    with pytest.raises(ValueError, match="data was .*'short.jsonl', 0.3, .*, now it is .*'short.jsonl', 0.3, "):
        open_rows((files[0], other)).restore(state)
