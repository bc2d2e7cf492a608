"""Training data: JSON Lines files, mixed by shares of the tokens, as an endless stream of batches (by grain).

The n-th row of the stream is found from n alone: which file (by share), which epoch of that file, which row of that
epoch (shuffled), and what lies in it (packing.py). So the state of the stream is the number of steps taken, a step has
the same rows however many processes share them, and going on at any step costs nothing.
"""
import dataclasses
import glob
import gzip
import lzma
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from jaxllm.documents import OPENERS, read_text
from jaxllm.generate.text import Tokenizer
from jaxllm.train import packing
from jaxllm.train.batch import Batch
from jaxllm.train.chat import read_conversation
from jaxllm.train.packing import CutRows, Document, WholeRows

END_OF_TEXT = ("<|endoftext|>", "</s>")      # the token that ends a document, by name, in Qwen's family and Llama's
FORMATS = ("text", "chat")
ON_BROKEN = ("stop", "skip")
Read = Callable[[bytes], Document | None]
State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """What one entry of `data` stands for."""
    name: str
    share: float
    documents: list[Document]

    @property
    def checksum(self) -> int:
        """Of all tokens: it tells this data, cut by this tokenizer, from any other."""
        crc = 0
        for document in self.documents:
            crc = zlib.crc32(document.tokens_T.tobytes(), crc)
        return crc


class Rows(Iterator[Batch]):
    """Endless batches, each of one process's rows of a step. Made by `batches`."""

    def __init__(self, steps: grain.MapDataset, num_tokens: int, skipped: list[str], origin: State):
        self.num_tokens = num_tokens      # of all files, each once
        self.skipped = skipped            # broken records that were left out: file, line and reason
        self._origin = origin
        # No threads: a batch is made in a millisecond or two, and without them no state is ever ahead of its batch.
        self._batches = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

    def __next__(self) -> Batch:
        return next(self._batches)

    def state(self) -> State:
        """What `restore` needs to go on after the last batch, ready for JSON; the same for every process, and for any
        number of them."""
        return {"step": self._batches.get_state()["next_index"], **self._origin}

    def restore(self, state: State) -> None:
        """Goes on where `state` was taken. Errors: ValueError for a state of other data, which has no such place."""
        for key, ours in self._origin.items():
            if state.get(key) != ours:
                raise ValueError(f"the data has changed since the checkpoint: {key} was {state.get(key)}, now it is "
                                 f"{ours}; go on with the same, or start a new run from the checkpoint's weights")
        self._batches.set_state({"next_index": state["step"]})


