"""The packed forms of a matrix in hub files, and which of them config.json's quantization_config allows for each.

A matrix in the form `Kind` is two hub tensors, X.weight with the codes and X.weight_scale_inv or X.weight_scale with
one scale for each block of it (MODEL.md 4.2, 4.6; int4 is our own), and two leaves of ours, `<path>.codes` and
`<path>.scale`. What a file holds is told by its dtypes, and must be what config.json says (MODEL.md 1.3).
"""
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.checkpoint.entry import Entry
from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.tensorfile import TensorInfo
from jaxllm.codec import DTYPES, kind_of

CODES, SCALE = ".codes", ".scale"      # after a parameter's path: the leaves of a packed one
FP8, BYTE = DTYPES["fp8"][0], DTYPES["mxfp4"][0]
EXPERTS = frozenset({"gate_EDI", "up_EDI", "down_EID"})
MATRICES = frozenset({"q_DNH", "k_DKH", "v_DKV", "gate_DF", "up_DF", "down_FD"})
EITHER = frozenset({"o_NVD", "join_CD", "head_DW"})     # plain in the releases, whether ignored_layers says so or not


@dataclass(frozen=True)
class Kind:
    """A packed form, by its name in codec.py, with one scale for each `block` (rows, columns) of a hub weight."""
    name: str
    block: tuple[int, int]

    @property
    def codes(self) -> np.dtype:
        return DTYPES[self.name][0]

    @property
    def scale(self) -> np.dtype:
        return DTYPES[self.name][1]

    @property
    def per_byte(self) -> int:
        return 1 if self.name == "fp8" else 2

    @property
    def suffix(self) -> str:
        """Of the scale's name in hub files, after the weight's; the one of fp8 multiplies despite its name."""
        return "_scale_inv" if self.name == "fp8" else "_scale"


MXFP4 = Kind("mxfp4", (1, 32))


def fp8(quantization: Mapping[str, Any] | None) -> Kind:
    rows, columns = (quantization or {}).get("weight_block_size") or (128, 128)
    return Kind("fp8", (rows, columns))


def int4(group: int) -> Kind:
    return Kind("int4", (1, group))


def kinds_of_leaves(params: Mapping[str, tuple[tuple[int, ...], np.dtype]],
                    quantization: Mapping[str, Any] | None = None) -> dict[str, Kind]:
    """The kind of each packed parameter among `params` (leaf -> shape, dtype), as `Table` wants them.

    The hub's blocks of fp8 cannot be told from our leaves: those that `quantization` states, 128 x 128 if it does not.
    """
    kinds = {}
    for leaf, (shape, dtype) in params.items():
        if leaf.endswith(CODES):
            path = leaf.removesuffix(CODES)
            scale_shape, scale_dtype = params[path + SCALE]
            name = kind_of(dtype, scale_dtype)
            group = 2 * math.prod(shape) // math.prod(scale_shape)
            kinds[path] = {"fp8": fp8(quantization), "mxfp4": MXFP4, "int4": int4(group)}[name]
    return kinds


def find_kinds(entries: Mapping[str, Entry], tensors: Mapping[str, TensorInfo],
               quantization: Mapping[str, Any] | None) -> dict[str, Kind]:
    """The kind of each parameter that `tensors` hold packed. `entries`: the plain ones, whose tensors are all there.

    Errors: CheckpointError for a scale without codes or codes without scale, for different kinds in one stack, and for
    a kind that is not what config.json's quantization_config says.
    """
    ignored = frozenset((quantization or {}).get("ignored_layers") or ())
    kinds: dict[str, Kind] = {}
    for path, entry in entries.items():
        first, *others = entry.tensors
        kind = _stored(tensors, first, quantization)
        for name in others:
            if (other := _stored(tensors, name, quantization)) != kind:
                raise CheckpointError(f"{tensors[name].file}: {name!r} is {_name(other)}, expected {_name(kind)} as "
                                      f"{first!r}, which is stacked with it in {path}")
        for name in entry.tensors:
            _check_allowed(path, name, tensors[name], kind, quantization, ignored)
        if kind:
            kinds[path] = kind
    return kinds


def _name(kind: Kind | None) -> str:
    return kind.name if kind else "not packed"


