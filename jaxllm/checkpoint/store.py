"""Converted checkpoints: an Orbax checkpoint of a flat dict {path: array}, written by blocks and read by slices.

Orbax writes a leaf that it is given whole, and an expert stack of a large model does not fit into memory whole. Its
partial saving (many `save`s, one `finalize`) bounds how many leaves are in flight but not the size of one; TensorStore
under hand-written metadata would have to imitate Orbax's private files. So: a `TypeHandler`, Orbax's own extension
point for leaf types. Its leaves are promises (`Leaf`), and it writes each as Orbax stores a jax.Array: zarr, in chunks
of at most `blocks.LIMIT` bytes, reading one while the one before is written. Orbax does the rest (tree metadata, commit
by rename), and plain Orbax restores the result onto any mesh.

Each chunk is a file (no OCDBT): one expert, 16 to 25 MB in the released models, which suits file systems and buckets,
and a chunk that is absent or cut short is noticed by name. Not compressed: weights shrink little, and a slice would
cost decoding the chunks around it.
"""
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from jaxllm.checkpoint.blocks import Index, chunk_shape
from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.source import Source, Tally, read_blocks

PARAMS = "params"      # the Orbax checkpoint inside a converted folder
Result = TypeVar("Result")


class Leaf:
    """A parameter that is read from `source` when it is written; `done` is told the bytes of each block."""

    def __init__(self, source: Source, path: str, done: Callable[[int], object]):
        self.source, self.path, self.done = source, path, done
        self.shape, self.dtype = source.params[path]

    async def write(self, folder: str, context: ts.Context) -> None:
        """Write the array into `folder`, holding two blocks at a time."""
        array = await _written(ts.open(self._spec(folder), create=True, context=context))
        tally, writing = Tally(), list[ts.WriteFutures]()
        whole = tuple(slice(0, size) for size in self.shape)
        for block, values in read_blocks(self.source, self.path, whole, self.dtype, tally):
            while writing:
                await _written(writing.pop())
            writing.append(array[block].write(values, can_reference_source_data_indefinitely=True))
            self.done(values.nbytes)
        await _written(writing.pop())
        tally.warn(self.source, self.path)

    def _spec(self, folder: str) -> dict[str, Any]:
        return {
            # `atomic.new_folder` flushes all files once, at the end
            "driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/", "file_io_sync": False},
            "dtype": self.dtype.name,
            "metadata": {"shape": self.shape, "chunks": chunk_shape(self.path, self.shape, self.dtype.itemsize),
                         "compressor": None},
            "store_data_equal_to_fill_value": True,      # else a chunk of zeros looks like one that was lost
        }


async def _written(work: Awaitable[Result]) -> Result:
    """What TensorStore makes of a full or read-only disk, as the OSError that it is."""
    try:
        return await work
    except Exception as error:      # a ValueError, for most
        raise OSError(str(error).split(" [")[0]) from error      # without the spec in brackets


class LeafHandler(ocp.type_handlers.TypeHandler):
    """Writes `Leaf`s in Orbax's format of a jax.Array, which is what reads them."""

    def typestr(self) -> str:
        return "jax.Array"

    async def serialize(self, values: Sequence[Leaf], infos: Sequence[ocp.type_handlers.ParamInfo],
                        args: Sequence[Any] | None = None) -> list[ocp.future.Future]:
        for leaf, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            await leaf.write(str(info.path), info.ts_context)
        return []

    async def metadata(self, infos: Sequence[ocp.type_handlers.ParamInfo]) -> Sequence[Any]:
        raise NotImplementedError("leaves are restored as jax.Array, by its own handler")

    async def deserialize(self, infos: Sequence[ocp.type_handlers.ParamInfo],
                          args: Sequence[Any] | None = None) -> Sequence[Any]:
        raise NotImplementedError("leaves are restored as jax.Array, by its own handler")


def save_params(source: Source, folder: Path, done: Callable[[int], object]) -> None:
    """Write all parameters of `source` as an Orbax checkpoint at `folder`, which must not exist. Errors: OSError."""
    registry = ocp.type_handlers.create_type_handler_registry((Leaf, LeafHandler()))
    leaves = {path: Leaf(source, path, done) for path in source.params}
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, type_handler_registry=registry)) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(leaves))


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


class StoreSource:
    """The parameters of a converted folder, which `Leaf.write` wrote. CheckpointError when they are damaged."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        opening = {file.parent.name: ts.open(_reading(file.parent), read=True)
                   for file in sorted((self.folder / PARAMS).glob("*/.zarray"))}
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
            raise CheckpointError(f"{self.folder / PARAMS / path} is damaged ({str(error).split(' [')[0]}); convert "
                                  "again") from error


def _reading(folder: Path) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder.absolute()}/"},
            "fill_missing_data_reads": False}      # a chunk that is not there is an error, not zeros
