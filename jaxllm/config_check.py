"""What a `Config` may hold: the type and choices of each field, and what only several fields together can get wrong.

Every complaint is a `ConfigError` that names the key, the value found and what is accepted.
"""
import copy
import dataclasses
import reprlib
from collections.abc import Callable
from typing import Any, NoReturn

MODEL_TYPES = ("mimo_v2_flash", "mimo_v2")
CHOICES: dict[str, tuple[str | None, ...]] = {
    "model_type": MODEL_TYPES,
    "attention_projection_layout": ("split", "fused_qkv"),
    "moe_router_dtype": (None, "float32", "bfloat16"),
    "dtype": ("bfloat16", "float16", "float32"),
}
CHOICES["torch_dtype"] = CHOICES["dtype"]
QUANTIZATION: dict[str, tuple[str | int | None, ...]] = {    # what the keys of quantization_config may say
    "quant_method": ("fp8", "int4"), "fmt": (None, "e4m3"), "store_dtype": (None, "fp8", "mxfp4"),
    "mxfp4_block_size": (None, 32), "group_size": (None, 32, 128)}
IGNORED_QUANTIZATION = ("activation_scheme", "packed_modules_mapping")    # of weights they say nothing
MAX_INT = 2**31 - 1                       # no dimension, count or token id of a model passes an int32
MIN_FLOAT, MAX_FLOAT = 1.2e-38, 3.4e38    # every number is used in float32 (normal range)
NON_NEGATIVE = ("eos_token_id", "bos_token_id", "pad_token_id", "num_nextn_predict_layers")    # all others are >= 1


class ConfigError(ValueError):
    """A config.json that this code cannot run exactly; names key, value and what is accepted."""


def show(accepted: tuple[object, ...]) -> str:
    return "accepted: " + ", ".join("absent" if value is None else repr(value) for value in accepted)


def refuse(key: str, value: object, expected: str) -> NoReturn:
    raise ConfigError(f"config key {key!r} is {reprlib.repr(value)}: {expected}")


def positive_int(key: str, value: object) -> int:
    low = 0 if key in NON_NEGATIVE else 1
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= MAX_INT:
        refuse(key, value, f"expected an integer from {low} to {MAX_INT}")
    return value


