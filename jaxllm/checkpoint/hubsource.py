"""Parameters straight out of a hub folder, checked as a whole before anything is read.

Every tensor must be used exactly once and every parameter made exactly once, by the table in names.py; the shapes must
be those of config.json; the dtypes must be ones that can be computed with.
"""
import os
import re
from pathlib import Path

import numpy as np

from jaxllm.checkpoint.blocks import EXPONENT, Index
from jaxllm.checkpoint.errors import CheckpointError, listed
from jaxllm.checkpoint.hub import HubCheckpoint
from jaxllm.checkpoint.names import Table, count_mtp, left_out
from jaxllm.config import Config

FLOATS = frozenset(EXPONENT)      # float32, float16, bfloat16
PACKED = re.compile(r"\.(weight_scale|weight_scale_inv)$|^(float8|uint8|int8)")


class HubSource:
    """A hub folder read by the table. `left_out`: what is not taken, group -> names; `num_mtp`: MTP blocks held."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.config = Config.from_hub(self.folder)
        self.hub = HubCheckpoint(self.folder)
        self.left_out = left_out(self.hub.tensors) | _other_folders(
            self.folder, {info.file for info in self.hub.tensors.values()})
        unused = {name for names in self.left_out.values() for name in names}
        taken = self.hub.tensors.keys() - unused
        _refuse_packed(self.folder, self.config, {name: str(self.hub.tensors[name].dtype) for name in taken})
        self.num_mtp = count_mtp(taken)
        self.table = Table(self.config, self.num_mtp)
        self._check(taken)
        self.params = {path: (entry.shape, self._dtype(path)) for path, entry in self.table.entries.items()}

    def read(self, path: str, index: Index) -> np.ndarray:
        """params[path][index], not empty; only the hub bytes that hold it are read."""
        return self.table.entries[path].read(self.hub.read, index)

    def describe(self, path: str) -> str:
        return f"{path} (of {self.folder}: {listed(self._tensors(path), 2)})"

    def _tensors(self, path: str) -> list[str]:
        """The hub tensors that the parameter is made of."""
        matrices = self.table.entries[path].matrices
        return list(dict.fromkeys(rows.tensor for runs in matrices for rows in runs))

    def _dtype(self, path: str) -> np.dtype:
        """The one dtype of the tensors that the parameter is made of."""
        first, *others = self._tensors(path)
        expected = self.hub.tensors[first].dtype
        for name in others:
            if self.hub.tensors[name].dtype != expected:
                raise CheckpointError(f"{self.hub.tensors[name].file}: {name!r} is {self.hub.tensors[name].dtype}, "
                                      f"expected {expected} as {first!r}, which is stacked with it in {path}")
        return expected

    def _check(self, taken: set[str]) -> None:
        """Names, shapes and dtypes of the tensors against the table."""
        missing, extra = sorted(self.table.shapes.keys() - taken), sorted(taken - self.table.shapes.keys())
        if missing or extra:
            raise CheckpointError(
                f"{self.folder}: the tensors are not those of its config.json; missing {listed(missing)}; "
                f"not known {listed(extra)}; complete the download, or check config.json's layer counts and layouts")
        for name in sorted(taken):
            info, shape = self.hub.tensors[name], self.table.shapes[name]
            if info.shape != shape:
                raise CheckpointError(f"{info.file}: {name!r} has shape {list(info.shape)}, expected {list(shape)} by "
                                      f"{self.folder / 'config.json'}")
            if info.dtype not in FLOATS:
                raise CheckpointError(f"{info.file}: {name!r} is {info.dtype}, expected float32, bfloat16 or float16")


def _refuse_packed(folder: Path, config: Config, dtypes: dict[str, str]) -> None:
    """Quantised layouts are refused as such, rather than as a list of unknown names."""
    packed = sorted(name for name, dtype in dtypes.items() if PACKED.search(name) or PACKED.search(dtype))
    if config.quantization_config or packed:
        method = (config.quantization_config or {}).get("quant_method", "not stated")
        raise CheckpointError(f"{folder} holds a quantised layout, which is not readable yet (quantization_config of "
                              f"config.json: {method}; packed tensors {listed(packed, 3)}); use a float32, bfloat16 or "
                              "float16 export of the model")


def _other_folders(folder: Path, used: set[Path]) -> dict[str, list[str]]:
    """Models in folders beside the text model (audio_tokenizer/, dflash/): their files, by folder."""
    groups: dict[str, list[str]] = {}
    for file in sorted(set(folder.glob("*/*.safetensors")) - used):
        groups.setdefault(f"{file.parent.name}/", []).append(f"{file.parent.name}/{file.name}")
    return groups
