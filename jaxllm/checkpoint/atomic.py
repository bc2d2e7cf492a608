"""A folder that appears whole or not at all.

It is filled under another name beside its own (OUT.jaxllm-incomplete), flushed to disk and renamed. A marker file lies
in it from the first moment until after the rename, so that whatever a kill leaves behind, under either name, says of
itself that it is not whole; the next run takes it up. Only names that the caller calls its own are ever deleted.
"""
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from jaxllm.checkpoint.errors import CheckpointError, listed

MARKER = "jaxllm-incomplete.txt"
SUFFIX = ".jaxllm-incomplete"
NOTE = ("jaxllm was filling this folder. If no jaxllm is running, it was interrupted: run the same command again, or "
        "delete this folder.\n")
IsOurs = Callable[[str], bool]      # whether a name inside the folder is one that the caller writes


def work_folder(out: Path) -> Path:
    """Where `out` is filled."""
    return out.with_name(out.name + SUFFIX)


@contextmanager
def new_folder(out: Path, is_ours: IsOurs) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends, and is removed when it raises.

    Errors: CheckpointError when `out` holds something, when another process fills it, or when it cannot be written.
    """
    work = work_folder(out)
    try:
        _make_room(out, is_ours)
        with _claim(work, is_ours):
            try:
                yield work
                _flush(work)
                os.rename(work, out)
            except BaseException:
                _clear(work, is_ours)
                raise
        os.unlink(out / MARKER)
        _sync(out)
        _sync(out.parent)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}; free space or choose another place, and run "
                              "again") from error


def _make_room(out: Path, is_ours: IsOurs) -> None:
    """`out` may be absent, empty, or marked as not whole."""
    if not out.exists():
        return
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file; expected a folder to be made, or an empty one")
    names = os.listdir(out)
    if names and MARKER not in names:
        raise CheckpointError(f"{out} already holds something ({listed(sorted(names))}); expected a new or empty "
                              "folder; nothing was changed")
    if names:
        with _claim(out, is_ours):
            _clear(out, is_ours)


@contextmanager
def _claim(folder: Path, is_ours: IsOurs) -> Iterator[IO[str]]:
    """`folder`, existing, marked, empty but for the mark, and ours alone until the block ends or the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    names = set(os.listdir(folder)) - {MARKER}
    foreign = sorted(name for name in names if not is_ours(name))
    if foreign or (names and not (folder / MARKER).exists()):
        raise CheckpointError(f"{folder} is needed for writing, but holds what jaxllm did not put there "
                              f"({listed(foreign or sorted(names))}); move it away; nothing was changed")
    with open(folder / MARKER, "a") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{folder} is being filled by another process; wait for it, or choose another "
                                  "output") from None
        mark.truncate(0)
        mark.write(NOTE)
        mark.flush()
        for name in names:
            _remove(folder / name)
        yield mark


def _clear(folder: Path, is_ours: IsOurs) -> None:
    """Remove what is ours, and the folder if nothing else is in it."""
    for name in os.listdir(folder):
        if is_ours(name):
            _remove(folder / name)
    if os.listdir(folder) == [MARKER]:
        os.unlink(folder / MARKER)
        os.rmdir(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _flush(folder: Path) -> None:
    """Everything in `folder` onto the disk, so that the rename cannot get there first."""
    for parent, _, files in os.walk(folder):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
