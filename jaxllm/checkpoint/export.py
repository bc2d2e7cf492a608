"""From a converted folder back to hub layout: config.json, tokenizer files, shards and their index, for other programs.

Every tensor is made again by the table that it was read by, so it has the name, shape and bytes of the release. Shards
are written front to back in blocks, so memory is a few blocks. All files lie in the folder that marks the output as not
whole (incomplete.py) until the last is written, and leave it together.
"""
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoint.adapted import Merged
from jaxllm.checkpoint.blocks import chunk_shape
from jaxllm.checkpoint.decoded import Decoded
from jaxllm.checkpoint.entry import Entry
from jaxllm.checkpoint.errors import CheckpointError, listed
from jaxllm.checkpoint.files import Files
from jaxllm.checkpoint.hub import INDEX, SINGLE
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.checkpoint.incomplete import MARKER, filling
from jaxllm.checkpoint.kinds import kinds_of_leaves
from jaxllm.checkpoint.load import open_source
from jaxllm.checkpoint.manifest import MANIFEST, read_manifest
from jaxllm.checkpoint.names import MTP_NAME, Table
from jaxllm.checkpoint.peft import Adapter, save_adapter
from jaxllm.checkpoint.peft_load import adapter_of
from jaxllm.checkpoint.readings import count_ranks
from jaxllm.checkpoint.shards import COPIED, progress_bar
from jaxllm.checkpoint.source import Source
from jaxllm.checkpoint.tensorfile import parse_json
from jaxllm.checkpoint.tensorwriter import Piece, Tensors, count_bytes, made_ahead, write_tensors
from jaxllm.checkpoint.trained import TrainedSource
from jaxllm.checkpoint.writer import THREADS
from jaxllm.config import Config

KEEP, SPLIT, FUSED = "keep", "split", "fused_qkv"
WEIGHTS, LAYOUTS = (KEEP, "bfloat16", "float32"), (KEEP, SPLIT)
CONFIG = "config.json"
MTP_FILE = "model_mtp.safetensors"      # as in the releases
STAGE = f"{MARKER}/export"              # where files lie until all are whole
SHARD_BYTES = 5 * 10**9
EXPERT = re.compile(r"(.+\.experts\.\d+\.)")
QKV = ("q_DNH", "k_DKH", "v_DKV")


@dataclass(frozen=True)
class Exported:
    """What was written into `folder`."""
    folder: Path
    num_tensors: int
    num_files: int        # with tensors in them
    nbytes: int           # of the tensors
    seconds: float


@dataclass(frozen=True)
class Release:
    """What is to be written."""
    source: Source              # of the parameters
    table: Table                # their places
    config: Config
    reading: str | None         # of attention rows
    small: dict[str, bytes]     # the files beside the tensors, config.json last


def export(folder: str | os.PathLike[str], hub_dir: str | os.PathLike[str], *, weights: str = KEEP, layout: str = KEEP,
           reading: str | None = None, merge_lora: bool | str | os.PathLike[str] = False,
           shard_bytes: int = SHARD_BYTES, progress: bool = True) -> Exported:
    """Write the checkpoint `folder`, converted, in hub layout or of a training run, to `hub_dir`, a new or empty
    folder on this machine.

    weights: "keep" keeps every bit; "bfloat16" and "float32" decode what is packed and cast the rest, but for routers.
    layout: "split" cuts a fused qkv_proj into q_proj, k_proj and v_proj, heads in their natural order, as transformers,
    mlx-lm and llama.cpp want them; "keep" leaves it. reading: how attention rows lie in a hub folder that leaves it
    open. merge_lora: merge what a LoRA run trained, or a folder of PEFT's files, into the weights; without it a LoRA
    run is written as its adapter alone, in PEFT's files. A file has at most `shard_bytes`, or one
    tensor or expert that is larger; MTP blocks have a file of their own. What an interrupted export left in `hub_dir`
    is begun again. Of omni models only the text model is written.
    Errors: CheckpointError, ConfigError; `hub_dir` is then as it was.
    """
    if weights not in WEIGHTS or layout not in LAYOUTS or shard_bytes < 1:
        raise ValueError(f"weights = {weights!r}, layout = {layout!r}, shard_bytes = {shard_bytes}: expected one of "
                         f"{', '.join(WEIGHTS)}, one of {', '.join(LAYOUTS)}, and a number above 0")
    start, out = time.monotonic(), Files(hub_dir)
    if out.local is None:
        raise CheckpointError(f"{out.place}: an export goes to a folder on this machine; copy it there afterwards")
    source = open_source(folder, reading)
    if isinstance(source, TrainedSource) and source.adapter and not merge_lora:
        if (weights, layout) != (KEEP, KEEP):
            raise ValueError(f"{folder} is a LoRA run, of which the adapter alone is written: weights and layout are "
                             "for merge_lora (--merge-lora)")
        return _export_adapter(source, source.adapter, out.local, start)
    release = _open(source, folder, weights, layout, merge_lora)
    shards = _place(_tensors(release.source, release.table), shard_bytes)
    total, facts = sum(map(count_bytes, shards.values())), _facts(release)
    small = release.small
    if list(shards) != [SINGLE]:
        names = {name: file for file, tensors in shards.items() for name in tensors}
        small = {INDEX: _json({"metadata": {"total_size": total, **facts}, "weight_map": names}), **small}
    with filling(out, resume=out.holds(STAGE) and all(_is_ours(name) for name in out.top())):
        _check_disk(out.local, total + sum(map(len, small.values())))
        with progress_bar(total, out.local.name, progress) as done:
            _write(out.local, release, shards, {key: str(fact) for key, fact in facts.items()}, small, done)
    return Exported(out.local, len(release.table.shapes), len(shards), total, time.monotonic() - start)


