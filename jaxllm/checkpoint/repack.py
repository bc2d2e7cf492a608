"""A source whose weights are packed by `encode` as they are read.

A matrix is packed in units: some of its columns with all rows, since the rows of a group, and those that make up for
each other's errors, belong together. Memory: one unit for each thread, and the scales that were made with codes and are
not asked for yet; with grams also a few matrices of a gram's size.
"""
import math
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxllm.checkpoint.blocks import Index, bounds, count_nonfinite
from jaxllm.checkpoint.decoded import Decoded
from jaxllm.checkpoint.entry import Entry
from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.checkpoint.kinds import CODES, SCALE, Kind
from jaxllm.checkpoint.names import Table, model
from jaxllm.checkpoint.scales import Scale
from jaxllm.encode import feedback, fp8_codes, fp8_scale, pack

UNIT = 2**24                # numbers of a unit: 64 MiB as float32
KEPT = 512 * 2**20          # bytes of scales that wait; those of one stack of the largest released layer are 302 MB
Cut = tuple[tuple[int, int], ...]


class Repacked:
    """`source` with the parameters `chosen` packed, whatever form they have; `config` is the result's config.json.

    grams: of `calibrate.collect_grams`, for the parameters that have one. Threads may share it.
    Errors: CheckpointError for sizes that cannot be packed so; in `read`, for NaN and Inf.
    """

    def __init__(self, source: HubSource, chosen: dict[str, Kind], config: dict[str, Any],
                 grams: Mapping[str, np.ndarray]):
        self.folder, self.reading, self.num_mtp, self.left_out = (
            source.folder, source.reading, source.num_mtp, source.left_out)
        self.source, self.chosen, self.config, self.grams = source, chosen, config, grams
        self.plain = Decoded(source, np.dtype(np.float32))
        self.entries = {entry.path: entry for entry in model(source.config, 0, source.reading)}
        try:
            self.table = Table(source.config, source.num_mtp, source.kinds | chosen, source.reading)
        except CheckpointError as error:
            raise CheckpointError(f"{source.folder} cannot be packed so: {error}; choose another group, or leave its "
                                  "class out") from None
        self.params = {leaf: (entry.shape, self.table.dtypes[entry.tensors[0]]) if parameter_of(leaf) in chosen
                       else source.params[leaf] for leaf, entry in self.table.entries.items()}
        self._kept, self._lock, self._feedback = Kept(KEPT), threading.Lock(), (np.empty(0), np.empty(0))

    def hub_config(self) -> dict[str, Any]:
        return self.config

    def tensors_of(self, leaf: str) -> list[str]:
        """The hub tensors that `read` reads for `leaf`."""
        path = parameter_of(leaf)
        return tensors_of(self.source, path) if path in self.chosen else self.source.tensors_of(leaf)

    def describe(self, leaf: str) -> str:
        return self.plain.describe(parameter_of(leaf))

    def read(self, leaf: str, index: Index) -> np.ndarray:
        """params[leaf][index], not empty."""
        path = parameter_of(leaf)
        if path not in self.chosen:
            return self.source.read(leaf, index)
        cut = bounds(index, self.params[leaf][0])
        if not self.entries[path].stacked:
            return self._read_matrix(path, 0, leaf, cut)
        return np.stack([self._read_matrix(path, number, leaf, cut[1:]) for number in range(*cut[0])])

    def _read_matrix(self, path: str, number: int, leaf: str, cut: Cut) -> np.ndarray:
        """A slice of the codes, or of the scales, of matrix `number`."""
        entry, is_fp8 = self.entries[path], self.chosen[path].name == "fp8"
        if is_fp8 and leaf.endswith(SCALE):
            return self._fp8_scale(path, number)[tuple(slice(*edges) for edges in cut)]
        read = self._fp8_unit if is_fp8 else self._unit
        axis, found = len(entry.in_dims), []
        start, stop = cut[axis]
        for unit in units(entry, self._height(path)):
            if unit.start < stop and start < unit.stop:
                inside = [slice(*edges) for edges in cut]
                inside[axis] = slice(max(start - unit.start, 0), stop - unit.start)
                found.append(read(path, number, unit, leaf)[tuple(inside)])
        return np.concatenate(found, axis)

    def _unit(self, path: str, number: int, unit: range, leaf: str) -> np.ndarray:
        """The 4-bit codes of a unit, or their scales, in our dims."""
        key = path, number, unit.start
        if leaf.endswith(SCALE) and (scale := self._kept.take(key)) is not None:
            return scale
        packed = self._pack(path, self._matrix(path, number, unit))
        codes, scale = (array.reshape(*in_dims, len(unit), *self.entries[path].out_dims[1:])
                        for array, in_dims in zip(packed, self._in_dims(path), strict=True))
        if leaf.endswith(SCALE):
            return scale
        self._kept.put(key, scale)
        return codes

    def _in_dims(self, path: str) -> Iterator[tuple[int, ...]]:
        """Of the codes and of the scales of 4-bit groups."""
        for part in (CODES, SCALE):
            entry = self.table.entries[path + part]
            assert isinstance(entry, Entry)
            yield entry.in_dims

    def _pack(self, path: str, w_IO: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kind, gram_II = self.chosen[path], self.grams.get(path)
        if gram_II is None:
            return pack(w_IO, kind.name, kind.block[1])
        if gram_II.shape != (len(w_IO), len(w_IO)):
            raise CheckpointError(f"{self.describe(path)} has an in-dim of {len(w_IO)}, but its gram has shape "
                                  f"{list(gram_II.shape)}; calibrate with this model")
        with self._lock:      # the work is large and uses all cores; matrices that follow each other may share a gram
            if self._feedback[0] is not gram_II:
                self._feedback = gram_II, feedback(gram_II)
            return pack(w_IO, kind.name, kind.block[1], self._feedback[1])

    def _fp8_unit(self, path: str, number: int, unit: range, leaf: str) -> np.ndarray:
        """The fp8 codes of a unit, in our dims."""
        entry, w_IO, scale = self.entries[path], self._matrix(path, number, unit), self._fp8_scale(path, number)
        tall = self._height(path)
        scale = scale.reshape(math.prod(scale.shape[:len(entry.in_dims)]), -1)
        first = unit.start * math.prod(entry.out_dims[1:]) // tall
        codes = fp8_codes(w_IO, scale[:, first:first + w_IO.shape[1] // tall])
        return codes.reshape(*entry.in_dims, len(unit), *entry.out_dims[1:])

    def _fp8_scale(self, path: str, number: int) -> np.ndarray:
        """The fp8 scales of matrix `number`, in our dims."""
        leaf = self._scale_leaf(path)
        (run,), single = leaf.entry.matrices[number], leaf.entry.in_dims + leaf.entry.out_dims
        blocks = self._blocks(run.tensor)
        return blocks[leaf.labels[run.tensor].rows[None, :], leaf.columns[:, None]].reshape(single)

    def _blocks(self, tensor: str) -> np.ndarray:
        """The fp8 scales of a hub weight, in the hub's order; a block may hold rows of several of our parameters."""
        if (kept := self._kept.get(tensor)) is not None:
            return kept
        scale = tensor + "_scale_inv"
        largest = np.zeros(self.table.shapes[scale], np.float32)
        for leaf, number in self.table.scale_uses[scale]:
            path = parameter_of(leaf.path)
            entry, rows, done = self.entries[path], leaf.labels[tensor].rows, 0
            tall, wide = self._height(path), entry.in_dims[-1] // leaf.entry.in_dims[-1]
            for unit in units(entry, tall):
                w_IO = self._matrix(path, number, unit)
                row = np.abs(w_IO).reshape(-1, wide, w_IO.shape[1]).max(1)
                segments = row.reshape(len(row), -1, tall).max(2)
                labels = rows[done:done + segments.shape[1]]
                np.maximum.at(largest, (labels[None, :], leaf.columns[:, None]), segments)
                done += len(labels)
        found = fp8_scale(largest)
        self._kept.put(tensor, found)
        return found

    def _scale_leaf(self, path: str) -> Scale:
        leaf = self.table.entries[path + SCALE]
        assert isinstance(leaf, Scale)
        return leaf

    def _height(self, path: str) -> int:
        """Along the innermost out-dim, what one scale covers."""
        if self.chosen[path].name != "fp8":
            return 1
        return self.entries[path].out_dims[-1] // self._scale_leaf(path).entry.out_dims[-1]

    def _matrix(self, path: str, number: int, unit: range) -> np.ndarray:
        """float32 [in, out] of a unit of matrix `number`."""
        entry = self.entries[path]
        stack = (slice(number, number + 1),) if entry.stacked else ()
        values = self.plain.read(path, (*stack, *map(slice, entry.in_dims), slice(unit.start, unit.stop),
                                        *map(slice, entry.out_dims[1:])))
        if bad := count_nonfinite(values):
            raise CheckpointError(f"{self.describe(path)} has {bad} NaN or Inf values, which {self.chosen[path].name} "
                                  "cannot hold; the file is damaged: download it again, or leave its class out")
        return values.reshape(math.prod(entry.in_dims), -1)


class Kept:
    """Arrays by key: the last that were put, `limit` bytes at most. Threads may share it."""

    def __init__(self, limit: int):
        self.limit, self.nbytes = limit, 0
        self._arrays, self._lock = OrderedDict[Hashable, np.ndarray](), threading.Lock()

    def put(self, key: Hashable, array: np.ndarray) -> None:
        self.take(key)
        with self._lock:
            self._arrays[key], self.nbytes = array, self.nbytes + array.nbytes
            while self.nbytes > self.limit:
                self.nbytes -= self._arrays.popitem(last=False)[1].nbytes

    def get(self, key: Hashable) -> np.ndarray | None:
        return self._arrays.get(key)

    def take(self, key: Hashable) -> np.ndarray | None:
        """The array, which is then kept no longer."""
        with self._lock:
            array = self._arrays.pop(key, None)
            self.nbytes -= 0 if array is None else array.nbytes
            return array


def parameter_of(leaf: str) -> str:
    """The parameter's path, of a leaf that may be its codes or its scale."""
    return leaf.removesuffix(CODES).removesuffix(SCALE)


def tensors_of(source: HubSource, path: str) -> list[str]:
    """The hub tensors that hold a parameter, packed or not."""
    leaves = [path] if path in source.params else [path + CODES, path + SCALE]
    return [tensor for leaf in leaves for tensor in source.tensors_of(leaf)]


def units(entry: Entry, multiple: int = 1) -> Iterator[range]:
    """Runs along the first out-dim, of at most UNIT numbers or `multiple` columns; with heads, whole heads."""
    first, *inner = entry.out_dims
    size = max(1, UNIT // math.prod([*entry.in_dims, *inner]))
    size = size if inner else max(multiple, size // multiple * multiple)
    for start in range(0, first, size):
        yield range(start, min(start + size, first))
