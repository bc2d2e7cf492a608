"""Adapters (LoRA) in PEFT's files, adapter_config.json and adapter_model.safetensors (huggingface/peft 0.21).

A module M of the model's code computes with W + alpha / r * B @ A, of which base_model.model.M.lora_A.weight is A
[r, in] and base_model.model.M.lora_B.weight B [out, r], in the rows of the hub's weight. What PEFT knows otherwise:

    qkv_proj    of fused files is one module: ranks of q, k and v follow each other, and B is zero where the row is of
                one and the rank of another
    experts     are a module each, as in the hub's files and code. transformers 5 has V2-Flash's in two parameters a
                layer, gate_up_proj and down_proj; PEFT joins their adapters as it reads them, if target_parameters
                says so and a layer has them for gate, up and down, or for down alone. It saves them joined;
                `load_adapter` takes either
    MTP blocks  are not in transformers' models, and have no adapter

The file of an adapter also says which base it is of: a checksum of its norms and router biases, which every form of a
checkpoint has alike.
"""
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.checkpoint.blocks import is_stack
from jaxllm.checkpoint.errors import CheckpointError, listed
from jaxllm.checkpoint.files import sync
from jaxllm.checkpoint.names import Use
from jaxllm.checkpoint.projections import IN_DIMS, LORA_A, LORA_B, modules
from jaxllm.checkpoint.source import Source
from jaxllm.checkpoint.tensorwriter import write_tensors
from jaxllm.config import Config

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BASE = "jaxllm_base"      # in the metadata of TENSORS: `checksum` of the base
EXPERTS = re.compile(r"(.+\.mlp\.experts)\.\d+\.(gate|up|down)_proj")
Pair = tuple[np.ndarray, np.ndarray]      # A [r, in], B [out, r]


@dataclass(frozen=True)
class Adapter:
    """Low-rank additions to a model: the weight of `path` is base + scale * path.lora_a @ path.lora_b."""
    arrays: Mapping[str, np.ndarray]
    scale: float


def checksum(base: Source) -> str:
    """Of the vectors of the model, as bfloat16: the same whether it is packed, converted, or cast."""
    digest = sha256()
    for path in sorted(path for path in base.params if path.endswith((".scale_D", ".bias_E"))):
        if not path.startswith("mtp."):
            digest.update(path.encode() + base.read(path, (slice(None),)).astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


def save_adapter(folder: str | os.PathLike[str], adapter: Adapter, config: Config, base: Source,
                 reading: str | None = None) -> int:
    """Write `folder`, which is new or empty, whole or not at all: the number of its tensors. `reading`: how attention
    rows lie in the base's files (readings.py).

    Errors: CheckpointError for arrays that are no adapters of this model, and for a place that holds something.
    """
    pairs, folder = to_pairs(adapter.arrays, config, reading), Path(folder).absolute()
    tensors = {tensor_name(module, letter): array for module, pair in pairs.items()
               for letter, array in zip("AB", pair, strict=True)}
    stated = _config(pairs, adapter.scale, modules(config, reading)) | {"base_model_name_or_path": str(base.folder)}
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        part.mkdir()
        write_tensors(part / TENSORS, {name: (array.shape, array.dtype) for name, array in tensors.items()},
                      {"format": "pt", BASE: checksum(base)}, tensors.values(), lambda _: None)
        (part / CONFIG).write_text(json.dumps(stated, indent=2, ensure_ascii=False) + "\n")
        for path in (part / CONFIG, part):
            sync(path)
        os.rename(part, folder)      # fails where something is that is no empty folder
        sync(folder.parent)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}; expected a new or empty folder, in one "
                              "that is there; nothing was changed") from error
    return len(tensors)


