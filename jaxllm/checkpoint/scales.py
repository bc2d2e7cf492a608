"""The scales of packed matrices as leaves of ours, and the way back to hub files.

A hub file has one fp8 scale for each block of rows and columns, and blocks take no notice of heads: one may hold the
end of a head and the start of the next, or the end of K and the start of V. Ours has one scale for each *segment* of a
head's dim and of an in-dim: the longest that divides the dim and lies within one block everywhere, so that a scale of
the hub may stand in several places. Scales of 4-bit groups belong to single rows, as codes do, and need no segments.
"""
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from jaxllm.checkpoint.blocks import Index
from jaxllm.checkpoint.entry import Entry, ReadParam, ReadRows, Rows
from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.kinds import CODES, SCALE, Kind


@dataclass(frozen=True)
class Labels:
    """Which scales the rows of a hub weight take: row r those in row rows[r] of the scale `tensors`, laid one after
    the other, each given by (name, number of rows).
    """
    tensors: tuple[tuple[str, int], ...]
    rows: np.ndarray


def grid(scale: str, count: int, tile: int, height: int) -> Labels:
    """`count` rows in tiles of `tile`, each tile in blocks of `height` rows, its last one partial."""
    rows = _grid_rows(count, tile, height)
    return Labels(((scale, int(rows[-1]) + 1),), rows)


@functools.lru_cache(256)      # the matrices of a model have few sizes
def _grid_rows(count: int, tile: int, height: int) -> np.ndarray:
    row = np.arange(count, dtype=np.int32)
    return row // tile * -(-tile // height) + row % tile // height