def _export_adapter(run: TrainedSource, adapter: Adapter, folder: Path, start: float) -> Exported:
    assert run.base
    config = Config.from_hub(run.folder)
    num = save_adapter(folder, adapter, config, run.base, _rows_of(run)[0])
    return Exported(folder, num, 1, sum(array.nbytes for array in adapter.arrays.values()), time.monotonic() - start)


def _open(source: Source, folder: str | os.PathLike[str], weights: str, layout: str,
          merge_lora: bool | str | os.PathLike[str]) -> Release:
    files = Files(folder)
    small = {name: content for name in COPIED if name != CONFIG and (content := files.read(name)) is not None}
    place = f"{files.place}/{CONFIG}"
    text = files.read(CONFIG)
    if text is None:
        raise CheckpointError(f"{place} is missing; copy the folder again, or convert again")
    hub = parse_json(text, place)
    config = Config.from_dict(hub, place)
    kinds = kinds_of_leaves(source.params, config.quantization_config)
    reading, num_mtp = _rows_of(source)
    if merge_lora is not False:
        adapter = adapter_of(source, config, None if merge_lora is True else merge_lora, reading)
        if adapter is None:
            raise ValueError(f"{folder} is no LoRA run, so there is nothing to merge: name a folder of PEFT's files")
        source = Merged(source, adapter, None if weights == KEEP else np.dtype(weights))
    if weights != KEEP:
        source, kinds = Decoded(source, np.dtype(weights)), {}
        hub.pop("quantization_config", None)
        hub |= dict.fromkeys({"dtype", "torch_dtype"} & hub.keys() or {"dtype"}, weights)
    if layout == SPLIT and config.attention_projection_layout == FUSED:
        if any(kind.name == "fp8" for path, kind in kinds.items() if path.endswith(QKV)):
            raise CheckpointError(
                f"{files.place}: its attention is fused and fp8, and q, k and v share blocks of scales, so they cannot "
                "be split: export with --weights bfloat16 or float32, or keep the layout")
        hub["attention_projection_layout"] = SPLIT
    small[CONFIG] = text if weights == layout == KEEP else _json(hub)
    config = Config.from_dict(hub, place)
    return Release(source, Table(config, num_mtp, kinds, reading), config, reading, small)


def _rows_of(source: Source) -> tuple[str | None, int]:
    """(the reading of its attention rows, how many MTP blocks it has)."""
    if isinstance(source, TrainedSource):
        return _rows_of(source.base)[0] if source.base else None, source.num_mtp
    if isinstance(source, HubSource):
        return source.reading, source.num_mtp
    manifest = read_manifest(source.folder)
    if manifest is None:
        raise CheckpointError(f"{source.folder} has no {MANIFEST}, which says how the rows of attention lay in the "
                              "release: the copy is not whole, or an older version converted it; convert again")
    return manifest.plan.reading, manifest.plan.num_mtp


def _tensors(source: Source, table: Table) -> Tensors:
    """Every hub tensor. Errors: CheckpointError where the parameters are not those of the table."""
    expected = {path: entry.shape for path, entry in table.entries.items()}
    found = {path: shape for path, (shape, _) in source.params.items()}
    wrong = sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
    if wrong:
        raise CheckpointError(f"{source.folder}: parameters that are missing, too many or of another shape than its "
                              f"{CONFIG} says ({listed(wrong)}); is it the checkpoint's own, and the copy whole?")
    names = dict.fromkeys(name for entry in table.entries.values() for name in entry.tensors)
    return {name: (table.shapes[name], _dtype(source, table, name)) for name in names}


