"""Where the files of a hub checkpoint come from: a folder that is there already, or (`remote`) the hub, file by file.

`convert` asks for a shard before it reads from it and says when it needs it no more, so that a provider that fetches
may fetch late and drop early. Every provider vouches for the bytes by their SHA-256.
"""
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from tqdm import tqdm

from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.hub import INDEX, HubCheckpoint

COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
          "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
          "chat_template.json")      # what a converted folder has of a hub folder beside the weights
BUFFER = 4 * 2**20                   # bytes read at once
Item = TypeVar("Item")
Result = TypeVar("Result")
AT_ONCE = min(8, os.cpu_count() or 1)      # files hashed at the same time; a core each


class Shards(Protocol):
    """The files of one checkpoint in hub layout, by their names relative to `folder`."""
    folder: Path      # what HubSource opens
    @property
    def identity(self) -> Mapping[str, str]:
        """Which checkpoint this is, for people: {"folder": ...} or {"hub": ..., "revision": ...}."""
        ...

    @property
    def room(self) -> int:
        """Bytes of disk that its shards will take, beside what they take already."""
        ...

    def hashes(self) -> dict[str, str]:
        """File name -> SHA-256 in hex of every file that the conversion depends on."""
        ...

    def acquire(self, name: str) -> None:
        """Return when all bytes of the shard are in `folder` and are those of `hashes`."""
        ...

    def release(self, name: str) -> None:
        """The shard will not be read again; what was read of it must have been what `hashes` says."""
        ...

    def stop(self) -> None:
        """Nothing more is wanted: an `acquire` in another thread may end without a result."""
        ...


class LocalShards:
    """A hub folder on this machine: every file is hashed once, and must then stay as it is."""
    room = 0

    def __init__(self, folder: str | os.PathLike[str], progress: bool = False):
        self.folder, self.progress = Path(folder), progress
        self.identity = {"folder": self.folder.resolve().name}
        self._seen: dict[str, tuple[int, int]] = {}      # file -> (size, mtime) when its hashing began

    def hashes(self) -> dict[str, str]:
        """Errors: CheckpointError for a file whose content is not what the hub said at its download."""
        shards = {str(info.file.relative_to(self.folder)) for info in HubCheckpoint(self.folder).tensors.values()}
        names = sorted(shards | {name for name in (*COPIED, INDEX) if (self.folder / name).is_file()})
        self._seen = {name: _stamp(self.folder / name) for name in names}
        total = sum(size for size, _ in self._seen.values())
        with progress_bar(total, f"checking {self.folder.name}", self.progress) as done:
            found = dict(zip(names, at_once(lambda name: self._hash(name, done), names), strict=True))
        for name in names:
            self.acquire(name)
        return found

    def acquire(self, name: str) -> None:
        if _stamp(self.folder / name) != self._seen[name]:
            raise CheckpointError(f"{self.folder / name} was changed while it was converted; wait until nothing writes "
                                  "to it, delete the output and convert again")

    def release(self, name: str) -> None:
        self.acquire(name)
        if hasattr(os, "posix_fadvise"):      # not on macOS. What is read no more makes room for what is written
            with open(self.folder / name, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def stop(self) -> None:
        pass      # nothing here takes long

    def _hash(self, name: str, done: Callable[[int], object]) -> str:
        found = hash_file(self.folder / name, done)
        stated = _stated(self.folder, name)
        if len(stated) == 40:      # the hub's name for a file kept in git itself: that of a git blob
            actual = hash_file(self.folder / name, kind="sha1", prefix=b"blob %d\0" % self._seen[name][0])
        else:
            actual = found
        if stated and stated != actual:
            raise CheckpointError(f"{self.folder / name} is damaged: the hub stated the hash {stated} when it was "
                                  f"downloaded, its content has {actual}; download it again")
        return found


def hash_file(file: Path, done: Callable[[int], object] = lambda count: None, kind: str = "sha256",
              prefix: bytes = b"") -> str:
    """The hash of `prefix` and the file, in hex; `done` is told the bytes of each piece. Errors: CheckpointError."""
    digest, buffer = hashlib.new(kind, prefix), bytearray(BUFFER)
    try:
        with open(file, "rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                done(count)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def at_once(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """[work(item) for item in items], AT_ONCE at the same time; the first error ends it."""
    found: dict[int, Result] = {}
    numbers = iter(range(len(items)))      # which all threads draw from: a future for each item would be ten times it

    def draw() -> None:
        for number in numbers:
            try:
                found[number] = work(items[number])
            except BaseException:
                deque(numbers, maxlen=0)      # nothing is left to draw
                raise

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for drawing in [pool.submit(draw) for _ in range(AT_ONCE)]:
            drawing.result()
    return [found[number] for number in range(len(items))]


@contextmanager
def progress_bar(total: int, label: str, shown: bool) -> Iterator[Callable[[int], object]]:
    """A bar on stderr with rate and time left; what it gives may be called from any thread with bytes that are done."""
    lock = threading.Lock()
    with tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=not shown) as bar:
        def done(count: int) -> None:
            with lock:
                bar.update(count)
        yield done


def _stamp(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    return found.st_size, found.st_mtime_ns


def _stated(folder: Path, name: str) -> str:
    """The hash by which the hub knows the file, if huggingface_hub left it here, else "": SHA-256 for large files, the
    SHA-1 of a git blob for small ones.

    A download into a folder keeps it in the second line of .cache/huggingface/download/NAME.metadata; one into the
    shared cache is links to blobs/HASH.
    """
    record = folder / ".cache/huggingface/download" / f"{name}.metadata"
    if record.is_file():
        stated = [*record.read_text().splitlines(), "", ""][1]
    else:
        link = (folder / name).readlink() if (folder / name).is_symlink() else Path()
        stated = link.name if link.parent.name == "blobs" else ""
    return stated if len(stated) in (40, 64) and set(stated) <= set("0123456789abcdef") else ""