def to_pairs(arrays: Mapping[str, np.ndarray], config: Config, reading: str | None = None) -> dict[str, Pair]:
    """Module -> its A and B. Errors: CheckpointError for arrays that belong to none."""
    held = {path: np.asarray(array) for path, array in arrays.items()}
    pairs, used = {}, set[str]()
    for name, uses in modules(config, reading).items():
        paths = [path for path in dict.fromkeys(use.entry.path for use in uses)
                 if {path + LORA_A, path + LORA_B} <= held.keys()]
        if paths:
            pairs[name] = _pair(uses, paths, held)
            used.update(path + which for path in paths for which in (LORA_A, LORA_B))
    if not held or held.keys() != used:
        raise CheckpointError(f"no adapters of this model's projections: {listed(sorted(held.keys() - used))}; "
                              f"expected PATH{LORA_A} and PATH{LORA_B} of paths that end in {', '.join(IN_DIMS)}, not "
                              "of MTP blocks, for which PEFT has no place")
    return pairs


def _pair(uses: list[Use], paths: list[str], arrays: Mapping[str, np.ndarray]) -> Pair:
    """Of one module, in which these paths have adapters."""
    def matrix(path: str, which: str) -> np.ndarray:
        return arrays[path + which][uses[0].number] if is_stack(path) else arrays[path + which]
    all_a = [matrix(path, LORA_A) for path in paths]
    all_b = [matrix(path, LORA_B) for path in paths]
    edges = np.cumsum([0, *(len(b) for b in all_b)])
    whole = np.zeros((sum(use.rows.count for use in uses), edges[-1]), all_b[0].dtype)
    for use in uses:
        if use.entry.path in paths:
            n = paths.index(use.entry.path)
            b_RO = all_b[n].reshape(len(all_b[n]), -1)[:, use.start:use.start + use.rows.count]
            whole[use.rows.start:use.rows.start + use.rows.count, edges[n]:edges[n + 1]] = b_RO.T
    return np.concatenate([a.reshape(-1, a.shape[-1]).T for a in all_a]), whole


def _config(pairs: Mapping[str, Pair], scale: float, known: Collection[str]) -> dict[str, Any]:
    """What PEFT must be told; all else is as it is by default."""
    ranks = {name: len(a) for name, (a, _) in pairs.items()}
    joined, there = _joined(ranks), _joined(dict.fromkeys(known, 0))
    r = Counter(ranks.values()).most_common(1)[0][0]
    other = {name: rank for name, rank in (ranks | joined).items() if rank != r}
    short = {name.rsplit(".", 1)[-1] for name in other}
    if not any(name.rsplit(".", 1)[-1] in short for name in (ranks | joined).keys() - other.keys()):
        other = {name.rsplit(".", 1)[-1]: rank for name, rank in other.items()}
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none", "r": r,
            "lora_alpha": _number(scale * r), "lora_dropout": 0.0, "rank_pattern": other,
            "alpha_pattern": {name: _number(scale * rank) for name, rank in other.items()},
            "target_modules": _ends(ranks, known), "target_parameters": _ends(joined, there) or None}


def _joined(ranks: Mapping[str, int]) -> dict[str, int]:
    """Rank of each parameter of transformers 5 whose adapter PEFT can join out of those of experts."""
    layers: dict[str, dict[str, int]] = {}
    for name, rank in ranks.items():
        if match := EXPERTS.fullmatch(name):
            layers.setdefault(match[1], {})[match[2]] = rank
    found = {}
    for experts, of in layers.items():
        if of.keys() == {"gate", "up", "down"}:
            found[f"{experts}.gate_up_proj"] = of["gate"] + of["up"]
        if of.keys() in ({"gate", "up", "down"}, {"down"}):
            found[f"{experts}.down_proj"] = of["down"]
    return found


def _ends(names: Collection[str], known: Collection[str]) -> list[str]:
    """What the names end in, if no other of those that are known ends so; else the names."""
    ends = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    return list(ends if all(name in names for name in known if name.rsplit(".", 1)[-1] in ends) else names)


def _number(value: float) -> float:
    """A product of rounded numbers as the whole one that it is meant to be."""
    return round(value) if abs(value - round(value)) < 1e-9 else value


def tensor_name(module: str, letter: str) -> str:
    return f"base_model.model.{module}.lora_{letter}.weight"
