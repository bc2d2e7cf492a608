"""Reading an adapter that PEFT or `save_adapter` wrote: peft.py says what is in the files.

Everything is held against the base, and against adapter_config.json, before it is taken: each tensor has its place and
each place its tensor.
"""
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxllm.checkpoint.entry import Entry
from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.names import Use
from jaxllm.checkpoint.peft import BASE, CONFIG, EXPERTS, TENSORS, Adapter, Pair, checksum, tensor_name
from jaxllm.checkpoint.peft_config import PeftConfig
from jaxllm.checkpoint.projections import LORA_A, LORA_B, finder, modules
from jaxllm.checkpoint.source import Source
from jaxllm.checkpoint.tensorfile import DTYPES, parse_json, read_header, read_tensor
from jaxllm.checkpoint.trained import TrainedSource
from jaxllm.config import Config

NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
JOINED = re.compile(r"(.+\.mlp\.experts)(\.base_layer)?")
FLOATS = tuple(DTYPES[name] for name in ("F32", "BF16", "F16"))


def adapter_of(source: Source, config: Config, folder: str | os.PathLike[str] | None, reading: str | None = None
               ) -> Adapter | None:
    """The adapter of `folder`, or if that is None what a LoRA run has trained. Errors: as `load_adapter`; ValueError
    where there are both."""
    trained = source.adapter if isinstance(source, TrainedSource) else None
    if folder is None:
        return trained
    if trained:
        raise ValueError(f"{source.folder} is a LoRA run, which has an adapter, and {folder} is another: merge the one "
                         "(jaxllm export --merge-lora) and give the other with the result")
    return load_adapter(folder, config, source, reading)


