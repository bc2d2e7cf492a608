"""The choice of another form for the weights of a hub folder, and the config.json that describes the result.

What is packed is chosen by class; the rest stays as it is stored, and so do MTP blocks. Blocks and groups are those of
the hub's layout, so what comes out can be exported. The work is done in decoded.py and repack.py.
"""
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxllm.checkpoint.decoded import Decoded
from jaxllm.checkpoint.entry import Entry
from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.checkpoint.kinds import EITHER, EXPERTS, MATRICES, MXFP4, Kind, allowed_kinds, fp8, int4
from jaxllm.checkpoint.names import model
from jaxllm.checkpoint.repack import Repacked, tensors_of
from jaxllm.checkpoint.source import Convertible
from jaxllm.encode import GROUPS

PLAIN = ("bfloat16", "float32")
CLASSES = {"experts": ("gate_EDI", "up_EDI", "down_EID"), "attention": ("q_DNH", "k_DKH", "v_DKV", "o_NVD"),
           "dense": ("gate_DF", "up_DF", "down_FD"), "head": ("head_DW",)}
ALL = "all"      # of the classes


class Described(Convertible, Protocol):
    """What `convert` writes, and the config.json that describes it."""

    def hub_config(self) -> dict[str, Any]: ...


def requantised(source: HubSource, weights: str, classes: Sequence[str] = ("experts",), group: int = 32,
                grams: Mapping[str, np.ndarray] | None = None) -> Described:
    """`source` with its weights as bfloat16 or float32, or packed as fp8, mxfp4 or int4.

    Plain: what is packed is decoded, and all is cast but routers, their biases and sinks. Packed: the matrices of
    `classes` (experts, attention, dense, head; or all), of 4-bit kinds in groups of `group` along the in-dim; what has
    that form already is kept. grams: of `calibrate.collect_grams`, which make 4-bit codes better.
    Errors: CheckpointError for what is not known, does not fit, or has no name in a config.json.
    """
    if weights in PLAIN:
        return Unpacked(source, np.dtype(weights))
    kinds = {"fp8": fp8(source.config.quantization_config), "mxfp4": MXFP4, "int4": int4(group)}
    if weights not in kinds:
        raise CheckpointError(f"weights {weights!r} are not known; expected one of {', '.join((*PLAIN, *kinds))}")
    if group not in GROUPS.get(weights, (group,)):
        raise CheckpointError(f"{weights} in groups of {group} is not known; expected groups of "
                              f"{' or '.join(map(str, GROUPS[weights]))}")
    names = list(CLASSES) if ALL in classes else list(classes)
    if unknown := sorted(set(names) - CLASSES.keys()):
        raise CheckpointError(f"classes {', '.join(unknown)} are not known; expected some of {', '.join(CLASSES)}, or "
                              f"{ALL}")
    kind, endings = kinds[weights], tuple(letters for name in names for letters in CLASSES[name])
    chosen = {entry.path: kind for entry in model(source.config, 0)
              if entry.path.endswith(endings) and source.kinds.get(entry.path) != kind}
    if not chosen:
        raise CheckpointError(f"{source.folder} has nothing to pack as {weights} in the classes {', '.join(names)}: no "
                              "such matrices, or all have that form already")
    return Repacked(source, chosen, packed_config(source, chosen), grams or {})


class Unpacked:
    """`source` as plain numbers of one dtype."""

    def __init__(self, source: HubSource, dtype: np.dtype):
        decoded = Decoded(source, dtype)
        self.folder, self.reading, self.num_mtp, self.left_out = (
            source.folder, source.reading, source.num_mtp, source.left_out)
        self.params, self.read, self.describe = decoded.params, decoded.read, decoded.describe
        self.source, self.dtype = source, dtype

    def tensors_of(self, path: str) -> list[str]:
        """The hub tensors that `read` reads for `path`."""
        return tensors_of(self.source, path)

    def hub_config(self) -> dict[str, Any]:
        hub = json.loads(self.source.config.hub_json)
        hub.pop("quantization_config", None)
        return hub | dict.fromkeys({"dtype", "torch_dtype"} & hub.keys() or {"dtype"}, self.dtype.name)


def packed_config(source: HubSource, chosen: dict[str, Kind]) -> dict[str, Any]:
    """The config.json of `source` with the parameters `chosen` in other forms, told as the releases tell it.

    Errors: CheckpointError for a mixture that its keys cannot tell.
    """
    kinds, entries = source.kinds | chosen, list(model(source.config, source.num_mtp))
    old = source.config.quantization_config or {}
    found: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                             "weight_block_size": old.get("weight_block_size") or [128, 128]}
    names = {kind.name: kind for kind in kinds.values()}
    if "int4" in names:
        found |= {"quant_method": "int4", "group_size": names["int4"].block[1]}
    elif "mxfp4" in names:
        found |= {"store_dtype": "mxfp4", "mxfp4_block_size": 32}
    modules = {path: module for path, module in ((entry.path, module_of(entry)) for entry in entries) if module}
    packed = {module for path, module in modules.items() if path in kinds}
    stated = [module for module in old.get("ignored_layers") or () if module not in packed]
    found["ignored_layers"] = list(dict.fromkeys([*stated, *(m for m in modules.values() if m not in packed)]))
    for entry in entries:
        check_told(source, entry, kinds.get(entry.path), found, names)
    return json.loads(source.config.hub_json) | {"quantization_config": found}


def module_of(entry: Entry) -> str | None:
    """The name in ignored_layers of the linear module with these weights, None if it is none; experts are one module.
    """
    if entry.path.rsplit(".", 1)[-1] not in EXPERTS | MATRICES | EITHER:
        return None
    head, experts, _ = entry.tensors[0].partition(".experts.")
    return f"{head}.experts" if experts else head.removesuffix(".weight")


def check_told(source: HubSource, entry: Entry, kind: Kind | None, found: dict[str, Any], names: dict[str, Kind]
               ) -> None:
    """CheckpointError unless the quantization_config `found` lets this parameter be of this kind."""
    allowed = allowed_kinds(entry.path, entry.tensors[0], found, frozenset(found["ignored_layers"]))
    if (kind.name if kind else "not packed") in allowed and (kind is None or kind == names[kind.name]):
        return
    raise CheckpointError(
        f"{source.folder}: {entry.path} would be {describe(kind)} beside {', '.join(map(describe, names.values()))}, "
        "which no config.json can tell: of the 4-bit kinds a model has one, and its experts if they are packed have "
        "it; choose the classes or the group accordingly")


def describe(kind: Kind | None) -> str:
    return "plain" if kind is None else kind.name if kind.name != "int4" else f"int4 in groups of {kind.block[1]}"
