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
        read = self._read_blocks if self.chosen[path].name == "fp8" else self._read_groups
        cut = bounds(index, self.params[leaf][0])
        if not self.entries[path].stacked:
            return read(path, 0, leaf, cut)
        return np.stack([read(path, number, leaf, cut[1:]) for number in range(*cut[0])])

    def _read_groups(self, path: str, number: int, leaf: str, cut: Cut) -> np.ndarray:
        """A slice of the 4-bit codes, or of the scales, of matrix `number`."""
        entry = self.entries[path]
        axis, found = len(entry.in_dims), []
        start, stop = cut[axis]
        for unit in units(entry):
            if unit.start < stop and start < unit.stop:
                inside = [slice(*edges) for edges in cut]
                inside[axis] = slice(max(start - unit.start, 0), stop - unit.start)
                found.append(self._unit(path, number, unit, leaf)[tuple(inside)])
        return np.concatenate(found, axis)

    def _unit(self, path: str, number: int, unit: range, leaf: str) -> np.ndarray:
        """The codes of a unit, or its scales, all in our dims."""
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

    def _read_blocks(self, path: str, number: int, leaf: str, cut: Cut) -> np.ndarray:
        """A slice of the fp8 codes, or of the scales, of matrix `number`."""
        scale = self._scale(path, number)
        if leaf.endswith(SCALE):
            return scale[tuple(slice(*edges) for edges in cut)]
        entry = self.entries[path]
        steps = [size // parts for size, parts in zip(entry.in_dims + entry.out_dims, scale.shape, strict=True)]
        factor = scale[np.ix_(*(np.arange(*edges) // step for edges, step in zip(cut, steps, strict=True)))]
        return fp8_codes(self._values(path, number, tuple(slice(*edges) for edges in cut)), factor)

    def _scale(self, path: str, number: int) -> np.ndarray:
        """The fp8 scales of matrix `number`, in our dims."""
        leaf = self.table.entries[path + SCALE]
        assert isinstance(leaf, Scale)
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
            entry, rows = self.entries[path], leaf.labels[tensor].rows
            tall, wide = entry.out_dims[-1] // leaf.entry.out_dims[-1], entry.in_dims[-1] // leaf.entry.in_dims[-1]
            done = 0
            for unit in units(entry, tall):
                w_IO = np.abs(self._matrix(path, number, unit))
                segments = w_IO.reshape(-1, wide, w_IO.shape[1]).max(1).reshape(len(w_IO) // wide, -1, tall).max(2)
                part = rows[done:done + segments.shape[1]]
                np.maximum.at(largest, (part[None, :], leaf.columns[:, None]), segments)
                done += len(part)
        found = fp8_scale(largest)
        self._kept.put(tensor, found)
        return found

    def _matrix(self, path: str, number: int, unit: range) -> np.ndarray:
        """float32 [in, out] of some columns of matrix `number`."""
        entry = self.entries[path]
        index = (*map(slice, entry.in_dims), slice(unit.start, unit.stop), *map(slice, entry.out_dims[1:]))
        return self._values(path, number, index).reshape(math.prod(entry.in_dims), -1)

    def _values(self, path: str, number: int, index: Index) -> np.ndarray:
        """float32 numbers of matrix `number` in our dims."""
        if not self.entries[path].stacked:
            values = self.plain.read(path, index)
        else:
            values = self.plain.read(path, (slice(number, number + 1), *index))[0]
        if bad := count_nonfinite(values):
            raise CheckpointError(f"{self.describe(path)} has {bad} NaN or Inf values, which {self.chosen[path].name} "
                                  "cannot hold; the file is damaged: download it again, or leave its class out")
        return values


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
