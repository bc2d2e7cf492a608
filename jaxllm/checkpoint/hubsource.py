"""Parameters straight out of a hub folder, checked as a whole before anything is read.

Every tensor must be used and every parameter made exactly once, by the table in names.py; the shapes must be those of
config.json, the dtypes ones that can be computed with or that its quantization_config states, and the rows of fused or
fp8 attention must leave one reading (readings.py). What only the values can show, NaN codes and scales that are no
scales, is found when they are read.
"""
import os
from collections.abc import Set
from pathlib import Path

import numpy as np

from jaxllm.checkpoint.blocks import EXPONENT, Index, bounds
from jaxllm.checkpoint.entry import Entry
from jaxllm.checkpoint.errors import CheckpointError, listed
from jaxllm.checkpoint.hub import HubCheckpoint
from jaxllm.checkpoint.kinds import check_values, find_kinds, fp8
from jaxllm.checkpoint.names import Table, count_mtp, left_out, model
from jaxllm.checkpoint.readings import Evidence
from jaxllm.config import Config

FLOATS = frozenset(EXPONENT)      # float32, float16, bfloat16


class HubSource:
    """A hub folder read by the table. `reading`: how attention rows lie, needed where the file leaves that open.

    `params`: leaf -> (shape, dtype); `left_out`: what is not taken, group -> names; `num_mtp`: MTP blocks held;
    `kinds`: packed parameter -> kind; `reading`: the one taken, None where there is only one; `table`: all of it.
    """

    def __init__(self, folder: str | os.PathLike[str], reading: str | None = None):
        self.folder = Path(folder)
        self.config = Config.from_hub(self.folder)
        self.hub = HubCheckpoint(self.folder)
        self.left_out = left_out(self.hub.tensors) | _other_folders(
            self.folder, {info.file for info in self.hub.tensors.values()})
        unused = {name for names in self.left_out.values() for name in names}
        taken = self.hub.tensors.keys() - unused
        self.num_mtp = count_mtp(taken)
        plain = {entry.path: entry for entry in model(self.config, self.num_mtp)}
        weights = {tensor for entry in plain.values() for tensor in entry.tensors}
        self._check_names(taken, weights, {weight + suffix for weight in weights
                                           for suffix in ("_scale", "_scale_inv")})
        self.kinds = find_kinds(plain, self.hub.tensors, self.config.quantization_config)
        self.reading = self._choose_reading(plain, reading)
        self.table = Table(self.config, self.num_mtp, self.kinds, self.reading)
        self._check_names(taken, self.table.shapes.keys())
        self._check_tensors(taken)
        self.params = {path: (entry.shape, self._dtype(path)) for path, entry in self.table.entries.items()}

    def read(self, path: str, index: Index) -> np.ndarray:
        """params[path][index], not empty; only the hub bytes that hold it are read.

        Errors: CheckpointError for fp8 codes that are NaN, and scales that are not finite numbers above 0.
        """
        return self.table.entries[path].read(self._read_rows, index)

    def tensors_of(self, path: str) -> list[str]:
        """The hub tensors that hold the leaf."""
        return list(self.table.entries[path].tensors)

    def describe(self, path: str) -> str:
        return f"{path} (of {self.folder}: {listed(self.tensors_of(path), 2)})"

    def _read_rows(self, tensor: str, index: Index) -> np.ndarray:
        values = self.hub.read(tensor, index)
        if fault := check_values(values, tensor):
            what, inside = fault
            info = self.hub.tensors[tensor]
            where = [start + n for (start, _), n in zip(bounds(index, info.shape), inside, strict=True)]
            raise CheckpointError(f"{info.file}: {tensor!r} holds {what}, at {where}; the file is damaged, or was "
                                  "written by a quantiser that failed: download it again")
        return values

    def _choose_reading(self, plain: dict[str, Entry], stated: str | None) -> str | None:
        packed = {tensor for path, kind in self.kinds.items() if kind.name == "fp8" for tensor in plain[path].tensors}
        kind = fp8(self.config.quantization_config)
        rows = {name + kind.suffix: (self.hub.tensors[name + kind.suffix].shape or (0,))[0] for name in packed}
        return Evidence(str(self.folder), self.config, self.num_mtp, packed, rows, kind.block[0],
                        self.hub.metadata.get("tp_size")).choose(stated)

    def _dtype(self, path: str) -> np.dtype:
        """The one dtype of the tensors that the leaf is made of."""
        first, *others = self.tensors_of(path)
        expected = self.hub.tensors[first].dtype
        for name in others:
            if self.hub.tensors[name].dtype != expected:
                raise CheckpointError(f"{self.hub.tensors[name].file}: {name!r} is {self.hub.tensors[name].dtype}, "
                                      f"expected {expected} as {first!r}, which is stacked with it in {path}")
        return expected

    def _check_names(self, taken: Set[str], wanted: Set[str], also: Set[str] = frozenset()) -> None:
        """All tensors that are `wanted` are there, and no other but those of `also`."""
        missing, extra = sorted(wanted - taken), sorted(taken - wanted - also)
        if missing or extra:
            raise CheckpointError(
                f"{self.folder}: the tensors are not those of its config.json; missing {listed(missing)}; "
                f"not known {listed(extra)}; complete the download, or check config.json's layer counts and layouts")

    def _check_tensors(self, taken: Set[str]) -> None:
        """Shapes and dtypes of the tensors against the table."""
        for name in sorted(taken):
            info, shape = self.hub.tensors[name], self.table.shapes[name]
            if info.shape != shape:
                raise CheckpointError(f"{info.file}: {name!r} has shape {list(info.shape)}, expected {list(shape)} by "
                                      f"{self.folder / 'config.json'}")
            if name not in self.table.dtypes and info.dtype not in FLOATS:
                raise CheckpointError(f"{info.file}: {name!r} is {info.dtype}, expected float32, bfloat16 or float16")


def _other_folders(folder: Path, used: set[Path]) -> dict[str, list[str]]:
    """Models in folders beside the text model (audio_tokenizer/, dflash/): their files, by folder."""
    groups: dict[str, list[str]] = {}
    for file in sorted(set(folder.glob("*/*.safetensors")) - used):
        groups.setdefault(f"{file.parent.name}/", []).append(f"{file.parent.name}/{file.name}")
    return groups
