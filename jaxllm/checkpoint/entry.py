"""How one parameter of ours lies in the matrices of a hub checkpoint, and the way back.

A hub matrix is [out, in]; ours is its transpose with heads unfolded: q_DNH[d, n, h] is q_proj.weight[n * H + h, d]. An
`Entry` holds where the rows lie, as runs of hub rows: one run for most parameters, one matrix for each expert of a
stack, one run for each chunk of a fused qkv_proj. Any slice is read from just the rows and columns that hold it.

Entries know rows and columns, whatever lies in them: numbers, codes, or scales of segments (scales.py).
"""
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from jaxllm.checkpoint.blocks import Index, bounds

ReadRows = Callable[[str, Index], np.ndarray]      # (hub tensor, slices of it) -> values
ReadParam = Callable[[str, Index], np.ndarray]     # (our path, slices of it) -> values
TILE = 32      # hub rows that numpy transposes at once; whole matrices miss the cache at every element, 9 times slower


@dataclass(frozen=True)
class Rows:
    """`count` rows of the hub tensor `tensor`, from row `start`."""
    tensor: str
    start: int
    count: int


Matrix = tuple[Rows, ...]      # a matrix [out, in] in hub order, one run of rows after the other


@dataclass(frozen=True)
class Entry:
    """One parameter of ours: `matrices` of prod(out_dims) rows and prod(in_dims) columns; a vector has no in_dims.

    Its shape is in_dims + out_dims if transposed, else out_dims + in_dims; after the number of matrices if stacked.
    """
    path: str
    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    matrices: tuple[Matrix, ...]
    transposed: bool = True
    stacked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        single = self.in_dims + self.out_dims if self.transposed else self.out_dims + self.in_dims
        return (len(self.matrices), *single) if self.stacked else single

    @property
    def tensors(self) -> tuple[str, ...]:
        """The hub tensors that it is made of."""
        return tuple(dict.fromkeys(run.tensor for runs in self.matrices for run in runs))

    def read(self, read_rows: ReadRows, index: Index) -> np.ndarray:
        """parameter[index], not empty, where `read_rows` reads only the rows and columns that hold it."""
        if not self.stacked:
            return self._read_matrix(read_rows, self.matrices[0], index)
        (first, last), = bounds(index[:1], self.shape[:1])
        found = [self._read_matrix(read_rows, matrix, index[1:]) for matrix in self.matrices[first:last]]
        return found[0][None] if len(found) == 1 else np.stack(found)

    def _read_matrix(self, read_rows: ReadRows, matrix: Matrix, index: Index) -> np.ndarray:
        in_index, out_index = self._split(index)
        rows, out_shape, out_inner = _flatten(out_index, self.out_dims)
        cols, in_shape, in_inner = _flatten(in_index, self.in_dims)
        found = [read_rows(run.tensor, (cut, cols) if self.in_dims else (cut,)) for run, cut in _overlaps(matrix, rows)]
        block = found[0] if len(found) == 1 else np.concatenate(found)
        if not self.transposed:
            return block       # has no inner dims to cut: a table [out, in] or a vector [out]
        return transpose(block).reshape(in_shape + out_shape)[(slice(None), *in_inner, slice(None), *out_inner)]

    def _split(self, index: Index) -> tuple[Index, Index]:
        """(slices of in_dims, slices of out_dims)."""
        if self.transposed:
            return index[:len(self.in_dims)], index[len(self.in_dims):]
        return index[len(self.out_dims):], index[:len(self.out_dims)]

    def write(self, read_param: ReadParam, number: int, rows: range) -> np.ndarray:
        """Rows of matrix `number` in hub order [len(rows), in], the inverse of `read`; `rows` are whole heads."""
        inner = math.prod(self.out_dims[1:])
        out_index = (slice(rows.start // inner, rows.stop // inner), *(slice(None),) * len(self.out_dims[1:]))
        in_index = (slice(None),) * len(self.in_dims)
        index = in_index + out_index if self.transposed else out_index + in_index
        if self.stacked:
            block = read_param(self.path, (slice(number, number + 1), *index))[0]
        else:
            block = read_param(self.path, index)
        if self.transposed:
            return transpose(block.reshape(math.prod(self.in_dims), -1))
        return block.reshape(len(rows), *self.in_dims)


def _flatten(index: Index, dims: tuple[int, ...]) -> tuple[slice, tuple[int, ...], Index]:
    """(the run of flat rows that holds `index` of `dims`, its shape, what to cut from its inner dims)."""
    if not dims:
        return slice(0, 1), (), ()
    first, last = bounds(index, dims)[0]
    inner = math.prod(dims[1:])
    return slice(first * inner, last * inner), (last - first, *dims[1:]), index[1:]


def _overlaps(matrix: Matrix, rows: slice) -> Iterator[tuple[Rows, slice]]:
    """The runs that hold some of `rows` of the matrix, each with the rows of its hub tensor that do."""
    position = 0
    for run in matrix:
        first, last = max(rows.start - position, 0), min(rows.stop - position, run.count)
        if first < last:
            yield run, slice(run.start + first, run.start + last)
        position += run.count


def transpose(block: np.ndarray) -> np.ndarray:
    """block.T of a matrix, as a new array.

    XLA's copy of a strided host array is blocked and vectorised: 2.1 GB a second of CPU time for bytes [2048, 4096],
    where numpy has 0.5 in tiles, and 1.7 at best (64-bit words, whose 8 x 8 bytes are swapped by shifts and masks).
    """
    assert block.itemsize <= 4, "JAX would cut 8-byte numbers to 4"
    bits = block.view(f"u{block.itemsize}")      # XLA and numpy both move plain integers fastest
    device = _host()
    if device is not None:
        return np.asarray(jax.device_put(bits.T, device)).view(block.dtype)
    out = np.empty(bits.shape[::-1], bits.dtype)
    for row in range(0, len(bits), TILE):
        out[:, row:row + TILE] = bits[row:row + TILE].T
    return out.view(block.dtype)


@functools.cache
def _host() -> jax.Device | None:
    """The CPU as a JAX device; None if JAX_PLATFORMS leaves it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
