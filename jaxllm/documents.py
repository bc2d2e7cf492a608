"""Documents of JSON Lines files, as a model reads them: tokens in windows, windows in batches of few shapes."""
import dataclasses
import gzip
import itertools
import json
import lzma
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.generate.text import Tokenizer

BATCH = 4096        # tokens of a batch on each part of the data axis
SHORTEST = 32       # tokens of the shortest kind of batch
OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens to be read together, of which those from `first` on are counted."""
    tokens: Sequence[int]
    first: int


@dataclasses.dataclass(frozen=True)
class Text:
    """The documents of a file as one model reads them."""
    windows: list[Window]
    tokens: int      # those that are counted
    nbytes: int      # of the text that they stand for


@dataclasses.dataclass(frozen=True)
class Batch:
    """Windows in rows, padded with empty ones; int32."""
    files: list[str]            # of the rows that are not padding
    tokens_BT: np.ndarray
    first_B: np.ndarray
    length_B: np.ndarray


def read_documents(file: str | os.PathLike[str]) -> list[str]:
    """The `text` of each line of a JSON Lines file. Errors: ValueError naming file and line, OSError."""
    texts = []
    try:
        with OPENERS.get(Path(file).suffix, open)(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                texts.append(read_text(line, f"{file}, line {number}"))
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{file} is not a whole {Path(file).suffix} file: {error}") from None
    if not any(texts):
        raise ValueError(f"{file} holds no text; expected JSON lines, each with a string 'text'")
    return texts


def read_text(line: bytes, place: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:      # bytes that are no UTF-8 too
        raise ValueError(f"{place} is not valid JSON: {error}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = line.decode(errors="replace").rstrip()
        raise ValueError(f"{place}: expected an object with a string 'text', found {found[:80]}")
    return text


def cut_up(file: str, texts: Iterable[str], tokenizer: Tokenizer, context: int) -> Text:
    """The documents of `file` in windows of `context` tokens. Errors: ValueError when there is nothing to count."""
    if context < 2:
        raise ValueError(f"context = {context}: a token is predicted from at least one before it; expected 2 or more")
    windows, tokens, nbytes = list[Window](), 0, 0
    for text in texts:
        ids = tokenizer.encode(text)
        if len(ids) > 1:
            windows += windows_of(ids, context)
            tokens += len(ids) - 1
            nbytes += len(text.encode()) - len(tokenizer.piece(ids[0], at_start=True) or b"")
    if not windows:
        raise ValueError(f"{file}: no document has two tokens or more, so there is nothing to predict")
    return Text(windows, tokens, nbytes)


def windows_of(ids: Sequence[int], context: int) -> Iterator[Window]:
    yield Window(ids[:context], 1)
    half = context // 2
    for counted in range(context, len(ids), context - half):
        yield Window(ids[counted - half:counted - half + context], half)


def batches_of(windows: Iterable[tuple[str, Window]], data: int) -> Iterator[Batch]:
    """The windows, each with its file, those of like length together.

    T is a power of two and B * T the same for all but the longest, so that there are few shapes to compile.
    """
    def padded(window: tuple[str, Window]) -> int:
        return max(SHORTEST, 1 << (len(window[1].tokens) - 1).bit_length())

    for T, group in itertools.groupby(sorted(windows, key=padded), padded):
        rest, B = list(group), max(1, BATCH // T) * data
        for begin in range(0, len(rest), B):
            some = rest[begin:begin + B]
            batch = Batch([file for file, _ in some], *(np.zeros(shape, np.int32) for shape in ((B, T), B, B)))
            for row, (_, window) in enumerate(some):
                batch.tokens_BT[row, :len(window.tokens)] = window.tokens
                batch.first_B[row], batch.length_B[row] = window.first, len(window.tokens)
            yield batch
