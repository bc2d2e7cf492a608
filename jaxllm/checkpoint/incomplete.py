"""A folder that says of itself that it is not whole, from before its first file until after its last.

While `OUT/jaxllm-incomplete/` exists, OUT is not loaded. In it lie plan.json and the journal (`journal.Journal`), on
this machine a lock, and `source/` for a source that has to put files somewhere. A mark without a plan.json is that of a
run that had not begun to write, or had written all.
"""
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from jaxllm.checkpoint.errors import CheckpointError, listed
from jaxllm.checkpoint.files import Files, sync
from jaxllm.checkpoint.manifest import MANIFEST

MARKER = "jaxllm-incomplete"
PLAN, LOCK, SOURCE = f"{MARKER}/plan.json", f"{MARKER}/lock", f"{MARKER}/source"


def is_incomplete(folder: str | os.PathLike[str]) -> bool:
    """Whether a conversion into `folder` is running or was interrupted."""
    return Files(folder).holds(MARKER)


@contextmanager
def filling(files: Files, resume: bool) -> Iterator[None]:
    """Mark `files` as not whole, and ours alone, while the block runs; a block that ends has made it whole.

    If the block raises before it has made a `Journal`, all is put back as it was; afterwards what is finished is kept.
    Errors: CheckpointError when another process fills the folder, when it holds something else, or an interrupted
    conversion and not `resume`; also for every OSError.
    """
    _refuse(files, resume)
    made = [path for path in (files.local, *files.local.parents) if not path.exists()] if files.local else []
    try:
        with _marked(files):
            yield
            files.flush()
            for path in made:
                sync(path.parent)
            files.delete(PLAN)      # first: a plan without its journal would be all to do again
            files.remove(MARKER)
        if files.local:
            sync(files.local)
    except BaseException as error:
        kept = files.holds(PLAN)
        for path in () if kept else made:
            with suppress(OSError):      # was not made yet
                path.rmdir()
        if isinstance(error, OSError):
            hint = ("what is finished is kept: free space, and run again with --resume" if kept else
                    "free space or choose another place, and run again")
            raise CheckpointError(f"{files.place} cannot be written: {error}; {hint}") from error
        raise


def _refuse(files: Files, resume: bool) -> None:
    """Whatever may not be there. Without `resume` that is everything, with it what is no conversion of ours."""
    if files.local and files.local.exists() and not files.local.is_dir():
        raise CheckpointError(f"{files.place} is a file; expected a folder to be made, or an empty one")
    if files.holds(MARKER):
        if not resume:
            with _locked(files.local) if files.local and files.holds(LOCK) else nullcontext():      # says if one runs
                raise CheckpointError(f"{files.place} is a conversion that was interrupted: run again with --resume, "
                                      "or delete it; nothing was changed")
    elif (found := files.top()) and not (resume and MANIFEST in found):
        raise CheckpointError(f"{files.place} already holds something ({listed(found)}); expected a new or empty "
                              "folder; nothing was changed")


@contextmanager
def _marked(files: Files) -> Iterator[None]:
    """The mark, which is removed again if the block raises before there is a plan. A bucket, which has neither folders
    nor locks, is marked by the plan alone."""
    if files.local:
        (files.local / MARKER).mkdir(parents=True, exist_ok=True)
    with _locked(files.local) if files.local else nullcontext():
        try:
            yield
        except BaseException:
            if files.holds(MARKER) and not files.holds(PLAN):
                files.remove(MARKER)
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{folder} is being filled by another process; wait for it, or choose another "
                                  "output") from None
        yield