def _dtype(source: Source, table: Table, name: str) -> np.dtype:
    """The one dtype of all that goes into a hub tensor."""
    if name not in table.uses:
        return table.dtypes[name]
    first, *others = (use.entry.path for use in table.uses[name])
    dtype = source.params[first][1]
    for path in others:
        if source.params[path][1] != dtype:
            raise CheckpointError(f"{source.folder}: {path} is {source.params[path][1]}, expected {dtype} as {first}, "
                                  f"since both go into {name!r}; export with layout split, or convert both alike")
    return dtype


def _place(tensors: Tensors, shard_bytes: int) -> dict[str, Tensors]:
    """File name -> its tensors, those of an expert next to each other."""
    units: dict[str, list[str]] = {}      # in the order in which the table first names them, experts by number
    for name in tensors:
        expert = EXPERT.match(name)
        units.setdefault(expert[1] if expert else name, []).append(name)
    runs: list[dict[str, Any]] = []
    mtp: dict[str, Any] = {}
    left = 0
    for names in units.values():
        unit = {name: tensors[name] for name in names}
        if MTP_NAME.match(names[0]):
            mtp |= unit
            continue
        size = count_bytes(unit)
        if size > left or not runs:
            runs.append({})
            left = shard_bytes
        runs[-1] |= unit
        left -= size
    shards = {f"model-{n:05d}-of-{len(runs):05d}.safetensors": run for n, run in enumerate(runs, 1)}
    return (shards if len(runs) > 1 else {SINGLE: runs[0]}) | ({MTP_FILE: mtp} if mtp else {})


def _facts(release: Release) -> dict[str, Any]:
    """What the releases say beside the tensors of how a fused qkv_proj is cut; `readings` reads it again."""
    config, quantization = release.config, release.config.quantization_config
    if config.attention_projection_layout != FUSED:
        return {}
    form = quantization.get("store_dtype") or quantization["quant_method"] if quantization else config.dtype
    return {"save_format": form, "tp_size": count_ranks(release.reading, config)}


def _is_ours(name: str) -> bool:
    """Whether an export has files of this name."""
    return name in (MARKER, INDEX, *COPIED) or name.endswith(".safetensors")


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{folder} needs {needed} bytes, but its disk has {free} free; nothing was written")


def _write(folder: Path, release: Release, shards: Mapping[str, Tensors], metadata: Mapping[str, str],
           small: Mapping[str, bytes], done: Callable[[int], object]) -> None:
    """All files. To programs that do not know the mark, a folder is no model before config.json is there, the last."""
    stage = folder / STAGE
    shutil.rmtree(stage, ignore_errors=True)      # of an export that was interrupted, here and in the next line
    for name in set(os.listdir(folder)) - {MARKER}:
        (folder / name).unlink()
    stage.mkdir()
    for file, tensors in shards.items():
        pieces = (piece for name in tensors for piece in _pieces(release.source, release.table, name))
        write_tensors(stage / file, tensors, {"format": "pt", **metadata}, made_ahead(pieces, THREADS), done)
    for file, content in small.items():
        (stage / file).write_bytes(content)
    for file in [*shards, *small]:
        os.replace(stage / file, folder / file)


def _pieces(source: Source, table: Table, name: str) -> Iterator[Piece]:
    """The hub tensor, one run of rows after the other."""
    if name not in table.uses:
        yield math.prod(table.shapes[name]) * table.dtypes[name].itemsize, partial(table.to_hub, name, source.read)
    for use in table.uses.get(name, ()):
        step, stop = _rows_at_once(source, use.entry), use.start + use.rows.count
        row_bytes = math.prod(use.entry.in_dims) * source.params[use.entry.path][1].itemsize
        for row in range(use.start, stop, step):
            rows = range(row, min(row + step, stop))
            yield row_bytes * len(rows), partial(use.entry.write, source.read, use.number, rows)


def _rows_at_once(source: Source, entry: Entry) -> int:
    """Hub rows that lie in one chunk of a converted folder."""
    shape, dtype = source.params[entry.path]
    dim = len(shape) - len(entry.out_dims) if entry.transposed else 0
    return chunk_shape(entry.path, shape, dtype.itemsize)[dim] * math.prod(entry.out_dims[1:])


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
