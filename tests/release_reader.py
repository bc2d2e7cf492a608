"""An independent reading of released MiMo-V2 folders into float32: plain numpy, straight from MODEL.md 4.

Nothing of jaxllm and nothing of the tool that writes such folders. Every value is one float32 product of its code and
its scale, so another reading must agree bit for bit. Rows are walked one by one and asked for their block: slow, and
hard to get wrong.
"""
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "U8": np.uint8}
FP4 = [0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6]


def read_tensors(folder: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder as stored, by the headers of its safetensors files."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                flat = np.frombuffer(data[start + begin:start + end], DTYPES[entry["dtype"]])
                tensors[name] = flat.reshape(entry["shape"])
    return tensors


def read_release(folder: str | Path, reading: str | None = None) -> dict[str, np.ndarray]:
    """Hub name -> float32 [out, in], scales applied and gone; q_proj, k_proj and v_proj in natural head order.

    `reading` of attention rows: "ranks" (4.4) or "plain" for qkv_proj, "stacked" (4.3) or "grid" for k_proj and v_proj;
    None is as released: ranks, and stacked on full layers.
    """
    config, stored = json.loads((Path(folder) / "config.json").read_text()), read_tensors(folder)
    decoded: dict[str, np.ndarray] = {}
    for name, value in stored.items():
        if name.endswith((".weight_scale", ".weight_scale_inv")) or name in decoded:
            continue
        if name.endswith(".qkv_proj.weight"):
            decoded |= read_fused(name, stored, config, reading or "ranks")
        elif name.endswith(".k_proj.weight") and is_stacked(name, stored, config, reading):
            decoded |= read_stacked(name, stored, config)
        elif name.endswith(".v_proj.weight") and is_stacked(name.replace("v_proj", "k_proj"), stored, config, reading):
            continue                                                # came with k_proj
        elif f"{name}_scale_inv" in stored:
            rows = np.arange(len(value)) // 128
            decoded[name] = decode_fp8(value, stored[f"{name}_scale_inv"], rows)
        elif f"{name}_scale" in stored:
            decoded[name] = decode_mxfp4(value, stored[f"{name}_scale"])
        else:
            decoded[name] = value.astype(np.float32)
    return decoded


def decode_fp8(codes: np.ndarray, scale: np.ndarray, scale_rows: np.ndarray) -> np.ndarray:
    """`scale_rows`: the row of `scale` of each row of codes; blocks of columns are 128 wide (4.2)."""
    columns = np.arange(codes.shape[1]) // 128
    assert scale.shape == (scale_rows.max() + 1, columns.max() + 1), (scale.shape, codes.shape)
    return codes.astype(np.float32) * scale[scale_rows][:, columns]


def decode_mxfp4(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Two codes a byte, the low four bits first; a scale byte b is 2^(b - 127) for 32 columns (4.6)."""
    values = np.empty((packed.shape[0], 2 * packed.shape[1]), np.float32)
    table = np.array(FP4, np.float32)
    values[:, 0::2], values[:, 1::2] = table[packed & 15], table[packed >> 4]
    return values * np.ldexp(np.float32(1), scale.astype(np.int32) - 127)[:, np.arange(values.shape[1]) // 32]


def sizes(name: str, config: dict[str, Any]) -> dict[str, int]:
    """N, K, H and V of the layer that the tensor is of; MTP blocks slide."""
    slides = ".mtp." in name or bool(config["hybrid_layer_pattern"][int(name.split(".")[2])])
    prefix = "swa_" if slides else ""
    keys = {"N": "num_attention_heads", "K": "num_key_value_heads", "H": "head_dim", "V": "v_head_dim"}
    return {letter: config[prefix + key] for letter, key in keys.items()}


def read_fused(name: str, stored: dict[str, np.ndarray], config: dict[str, Any], reading: str) -> dict[str, np.ndarray]:
    """q, k and v out of qkv_proj: a chunk [Q | K | V] of each rank, whose blocks of rows begin anew (4.4)."""
    codes, s = stored[name], sizes(name, config)
    ranks = config["num_key_value_heads"] if reading == "ranks" else 1
    chunk_rows = len(codes) // ranks
    chunk_scales = -(-chunk_rows // 128)
    rows = np.array([rank * chunk_scales + row // 128 for rank in range(ranks) for row in range(chunk_rows)])
    scale = stored.get(f"{name}_scale_inv")
    values = codes.astype(np.float32) if scale is None else decode_fp8(codes, scale, rows)
    parts: dict[str, list[np.ndarray]] = {"q": [], "k": [], "v": []}
    for rank in range(ranks):
        row = rank * chunk_rows
        for part, count in (("q", s["N"] * s["H"]), ("k", s["K"] * s["H"]), ("v", s["K"] * s["V"])):
            parts[part].append(values[row:row + count // ranks])
            row += count // ranks
        assert row == (rank + 1) * chunk_rows
    return {name.replace("qkv_proj", f"{part}_proj"): np.concatenate(runs) for part, runs in parts.items()}


def is_stacked(name: str, stored: dict[str, np.ndarray], config: dict[str, Any], reading: str | None) -> bool:
    """Does this k_proj share scales with its v_proj? 4.3: full layers of a split FP8 release do."""
    full = ".mtp." not in name and not config["hybrid_layer_pattern"][int(name.split(".")[2])]
    return full and f"{name}_scale_inv" in stored and reading != "grid"


def read_stacked(name: str, stored: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """k and v whose scales are those of each head's K rows with its V rows below them (4.3)."""
    s, v_name = sizes(name, config), name.replace("k_proj", "v_proj")
    k, v, k_scale, v_scale = stored[name], stored[v_name], stored[f"{name}_scale_inv"], stored[f"{v_name}_scale_inv"]
    heads: dict[str, list[np.ndarray]] = {name: [], v_name: []}
    for head in range(s["K"]):
        in_k = k_scale.reshape(s["K"], -1, k_scale.shape[1])[head]
        in_v = v_scale.reshape(s["K"], -1, v_scale.shape[1])[head]
        codes = np.concatenate([k[head * s["H"]:(head + 1) * s["H"]], v[head * s["V"]:(head + 1) * s["V"]]])
        values = decode_fp8(codes, np.concatenate([in_k, in_v]), np.arange(len(codes)) // 128)
        heads[name].append(values[:s["H"]])
        heads[v_name].append(values[s["H"]:])
    return {key: np.concatenate(runs) for key, runs in heads.items()}
