"""Which files of a folder that is being filled are finished, so that a later run does not make them again."""
import time
from dataclasses import asdict

from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.files import Files
from jaxllm.checkpoint.incomplete import MARKER, PLAN
from jaxllm.checkpoint.manifest import Plan, Stored, dump, read_manifest
from jaxllm.checkpoint.tensorfile import parse_json

JOURNAL = f"{MARKER}/journal-"
EVERY_BYTES, EVERY_SECONDS = 64 * 2**20, 0.25      # of finished work between two entries: what a kill costs at most


class Journal:
    """`plan` of the run that began the folder, and `done`: the finished files, of earlier runs and of this one.

    It is kept in pieces, each an object of its own: nothing can be added to an object in a bucket.
    """

    def __init__(self, files: Files, plan: Plan):
        """Begin to fill `files` by `plan`, or go on. Errors: CheckpointError if it was begun by another plan."""
        self.files, self.plan, self.done = files, plan, dict[str, Stored]()
        self._new: dict[str, Stored] = {}
        self._pieces = len(pieces := files.names(JOURNAL))
        self._flushed = time.monotonic()
        begun, whole = files.read(PLAN), None
        if begun is not None:
            self.plan = Plan.parse(parse_json(begun, f"{files.place}/{PLAN}"), f"{files.place}/{PLAN}")
            for piece in pieces:
                self.done |= _entries(files.read(piece) or b"")
        elif whole := read_manifest(files):
            self.plan = whole.plan
            self.done, self._new = dict(whole.files), dict(whole.files)
        self.plan.require(plan, files.place)
        self.flush()      # of a whole folder, so that its plan never stands alone
        if begun is None:
            files.write(PLAN, dump(asdict(self.plan)))

    def add(self, name: str, stored: Stored) -> None:
        """`name` is written. Known to a later run from the next flush on: here, if the last was long ago."""
        self.done[name] = self._new[name] = stored
        if (sum(new.size for new in self._new.values()) >= EVERY_BYTES
                or time.monotonic() - self._flushed >= EVERY_SECONDS):
            self.flush()

    def flush(self) -> None:
        if self._new:
            self._pieces += 1
            self.files.write(f"{JOURNAL}{self._pieces:06}.json",
                             dump({name: asdict(stored) for name, stored in self._new.items()}))
            self._new = {}
        self._flushed = time.monotonic()


def _entries(content: bytes) -> dict[str, Stored]:
    """Those of one piece; none if a loss of power has spoilt it, and its files are made again."""
    try:
        return {name: Stored(**record) for name, record in parse_json(content, JOURNAL).items()}
    except (CheckpointError, TypeError):
        return {}
