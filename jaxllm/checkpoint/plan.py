"""The files of a converted folder, in an order that follows the shards of the source.

Every file is a `Piece`, made whole in memory from few tensors: no expert shares one with another. Sorted by the last
shard that each needs, the shards are gone through once and few are needed at the same time.
"""
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from jaxllm.checkpoint.blocks import chunk_shape, grid, is_stack
from jaxllm.checkpoint.source import Convertible, Tally
from jaxllm.checkpoint.store import PARAMS, array_files, chunk_content, chunk_name, tree_files
from jaxllm.checkpoint.tensorfile import TensorInfo

EXPERT = re.compile(r"\.experts\.(\d+)\.")      # in the name of a hub tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """A file to be written: `name` below the folder, `size` in bytes, the shards that `make` reads."""
    name: str
    size: int
    shards: frozenset[str]
    make: Callable[[], bytes]


def known(name: str, content: bytes) -> Piece:
    """A file whose content is there already."""
    return Piece(name, len(content), frozenset(), lambda: content)


def metadata_pieces(source: Convertible) -> Iterator[Piece]:
    """What Orbax and zarr say of the arrays."""
    for name, content in tree_files(source.params).items():
        yield known(f"{PARAMS}/{name}", content)
    for path, (shape, dtype) in source.params.items():
        for name, content in array_files(path, shape, dtype).items():
            yield known(f"{PARAMS}/{path}/{name}", content)


def array_pieces(source: Convertible, tensors: dict[str, TensorInfo], tallies: dict[str, Tally]) -> list[Piece]:
    """The chunks of all parameters. `tensors` says in which file of source.folder each tensor is; `tallies` (by path)
    are told the values."""
    pieces = [piece for path in source.params for piece in _chunks(source, path, tensors, tallies[path])]
    order = {name: number for number, name in enumerate(dict.fromkeys(
        name for piece in pieces for name in sorted(piece.shards)))}
    return sorted(pieces, key=lambda piece: max(order[name] for name in piece.shards))


def _chunks(source: Convertible, path: str, tensors: dict[str, TensorInfo], tally: Tally) -> Iterator[Piece]:
    shape, dtype = source.params[path]
    chunk, whole = chunk_shape(path, shape, dtype.itemsize), tuple(slice(0, size) for size in shape)
    shards: dict[str, set[str]] = {}      # number of an expert, or "" for what all chunks need
    for tensor in source.tensors_of(path):
        expert = EXPERT.search(tensor) if is_stack(path) else None
        shards.setdefault(expert[1] if expert else "", set()).add(
            str(tensors[tensor].file.relative_to(source.folder)))
    for block in grid(whole, shape, chunk):
        needed = shards.get("", set()) | shards.get(str(block[0].start), set())
        yield Piece(f"{PARAMS}/{path}/{chunk_name(block, chunk)}", math.prod(chunk) * dtype.itemsize,
                    frozenset(needed), partial(chunk_content, source, path, block, chunk, tally))