@dataclass(frozen=True)
class Scale:
    """The fp8 scales of one parameter: `entry` is the parameter's own, with rows and columns counted in segments.

    Each matrix of `entry` is one run, of all segments of rows in our order; `labels`, by the hub weight that names the
    run, are theirs. `columns`: for each segment of columns the column of the hub scale.
    """
    entry: Entry
    labels: Mapping[str, Labels]
    columns: np.ndarray

    @property
    def path(self) -> str:
        return self.entry.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def tensors(self) -> tuple[str, ...]:
        """The hub tensors that hold scales of its rows."""
        return tuple(dict.fromkeys(tensor for _, tensor, _ in self.parts()))

    def parts(self) -> Iterator[tuple[int, str, tuple[int, int]]]:
        """(matrix number, scale tensor that it takes from, that tensor's shape)."""
        width = int(self.columns[-1]) + 1
        for number, (run,) in enumerate(self.entry.matrices):
            rows = dict(self.labels[run.tensor].tensors)
            taken = rows if len(rows) == 1 else [tensor for tensor, *_ in self._takes(run)]
            yield from ((number, tensor, (rows[tensor], width)) for tensor in taken)

    def read(self, read_rows: ReadRows, index: Index) -> np.ndarray:
        """scales[index], not empty; only the hub scales between the first and the last that it takes are read."""
        return self.entry.read(functools.partial(self._expand, read_rows), index)

    def _expand(self, read_rows: ReadRows, weight: str, cut: Index) -> np.ndarray:
        """Scales of the segments `cut` (rows, columns) of a hub weight."""
        rows, column = cut[0], self.columns[cut[1]]
        found = [(taking, row - row.min(),
                  read_rows(tensor, (slice(row.min(), row.max() + 1), slice(column[0], column[-1] + 1))))
                 for tensor, taking, row in self._takes(Rows(weight, rows.start, rows.stop - rows.start))]
        out = np.empty((rows.stop - rows.start, len(column)), found[0][2].dtype)
        for taking, row, values in found:
            out[taking] = values[row][:, column - column[0]]
        return out

    def _takes(self, run: Rows) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(scale tensor, which segments of the run take their scale from it, the row that each of those takes)."""
        labels = self.labels[run.tensor]
        rows, first = labels.rows[run.start:run.start + run.count], 0
        for tensor, count in labels.tensors:
            taking = (rows >= first) & (rows < first + count)
            if taking.any():
                yield tensor, taking, rows[taking] - first
            first += count

    def fill(self, out: np.ndarray, is_filled: np.ndarray, tensor: str, read_param: ReadParam, number: int) -> None:
        """Put into `out`, a hub scale tensor, what matrix `number` of ours says of it; `is_filled` tells its rows.

        Errors: CheckpointError where segments of one block differ, which the hub's layout cannot express.
        """
        (run,), (_, first) = self.entry.matrices[number], np.unique(self.columns, return_index=True)
        for name, taking, row in self._takes(run):
            if name == tensor:
                values, is_new = self.entry.write(read_param, number, range(run.count))[taking], ~is_filled[row]
                out[row[is_new]] = values[is_new][:, first]
                is_filled[row] = True
                if not np.array_equal(out[row][:, self.columns], values):
                    raise CheckpointError(f"{self.path}: scales differ within one block of {tensor!r}, which has a "
                                          "single one for it; export with smaller blocks, or as another kind")


def codes_entry(entry: Entry, kind: Kind) -> Entry:
    """The entry of the codes of a packed parameter. Errors: CheckpointError where they do not fill whole bytes."""
    *outer, inner = entry.in_dims
    if inner % kind.per_byte:
        raise CheckpointError(f"{entry.path} (of {entry.tensors[0]!r}) is stored as {kind.name}, two codes a byte, but "
                              f"its in-dim has {inner}, an odd number")
    return replace(entry, path=entry.path + CODES, in_dims=(*outer, inner // kind.per_byte))


def scale_leaf(entry: Entry, kind: Kind, special: Mapping[str, Labels]) -> Entry | Scale:
    """The scales of a packed parameter. `special`: labels of hub weights whose fp8 blocks are no plain grid."""
    return _block_scale(entry, kind, special) if kind.name == "fp8" else _group_scale(entry, kind)


def _group_scale(entry: Entry, kind: Kind) -> Entry:
    """The entry of the scales of 4-bit groups. Errors: CheckpointError where groups do not divide the in-dims."""
    *outer, inner = entry.in_dims
    group = kind.block[1]
    if inner % group == 0:
        in_dims = (*outer, inner // group)
    elif outer and group % inner == 0 and outer[0] % (group // inner) == 0:
        in_dims = (outer[0] // (group // inner), 1)      # a group spans whole heads
    else:
        raise CheckpointError(f"{entry.path} (of {entry.tensors[0]!r}) is stored as {kind.name} in groups of {group}, "
                              f"which do not divide its in-dims {list(entry.in_dims)}")
    matrices = tuple(tuple(Rows(run.tensor + kind.suffix, run.start, run.count) for run in runs)
                     for runs in entry.matrices)
    return replace(entry, path=entry.path + SCALE, in_dims=in_dims, matrices=matrices)


def _block_scale(entry: Entry, kind: Kind, special: Mapping[str, Labels]) -> Scale:
    (height, width), runs = kind.block, entry.matrices[0]
    hub = {tensor: special.get(tensor) or grid(tensor + kind.suffix, run.count, run.count, height)
           for run, *_ in entry.matrices for tensor in [run.tensor]}
    rows = np.concatenate([hub[run.tensor].rows[run.start:run.start + run.count] for run in runs])
    tall = math.gcd(entry.out_dims[-1], *(np.flatnonzero(np.diff(rows)) + 1).tolist())
    size = math.prod(entry.in_dims)
    wide = math.gcd(entry.in_dims[-1], *range(width, size, width))
    # The matrices of a stack have equal rows, so they share one array of labels.
    labels = {tensor: Labels(found.tensors, rows[::tall]) for tensor, found in hub.items()}
    small = Entry(entry.path + SCALE, (*entry.out_dims[:-1], entry.out_dims[-1] // tall),
                  (*entry.in_dims[:-1], entry.in_dims[-1] // wide),
                  tuple((Rows(run.tensor, 0, len(rows[::tall])),) for run, *_ in entry.matrices),
                  entry.transposed, entry.stacked)
    return Scale(small, labels, np.arange(0, size, wide) // width)
