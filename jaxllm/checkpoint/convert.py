"""From a hub folder to a converted one: parameters by Orbax in params/, config and tokenizer files verbatim beside it.

Memory: two blocks of one parameter (`store.Leaf`), whatever the sizes. Interruption: `atomic.new_folder`.
"""
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from jaxllm.checkpoint.atomic import new_folder
from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.checkpoint.store import PARAMS, save_params

COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
          "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
          "chat_template.json")


@dataclass(frozen=True)
class Converted:
    """What was written into `folder`, and what of the hub folder was not."""
    folder: Path
    num_arrays: int
    nbytes: int
    num_mtp: int                        # MTP blocks among the arrays
    left_out: dict[str, list[str]]      # group -> tensors or files
    seconds: float


def convert(hub_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str], progress: bool = True) -> Converted:
    """Write the checkpoint in hub layout `hub_dir` to the new folder `out_dir`, for `open_source` and plain Orbax.

    `progress` shows a bar, and what is left out, on stderr. NaN or Inf: one warning for each parameter.
    Errors: CheckpointError for a checkpoint that is not whole, an `out_dir` that holds something, a disk that is full;
    ConfigError for its config.json.
    """
    start = time.monotonic()
    source, out = HubSource(hub_dir), Path(out_dir).resolve()
    nbytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in source.params.values())
    _check_space(out, nbytes)
    if progress and source.left_out:
        groups = ", ".join(f"{group} ({len(names)})" for group, names in source.left_out.items())
        print(f"left out, not part of the text model: {groups}", file=sys.stderr)
    with new_folder(out, _is_ours) as folder:
        for name in COPIED:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, folder / name)
        with tqdm(total=nbytes, unit="B", unit_scale=True, desc=out.name, disable=not progress) as bar:
            save_params(source, folder / PARAMS, bar.update)
    return Converted(out, len(source.params), nbytes, source.num_mtp, source.left_out, time.monotonic() - start)


def _is_ours(name: str) -> bool:
    """Whether `convert` writes this name; Orbax adds a suffix while it is not done."""
    return name in COPIED or name == PARAMS or name.startswith(f"{PARAMS}.orbax-checkpoint-tmp")


def _check_space(out: Path, nbytes: int) -> None:
    existing = next(parent for parent in out.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise CheckpointError(f"{out} needs {nbytes} bytes, but {existing} has {free} free; nothing was written")
