"""Checking a converted folder against its manifest: every byte of it, and on request those that it was made from."""
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.files import Files
from jaxllm.checkpoint.load import refuse_incomplete
from jaxllm.checkpoint.manifest import MANIFEST, Manifest, Stored, read_manifest
from jaxllm.checkpoint.shards import at_once, hash_file, progress_bar
from jaxllm.checkpoint.store import PARAMS


@dataclass(frozen=True)
class Verified:
    """What was found whole."""
    num_files: int
    nbytes: int


def verify(folder: str | os.PathLike[str], source: str | os.PathLike[str] | None = None,
           progress: bool = True) -> Verified:
    """Hash every file of a folder that `convert` wrote, and of the hub folder `source` those that it was made from.

    Errors: CheckpointError that names every file that is missing, damaged or too many.
    """
    files = Files(folder)
    refuse_incomplete(folder)
    manifest = read_manifest(files)
    if manifest is None:
        raise CheckpointError(f"{folder} has no {MANIFEST}, so there is nothing to check it against: it was converted "
                              "by an older version, or is no converted folder; convert again to have one")
    with progress_bar(sum(stored.size for stored in manifest.files.values()), f"checking {files.place}",
                      progress) as done:
        def fault(name: str) -> str | None:
            found = _fault(files, name, manifest.files[name])
            done(manifest.files[name].size)
            return found
        faults = [found for found in at_once(fault, sorted(manifest.files)) if found]
    faults += [f"{name} does not belong there" for name in files.names(f"{PARAMS}/") if name not in manifest.files]
    if source is not None:
        faults += _source_faults(manifest, Path(source))
    if faults:
        raise CheckpointError(f"{folder} is not as it was made: {'; '.join(faults)}; copy these files again, or run "
                              "jaxllm convert again with --resume, which makes them again")
    return Verified(len(manifest.files), sum(stored.size for stored in manifest.files.values()))


def _fault(files: Files, name: str, stored: Stored) -> str | None:
    try:
        content = files.read(name)
    except OSError as error:
        return f"{name} cannot be read ({error})"
    if content is None:
        return f"{name} is missing"
    if len(content) != stored.size:
        return f"{name} has {len(content)} bytes, expected {stored.size}"
    return None if sha256(content).hexdigest() == stored.sha256 else f"{name} is damaged: other bytes than written"


def _source_faults(manifest: Manifest, source: Path) -> list[str]:
    """Of the files that the folder was made from."""
    def fault(name: str) -> str | None:
        if not (source / name).is_file():
            return f"{source / name} is missing"
        return None if hash_file(source / name) == manifest.plan.files[name] else f"{source / name} is not what it was"
    return [found for found in at_once(fault, sorted(manifest.plan.files)) if found]