def _stored(tensors: Mapping[str, TensorInfo], weight: str, quantization: Mapping[str, Any] | None) -> Kind | None:
    """How `tensors` hold a weight, by the dtypes of it and of its scale."""
    info = tensors[weight]
    scales = [weight + suffix for suffix in ("_scale_inv", "_scale") if weight + suffix in tensors]
    if info.dtype not in (FP8, BYTE):
        if scales:
            raise CheckpointError(f"{tensors[scales[0]].file}: {scales[0]!r} is the scale of {weight!r}, which is "
                                  f"{info.dtype} and has none; expected codes (F8_E4M3 or U8), or no scale")
        return None
    expected = weight + ("_scale_inv" if info.dtype == FP8 else "_scale")
    if scales != [expected]:
        found = ", ".join(map(repr, scales)) or "no scale"
        raise CheckpointError(f"{info.file}: {weight!r} is {info.dtype}, whose scale is expected as {expected!r}; "
                              f"found {found}; complete the download, or name the layout as the release does")
    scale = tensors[expected]
    group = (quantization or {}).get("group_size") or 32
    kinds = (fp8(quantization),) if info.dtype == FP8 else (MXFP4, int4(group))
    for kind in kinds:
        if scale.dtype == kind.scale:
            return kind
    raise CheckpointError(f"{scale.file}: {expected!r} is {scale.dtype}, expected "
                          f"{' or '.join(f'{kind.scale} ({kind.name})' for kind in kinds)}")


def allowed_kinds(path: str, tensor: str, quantization: Mapping[str, Any] | None,
                  ignored: frozenset[str]) -> tuple[str, ...]:
    """The kinds in which quantization_config lets the hub tensor `tensor` of parameter `path` be stored."""
    letters, module = path.rsplit(".", 1)[-1], tensor.removesuffix(".weight")
    if quantization is None or letters not in EXPERTS | MATRICES | EITHER or _is_ignored(module, ignored):
        return ("not packed",)
    of_experts = "int4" if quantization["quant_method"] == "int4" else quantization.get("store_dtype") or "fp8"
    if letters in EXPERTS:
        return (of_experts,)
    packed = tuple(dict.fromkeys(("fp8", of_experts)))
    return ("not packed", *packed) if letters in EITHER else packed


def _is_ignored(module: str, ignored: frozenset[str]) -> bool:
    """Whether ignored_layers names the module or one that it is part of."""
    while module and ignored:
        if module in ignored:
            return True
        module = module.rpartition(".")[0]
    return False


def _check_allowed(path: str, tensor: str, info: TensorInfo, kind: Kind | None,
                   quantization: Mapping[str, Any] | None, ignored: frozenset[str]) -> None:
    allowed = allowed_kinds(path, tensor, quantization, ignored)
    if _name(kind) in allowed:
        return
    keys = ("quant_method", "store_dtype")
    said = ", ".join(f"{key} {quantization.get(key) or 'absent'}" for key in keys) if quantization else "absent"
    if quantization and allowed == ("not packed",):
        said += "; the tensor is among ignored_layers or of a sort that is never packed"
    raise CheckpointError(f"{info.file}: {tensor!r} is stored as {kind.name if kind else info.dtype}, but "
                          f"config.json's quantization_config ({said}) says {' or '.join(allowed)}; is the config.json "
                          "the checkpoint's own?")


def check_values(values: np.ndarray, tensor: str) -> tuple[str, list[int]] | None:
    """(what, where) of the first of `values` of a hub tensor that no packed layout holds; None if there is none.

    Codes of fp8 must not be NaN; scales must be finite numbers above 0, exponent bytes anything but 255 (NaN).
    """
    if values.dtype == FP8:
        bits = values.view(np.uint8)
        # Both NaN codes are extremes, 0xff of unsigned and 0x7f of signed bytes: no copy, and several times faster.
        sound = bits.max() < 0xFF and bits.view(np.int8).max() < 0x7F
        return None if sound else _first(bits & 0x7F == 0x7F, "the code of NaN")
    if not tensor.endswith(("_scale", "_scale_inv")):
        return None
    if values.dtype == BYTE:
        return _first(values == 0xFF, "the exponent byte 255, which is NaN")
    numbers = values.astype(np.float32, copy=False)
    return _first(~((numbers > 0) & (numbers < np.inf)), "a scale that is not a finite number above 0")


def _first(bad: np.ndarray, what: str) -> tuple[str, list[int]] | None:
    return (what, np.argwhere(bad)[0].tolist()) if bad.any() else None