def load_adapter(folder: str | os.PathLike[str], config: Config, base: Source, reading: str | None = None) -> Adapter:
    """The adapter of this base, float32. `reading`: how attention rows lie in the base's files.

    What has another alpha / r than most (alpha_pattern, rank_pattern) has the difference in its lora_b.
    Errors: CheckpointError naming the file and the key, or the tensor, that is damaged, not supported or of another
    base.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / TENSORS).is_file():
        raise CheckpointError(f"{folder} is no adapter: expected {CONFIG} and {TENSORS}, as PEFT writes them")
    settings = PeftConfig.parse(parse_json((folder / CONFIG).read_bytes(), f"{folder / CONFIG}"), f"{folder / CONFIG}")
    file, known = folder / TENSORS, modules(config, reading)
    tensors = _read(file)
    _check_base(file, settings, base)
    pairs = _unjoined(file, tensors, settings, config.n_routed_experts or 1)
    _check_names(file, pairs, known, settings)
    return Adapter(_from_pairs(file, pairs, known), settings.scale(""))


def _read(file: Path) -> dict[str, Pair]:
    """Module -> A and B as they are stored, float32."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, info in read_header(file).items():
        match = NAME.fullmatch(name)
        if not match or info.dtype not in FLOATS or len(info.shape) != 2:
            raise CheckpointError(f"{file}: {name!r}, {info.dtype} {list(info.shape)}, is no part of a LoRA; expected "
                                  "matrices base_model.model.MODULE.lora_A.weight and lora_B.weight of floats")
        values = read_tensor(info, (slice(None), slice(None))).astype(np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{file}: {name!r} holds NaN or Inf")
        found.setdefault(match[1], {})[match[2]] = values
    if not found:
        raise CheckpointError(f"{file} holds no tensors")
    for module, of in found.items():
        if missing := {"A", "B"} - of.keys():
            raise CheckpointError(f"{file}: {tensor_name(module, missing.pop())!r} is missing; copy the file again")
    return {module: (of["A"], of["B"]) for module, of in found.items()}


def _check_base(file: Path, settings: PeftConfig, base: Source) -> None:
    """By its checksum, which only we write; else by the last part of its name."""
    with open(file, "rb") as stream:      # `read_header` found it sound
        header = parse_json(stream.read(int.from_bytes(stream.read(8), "little")), str(file))
    stated, name = header.get("__metadata__", {}).get(BASE), settings.base_model_name_or_path
    if stated is not None and stated != (found := checksum(base)):
        raise CheckpointError(f"{file} is an adapter of another base ({name}): its checksum of norms and router biases "
                              f"is {stated}, that of {base.folder} is {found}")
    ours = Path(base.folder).name
    if stated is None and name is not None and Path(name).name != ours:
        raise CheckpointError(f"{file.with_name(CONFIG)}: base_model_name_or_path = {name!r}, the base is {ours!r}; "
                              "if they are the same model, write its name there")


def _unjoined(file: Path, tensors: Mapping[str, Pair], settings: PeftConfig, E: int) -> dict[str, Pair]:
    """The same with a module for each expert, and one scale for all."""
    pairs: dict[str, Pair] = {}
    for module, (a, b) in tensors.items():
        joined = JOINED.fullmatch(module)
        name = f"{joined[1]}.{_parameter(module, tensors, settings)}" if joined else module
        r, num = settings.rank(name), E if joined else 1
        for letter, found in (("A", len(a)), ("B", b.shape[1])):
            if found != r * num:
                raise CheckpointError(f"{file}: {tensor_name(module, letter)!r} has rank {found}, expected {r * num} "
                                      f"by {CONFIG}'s r or rank_pattern")
        if (scale := settings.scale(name)) != settings.scale(""):
            b = b * np.float32(scale / settings.scale(""))
        if not joined:
            pairs[name] = a, b
            continue
        a_ErI, b_OrE = a.reshape(E, r, -1), b.reshape(-1, r, E)
        parts = {"down": b_OrE} if name.endswith(".down_proj") else dict(
            zip(("gate", "up"), np.array_split(b_OrE, 2), strict=True))
        pairs |= {f"{joined[1]}.{e}.{part}_proj": (a_ErI[e], rows[..., e])
                  for part, rows in parts.items() for e in range(E)}
    return pairs


def _parameter(module: str, tensors: Mapping[str, Pair], settings: PeftConfig) -> str:
    """Whose joined adapter a module `experts` or `experts.base_layer` has: where both have one, down_proj's is outside.
    """
    is_down = f"{module}.base_layer" in tensors or finder(settings.target_parameters)(f"{module}.down_proj")
    return "down_proj" if is_down else "gate_up_proj"


def _check_names(file: Path, pairs: Mapping[str, Pair], known: Mapping[str, list[Use]], settings: PeftConfig) -> None:
    """Every module that the settings name is there, and no other. Of a layer's experts it is all or, since
    transformers 5 has no modules for them, none."""
    by_module, by_parameter = finder(settings.target_modules), finder(settings.target_parameters)
    begun = {match.group(1, 2) for name in pairs if (match := EXPERTS.fullmatch(name))}
    for name in dict.fromkeys([*pairs, *known]):
        match = EXPERTS.fullmatch(name)
        joined = f"{match[1]}.{'down' if match[2] == 'down' else 'gate_up'}_proj" if match else ""
        is_stated = bool(by_module(name) or by_parameter(joined))
        if name not in known:
            fault = "is of a module that the base does not have"
        elif name in pairs and not is_stated:
            fault = f"is of a module that {CONFIG} does not name"
        elif name not in pairs and (match.group(1, 2) in begun or by_parameter(joined) if match else is_stated):
            fault = f"is missing, which {CONFIG} or another expert calls for"
        else:
            continue
        raise CheckpointError(f"{file}: {tensor_name(name, 'A')!r} {fault}; is it an adapter of this base, and whole?")


def _from_pairs(file: Path, pairs: Mapping[str, Pair], known: Mapping[str, list[Use]]) -> dict[str, np.ndarray]:
    """Our arrays. Each parameter of a module has the A of all, and its rows of B."""
    entries: dict[str, Entry] = {}
    all_a: dict[str, np.ndarray] = {}
    all_b: dict[str, np.ndarray] = {}
    for name, (a, b) in pairs.items():
        uses = known[name]
        wanted = {"A": (len(a), math.prod(uses[0].entry.in_dims)), "B": (sum(use.rows.count for use in uses), len(a))}
        for letter, array in (("A", a), ("B", b)):
            if array.shape != wanted[letter]:
                raise CheckpointError(f"{file}: {tensor_name(name, letter)!r} has shape {list(array.shape)}, expected "
                                      f"{list(wanted[letter])}; is it an adapter of another base?")
        for use in uses:
            entry, num = use.entry, len(use.entry.matrices)
            if entry.path not in entries:
                entries[entry.path] = entry
                all_a[entry.path] = np.zeros((num, a.shape[1], len(a)), np.float32)
                all_b[entry.path] = np.zeros((num, len(a), math.prod(entry.out_dims)), np.float32)
            if (r := all_a[entry.path].shape[2]) != len(a):
                raise CheckpointError(f"{file}: {tensor_name(name, 'A')!r} has rank {len(a)}, other experts {r}; "
                                      "expected one rank for all experts of a layer")
            all_a[entry.path][use.number] = a.T
            rows = slice(use.rows.start, use.rows.start + use.rows.count)
            all_b[entry.path][use.number, :, use.start:use.start + use.rows.count] = b[rows].T
    arrays = {}
    for path, entry in entries.items():
        stack, r = (len(entry.matrices),) if entry.stacked else (), all_a[path].shape[2]
        arrays[path + LORA_A] = all_a[path].reshape(*stack, *entry.in_dims, r)
        arrays[path + LORA_B] = all_b[path].reshape(*stack, r, *entry.out_dims)
    return arrays
