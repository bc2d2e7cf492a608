"""The projections that can have an adapter (LoRA), by our paths and by the names of the hub's modules, as PEFT knows
them.

The adapter of a parameter is two arrays (quant.Adapted): PATH.lora_a with the in-dims and the rank r, PATH.lora_b with
r and the out-dims; both after E for a stack of experts. Router, norms, embedding, head and MTP blocks have none.
"""
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from jaxllm.checkpoint.blocks import is_stack
from jaxllm.checkpoint.errors import listed
from jaxllm.checkpoint.names import Table, Use
from jaxllm.config import Config

LORA_A, LORA_B = ".lora_a", ".lora_b"
ALL = "all-linear"      # PEFT's word for all of them
IN_DIMS = {"q_DNH": 1, "k_DKH": 1, "v_DKV": 1, "o_NVD": 2, "gate_DF": 1, "up_DF": 1, "down_FD": 1,
           "gate_EDI": 1, "up_EDI": 1, "down_EID": 1}      # how many in-dims each has
QKV = re.compile(r"\.[qkv]_proj$")
Targets = str | Sequence[str]


def split_dims(path: str, dims: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
    """(stack, in-dims, out-dims) of what there is for each dim of the parameter: sizes, mesh axes, slices."""
    begin = int(is_stack(path))
    end = begin + IN_DIMS[path.rsplit(".", 1)[-1]]
    return tuple(dims[:begin]), tuple(dims[begin:end]), tuple(dims[end:])


def modules(config: Config, reading: str | None = None) -> dict[str, list[Use]]:
    """Module of the hub's files, "model.layers.0.self_attn.q_proj" -> what its rows are. `reading`: see readings.py."""
    return {tensor.removesuffix(".weight"): uses for tensor, uses in Table(config, reading=reading).uses.items()
            if uses[0].entry.path.rsplit(".", 1)[-1] in IN_DIMS}


def targets(config: Config, target_modules: Targets) -> list[str]:
    """The paths that `target_modules` names, as PEFT reads it: a list of modules or of what their names end in, or one
    regular expression for whole names, or "all-linear".

    Where the hub's files have a fused qkv_proj, it stands for all three, and q_proj, k_proj, v_proj for one each.
    Errors: ValueError for names of no module, of one without an adapter, and of some experts of a layer but not all.
    """
    split = dataclasses.replace(config, attention_projection_layout="split")
    names: dict[str, list[str]] = {}
    for name, uses in modules(split).items():
        names.setdefault(uses[0].entry.path, []).append(name)
    if target_modules == ALL:
        return list(names)
    find, used, chosen = finder(target_modules), set[str](), []
    for path, of_path in names.items():
        found = [find(name) | (find(QKV.sub(".qkv_proj", name)) if config != split else set()) for name in of_path]
        if any(found) and not all(found):
            missing = of_path[found.index(set())]
            raise ValueError(f"target_modules names some experts of {path} but not {missing!r}: a layer's experts are "
                             "adapted together or not at all")
        used |= found[0].union(*found[1:])
        chosen += [path] if all(found) else []
    wanted = {target_modules} if isinstance(target_modules, str) else set(target_modules)
    _refuse(config, find, wanted - used, [name for of_path in names.values() for name in of_path])
    if not chosen:
        raise ValueError("target_modules is empty; expected names as in [\"q_proj\", \"v_proj\"]")
    return chosen


def finder(target_modules: Targets) -> Callable[[str], set[str]]:
    """Which of the targets a module's name meets. ValueError for a regular expression that is none."""
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(".*" if target_modules == ALL else target_modules)
        except re.error as error:
            raise ValueError(f"target_modules = {target_modules!r} is no regular expression ({error}); names are given "
                             "as a list") from None
        return lambda name: {target_modules} if pattern.fullmatch(name) else set()
    wanted = set(target_modules)

    def ends(name: str) -> set[str]:
        parts = name.split(".")
        return wanted & {".".join(parts[n:]) for n in range(len(parts))}
    return ends


def _refuse(config: Config, find: Callable[[str], set[str]], unused: set[str], there: list[str]) -> None:
    """What the targets name besides the projections that are `there`, or instead of them."""
    for tensor in Table(config).shapes:
        name = tensor.removesuffix(".weight")
        if name != tensor and name not in there and not name.endswith(".qkv_proj") and find(name):
            raise ValueError(f"target_modules: {listed(map(repr, find(name)))} names {name!r}, which has no adapter: "
                             "router, norms, embedding and head are left as they are")
    if unused:
        ends = [*dict.fromkeys(name.rsplit(".", 1)[-1] for name in there)]
        ends += ["qkv_proj"] if config.attention_projection_layout != "split" else []
        raise ValueError(f"target_modules: {listed(map(repr, sorted(unused)))} names no module of this model; it has "
                         f"{', '.join(ends)}, in full as {there[0]!r}. A list holds names, or what names end in; a "
                         "text is one regular expression for names in full")
