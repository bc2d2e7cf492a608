"""From a hub checkpoint to a converted folder: parameters as an Orbax checkpoint in params/, config and tokenizer files
beside it, a manifest of all.

The files are planned (plan.py), made one by one and noted as finished (writer.py). So memory is a few chunks whatever
the sizes, and a run goes on where the one before was interrupted.
"""
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.files import Files
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.checkpoint.incomplete import SOURCE, filling
from jaxllm.checkpoint.journal import Journal
from jaxllm.checkpoint.manifest import Manifest, Plan, write_manifest
from jaxllm.checkpoint.plan import Piece, array_pieces, known, metadata_pieces
from jaxllm.checkpoint.shards import COPIED, LocalShards, Shards, progress_bar
from jaxllm.checkpoint.source import Convertible, Tally
from jaxllm.checkpoint.store import PARAMS
from jaxllm.checkpoint.writer import unfinished, write_pieces
from jaxllm.codec import DTYPES

KEEP = "keep"      # `weights`: as they are stored
PACKED = tuple(DTYPES)
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")      # on the hub


@dataclass(frozen=True)
class Converted:
    """What was written into `folder`, and what of the source was not."""
    folder: Path | str                  # str: an address, gs://...
    num_arrays: int
    nbytes: int                         # of the arrays
    num_mtp: int                        # MTP blocks among the arrays
    left_out: dict[str, list[str]]      # group -> tensors or files
    seconds: float


def convert(source: str | os.PathLike[str], out: str | os.PathLike[str], *, weights: str = KEEP, resume: bool = False,
            reading: str | None = None, revision: str | None = None, classes: Sequence[str] = ("experts",),
            group: int = 32, grams: Mapping[str, np.ndarray] | None = None, progress: bool = True) -> Converted:
    """Write the checkpoint in hub layout `source` to `out`, for `open_source` and plain Orbax.

    source: a folder, or the id of a repository on the hub, of which `revision` is taken. out: a new or empty folder, or
    an address such as gs://bucket/folder; with `resume` also what an interrupted conversion left there.
    weights: the form in which parameters are stored: "keep", "bfloat16", "float32", or fp8, mxfp4 or int4 for the
    matrices of `classes` (experts, attention, dense, head; or all), int4 in groups of `group`; `grams` of
    `calibrate.collect_grams` make 4-bit codes better.
    reading: how attention rows lie in files that leave it open (readings.py).
    `progress` shows bars, and what is left out, on stderr. NaN or Inf: one warning for each parameter.
    Errors: CheckpointError for a checkpoint that is not whole or changes, an `out` that holds something or cannot be
    written; ConfigError for the config.json. What is finished when an error comes is kept, for `resume`.
    """
    start, files = time.monotonic(), Files(out)
    with filling(files, resume), tempfile.TemporaryDirectory() as temporary:
        shards = open_shards(source, revision, files.local / SOURCE if files.local else Path(temporary), progress)
        hub = HubSource(shards.folder, reading)
        made, config = (hub, None) if weights == KEEP else _requantised(hub, weights, classes, group, grams)
        if progress and made.left_out:
            groups = ", ".join(f"{group} ({len(names)})" for group, names in made.left_out.items())
            print(f"left out, not part of the text model: {groups}", file=sys.stderr)
        tallies = {path: Tally() for path in made.params}
        pieces = [*_copies(shards.folder, config), *metadata_pieces(made),
                  *array_pieces(made, hub.hub.tensors, tallies)]
        _check_disk(files, pieces, shards.room)
        options = _options(weights, classes, group, grams)
        journal = Journal(files, Plan(shards.identity, shards.hashes(), options, made.reading, made.num_mtp))
        with progress_bar(sum(piece.size for piece in pieces), Path(files.place).name, progress) as done:
            write_pieces(unfinished(pieces, files, journal, done), files, shards, journal, done)
        write_manifest(files, Manifest(journal.plan, {piece.name: journal.done[piece.name] for piece in pieces}))
    for path, tally in tallies.items():
        tally.warn(made, path)
    nbytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in made.params.values())
    return Converted(files.local or files.place, len(made.params), nbytes, made.num_mtp, made.left_out,
                     time.monotonic() - start)


def open_shards(source: str | os.PathLike[str], revision: str | None, work: Path, progress: bool) -> Shards:
    """The files of a folder, or those of the repository `source` on the hub, which come into `work`."""
    folder = Path(source)
    if folder.exists() or not REPOSITORY.fullmatch(str(source)):
        if revision is not None:
            raise CheckpointError(f"{source} is a folder, of which there are no revisions; {revision!r} was asked for")
        return LocalShards(folder, progress)
    from jaxllm.checkpoint.remote import HubShards  # takes a second: huggingface_hub
    return HubShards(str(source), revision, work)


def _requantised(hub: HubSource, *form: Any) -> tuple[Convertible, dict[str, Any]]:
    """The source with its weights in another form, and the config.json that describes them."""
    from jaxllm.checkpoint.requantise import requantised
    source = requantised(hub, *form)
    return source, source.hub_config()


def _options(weights: str, classes: Sequence[str], group: int, grams: Mapping[str, np.ndarray] | None
             ) -> dict[str, Any]:
    """What a later run must be told too, to go on with this one."""
    if weights not in PACKED:
        return {"weights": weights}
    digest = sha256()
    for path, gram in sorted((grams or {}).items()):
        digest.update(path.encode() + gram.tobytes())
    return {"weights": weights, "classes": list(classes), "group": group,
            "grams": digest.hexdigest() if grams else None}


def _copies(folder: Path, config: dict[str, Any] | None) -> list[Piece]:
    """The small files beside the weights, verbatim, but for a config.json that is given."""
    contents = {name: _content(folder / name) for name in COPIED if (folder / name).is_file()}
    if config is not None:
        contents["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return [known(name, content) for name, content in contents.items()]


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None


def _check_disk(files: Files, pieces: Sequence[Piece], room: int) -> None:
    """Before anything is written: is there place for all pieces, and `room` bytes for the shards that come and go? What
    an earlier run has written is there already.
    """
    if not files.local:
        return
    place = next(parent for parent in (files.local, *files.local.parents) if parent.exists())
    needed = room + sum(piece.size for piece in pieces) - sum(
        file.stat().st_size for file in (files.local / PARAMS).rglob("*") if file.is_file())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(f"{files.place} needs {needed} bytes, but {place} has {free} free; nothing was written")
