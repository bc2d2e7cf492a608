"""What a run begins with, and the folder that it fills."""
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax

from jaxllm.checkpoint.load import open_source
from jaxllm.checkpoint.shards import COPIED
from jaxllm.checkpoint.source import Source
from jaxllm.checkpoint.trained import RUN
from jaxllm.config import Config
from jaxllm.config_hub import read_json
from jaxllm.generate.text import Tokenizer
from jaxllm.train.run import Run

CONFIG, LOCK, PART = "config.json", "lock", ".part"
UNTIED = ("max_position_embeddings", "num_nextn_predict_layers", "quantization_config", "dtype")   # no part of a state


@dataclasses.dataclass(frozen=True)
class Origin:
    """The model, or the config, that a run starts from; and its tokenizer."""
    config: Config
    source: Source | None        # None: random weights
    num_mtp: int
    tokenizer: Tokenizer
    small: dict[str, bytes]      # the files that belong beside the weights
    identity: dict[str, dict[str, Any]]      # what a checkpoint must agree with


def open_origin(run: Run) -> Origin:
    """Errors: ConfigError, CheckpointError, ValueError for a folder without a tokenizer or with another model's."""
    start = Path(run.model) if run.model else None
    hub = (read_json(start / CONFIG) if start else {}) | (run.config or {})
    config = Config.from_dict(hub, f"{start / CONFIG if start else 'config'} of the run")
    source = open_source(start) if start else None
    found = {path.split(".")[1] for path in source.params if path.startswith("mtp.")} if source else set()
    folder = Path(run.tokenizer or start or "")
    tokenizer = Tokenizer.from_dir(folder, config.vocab_size)
    if tokenizer is None:
        raise ValueError(f"tokenizer = {folder}: holds neither tokenizer.json nor tokenizer.model")
    small = {name: (folder / name).read_bytes() for name in COPIED if name != CONFIG and (folder / name).is_file()}
    architecture = {key: value for key, value in json.loads(json.dumps(dataclasses.asdict(config))).items()
                    if key not in (*UNTIED, "hub_json")}
    num_mtp = max(len(found), config.num_nextn_predict_layers or 0) if run.mtp_weight or source is None else 0
    return Origin(config, source, num_mtp, tokenizer,
                  small | {CONFIG: (json.dumps(hub, indent=2, ensure_ascii=False) + "\n").encode()},
                  {"architecture": architecture,
                   "tokenizer": {name: sha256(content).hexdigest() for name, content in small.items()
                                 if name.startswith("tokenizer.")}})


@contextmanager
def output_of(run: Run, resume: bool) -> Iterator[Path]:
    """The folder of the run, ours alone while the block runs.

    Errors: ValueError for a folder that holds anything, unless `resume` and it is a run's; another process's.
    """
    folder = Path(run.output)
    found = [name for name in os.listdir(folder) if name != LOCK and not name.endswith(PART)] \
        if folder.is_dir() else []      # a run that is killed at its beginning leaves these
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output = {folder} is a file; expected a folder to be made")
    if resume and RUN not in found:
        raise ValueError(f"{folder} holds no run (no {RUN}), so there is nothing to resume")
    if found and not resume:
        hint = "go on with it by --resume, or choose another output" if RUN in found else "choose another output"
        raise ValueError(f"output = {folder} already holds something ({', '.join(sorted(found)[:3])}); {hint}")
    if jax.process_index():
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output = {folder}: another process is training into it; wait for its end") from None
        yield folder


def write_settings(folder: Path, run: Run, origin: Origin) -> None:
    """What says that the folder is a run's: its settings, and the model's small files. Not before it is known that a
    checkpoint which is there belongs to them."""
    if jax.process_index() == 0:
        for name, content in ({RUN: run.to_json().encode()} | origin.small).items():      # a killed run can be resumed
            (folder / f"{name}{PART}").write_bytes(content)
            os.replace(folder / f"{name}{PART}", folder / name)
