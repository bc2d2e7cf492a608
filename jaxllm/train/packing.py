"""Documents in rows of exactly T tokens, of which each row can be made at any time, by its number alone.

Text may be cut: its documents follow each other in an order of their own in every epoch, and that stream is cut into
rows. The last token of a row is the first of the next, so that each token but a document's first is a target once in an
epoch: of the last row only, some may be padding. Conversations stay whole (best fit, the longest first), so there is
padding at the end of rows.
"""
import bisect
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Document:
    """Tokens that belong together, and which of them are targets; the first never is, as nothing stands before it."""
    tokens_T: np.ndarray      # int32
    counted_T: np.ndarray     # bool

    def __len__(self) -> int:
        return len(self.tokens_T)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a `Batch`. Padding says that it begins after itself, at T."""
    tokens_T: np.ndarray      # int32
    begin_T: np.ndarray       # int32
    counted_T: np.ndarray     # bool


class Rows(Protocol):
    """All documents in rows, as many in every epoch."""
    num_rows: int

    def row(self, epoch: int, number: int) -> Row:
        """Row `number` of 0 .. num_rows - 1."""


class CutRows:
    """Documents cut at the borders of rows, in an order that epoch and seed decide. At least two tokens in all."""

    def __init__(self, documents: Sequence[Document], context: int, seed: int):
        self._documents, self._context, self._seed = documents, context, seed
        self._length_N = np.array([len(document) for document in documents], np.int64)
        self._end = int(self._length_N.sum())
        self.num_rows = -(-(self._end - 1) // (context - 1))
        self._layout = functools.lru_cache(maxsize=2)(self._lay_out)      # two: files are mixed, epochs are not

    def row(self, epoch: int, number: int) -> Row:
        order_N, start_N = self._layout(epoch)
        begin = number * (self._context - 1)
        end = min(begin + self._context, self._end)
        first, last = np.searchsorted(start_N, (begin, end - 1), side="right") - 1
        pieces = []
        for document, start in zip(order_N[first:last + 1], start_N[first:last + 1], strict=True):
            whole, cut = self._documents[document], slice(max(begin - start, 0), end - start)
            pieces.append(Document(whole.tokens_T[cut], whole.counted_T[cut]))
        return lay(pieces, self._context)

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents in their order, where in the stream each starts).

        By raw random bits, since numpy keeps those the same in all its versions, and permutations not.
        """
        order_N = np.argsort(np.random.PCG64((self._seed, epoch)).random_raw(len(self._length_N)), kind="stable")
        return order_N, np.cumsum(self._length_N[order_N]) - self._length_N[order_N]


class WholeRows:
    """Documents none of which is cut, the same ones together in every epoch. None may be longer than a row."""

    def __init__(self, documents: Iterable[Document], context: int):
        self._context = context
        self._rows = best_fit(documents, context)
        self.num_rows = len(self._rows)

    def row(self, epoch: int, number: int) -> Row:
        return lay(self._rows[number], self._context)


def best_fit(documents: Iterable[Document], context: int) -> list[list[Document]]:
    """The documents in rows of up to `context` tokens: from the longest on, each where it leaves the least room."""
    rows: list[list[Document]] = []
    free: list[tuple[int, int]] = []      # (room, row), ascending
    for document in sorted(documents, key=len, reverse=True):
        found = bisect.bisect_left(free, (len(document),))
        room, row = free.pop(found) if found < len(free) else (context, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(document)
        bisect.insort(free, (room - len(document), row))
    return rows


def lay(documents: Iterable[Document], context: int) -> Row:
    """One document after the other, then padding."""
    row = Row(np.zeros(context, np.int32), np.full(context, context, np.int32), np.zeros(context, bool))
    begin = 0
    for document in documents:
        end = begin + len(document)
        row.tokens_T[begin:end], row.begin_T[begin:end] = document.tokens_T, begin
        row.counted_T[begin + 1:end] = document.counted_T[1:]
        begin = end
    return row
