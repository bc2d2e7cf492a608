"""The safetensors file format: headers parsed and distrusted, bytes read by position.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the data, which
the tensors fill without hole or overlap (format: github.com/huggingface/safetensors). `read_header` accepts nothing
else, so a file that was cut off or lies about itself is refused before anything is read from it.

Bytes come by `preadv` into numpy buffers rather than by mmap: mapped pages count as resident memory, and converting
has a stated bound on that.
"""
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.checkpoint.blocks import Index, bounds
from jaxllm.checkpoint.errors import CheckpointError

DTYPES = {name: np.dtype(dtype) for name, dtype in {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}.items()}
MAX_HEADER = 100 * 10**6     # the format's own limit, bytes
WORTH_A_CALL = 4096          # bytes; shorter pieces of rows are cheaper to read with what lies between them
SCRATCH = 8 * 2**20          # bytes of whole rows held at once while columns are cut out of them


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` bytes into `file`, `shape` of `dtype`, row-major and little-endian."""
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def parse_json(text: bytes, source: str) -> dict[str, Any]:
    """The JSON object in `text`. Errors: CheckpointError naming `source`; a key given twice is one."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is given twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: expected a JSON object, found {type(value).__name__}")
    return value


def read_header(file: Path) -> dict[str, TensorInfo]:
    """What `file` holds, by tensor name, after every check that needs no data. Errors: CheckpointError."""
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or 8 + length > size or length > MAX_HEADER:
                raise CheckpointError(
                    f"{file} is truncated or not a safetensors file: it has {size} bytes and states a header of "
                    f"{length} (at most {MAX_HEADER} and what the file holds after 8); download it again")
            header = parse_json(stream.read(length), f"the header of {file}")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = {name: _tensor_info(file, data, name, entry) for name, entry in header.items()}
    _check_tiling(file, data, size, tensors)
    return tensors


def _tensor_info(file: Path, data: int, name: str, entry: Any) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end))    # `type`: true is no number
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{file}: header entry of {name!r} is {str(entry)[:200]}: expected dtype, shape (numbers "
                              "from 0) and data_offsets [begin, end]")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{file}: {name!r} has the unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    info = TensorInfo(file, DTYPES[dtype], tuple(shape), data + begin)
    if end - begin != info.nbytes:
        raise CheckpointError(f"{file}: {name!r} has shape {list(shape)} of {dtype}, which is {info.nbytes} bytes, but "
                              f"its data_offsets [{begin}, {end}] span {end - begin}; the header lies about one")
    return info


def _check_tiling(file: Path, data: int, size: int, tensors: dict[str, TensorInfo]) -> None:
    """The tensors must cover the data exactly, as the format demands."""
    position = data
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != position:
            kind = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
            raise CheckpointError(f"{file}: {name!r} begins at byte {info.offset - data} of the data and {kind}, which "
                                  f"ends at {position - data}; the header lies about offsets")
        position += info.nbytes
    if position != size:
        kind = "is truncated" if position > size else "has bytes that belong to no tensor"
        raise CheckpointError(f"{file} {kind}: its header describes {position} bytes, the file has {size}; "
                              "download it again")


def read_tensor(info: TensorInfo, index: Index) -> np.ndarray:
    """tensor[index] of a tensor of at most two dims, reading only those bytes, or, where the columns wanted are few,
    the rows that hold them in blocks of at most SCRATCH. Errors: CheckpointError when the file ends early."""
    if len(info.shape) > 2:
        raise ValueError(f"slices are read of at most two dims; this tensor in {info.file} has shape {info.shape}")
    cut = bounds(index, info.shape)
    (row, row_end), (col, col_end) = (*cut, (0, 1), (0, 1))[:2]
    width = info.shape[1] if len(info.shape) == 2 else 1
    out = np.empty((row_end - row, col_end - col), info.dtype)
    if out.size:
        item = info.dtype.itemsize
        start, stride = info.offset + (row * width + col) * item, width * item
        try:
            fd = os.open(info.file, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{info.file} cannot be read: {error.strerror}") from None
        try:
            _read_rows(fd, info.file, out.view(np.uint8), start, stride)
        finally:
            os.close(fd)
    return out.reshape([stop - begin for begin, stop in cut])


def _read_rows(fd: int, file: Path, out: np.ndarray, start: int, stride: int) -> None:
    """Fill `out` (uint8 [rows, bytes]) with pieces of rows that lie `stride` bytes apart, the first at `start`."""
    rows, run = out.shape
    if run == stride:
        _fill(fd, file, out.reshape(-1), start)
    elif run >= WORTH_A_CALL:
        for row in range(rows):
            _fill(fd, file, out[row], start + row * stride)
    else:
        step = max(1, SCRATCH // stride)
        scratch = np.empty((min(step, rows), stride), np.uint8)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            _fill(fd, file, scratch.reshape(-1)[:(count - 1) * stride + run], start + row * stride)
            out[row:row + count] = scratch[:count, :run]


def _fill(fd: int, file: Path, out: np.ndarray, offset: int) -> None:
    """Read exactly out.nbytes bytes from `offset`; one call may return fewer than asked for."""
    view = out.data
    while view:
        try:
            count = os.preadv(fd, [view], offset)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read at byte {offset}: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(f"{file} ends at byte {offset}, in the middle of a tensor; it was cut after it was "
                                  "opened: download it again")
        view, offset = view[count:], offset + count
