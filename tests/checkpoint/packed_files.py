"""Hub folders with packed matrices, random in every bit, and an independent reading of them in plain numpy.

Written from MODEL.md 4.2 to 4.6 in hub orientation, with nothing of jaxllm. Any sizes, and any size of fp8 blocks.
"""
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from hub_maker import attention_sizes, hub_tensors, layer_pattern
from release_reader import read_tensors
from safetensors.numpy import save_file

FP8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
E2M1 = [0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6]
EXPERT = re.compile(r"\.experts\.")
MATRIX = re.compile(r"\.(q|k|v|qkv|gate|up|down)_proj\.weight$")
EITHER = re.compile(r"(\.o_proj|\.eh_proj|lm_head)\.weight$")


def write_packed(folder: Path, config: dict[str, Any], kind: str, reading: str | None = None, mtp: int = 0,
                 everything: bool = False, metadata: dict[str, str] | None = None, **quantization: Any) -> None:
    """A folder of `kind` fp8, mxfp4 (experts; the rest fp8) or int4 (all), o_proj, eh_proj and lm_head only if
    `everything`. `reading` says how attention rows lie, as of one who writes; `quantization` are keys for the config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stated = {"fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
              "mxfp4": {"quant_method": "fp8", "store_dtype": "mxfp4", "mxfp4_block_size": 32},
              "int4": {"quant_method": "int4", "group_size": 32}}[kind] | quantization
    is_fused = config.get("attention_projection_layout") == "fused_qkv"
    rng, tensors = np.random.default_rng(0), {}
    for tensor in hub_tensors(config, is_fused, mtp):
        name, shape = tensor.name, tensor.shape
        if not MATRIX.search(name) and not (everything and EITHER.search(name)):
            tensors[name] = tensor.values(0).astype(np.float32 if tensor.always_float32 else BF16)
        elif kind == "int4":
            tensors[name] = rng.integers(0, 256, (shape[0], shape[1] // 2), np.uint8)
            tensors[name + "_scale"] = positive(rng, (shape[0], shape[1] // stated["group_size"])).astype(BF16)
        elif kind == "mxfp4" and EXPERT.search(name):
            tensors[name] = rng.integers(0, 256, (shape[0], shape[1] // 2), np.uint8)
            tensors[name + "_scale"] = rng.integers(100, 150, (shape[0], shape[1] // 32), np.uint8)
        else:
            rows = scale_rows(config, name, shape[0], reading, stated.get("weight_block_size", [128, 128])[0])
            columns = -(-shape[1] // stated.get("weight_block_size", [128, 128])[1])
            bits = rng.integers(0, 0x7F, shape, np.uint8) | (rng.integers(0, 2, shape, np.uint8) << 7)    # no NaN
            tensors[name], tensors[name + "_scale_inv"] = bits.view(FP8), positive(rng, (rows, columns))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    save_file(tensors, folder / "model.safetensors", metadata)


def positive(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.exp(rng.standard_normal(shape, np.float32))


def layer_sizes(config: dict[str, Any], name: str) -> tuple[bool, tuple[int, int, int, int]]:
    """(whether the layer of this tensor slides, its N, K, H, V)."""
    slides = ".mtp." in name or layer_pattern(config)[int(name.split(".")[2])]
    return slides, attention_sizes(config, slides)


def scale_rows(config: dict[str, Any], name: str, rows: int, reading: str | None, block: int) -> int:
    if "qkv_proj" in name and reading.startswith("ranks="):
        ranks = int(reading.removeprefix("ranks="))
        return ranks * ceil(rows // ranks, block)
    if reading == "stacked" and re.search(r"\.[kv]_proj", name):
        slides, (_, K, H, V) = layer_sizes(config, name)
        if not slides:
            of_k = ceil(H, block)
            return K * (of_k if ".k_proj" in name else ceil(H + V, block) - of_k)
    return ceil(rows, block)


def ceil(size: int, block: int) -> int:
    return -(-size // block)


# ---- reading -----------------------------------------------------------------------------------------------------

def read_by_hand(folder: Path, reading: str | None) -> dict[str, np.ndarray]:
    """Hub name -> float32 values [out, in], with q_proj, k_proj, v_proj in natural head order even if fused."""
    config, hub = json.loads((folder / "config.json").read_text()), read_tensors(folder)
    block = config["quantization_config"].get("weight_block_size", [128, 128])
    values = {}
    for name, codes in hub.items():
        if "weight_scale" in name:
            continue
        _, (N, K, H, V) = layer_sizes(config, name) if ".self_attn." in name else (False, (0, 0, 0, 0))
        slides = ".self_attn." in name and layer_sizes(config, name)[0]
        if "qkv_proj" in name:
            ranks = int(reading.removeprefix("ranks=")) if reading.startswith("ranks=") else 1
            chunks = zip(np.split(codes, ranks), np.split(scale_of(hub, name), ranks), strict=True)
            parts = [np.split(decode(code, scale, block), [N * H // ranks, (N + K) * H // ranks])
                     for code, scale in chunks]
            for part, proj in zip(zip(*parts, strict=True), ("q_proj", "k_proj", "v_proj"), strict=True):
                values[name.replace("qkv_proj", proj)] = np.concatenate(part)
        elif reading == "stacked" and not slides and "k_proj" in name:
            other, width = name.replace("k_proj", "v_proj"), codes.shape[1]
            both = np.concatenate([codes.reshape(K, H, width), hub[other].reshape(K, V, width)], 1)
            scales = np.concatenate([hub[name + "_scale_inv"].reshape(K, ceil(H, block[0]), -1),
                                     hub[other + "_scale_inv"].reshape(K, -1, ceil(width, block[1]))], 1)
            heads = np.stack([decode(head, scale, block) for head, scale in zip(both, scales, strict=True)])
            values[name], values[other] = (part.reshape(-1, width) for part in np.split(heads, [H], 1))
        elif not (reading == "stacked" and not slides and "v_proj" in name):
            values[name] = decode(codes, scale_of(hub, name), block)
    return values


def scale_of(hub: dict[str, np.ndarray], name: str) -> np.ndarray | None:
    return next((hub[name + suffix] for suffix in ("_scale_inv", "_scale") if name + suffix in hub), None)


def decode(codes: np.ndarray, scale: np.ndarray | None, block: list[int]) -> np.ndarray:
    """A matrix of any kind; fp8 in one grid of blocks, partial at its ends."""
    if scale is None:
        return codes.astype(np.float32)
    if codes.dtype == FP8:
        rows, columns = (np.arange(size) // edge for size, edge in zip(codes.shape, block, strict=True))
        return codes.astype(np.float32) * scale[rows][:, columns]
    nibbles = np.stack([codes & 15, codes >> 4], 2).reshape(len(codes), -1)      # low four bits first
    group = nibbles.shape[1] // scale.shape[1]
    if scale.dtype == np.uint8:
        numbers, factors = np.array(E2M1, np.float32)[nibbles], np.exp2(scale.astype(np.float32) - 127)
    else:
        numbers, factors = (nibbles.astype(np.int32) ^ 8) - 8, scale.astype(np.float32)
    return numbers.astype(np.float32) * np.repeat(factors, group, 1)


# ---- breaking ----------------------------------------------------------------------------------------------------

def edit_packed(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Rewrite model.safetensors with its tensors changed in place by `change`."""
    tensors = {name: np.array(array) for name, array in read_tensors(folder).items()}
    change(tensors)
    save_file({name: np.array(array, order="C") for name, array in tensors.items()}, folder / "model.safetensors")
