"""Checkpoints of a run: checkpoints/STEP, each written by Orbax in the background and put in place by one rename.

Before the rename manifest.json comes into the folder: size and SHA-256 of every file, the step, the place in the data,
and the identity of what is trained. So a folder called STEP holds all that it ever will, and one whose manifest does
not agree with its files was damaged later: it is set aside, and the one before it is taken. What a killed run was
writing has a name of Orbax's and is cleared away at the next start.

Orbax's CheckpointManager is not used: it has no place for a file that is made of the finished ones, and it would remove
old steps before anyone knows whether the new one is whole.
"""
import dataclasses
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxllm.checkpoint.errors import CheckpointError, listed
from jaxllm.checkpoint.files import Files
from jaxllm.checkpoint.manifest import MANIFEST, Stored, checksum, dump
from jaxllm.checkpoint.shards import at_once, hash_file
from jaxllm.checkpoint.tensorfile import parse_json

TEMPORARY = ".orbax-checkpoint-tmp"      # ends the name of a folder that Orbax is writing
DAMAGED = ".damaged"                     # ends the name of a step that was set aside
ABSL = logging.getLogger("absl")         # Orbax's
UNLISTED = "_CHECKPOINT_METADATA"        # into which Orbax writes the time of the rename, after the manifest is made
Identity = Mapping[str, Mapping[str, Any]]     # "architecture" or "tokenizer" -> what of it must be the same


@dataclasses.dataclass(frozen=True)
class Restored:
    step: int
    state: Any
    data: Any      # the place in the data


@dataclasses.dataclass(frozen=True)
class _Manifest:
    step: int
    identity: Identity
    data: Any
    arrays: Mapping[str, str]      # name -> "float32[64, 96]"
    files: Mapping[str, Stored]


class Checkpoints:
    """The checkpoints of one run. Every process calls every method; files are looked after by the first.

    Errors: CheckpointError for what cannot be written, or is not of this run.
    """

    def __init__(self, folder: Path, keep: int, identity: Identity):
        self.folder, self.keep, self.identity = folder.absolute(), keep, identity
        self._writing: _Manifest | None = None
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), async_options=ocp.options.AsyncOptions(
            post_finalization_callback=self._seal))
        self._clear()

    def __enter__(self) -> "Checkpoints":
        self._level = ABSL.level
        ABSL.setLevel(logging.CRITICAL)      # Orbax logs pages of traceback for what is raised here as one error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Waits for the checkpoint that is being written, whatever else has gone wrong."""
        try:
            self.wait()
        except CheckpointError:
            if error is None:
                raise
        finally:
            with suppress(Exception):      # of a failed write, once more
                self._orbax.close()
            self._clear()
            ABSL.setLevel(self._level)

    @property
    def steps(self) -> list[int]:
        """Those that there are, ascending, damaged or not."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, step: int, state: Any, data: Any) -> None:
        """Copy the state to the host, after which it may be donated, and write it in the background.

        state: a pytree of arrays. data: JSON, the place in the data, the same on every process. An error of the save
        before this one comes out here.
        """
        self.wait()
        arrays = _named(state)
        self._writing = _Manifest(step, self.identity, data, {name: _describe(x) for name, x in arrays.items()}, {})
        self._try(lambda: self._orbax.save(self.folder / str(step), args=ocp.args.StandardSave(arrays), force=True))

    def wait(self) -> None:
        """Return when the last `save` is on disk, and older steps than the `keep` newest are gone."""
        self._try(self._orbax.wait_until_finished)
        if self._writing and jax.process_index() == 0:
            for step in [step for step in self.steps if step <= self._writing.step][:-self.keep]:
                shutil.rmtree(self.folder / str(step))
        self._writing = None

    def restore_latest(self, abstract: Any, say: Callable[[str], object]) -> Restored | None:
        """The newest step that is whole, laid out as `abstract` (a pytree of ShapeDtypeStruct with shardings) says;
        None if there is no step at all. Newer ones are set aside, and what is wrong with them is told to `say`.
        """
        step = _of_first_process(lambda: self._find(say))
        if step < 0:
            return None
        manifest = _read_manifest(self.folder / str(step))
        targets = _named(abstract)
        _require(manifest, self.identity, {name: _describe(x) for name, x in targets.items()}, self.folder / str(step))
        arrays = self._orbax.restore(self.folder / str(step), args=ocp.args.StandardRestore(targets))
        state = jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in targets])
        return Restored(step, state, manifest.data)

    def _find(self, say: Callable[[str], object]) -> int:
        """The newest step that is whole; -1 if there is none at all."""
        faults: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                _verify(self.folder / str(step))
            except CheckpointError as error:
                faults[step] = str(error)
                continue
            for damaged, fault in faults.items():
                aside = self.folder / f"{damaged}{DAMAGED}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(damaged)).rename(aside)
                say(f"{fault}; set aside as {aside.name}; going on from step {step}")
            return step
        if faults:
            raise CheckpointError(f"no checkpoint in {self.folder} is whole: {'; '.join(faults.values())}; start again "
                                  "with another output")
        return -1

    def _seal(self) -> None:
        """Called in Orbax's thread when all files are written, before the rename."""
        assert self._writing
        folder = self.folder / f"{self._writing.step}{TEMPORARY}"
        names = [name for name in Files(folder).names() if name != UNLISTED]
        stored = at_once(lambda name: Stored((folder / name).stat().st_size, hash_file(folder / name)), names)
        manifest = dataclasses.replace(self._writing, files=dict(zip(names, stored, strict=True)))
        content = dataclasses.asdict(manifest)
        Files(folder).write(MANIFEST, dump(content | {"sha256": checksum(content)}))

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:      # of many kinds, by where in Orbax or TensorStore the disk was found full
            step, self._writing = self._writing.step if self._writing else "?", None
            self._clear()
            last = f"the last whole one is step {self.steps[-1]}" if self.steps else "there is none before it"
            raise CheckpointError(f"the checkpoint of step {step} could not be written into {self.folder} "
                                  f"({_reason(error)}); {last}: free space, and go on with --resume") from error

    def _clear(self) -> None:
        """Remove what is half written. Where one write has failed, others that Orbax began may still make files."""
        for _ in range(50 if jax.process_index() == 0 else 0):
            unfinished = list(self.folder.glob(f"*{TEMPORARY}*"))
            for left in unfinished:
                shutil.rmtree(left, ignore_errors=True)
            if not unfinished:
                return
            time.sleep(0.1)