def batches(data: Mapping[str, float], tokenizer: Tokenizer, *, context: int, batch: int, seed: int,
            format: str = "text", on_broken: str = "stop", process: int = 0, processes: int = 1) -> Rows:
    """The batches of a run: rows of `context` tokens, `batch` of them a step.

    data: JSON Lines file, or pattern of such files, -> its share of the tokens (relative; to within a hundredth of the
    smallest share). Lines of format "text" are objects with a `text`, those of "chat" with `messages` (chat.py).
    on_broken: "stop" raises for the first broken line, "skip" leaves it out and notes it in `skipped`.
    process, processes: this one gets the rows process * batch / processes and on of each step, in order.

    Every file is read and encoded now, and its tokens are kept in memory: 5 bytes each, in every process.

    Errors: ValueError naming file and line, or the argument; OSError.
    """
    check_arguments(data, context, batch, seed, format, on_broken, process, processes)
    read = reader(format, tokenizer, context)
    skipped: list[str] = []
    parts = [Part(Path(name).name, share, read_part(name, read, skipped if on_broken == "skip" else None))
             for name, share in data.items()]
    rows = [stream(part, format, context, *np.random.SeedSequence((seed, i)).generate_state(2).tolist())
            for i, part in enumerate(parts)]
    mixed = grain.MapDataset.mix(rows, [part.share for part in parts])
    # There is no remainder, but without dropping it grain rounds so great a length up, to one that Python refuses.
    steps = mixed.batch(batch // processes, drop_remainder=True, batch_fn=stack)[process::processes]
    return Rows(steps, sum(len(document) for part in parts for document in part.documents), skipped, {
        "format": format, "context": context, "batch": batch, "seed": seed,
        "data": [[part.name, part.share, part.checksum] for part in parts]})


def check_arguments(data: Mapping[str, float], context: int, batch: int, seed: int, format: str, on_broken: str,
                    process: int, processes: int) -> None:
    for name, value, least in (("context", context, 2), ("batch", batch, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} = {value}: expected {least} or more")
    for name, choice, known in (("format", format, FORMATS), ("on_broken", on_broken, ON_BROKEN)):
        if choice not in known:
            raise ValueError(f"{name} = {choice!r}: expected {' or '.join(map(repr, known))}")
    if not 0 <= process < processes or batch % processes:
        raise ValueError(f"batch = {batch}: {processes} processes cannot have equally many of its rows, or there is no "
                         f"process {process} among them; expected a batch that they divide")
    if not data:
        raise ValueError("data is empty; expected one file or more, each with its share of the tokens")
    for name, share in data.items():
        if not (share > 0 and math.isfinite(share)):
            raise ValueError(f"data: {name} has a share of {share}; expected more than 0, or leave the file out")


def reader(format: str, tokenizer: Tokenizer, context: int) -> Read:
    """What makes a document of a line; None of one that holds nothing to predict."""
    if format == "chat":
        return lambda line: read_conversation(line, tokenizer, context)
    end = end_of_text(tokenizer)

    def read_document(line: bytes) -> Document | None:
        ids = tokenizer.encode(read_text(line, "the record"))
        return Document(np.array([*ids, end], np.int32), np.ones(len(ids) + 1, bool)) if ids else None
    return read_document


def end_of_text(tokenizer: Tokenizer) -> int:
    """The token that a document ends with. Errors: ValueError for a tokenizer without one."""
    found = [token for name in END_OF_TEXT if (token := tokenizer.vocabulary.token_id(name)) is not None]
    if not found:
        raise ValueError(f"the tokenizer has no token to end a document with; expected one of {', '.join(END_OF_TEXT)}")
    return found[0]


def read_part(pattern: str, read: Read, skipped: list[str] | None) -> list[Document]:
    """The documents of all files of a pattern; broken lines go to `skipped`, if there is such a list.

    Errors: ValueError naming file and line, or a pattern without files or documents; OSError.
    """
    files = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise ValueError(f"data: there is no file {pattern}, nor any that fits it as a pattern")
    documents, broken = list[Document](), list[str]()
    for place, line in (pair for file in files for pair in read_lines(file)):
        try:
            document = read(line)
        except ValueError as error:
            broken.append(f"{place}: {error}")
            if skipped is None:
                raise ValueError(broken[0]) from error
        else:
            documents += [document] if document else []
    if skipped is not None:
        skipped += broken
    if not documents:
        reason = f"all records are broken, {len(broken)} of them; the first: {broken[0]}" if broken else "no text"
        raise ValueError(f"data: {pattern} holds nothing to learn from: {reason}")
    return documents


def read_lines(file: str) -> Iterator[tuple[str, bytes]]:
    """("file, line n", line) of a file that may be compressed. Errors: ValueError for one that is not whole, OSError.
    """
    try:
        with OPENERS.get(Path(file).suffix, open)(file, "rb") as lines:
            yield from ((f"{file}, line {number}", line) for number, line in enumerate(lines, 1))
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{file} is not a whole {Path(file).suffix} file: {error}") from None


def stream(part: Part, format: str, context: int, order_seed: int, row_seed: int) -> grain.MapDataset:
    """The rows of a part without end, in another order in every epoch."""
    rows: packing.Rows = (WholeRows(part.documents, context) if format == "chat"
                          else CutRows(part.documents, context, order_seed))
    numbers = grain.MapDataset.range(rows.num_rows).shuffle(row_seed).repeat()
    return numbers.map_with_index(lambda i, number: rows.row(i // rows.num_rows, number))


def stack(rows: Sequence[packing.Row]) -> Batch:
    return Batch(*(np.stack(column) for column in zip(*((row.tokens_T, row.begin_T, row.counted_T) for row in rows),
                                                      strict=True)))
