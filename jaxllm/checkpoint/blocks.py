"""Cutting arrays into blocks: the chunks that are stored, and the pieces that are held in memory at once.

The letters of a parameter's path (`gate_EDI`: experts, model, expert hidden) say along which dims it may be sharded
and along which hub rows run; blocks are cut there first, so that a block is a run of bytes in a hub file and a device
later reads few blocks that it does not need.
"""
import itertools
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np

Index = tuple[slice, ...]
LIMIT = 32 * 2**20        # bytes of a block at most: small beside the memory bound, large beside a disk's seek
CUT_FIRST = "EWNKFI"      # dims that meshes shard, and hub rows; any other dim only if these do not suffice
ALIGNMENT = 64            # bytes; XLA's CPU backend takes host arrays aligned so without copying them
EXPONENT = {np.dtype(dtype): (unsigned, unsigned(bits)) for dtype, unsigned, bits in (     # the bits of the exponent
    (np.float32, np.uint32, 0x7F800000), (np.float16, np.uint16, 0x7C00), (ml_dtypes.bfloat16, np.uint16, 0x7F80))}


def bounds(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(start, stop) for each dim. ValueError if `index` does not fit `shape` or steps."""
    if len(index) != len(shape) or any(s.step not in (None, 1) for s in index):
        raise ValueError(f"index {index} does not fit shape {shape}: expected one slice of step 1 for each dim")
    cut = (s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
    return tuple((start, max(start, stop)) for start, stop in cut)


def cut_shape(index: Index, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of array[index]."""
    return tuple(stop - start for start, stop in bounds(index, shape))


def letters_of(path: str) -> str:
    """The dims of a parameter, of its codes or of its scale: "EDI" of gate_EDI.codes."""
    return path.removesuffix(".codes").removesuffix(".scale").rsplit("_", 1)[-1]


def is_stack(path: str) -> bool:
    """Whether the first dim of the parameter counts experts."""
    letters = letters_of(path)
    return len(letters) == 3 and letters[0] == "E"


def chunk_shape(path: str, shape: tuple[int, ...], itemsize: int, limit: int = LIMIT) -> tuple[int, ...]:
    """The shape of the blocks, at most `limit` bytes each, in which the parameter `path` is stored.

    A stack of experts is always cut into single experts. Other dims are halved while they divide, so that blocks line
    up with the shards of a mesh; a dim that no longer halves is cut unevenly.
    """
    letters = letters_of(path)
    assert len(letters) == len(shape), (path, shape)
    chunk = list(shape)
    if is_stack(path):
        chunk[0] = 1
    order = sorted(range(len(shape)), key=lambda dim: (CUT_FIRST + letters).index(letters[dim]))
    for dim in order:
        excess = math.prod(chunk) * itemsize / limit
        if excess <= 1:
            break
        pieces = 2 ** math.ceil(math.log2(excess))
        if chunk[dim] % pieces == 0:
            chunk[dim] //= pieces
        else:
            chunk[dim] = max(1, math.floor(chunk[dim] / excess))
    return tuple(chunk)


def grid(index: Index, shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Index]:
    """The blocks of array[index], cut where the chunks of the whole array are, in row-major order."""
    edges = []
    for (start, stop), step in zip(bounds(index, shape), chunk, strict=True):
        inner = range((start // step + 1) * step, stop, step)
        edges.append(list(itertools.pairwise([start, *inner, stop])) if stop > start else [])
    for block in itertools.product(*edges):
        yield tuple(slice(start, stop) for start, stop in block)


def relative(block: Index, index: Index, shape: tuple[int, ...]) -> Index:
    """`block` of the whole array as an index into array[index]."""
    starts = [start for start, _ in bounds(index, shape)]
    return tuple(slice(s.start - start, s.stop - start) for s, start in zip(block, starts, strict=True))


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """np.empty with its data on a multiple of ALIGNMENT bytes."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start:start + nbytes].view(dtype).reshape(shape)


def count_nonfinite(array: np.ndarray) -> int:
    """How many elements of a float32, float16 or bfloat16 array are NaN or Inf: the exponent bits are all ones."""
    unsigned, mask = EXPONENT[array.dtype]     # four times as fast as np.isfinite on bfloat16
    return int(np.count_nonzero(np.bitwise_and(array.view(unsigned), mask) == mask))