def positive_float(key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not MIN_FLOAT <= value <= MAX_FLOAT:
        refuse(key, value, f"expected a number above 0 that float32 can hold ({MIN_FLOAT} to {MAX_FLOAT})")
    return float(value)


def boolean(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        refuse(key, value, "expected true or false")
    return value


def string(key: str, value: object) -> str:
    if not isinstance(value, str):
        refuse(key, value, "expected a string")
    return value


def flags(key: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(type(flag) is int and flag in (0, 1) for flag in value):
        refuse(key, value, "expected a list of 0 and 1, one a layer")
    return tuple(value)


def token_ids(key: str, value: object) -> int | tuple[int, ...]:
    return tuple(positive_int(key, v) for v in value) if isinstance(value, list | tuple) else positive_int(key, value)


def choice(key: str, value: object) -> Any:
    if value not in CHOICES[key]:
        refuse(key, value, show(CHOICES[key]))
    return value


def quantization(key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        refuse(key, value, "expected an object or null")
    for inner, accepted in QUANTIZATION.items():
        if not any(type(value.get(inner)) is type(a) and value.get(inner) == a for a in accepted):
            refuse(f"{key}.{inner}", value.get(inner), show(accepted))
    known = (*QUANTIZATION, "weight_block_size", "ignored_layers", *IGNORED_QUANTIZATION)
    for inner in value:
        if inner not in known:
            refuse(f"{key}.{inner}", value[inner], f"unknown key; known: {', '.join(known)}")
    if value["quant_method"] == "int4" and (value.get("group_size") is None or value.get("store_dtype") is not None):
        refuse(key, value, "quant_method 'int4' needs group_size (32 or 128) and takes no store_dtype")
    block = value.get("weight_block_size")
    if block is not None and not (isinstance(block, list | tuple) and len(block) == 2
                                  and all(type(size) is int and 1 <= size <= MAX_INT for size in block)):
        refuse(f"{key}.weight_block_size", block, "expected two integers from 1, rows and columns; the releases have "
               "[128, 128]")
    layers = value.get("ignored_layers")
    if layers is not None and not (isinstance(layers, list | tuple)
                                   and all(isinstance(layer, str) for layer in layers)):
        refuse(f"{key}.ignored_layers", layers, "expected a list of names of modules")
    return copy.deepcopy(value)    # a caller's later change must not reach a frozen config


CHECKS: dict[object, Callable[[str, object], Any]] = {    # by a field's type without its "| None"
    int: positive_int, float: positive_float, bool: boolean, str: string, tuple[int, ...]: flags,
    int | tuple[int, ...]: token_ids, dict[str, Any]: quantization,
}


def check_field(field: dataclasses.Field, value: object) -> Any:
    """The value of one field in its own type; ConfigError if it has another type or is not among the choices."""
    optional = field.type in {kind | None for kind in CHECKS}    # type: ignore[operator]
    if value is not None or not optional:
        kind = next(k for k in CHECKS if field.type in (k, k | None))    # type: ignore[operator]
        value = CHECKS[kind](field.name, value)
    return choice(field.name, value) if field.name in CHOICES else value


def check_together(c: Any) -> None:
    """What no key can say alone: lengths, divisibility, and the keys that others need. `c` is a `Config`."""
    for key in ("hybrid_layer_pattern", "moe_layer_freq"):
        pattern = getattr(c, key)
        if len(pattern) != c.num_hidden_layers:
            refuse(key, list(pattern), f"has {len(pattern)} entries, num_hidden_layers is {c.num_hidden_layers}")
    if c.sliding_window is None and (any(c.hybrid_layer_pattern) or c.num_nextn_predict_layers):
        refuse("sliding_window", None, "needed by sliding layers (hybrid_layer_pattern, hybrid_block_size) "
               "and by MTP blocks (num_nextn_predict_layers)")
    if c.partial_rotary_factor > 1:
        refuse("partial_rotary_factor", c.partial_rotary_factor, "expected a number in (0, 1]")
    for swa in ("", "swa_"):
        check_heads(c, swa)
    if any(c.moe_layer_freq):
        check_experts(c)
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        ids = getattr(c, key)
        if ids is not None and max(ids if isinstance(ids, tuple) else (ids,), default=0) >= c.vocab_size:
            refuse(key, ids, f"expected ids below vocab_size {c.vocab_size}")


def check_heads(c: Any, swa: str) -> None:
    keys = ("num_attention_heads", "num_key_value_heads", "head_dim")
    heads, kv_heads, head_dim = (getattr(c, swa + key) for key in keys)
    if heads % kv_heads:
        refuse(f"{swa}num_attention_heads", heads, f"not a multiple of {swa}num_key_value_heads {kv_heads}")
    if c.attention_projection_layout == "fused_qkv" and kv_heads % c.num_key_value_heads:
        refuse(f"{swa}num_key_value_heads", kv_heads,
               f"not a multiple of num_key_value_heads {c.num_key_value_heads}, the number of chunks of rows "
               "with attention_projection_layout 'fused_qkv'")
    rotary = int(head_dim * c.partial_rotary_factor)
    if rotary % 2 or rotary == 0:
        refuse("partial_rotary_factor", c.partial_rotary_factor,
               f"int({swa}head_dim {head_dim} * factor) = {rotary}, expected an even number above 0")


def check_experts(c: Any) -> None:
    for key in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"):
        if getattr(c, key) is None:
            refuse(key, None, "needed by the expert layers that moe_layer_freq asks for")
    if c.n_routed_experts % c.n_group:
        refuse("n_routed_experts", c.n_routed_experts, f"not a multiple of n_group {c.n_group}")
    if c.n_group > 1 and c.n_routed_experts < 2 * c.n_group:
        refuse("n_group", c.n_group, "a group is ranked by its two best experts, so it needs at least two")
    if c.topk_group > c.n_group:
        refuse("topk_group", c.topk_group, f"expected at most n_group {c.n_group}")
    available = c.n_routed_experts // c.n_group * c.topk_group
    if c.num_experts_per_tok > available:
        refuse("num_experts_per_tok", c.num_experts_per_tok,
               f"topk_group {c.topk_group} of n_group {c.n_group} groups hold only {available} "
               f"of the n_routed_experts {c.n_routed_experts}")
