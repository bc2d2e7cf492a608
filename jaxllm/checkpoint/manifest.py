"""manifest.json of a converted folder: every file with size and SHA-256, and what it was made from and how.

The same source and options give the same manifest: no times, no host names. Its own last field is the checksum of the
others, so that damage to it is not taken for damage to the files.
"""
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.files import Files
from jaxllm.checkpoint.tensorfile import parse_json

MANIFEST = "manifest.json"
FORMAT = 1      # of manifest, plan and journal, and of how a source becomes files


@dataclass(frozen=True)
class Plan:
    """What a converted folder is made of. Two runs with equal plans, `source` aside, write the same files."""
    source: Mapping[str, str]        # for people: {"folder": ...} or {"hub": ..., "revision": ...}
    files: Mapping[str, str]         # file of the source -> its SHA-256
    options: Mapping[str, Any]       # {"weights": ...} and what else the user chose
    reading: str | None              # how the rows of attention lie in the source
    num_mtp: int
    format: int = FORMAT

    @staticmethod
    def parse(content: Mapping[str, Any], place: str) -> "Plan":
        """Errors: CheckpointError for what another version of jaxllm wrote, or something else."""
        if content.get("format") != FORMAT or content.keys() != {field.name for field in dataclasses.fields(Plan)}:
            raise CheckpointError(f"{place} has the format {content.get('format')!r}, this jaxllm reads {FORMAT}; use "
                                  "the version that wrote it, or convert again into a new folder")
        return Plan(**content)

    def require(self, now: "Plan", place: str) -> None:
        """Errors: CheckpointError unless `now` makes the same files; names the file or option that differs."""
        what = [f"{name} of the source has the SHA-256 {now.files.get(name, 'of no file')}, then "
                f"{self.files.get(name, 'there was none')}" for name in sorted(self.files.keys() | now.files.keys())
                if self.files.get(name) != now.files.get(name)]
        what += [f"{name} is {now.options.get(name)!r}, then {self.options.get(name)!r}"
                 for name in sorted(self.options.keys() | now.options.keys())
                 if self.options.get(name) != now.options.get(name)]
        what += [f"{name} is {getattr(now, name)!r}, then {getattr(self, name)!r}" for name in ("reading", "num_mtp")
                 if getattr(now, name) != getattr(self, name)]
        if what:
            more = f"; and {len(what) - 1} more" if what[1:] else ""
            raise CheckpointError(f"{place} was begun from another source or with other options: {what[0]}{more}; go "
                                  "on with those it was begun with, or delete it and convert again")


@dataclass(frozen=True, slots=True)
class Stored:
    """A finished file."""
    size: int        # bytes
    sha256: str      # in hex


@dataclass(frozen=True)
class Manifest:
    """`files`: name below the folder -> Stored, of all but the manifest."""
    plan: Plan
    files: Mapping[str, Stored]


def read_manifest(folder: str | os.PathLike[str] | Files) -> Manifest | None:
    """The manifest of a converted folder; None if it has none. Errors: CheckpointError when it is damaged."""
    files = folder if isinstance(folder, Files) else Files(folder)
    place = f"{files.place}/{MANIFEST}"
    text = files.read(MANIFEST)
    if text is None:
        return None
    content = parse_json(text, place)
    stated = content.pop("sha256", None)
    if stated != checksum(content):
        raise CheckpointError(f"{place} is damaged: its content has not the checksum that it states; copy it again, or "
                              "convert again into a new folder")
    return Manifest(Plan.parse(content.pop("plan"), place), {
        name: Stored(**record) for name, record in content["files"].items()})


def write_manifest(files: Files, manifest: Manifest) -> None:
    content: dict[str, Any] = {
        "plan": dataclasses.asdict(manifest.plan),
        "files": {name: dataclasses.asdict(stored) for name, stored in manifest.files.items()},
    }
    content["sha256"] = checksum(content)
    files.write(MANIFEST, dump(content))


def dump(content: Mapping[str, Any]) -> bytes:
    """JSON that is the same for the same content."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(dump(content)).hexdigest()