def _named(tree: Any) -> dict[str, Any]:
    """Path in the tree -> leaf."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _describe(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _read_manifest(folder: Path) -> _Manifest:
    file = folder / MANIFEST
    try:
        content = parse_json(file.read_bytes(), str(file))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from None
    if content.pop("sha256", None) != checksum(content):
        raise CheckpointError(f"{file} is damaged: its content has not the checksum that it states")
    return _Manifest(**content | {"files": {name: Stored(**stored) for name, stored in content["files"].items()}})


def _verify(folder: Path) -> None:
    """CheckpointError that says what is wrong with the first file that is not as it was written."""
    def check(name: str) -> None:
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found is None:
            raise CheckpointError(f"{folder / name} is missing")
        if found != files[name].size:
            raise CheckpointError(f"{folder / name} has {found} bytes, expected {files[name].size}")
        if hash_file(folder / name) != files[name].sha256:
            raise CheckpointError(f"{folder / name} is damaged: other bytes than written")
    files = _read_manifest(folder).files
    at_once(check, sorted(files))


def _require(found: _Manifest, identity: Identity, arrays: Mapping[str, str], folder: Path) -> None:
    """CheckpointError naming what differs, unless the checkpoint is of what is trained now."""
    for kind in ("architecture", "tokenizer"):
        differs = _differences(found.identity.get(kind, {}), identity[kind])
        if differs:
            raise CheckpointError(f"{folder} is of another {kind}: {listed(differs)}")
    if differs := _differences(found.arrays, arrays):
        raise CheckpointError(f"{folder} holds other arrays than this run has: {listed(differs)}")


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    keys = sorted(there.keys() | here.keys())
    return [f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in keys
            if there.get(key) != here.get(key)]


def _reason(error: Exception) -> str:
    """One line of it; TensorStore's own words end in a list of where in its source it was."""
    return str(error).strip().split("\n")[0].split(" [")[0] or type(error).__name__


def _of_first_process(work: Callable[[], int]) -> int:
    """What the first process makes of it, on every process; if it fails there, CheckpointError on all."""
    if jax.process_count() == 1:
        return work()
    found, failure = -2, None
    if jax.process_index() == 0:
        try:
            found = work()
        except CheckpointError as error:
            failure = error
    found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if found == -2:
        raise failure or CheckpointError("the first process could not restore a checkpoint; it says why")
    return found
