"""Hub folders that are wrong in one chosen way, and other help for the tests beside this file."""
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm.checkpoint import CheckpointError, convert, open_source
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.checkpoint.journal import JOURNAL
from jaxllm.checkpoint.store import StoreSource

ROOT = Path(__file__).parents[2]
SMALL = {"num_hidden_layers": 2, "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1]}    # for tiny_config


def write_raw(file: Path, header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header and data, and a stated header `length` that may be a lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Rewrite model.safetensors of a hub folder with its tensors changed in place by `change`."""
    tensors = {name: np.array(array) for name, array in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(None) for _ in shape)


def assert_same(hub: Path, out: Path) -> None:
    """`out` is the conversion of `hub`, bit for bit."""
    first, second = HubSource(hub), open_source(out)
    assert isinstance(second, StoreSource) and first.params == second.params
    for path, (shape, _) in first.params.items():
        assert first.read(path, whole(shape)).tobytes() == second.read(path, whole(shape)).tobytes(), path


def listing(folder: Path) -> dict[Path, tuple[int, int]]:
    """Everything below `folder`, with inode and time of change."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def tree(folder: Path) -> dict[str, bytes]:
    """Name and content of every file below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt(hub: Path, out: Path, monkeypatch: pytest.MonkeyPatch, reads: int = 10) -> None:
    """A conversion that fails in its `reads`-th read, with what is finished noted at once."""
    real, left = HubSource.read, reads

    def read(self, path, index):
        nonlocal left
        left -= 1
        if not left:
            raise CheckpointError("read failed")
        return real(self, path, index)
    with monkeypatch.context() as patch:
        patch.setattr("jaxllm.checkpoint.journal.EVERY_SECONDS", 0)
        patch.setattr("jaxllm.checkpoint.writer.THREADS", 1)
        patch.setattr(HubSource, "read", read)
        with pytest.raises(CheckpointError, match="read failed"):
            convert(hub, out, progress=False)


def finished(out: Path) -> set[Path]:
    """The files that an interrupted conversion has noted; not in a piece that it was still writing."""
    return {out / name for piece in out.glob(f"{JOURNAL}*.json") for name in json.loads(piece.read_text())}


def run(code: str, *args: object) -> subprocess.CompletedProcess:
    """A Python process of its own that imports jaxllm."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True,
                          check=False)
