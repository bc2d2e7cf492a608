"""The hub's config.json as strict input: reading it, the known keys, and the dialect's absent-key defaults.

A key is used (a field of `Config`, or folded into one here), fixed (only the stated values can be run), or ignored
(with a reason in `IGNORED`); anything else is refused. JSON null means the same as an absent key.
"""
import difflib
import json
import pathlib
import reprlib
from collections.abc import Callable
from typing import Any, NoReturn

from jaxllm.config_check import MODEL_TYPES, ConfigError, choice, positive_float, positive_int, refuse, show

# Keys with one meaning that this code computes; another value is another model.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "attention_bias": (False,),
    "n_shared_experts": (0,),
}
FOLDED = ("torch_dtype", "sliding_window_size", "hybrid_block_size", "rope_scaling", "rope_parameters")
IGNORED: dict[str, str] = {
    "architectures": "model_type already says which model this is",
    "auto_map": "names Python files of the hub's own implementation",
    "_name_or_path": "where the folder once was",
    "transformers_version": "a fact about the writer of the file",
    "use_cache": "a default of another runtime",
    "attention_chunk_size": "a leftover; taken literally it would turn sliding attention into chunked attention",
    "attention_dropout": "dropout is not part of the forward pass",
    "initializer_range": "weights are loaded; training states its own initialisation",
    "vision_config": "the vision tower is not part of the text model",
    "vision_model_type": "the vision tower is not part of the text model",
    "audio_config": "the audio tower is not part of the text model",
    "processor_config": "preprocessing for the towers",
    **dict.fromkeys(("image_token_id", "video_token_id", "audio_token_id", "vision_start_token_id",
                     "vision_end_token_id", "audio_start_token_id", "audio_end_token_id"),
                    "marks the place of tower outputs in a prompt; text has none"),
}
MAX_LAYERS = 1000      # an absent pattern is expanded to one entry a layer, so a lying count must not eat the memory


# ---- reading -----------------------------------------------------------------------------------------------------

def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in the file at `path`; ConfigError names the file if it is absent, broken or says a key twice."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []
        if twice:
            raise ConfigError(f"key {twice[0]!r} is given twice; keep one")
        return dict(pairs)

    try:
        found = json.loads(path.read_text("utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a config.json in hub layout") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:    # broken JSON or UTF-8, a key said twice, absurd nesting
        raise ConfigError(f"{path}: not a usable JSON object: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds a JSON {type(found).__name__}, expected an object with the hub's config keys")
    return found


def as_json(hub: object) -> dict[str, Any]:
    """A private copy of `hub` made of plain JSON values; refuses what JSON cannot say, NaN and infinities included."""
    if not isinstance(hub, dict):
        raise ConfigError(f"expected a dict with the hub's config keys, found {type(hub).__name__}")
    clean = {}
    for key, value in hub.items():
        try:
            clean[str(key)] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"config key {str(key)!r} is not a JSON value: {error}") from None
    return clean


# ---- the dialect -------------------------------------------------------------------------------------------------

def fold(hub: dict[str, Any], field_names: list[str], required: list[str]) -> dict[str, Any]:
    """Keyword arguments for `Config` from a hub dict: keys known, synonyms joined, absent keys filled in."""
    given = {key: value for key, value in hub.items() if value is not None}
    if given.get("model_type") not in MODEL_TYPES:
        refuse_model_type(given.get("model_type"))
    refuse_unknown(hub, field_names)
    for key, accepted in FIXED.items():
        if key in given and not any(type(given[key]) is type(a) and given[key] == a for a in accepted):
            refuse(key, given[key], show((*accepted, None)))
    fields = {key: given[key] for key in field_names if key in given}
    join(fields, "dtype", given, "torch_dtype", choice)
    join(fields, "sliding_window", given, "sliding_window_size", positive_int)
    fields |= rope(given)
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rope_theta"):
        if key not in fields:                       # the defaults below are made from these
            raise ConfigError(f"config key {key!r} is missing; it has no default")
    fill_defaults(fields, given)
    for key in required:
        if key not in fields:
            raise ConfigError(f"config key {key!r} is missing; it has no default")
    return fields


