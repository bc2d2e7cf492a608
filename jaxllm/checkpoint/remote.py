"""A checkpoint on the hub as a folder here, of which only the shards in use are really here.

The small files are downloaded. Every shard is a stub: a file of its size with its header and, in the place of the data,
a hole that takes no disk. So everything that opens hub folders opens this one, and knows all names, shapes and offsets,
before any data came. `acquire` puts the shard in the place of its stub, `release` the stub in that of the shard.

A file is downloaded beside its place and moved there once its hash is right, so a kill at any moment leaves either; the
next run goes on with it, at the same commit.
"""
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.feed import AT_HAND
from jaxllm.checkpoint.hub import INDEX, HubCheckpoint
from jaxllm.checkpoint.shards import COPIED, at_once, hash_file
from jaxllm.checkpoint.tensorfile import MAX_HEADER, parse_json
from jaxllm.checkpoint.transfer import Repo

NOTE = "jaxllm-hub.json"     # what the folder is of
GUESS = 2**18                # bytes; most headers are shorter


class HubShards:
    """The shards of `repo_id`, as a folder to open at `folder`; a `Shards` for conversion.

    `commit` is what `revision` (a branch, tag or commit, by default main) was when `work` was first used.
    Errors: CheckpointError for the hub, the line and the disk, as in `transfer.Repo`.
    """

    def __init__(self, repo_id: str, revision: str | None, work: Path):
        self.folder, self.repo = work, _open(work, repo_id, revision or "main")
        self.commit = self.repo.commit
        self.identity: Mapping[str, str] = {"hub": repo_id, "revision": self.commit}
        self._here: set[str] = set()
        weights = [name for name in self.repo.files if name.endswith(".safetensors")]
        # What is not kept by LFS has at most 10 MB by the hub's rules: even as a shard it is worth no stub.
        self._shards = {name: self.repo.files[name] for name in weights if self.repo.files[name].sha256 is not None}
        self._small = [name for name in (*COPIED, INDEX, *weights)
                       if name in self.repo.files and name not in self._shards]
        for name in weights:
            if not (work / name).resolve().is_relative_to(work.resolve()):
                raise CheckpointError(f"{self.repo} lists {name!r}, which is not inside the repository")
        at_once(self._fetch_small, self._small)
        at_once(self._fetch_stub, list(self._shards))

    def hashes(self) -> dict[str, str]:
        """File name -> sha256 of what the text model is made of: of shards as the hub states it, of others as they are.
        """
        used = {str(info.file.relative_to(self.folder)) for info in HubCheckpoint(self.folder).tensors.values()}
        small = {name: hash_file(self.folder / name) for name in self._small if name in {*used, *COPIED, INDEX}}
        return small | {name: str(file.sha256) for name, file in self._shards.items() if name in used}

    @property
    def room(self) -> int:
        """Bytes for the largest shards that are here at once, less what a killed run has left of shards."""
        largest = sorted(file.size for file in self._shards.values())[-AT_HAND:]
        files = (file for name in self._shards for file in (self.folder / name, self._beside(name, ".partial")))
        taken = sum(_taken(file) for file in files if file.exists())
        return max(0, sum(largest) - taken)

    def is_here(self, name: str) -> bool:
        """Whether the file holds its data, and not a hole in its place."""
        return name in self._here or name in self._small

    def acquire(self, name: str) -> None:
        """Have all of the file, checked, until `release`."""
        if self.is_here(name):
            return
        target, partial = self.folder / name, self._beside(name, ".partial")
        with _writing(target):
            self._make_room(name)
            if not (_has_data(target) and self._shards[name].is_whole(target)):      # a killed run may have left it
                self.repo.download(name, partial)
                if _header(partial) != _header(target):
                    target.unlink()      # the next run fetches it again
                    raise CheckpointError(f"the header of {name} of {self.repo} came first with other bytes than now; "
                                          "nothing was read by it: run again with --resume")
                os.replace(partial, target)
        self._here.add(name)

    def release(self, name: str) -> None:
        """Give the disk of a shard back; what has been read of it stays true."""
        if name in self._here:
            self._here.remove(name)
            with _writing(self.folder / name):
                self._drop(name)

    def stop(self) -> None:
        self.repo.stopped.set()

    def _make_room(self, name: str) -> None:
        """Drop what a killed run left of other shards, as far as `name` would be one too many beside it."""
        left = [other for other in self._shards if other not in self._here | {name}
                and (_has_data(self.folder / other) or self._beside(other, ".partial").exists())]
        for other in left[:max(0, len(self._here) + len(left) + 1 - AT_HAND)]:
            self._drop(other)

    def _drop(self, name: str) -> None:
        self._beside(name, ".partial").unlink(missing_ok=True)
        self._beside(name, ".stub").write_bytes(_header(self.folder / name))
        self._place_stub(name)

    def _fetch_small(self, name: str) -> None:
        target, partial = self.folder / name, self._beside(name, ".partial")
        with _writing(target):
            if not (target.exists() and self.repo.files[name].is_whole(target)):
                self.repo.download(name, partial)
                os.replace(partial, target)

    def _fetch_stub(self, name: str) -> None:
        target, size, stub = self.folder / name, self._shards[name].size, self._beside(name, ".stub")
        with _writing(target):
            if not target.exists():
                self.repo.grow(stub, name, min(GUESS, size))
                end = _header_end(stub)
                if end <= min(size, 8 + MAX_HEADER):      # else the file is refused as soon as it is opened
                    self.repo.grow(stub, name, end)
                self._place_stub(name)

    def _place_stub(self, name: str) -> None:
        """Give `name`.stub, which begins with the header, the shard's size without data, and the shard's name."""
        stub = self._beside(name, ".stub")
        os.truncate(stub, min(_header_end(stub), stub.stat().st_size))
        os.truncate(stub, self._shards[name].size)
        os.replace(stub, self.folder / name)

    def _beside(self, name: str, suffix: str) -> Path:
        return self.folder / (name + suffix)


def _open(work: Path, repo_id: str, revision: str) -> Repo:
    """The repository at the commit that `work` was begun with; `work` is begun if it is new. Errors: CheckpointError
    when it was begun with another repository or revision."""
    note = work / NOTE
    if note.exists():
        begun = parse_json(note.read_bytes(), str(note))
        if begun.get("repo_id") != repo_id or revision not in (begun.get("revision"), begun.get("commit")):
            raise CheckpointError(f"{work} was begun with {begun.get('repo_id')} at {begun.get('revision')}, not "
                                  f"{repo_id} at {revision}; go on with that, or choose another output")
        return Repo(repo_id, str(begun.get("commit")))
    repo = Repo(repo_id, revision)
    with _writing(note):
        fresh = work / f"{NOTE}.partial"
        fresh.write_text(json.dumps({"repo_id": repo_id, "revision": revision, "commit": repo.commit}) + "\n")
        os.replace(fresh, note)
    return repo


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """A place for `target`; says what to do when the disk is full. Errors: CheckpointError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror}; what was downloaded is kept: free space "
                              "and run again with --resume") from error


def _has_data(file: Path) -> bool:
    """Whether `file` takes the disk that its size needs. Only a hint: file systems differ in what they count."""
    return _taken(file) >= file.stat().st_size


def _taken(file: Path) -> int:
    """Bytes of disk; a hole takes none."""
    return file.stat().st_blocks * 512


def _header_end(file: Path) -> int:
    """Where the header of the safetensors file ends, by its first eight bytes."""
    with open(file, "rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def _header(file: Path) -> bytes:
    with open(file, "rb") as stream:
        return stream.read(_header_end(file))
