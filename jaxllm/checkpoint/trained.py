"""The parameters of a training run, out of the newest checkpoint in its output folder.

A checkpoint is an Orbax one of flat names: trained/PATH and biases/PATH are the model's parameters, all other names the
optimizer's and the loop's (jaxllm/train/checkpoint.py writes them, with a manifest as the sign that one is whole).
"""
import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jaxllm.checkpoint.blocks import Index
from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.manifest import MANIFEST
from jaxllm.checkpoint.peft import Adapter
from jaxllm.checkpoint.projections import LORA_A, LORA_B
from jaxllm.checkpoint.source import Source
from jaxllm.checkpoint.tensorfile import parse_json

CHECKPOINTS, RUN = "checkpoints", "run.json"      # in the output folder of a run
PARTS = ("trained/", "biases/")


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` is the output of a training run."""
    return Path(folder, RUN).is_file()


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of the run whose output `folder` is."""
    file = Path(folder, RUN)
    return parse_json(file.read_bytes(), str(file))


class TrainedSource:
    """A `Source`: what the run trained, and the rest from `base`, where it began. A LoRA run has an `adapter`, and the
    parameters of its base.

    Errors: CheckpointError where there is no checkpoint, or one that a part is missing from and there is no `base`.
    """
    def __init__(self, folder: str | os.PathLike[str], base: Source | None = None):
        self.folder, self.base = Path(folder), base
        whole = [path for path in (self.folder / CHECKPOINTS).glob("*") if path.name.isdecimal()
                 and (path / MANIFEST).is_file()]
        if not whole:
            raise CheckpointError(f"{folder} is a training run without a checkpoint yet: train it on with --resume")
        self.checkpoint = max(whole, key=lambda path: int(path.name))
        names = parse_json((self.checkpoint / MANIFEST).read_bytes(), str(self.checkpoint / MANIFEST))["arrays"]
        self._arrays = {name.removeprefix(part): self._open(name) for name in names for part in PARTS
                        if name.startswith(part)}
        adapters = {path: self._arrays.pop(path) for path in list(self._arrays) if path.endswith((LORA_A, LORA_B))}
        lora = read_settings(folder).get("lora")
        self.adapter = Adapter({path: array.read().result() for path, array in adapters.items()},
                               lora["lora_alpha"] / lora["r"]) if lora else None
        self.params = (dict(base.params) if base else {}) | {
            path: (tuple(array.shape), np.dtype(array.dtype.numpy_dtype)) for path, array in self._arrays.items()}
        self.num_mtp = len({path.split(".")[1] for path in self.params if path.startswith("mtp.")})
        if "embed_WD" not in self.params:
            raise CheckpointError(f"{folder} is a run that trained a part of random weights, of which the rest was not "
                                  "kept: train all of them, or begin with a model")

    def read(self, path: str, index: Index) -> np.ndarray:
        if path in self._arrays:
            return self._arrays[path][index].read().result()
        assert self.base
        return self.base.read(path, index)

    def describe(self, path: str) -> str:
        return f"{path} (of {self.checkpoint})" if path in self._arrays or not self.base else self.base.describe(path)

    def _open(self, name: str) -> ts.TensorStore:
        try:
            return ts.open({"driver": "zarr", "kvstore": {
                "driver": "ocdbt", "base": f"file://{self.checkpoint.absolute()}/", "path": f"{name}/"}}).result()
        except ValueError as error:      # TensorStore's for what is absent or not what it should be
            raise CheckpointError(f"{self.checkpoint} is damaged ({name}: {str(error).split(' [')[0]}); train on with "
                                  "--resume, which goes back to the checkpoint before it") from error
