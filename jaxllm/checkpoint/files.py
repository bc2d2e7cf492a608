"""The files of a converted folder, on this machine or in a bucket (gs://), behind one small interface.

It goes through TensorStore's key-value stores, which write a file whole or not at all, but for writing on this machine.
"""
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import tensorstore as ts

Result = TypeVar("Result")
WRITING = ".__lock"         # ends the names of files that are being written; TensorStore lists none such
FLUSHES = 16                # at a time; a file system does them together, in a tenth of the time of one after the other
CONTEXT = ts.Context()      # one for the process: its limit on requests at a time is for all of them together


class Files:
    """The files below a folder, by their names relative to it. What fails is an OSError."""

    def __init__(self, place: str | os.PathLike[str]):
        """place: a folder, which need not exist, or an address such as gs://bucket/folder."""
        address = os.fspath(place)
        self.local = None if "://" in address else Path(address).resolve()
        self.place = address.rstrip("/") if self.local is None else str(self.local)
        self._store = _result(lambda: ts.KvStore.open(self.spec(""), context=CONTEXT))

    def spec(self, name: str) -> dict[str, Any] | str:
        """What TensorStore calls the folder `name` below this one."""
        path = f"{self.place}/{name}/" if name else f"{self.place}/"
        return path if not self.local else {"driver": "file", "path": path, "file_io_sync": False}      # `flush`

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all."""
        if self.local:
            _write(self.local / name, content)
        else:
            _result(lambda: self._store.write(name, content))

    def read(self, name: str) -> bytes | None:
        """The content, or None where there is no such file."""
        found = _result(lambda: self._store.read(name))
        return found.value if found.state == "value" else None

    def names(self, below: str = "") -> list[str]:
        """Sorted names of all files, or of those whose names begin with `below`; those being written are not there."""
        keys = ts.KvStore.KeyRange(below, _after(below))
        return sorted(key.decode() for key in _result(lambda: self._store.list(keys)))

    def holds(self, name: str) -> bool:
        """Whether there is such a file, or folder."""
        if self.local:
            return (self.local / name).exists()
        return self.read(name) is not None or bool(self.names(f"{name}/"))

    def top(self) -> list[str]:
        """Names of the files and folders right inside this one."""
        if self.local:
            return sorted(os.listdir(self.local)) if self.local.exists() else []
        return sorted({name.split("/")[0] for name in self.names()})

    def delete(self, name: str) -> None:
        """Delete one file; there may be none."""
        _result(lambda: self._store.write(name, None))

    def remove(self, below: str) -> None:
        """Remove the folder `below` with all that is in it."""
        if self.local:
            shutil.rmtree(self.local / below)
        else:
            _result(lambda: self._store.delete_range(ts.KvStore.KeyRange(f"{below}/", _after(f"{below}/"))))

    def flush(self) -> None:
        """Return when everything would survive a loss of power; a bucket does not confirm a write before."""
        paths = [Path(parent, name) for parent, _, files in os.walk(self.local) for name in (*files, ".")] \
            if self.local else []
        with ThreadPoolExecutor(FLUSHES) as pool:
            list(pool.map(sync, paths))


def _write(path: Path, content: bytes) -> None:
    """As TensorStore does it, but with the room reserved first: that is faster, and a full disk is known before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, left = path.with_name(path.name + WRITING), memoryview(content)
    try:
        with open(part, "wb", buffering=0) as file:
            if content and hasattr(os, "posix_fallocate"):      # not on macOS
                os.posix_fallocate(file.fileno(), 0, len(content))
            while left:
                left = left[file.write(left):]
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _after(prefix: str) -> str:
    """The end of the range of names that begin with `prefix`; "" is the end of all."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""


def _result(work: Callable[[], ts.Future[Result]]) -> Result:
    """What TensorStore makes of a full or read-only disk, or of a bucket that is not there, as the OSError it is."""
    try:
        return work().result()
    except Exception as error:      # a ValueError, for most
        raise OSError(str(error).split(" [")[0]) from error      # without the spec in brackets


def sync(path: Path) -> None:
    """Flush a local file, or which files a local folder has, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