def refuse_model_type(found: object) -> NoReturn:
    accepted = show(MODEL_TYPES)
    hints = {"mimo": "MiMo-7B, a dense model of another architecture",
             "qwen3": "the type of DFlash drafters, which are no models on their own"}
    if found is None:
        raise ConfigError(f"config key 'model_type' is missing; {accepted}")
    hint = hints.get(found) if isinstance(found, str) else None
    refuse("model_type", found, accepted + (f" ({found!r} is {hint})" if hint else ""))


def refuse_unknown(hub: dict[str, Any], field_names: list[str]) -> None:
    known = [*field_names, *FIXED, *FOLDED, *IGNORED]
    for key, value in hub.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            refuse(key, value, f"unknown key; the nearest known key is {nearest!r}")


def join(fields: dict[str, Any], key: str, given: dict[str, Any], synonym: str,
         check: Callable[[str, object], Any]) -> None:
    """Two spellings of one fact: either may stand alone, both must agree."""
    if synonym in given and fields.setdefault(key, check(synonym, given[synonym])) != given[synonym]:
        refuse(synonym, given[synonym], f"contradicts {key!r}, which is {reprlib.repr(fields[key])}")


def rope(given: dict[str, Any]) -> dict[str, Any]:
    """What `rope_parameters` overrides; `rope_scaling` may only say "default", which means no scaling."""
    allowed = {"rope_scaling": ("rope_type", "type"),
               "rope_parameters": ("rope_type", "type", "rope_theta", "partial_rotary_factor")}
    for key, inner_keys in allowed.items():
        table = given.get(key, {})
        if not isinstance(table, dict):
            refuse(key, table, "expected an object or null")
        for inner, value in table.items():
            if inner not in inner_keys:
                refuse(f"{key}.{inner}", value, f"unknown key; accepted: {', '.join(inner_keys)}")
            if inner in ("rope_type", "type") and value not in ("default", None):
                refuse(f"{key}.{inner}", value, "accepted: 'default' (long context comes from rope_theta alone)")
    return {inner: positive_float(f"rope_parameters.{inner}", value)
            for inner, value in given.get("rope_parameters", {}).items()
            if inner in ("rope_theta", "partial_rotary_factor") and value is not None}


def fill_defaults(fields: dict[str, Any], given: dict[str, Any]) -> None:
    """Absent keys as the hub's configuration class resolves them."""
    layers = positive_int("num_hidden_layers", fields["num_hidden_layers"])
    if layers > MAX_LAYERS:
        refuse("num_hidden_layers", layers, f"expected at most {MAX_LAYERS}")
    hidden, heads = (positive_int(key, fields[key]) for key in ("hidden_size", "num_attention_heads"))
    if "head_dim" not in fields and hidden % heads:
        refuse("num_attention_heads", heads, f"does not divide hidden_size {hidden}, and head_dim is absent")
    fields.setdefault("head_dim", hidden // heads)
    fields.setdefault("v_head_dim", fields["head_dim"])
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta"):
        fields.setdefault(f"swa_{key}", fields[key])
    fields.setdefault("swa_v_head_dim", fields["swa_head_dim"])    # and not v_head_dim, as the class does
    every = given.get("hybrid_block_size")
    if every is not None:
        positive_int("hybrid_block_size", every)
    fields.setdefault("hybrid_layer_pattern", [int(every is not None and (i + 1) % every != 0) for i in range(layers)])
    freq = fields.get("moe_layer_freq", [0] * layers)
    if not isinstance(freq, list):
        freq = [int(i % positive_int("moe_layer_freq", freq) == 0) for i in range(layers)]
    fields["moe_layer_freq"] = freq
