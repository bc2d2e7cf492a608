"""Writing the safetensors format front to back: the header is known before any of the data."""
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jaxllm.checkpoint.blocks import LIMIT
from jaxllm.checkpoint.tensorfile import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
AT_ONCE = 4 * LIMIT      # bytes; each has copies besides, for its transposition
Tensors = Mapping[str, tuple[tuple[int, ...], np.dtype]]      # name -> (shape, dtype), in the order of the file
Piece = tuple[int, Callable[[], np.ndarray]]                  # (bytes, what makes them)


def count_bytes(tensors: Tensors) -> int:
    """Of the data."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())


def header(tensors: Tensors, metadata: Mapping[str, str]) -> bytes:
    """What stands before the data; a multiple of 8 bytes, so that the data is aligned."""
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(file: Path, tensors: Tensors, metadata: Mapping[str, str], data: Iterable[np.ndarray],
                  done: Callable[[int], object]) -> None:
    """Write a new file, through to the disk. `data`: the tensors' values one after the other, in pieces of any shape;
    `done` is told the bytes of each."""
    left = count_bytes(tensors)
    with open(file, "xb") as stream:
        stream.write(header(tensors, metadata))
        for piece in data:
            stream.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
            left -= piece.nbytes
            done(piece.nbytes)
        stream.flush()
        os.fsync(stream.fileno())
    assert left == 0, (file, left)


def made_ahead(pieces: Iterable[Piece], threads: int) -> Iterator[np.ndarray]:
    """What the pieces make, in their order, where a few are made at the same time: as many as there are `threads`, and
    of AT_ONCE bytes together, or a single one that is larger."""
    running: deque[tuple[int, Future[np.ndarray]]] = deque()
    pool, held = ThreadPoolExecutor(threads), 0
    try:
        for size, make in pieces:
            while running and (len(running) > threads or held + size > AT_ONCE):
                held -= running[0][0]
                yield running.popleft()[1].result()
            running.append((size, pool.submit(make)))
            held += size
        for _, future in running:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
