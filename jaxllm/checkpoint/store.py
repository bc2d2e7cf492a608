"""Converted checkpoints: an Orbax checkpoint of a flat dict {path: array}, written file by file and read by slices.

Orbax writes a leaf that it is given whole, and an expert stack of a large model does not fit into memory whole. Its
partial saving (many `save`s, one `finalize`) bounds how many leaves are in flight but not the size of one, and begins
again after an interruption. So the files are written here, each whole from memory, which is also what lets a later run
go on: chunks are the raw numbers (zarr v2, not compressed: weights shrink little, and a slice would cost decoding the
chunks around it), .zarray is TensorStore's and the metadata of the tree Orbax's own, of a save that stores no array.
Plain Orbax restores the result onto any mesh.

Each chunk is a file of at most `blocks.LIMIT` bytes (no OCDBT): one expert, 6 to 25 MB in the released models, which
suits file systems and buckets, and a chunk that is absent or cut short is noticed by name.
"""
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from jaxllm.checkpoint.blocks import Index, chunk_shape
from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.files import CONTEXT, Files
from jaxllm.checkpoint.source import Source, Tally
from jaxllm.checkpoint.tensorfile import parse_json

PARAMS = "params"            # the Orbax checkpoint inside a converted folder
TREE = "_METADATA"           # Orbax's file of what arrays there are
Result = TypeVar("Result")


def chunk_name(block: Index, chunk: Sequence[int]) -> str:
    """The file of the chunk that begins where `block` does."""
    return ".".join(str(cut.start // size) for cut, size in zip(block, chunk, strict=True))


def chunk_content(source: Source, path: str, block: Index, chunk: tuple[int, ...], tally: Tally) -> bytes:
    """params[path][block] as the file has it: row-major, the shape of a whole chunk also at the edges of the array."""
    values = source.read(path, block)
    tally.add(block, values)
    if values.shape != chunk:
        padded = np.zeros(chunk, values.dtype)
        padded[tuple(slice(size) for size in values.shape)] = values
        values = padded
    return values.tobytes()


def array_files(path: str, shape: tuple[int, ...], dtype: np.dtype) -> dict[str, bytes]:
    """What lies beside the chunks of a parameter: name -> content."""
    context = ts.Context()      # a store in memory of its own
    ts.open({"driver": "zarr", "kvstore": "memory://", "dtype": dtype.name, "metadata": {
        "shape": shape, "chunks": chunk_shape(path, shape, dtype.itemsize), "compressor": None,
    }}, create=True, context=context).result()
    store = ts.KvStore.open("memory://", context=context).result()
    return {key.decode(): store.read(key).result().value for key in store.list().result()}


class _Promise:
    """A leaf whose array is written by other means."""


class _Nothing(ocp.type_handlers.TypeHandler):
    """Stores what Orbax says of a jax.Array, and no array."""

    def typestr(self) -> str:
        return "jax.Array"

    async def serialize(self, values: Sequence[Any], infos: Sequence[ocp.type_handlers.ParamInfo],
                        args: Sequence[Any] | None = None) -> list[ocp.future.Future]:
        return []

    async def metadata(self, infos: Sequence[ocp.type_handlers.ParamInfo]) -> Sequence[Any]:
        raise NotImplementedError("leaves are restored as jax.Array, by its own handler")

    async def deserialize(self, infos: Sequence[ocp.type_handlers.ParamInfo],
                          args: Sequence[Any] | None = None) -> Sequence[Any]:
        raise NotImplementedError("leaves are restored as jax.Array, by its own handler")


def tree_files(paths: Iterable[str]) -> dict[str, bytes]:
    """What Orbax writes beside the arrays, name -> content; the same whenever and wherever it is made."""
    registry = ocp.type_handlers.create_type_handler_registry((_Promise, _Nothing()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, PARAMS)
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(
                use_ocdbt=False, type_handler_registry=registry)) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave({path: _Promise() for path in paths}))
        found = {file.name: file.read_bytes().replace(bytes(folder), PARAMS.encode()) for file in folder.iterdir()}
    return {name: re.sub(rb'(_timestamp_nsecs": )\d+', rb"\g<1>0", content) for name, content in found.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's warnings that a registry has no jax.Array and a checkpoint no OCDBT, which are meant."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def is_store(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` is one that `convert` wrote, whole or not."""
    files = Files(folder)
    return files.holds(PARAMS if files.local else f"{PARAMS}/{TREE}")      # a bucket has no folders


class StoreSource:
    """The parameters of a converted folder, here or in a bucket. CheckpointError when they are damaged."""

    def __init__(self, folder: str | os.PathLike[str]):
        files = Files(folder)
        self.folder = files.place
        text, place = files.read(f"{PARAMS}/{TREE}"), f"{self.folder}/{PARAMS}/{TREE}"
        if text is None:
            raise CheckpointError(f"{place} is missing: the folder is not a whole copy of what jaxllm convert wrote")
        try:
            paths = [key["key"] for leaf in parse_json(text, place)["tree_metadata"].values()
                     for key in leaf["key_metadata"]]
        except (KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{place} is damaged: it does not describe a tree of arrays") from None
        opening = {path: ts.open({
            "driver": "zarr", "kvstore": files.spec(f"{PARAMS}/{path}"),
            "fill_missing_data_reads": False,      # a chunk that is not there is an error, not zeros
        }, read=True, context=CONTEXT) for path in paths}
        self._arrays = {path: self._whole(path, array) for path, array in opening.items()}
        self.params = {path: (array.shape, array.dtype.numpy_dtype) for path, array in self._arrays.items()}

    def read(self, path: str, index: Index) -> np.ndarray:
        """params[path][index]; the chunks that hold it are read."""
        return self._whole(path, self._arrays[path][index].read())

    def describe(self, path: str) -> str:
        return f"{path} (of {self.folder})"

    def _whole(self, path: str, work: ts.Future[Result]) -> Result:
        try:
            return work.result()
        except ValueError as error:     # TensorStore's for a file that is absent, too short or not what it should be
            raise CheckpointError(f"{self.folder}/{PARAMS}/{path} is damaged ({str(error).split(' [')[0]}); jaxllm "
                                  "verify tells what else is; copy it again, or convert again") from error
