"""Where parameters come from: a hub folder or a converted one, behind the same few members."""
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxllm.checkpoint.blocks import EXPONENT, Index, chunk_shape, count_nonfinite, grid


class Source(Protocol):
    """Parameters by path: `params` says what there is, `read` brings a slice in our layout into host memory.

    A packed parameter is two of them, its path with .codes and with .scale (codec.py).
    """
    params: dict[str, tuple[tuple[int, ...], np.dtype]]

    @property
    def folder(self) -> Path | str:
        """Where they are; str for an address such as gs://bucket/folder."""
        ...

    def read(self, path: str, index: Index) -> np.ndarray: ...

    def describe(self, path: str) -> str:
        """The parameter as its folder calls it, for warnings."""
        ...


class Convertible(Source, Protocol):
    """A source that `convert` takes: it also says what each parameter is made of."""
    reading: str | None                 # how the rows of attention lie in the hub files, where that was a question
    num_mtp: int                        # MTP blocks among the parameters
    left_out: dict[str, list[str]]      # what is not taken, group -> tensors or files

    def tensors_of(self, path: str) -> Sequence[str]:
        """The hub tensors that `read` reads for `path`."""
        ...


class Tally:
    """Counts the NaN and Inf values of one parameter, to warn of them once. Threads may share it."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[int] = []      # where in the parameter
        self._lock = threading.Lock()

    def add(self, block: Index, values: np.ndarray) -> None:
        """Look at values = parameter[block]. What is no float of at least 16 bits is checked by its source."""
        if values.dtype not in EXPONENT or not (found := count_nonfinite(values)):
            return
        inside = np.argwhere(~np.isfinite(values))[0]
        first = [s.start + int(n) for s, n in zip(block, inside, strict=True)]
        with self._lock:
            self.first = min(self.first or first, first)
            self.count += found

    def warn(self, source: Source, path: str) -> None:
        if self.count:
            warnings.warn(f"{source.describe(path)} has {self.count} NaN or Inf values, the first at {self.first}; "
                          "what the model computes from them will be NaN too", stacklevel=3)


def read_blocks(source: Source, path: str, index: Index, dtype: np.dtype,
                tally: Tally) -> Iterator[tuple[Index, np.ndarray]]:
    """params[path][index] as `dtype` in blocks of bounded size that cover it, each with its index in params[path]."""
    shape, stored = source.params[path]
    for block in grid(index, shape, chunk_shape(path, shape, stored.itemsize)):
        with np.errstate(over="ignore"):      # what float16 cannot hold becomes Inf, which the tally reports
            values = source.read(path, block).astype(dtype, copy=False)
        tally.add(block, values)
        yield block, values
