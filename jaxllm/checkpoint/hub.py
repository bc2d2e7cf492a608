"""A checkpoint in hub layout: model.safetensors, or shards behind an index, read lazily.

Everything that can be known without reading data is checked when the folder is opened (`tensorfile.read_header` for
each file; here, the index against the files). After that `tensors` says what there is, `read` brings slices, and
`metadata` is what the writer noted beside the tensors.
"""
import os
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxllm.checkpoint.blocks import Index
from jaxllm.checkpoint.errors import CheckpointError, listed
from jaxllm.checkpoint.tensorfile import TensorInfo, parse_json, read_header, read_tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class HubCheckpoint:
    """The tensors of a hub folder. Errors: CheckpointError naming file or tensor, and what is wrong with it."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, Any] = {}
        index = self._read_index()
        for name in sorted(set(index.values())) if index is not None else [SINGLE]:
            self._add_file(name)
        if index is not None:
            self._check_index(index)
        first = next(iter(self.tensors.values()), None)
        self.metadata = (_metadata(first.file) if first else {}) | self.metadata

    def read(self, name: str, index: Index) -> np.ndarray:
        """tensors[name][index], read from the file now; `index` has one slice for each dim."""
        return read_tensor(self.tensors[name], index)

    def _read_index(self) -> dict[str, str] | None:
        """Tensor name to file name, or None when the folder holds a single file."""
        path = self.folder / INDEX
        if not path.is_file():
            if not (self.folder / SINGLE).is_file():
                shards = [file.name for file in sorted(self.folder.glob("*.safetensors"))]
                hint = f"; it holds shards ({listed(shards)}) whose index is missing" if shards else ""
                raise CheckpointError(f"{self.folder} holds neither {SINGLE} nor {INDEX}{hint}")
            return None
        content = parse_json(path.read_bytes(), str(path))
        weight_map, metadata = content.get("weight_map"), content.get("metadata")
        self.metadata = metadata if isinstance(metadata, dict) else {}
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path}: expected a 'weight_map' from tensor names to file names")
        for name, file in weight_map.items():
            if not _is_plain(file):
                raise CheckpointError(f"{path}: {name!r} is said to be in {str(file)[:200]!r}; expected the name of a "
                                      ".safetensors file inside the folder (no absolute path, no '..')")
        absent = sorted({file for file in weight_map.values() if not (self.folder / file).is_file()})
        if absent:
            raise CheckpointError(f"{path} names files that are not in the folder ({listed(absent)}); the download is "
                                  "not complete")
        return weight_map

    def _add_file(self, name: str) -> None:
        found = read_header(self.folder / name)
        twice = sorted(found.keys() & self.tensors.keys())
        if twice:
            raise CheckpointError(f"tensors that are both in {self.tensors[twice[0]].file} and in {self.folder / name} "
                                  f"({listed(twice)}); which one holds is not known: remove the file that is too many")
        self.tensors |= found

    def _check_index(self, index: dict[str, str]) -> None:
        missing = [f"{name} in {file}" for name, file in index.items() if name not in self.tensors]
        if missing:
            raise CheckpointError(f"{self.folder / INDEX} names tensors that no shard holds ({listed(missing)})")
        moved = [f"{name}: {self.tensors[name].file.name}, not {file}" for name, file in index.items()
                 if self.tensors[name].file != self.folder / file]
        if moved:
            raise CheckpointError(f"{self.folder / INDEX} names the wrong shard for some tensors ({listed(moved)})")


def _metadata(file: Path) -> dict[str, Any]:
    """The free-form part of the header of a file that `read_header` accepted."""
    with open(file, "rb") as stream:
        header = parse_json(stream.read(int.from_bytes(stream.read(8), "little")), f"the header of {file}")
    found = header.get("__metadata__")
    return found if isinstance(found, dict) else {}


def _is_plain(file: object) -> bool:
    """A relative name below the folder. What it links to is not asked: hub caches are made of links."""
    if not isinstance(file, str) or not file.endswith(".safetensors") or len(file) > 255 or set(file) & set("\\\0"):
        return False
    path = PurePosixPath(file)
    return str(path) == file and not path.is_absolute() and ".." not in path.parts
