"""Random MiMo-V2 checkpoints in hub layout, for tests and for the golden arrays.

The values of a tensor depend on the seed and on the tensor's name alone (numpy only, nothing of jaxllm), so splitting
into shards, adding MTP blocks or fusing q, k and v never changes the model. Scales keep logits near a standard
deviation of 2 and give every piece weight: scores that peak, sinks that take a real share, norm weights away from one,
correction biases that change which experts are chosen.

Sizes in hub order [out, in]: D model · N query heads · K kv heads · H q/k head · V v head · F dense hidden ·
E experts · I expert hidden · W vocabulary.
"""
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A complete hub config of a small V2-Flash-like model (0.45M parameters, window 8), with `changes` to its keys."""
    config = {
        "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash",
        "hidden_size": 64, "num_hidden_layers": 6, "vocab_size": 96, "max_position_embeddings": 512,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24, "v_head_dim": 16,
        "swa_num_attention_heads": 8, "swa_num_key_value_heads": 4, "swa_head_dim": 24, "swa_v_head_dim": 16,
        "partial_rotary_factor": 0.334, "rope_theta": 5000000, "swa_rope_theta": 10000,
        "sliding_window": 8, "sliding_window_size": 8, "attention_chunk_size": 8,
        "hybrid_layer_pattern": [0, 1, 1, 0, 1, 1], "moe_layer_freq": [0, 1, 1, 1, 1, 1],
        "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "n_shared_experts": None, "n_group": 1, "topk_group": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "norm_topk_prob": True, "routed_scaling_factor": None,
        "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False, "attention_value_scale": 0.707,
        "attention_bias": False, "attention_dropout": 0.0, "layernorm_epsilon": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "initializer_range": 0.02, "torch_dtype": "float32", "use_cache": True,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
    }
    return config | changes


@dataclass(frozen=True)
class Tensor:
    """One tensor to be made: hub name, [out, in] shape, mean and standard deviation, float32 whatever the file's dtype?

    `parts`, for a fused q/k/v, are the three tensors whose rows it takes, in `ranks` chunks of [Q | K | V] (MODEL.md
    4.4).
    """
    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    always_float32: bool = False
    parts: tuple["Tensor", ...] = ()
    ranks: int = 1

    def values(self, seed: int) -> np.ndarray:
        """float32 values: a function of the seed and the name."""
        if self.parts:
            split = [part.values(seed).reshape(self.ranks, -1, part.shape[1]) for part in self.parts]
            return np.concatenate(split, axis=1).reshape(self.shape)
        noise = np.random.default_rng([seed, zlib.crc32(self.name.encode())]).standard_normal(self.shape, np.float32)
        return np.float32(self.mean) + np.float32(self.std) * noise


def matrix(name: str, out_size: int, in_size: int, gain: float = 1.0) -> Tensor:
    """A projection that maps unit-variance inputs to outputs of standard deviation `gain`."""
    return Tensor(name, (out_size, in_size), gain / in_size**0.5)


def norm(name: str, size: int) -> Tensor:
    return Tensor(name, (size,), 0.2, mean=1.0)


def layer_pattern(config: dict[str, Any]) -> list[bool]:
    """True where a layer slides, from the pattern, the block size, or (absent both) all full: MODEL.md 1.1."""
    num_layers = config["num_hidden_layers"]
    if config.get("hybrid_layer_pattern") is not None:
        return [bool(kind) for kind in config["hybrid_layer_pattern"]]
    block = config.get("hybrid_block_size")
    return [block is not None and (i + 1) % block != 0 for i in range(num_layers)]


def moe_pattern(config: dict[str, Any]) -> list[bool]:
    """True where a layer has experts; absent key: none; a number f: every f-th from layer 0."""
    freq, num_layers = config.get("moe_layer_freq"), config["num_hidden_layers"]
    if freq is None:
        return [False] * num_layers
    return [i % freq == 0 for i in range(num_layers)] if isinstance(freq, int) else [bool(kind) for kind in freq]


def attention_sizes(config: dict[str, Any], slides: bool) -> tuple[int, int, int, int]:
    """(N, K, H, V) of a full or sliding layer, with the dialect's defaults for absent keys (MODEL.md 1.1)."""
    N = config["num_attention_heads"]
    K = config.get("num_key_value_heads") or N
    H = config.get("head_dim") or config["hidden_size"] // N
    V = config.get("v_head_dim") or H
    if not slides:
        return N, K, H, V
    swa_H = config.get("swa_head_dim") or H
    return (config.get("swa_num_attention_heads") or N, config.get("swa_num_key_value_heads") or K, swa_H,
            config.get("swa_v_head_dim") or swa_H)


def attention(config: dict[str, Any], prefix: str, slides: bool, fused: bool) -> Iterator[Tensor]:
    D, (N, K, H, V) = config["hidden_size"], attention_sizes(config, slides)
    # Gain 1.3 on q and k: scores of standard deviation 1.7, so that softmax is neither flat nor one-hot.
    q, k, v = (matrix(f"{prefix}.{name}_proj.weight", rows, D, gain)
               for name, rows, gain in (("q", N * H, 1.3), ("k", K * H, 1.3), ("v", K * V, 1.0)))
    if fused:
        rows = q.shape[0] + k.shape[0] + v.shape[0]
        # Every layer is cut by the kv heads of the full layers, sliding layers and MTP too (MODEL.md 4.4).
        ranks = attention_sizes(config, slides=False)[1]
        yield Tensor(f"{prefix}.qkv_proj.weight", (rows, D), 0.0, parts=(q, k, v), ranks=ranks)
    else:
        yield from (q, k, v)
    yield matrix(f"{prefix}.o_proj.weight", D, N * V, gain=2.0)
    if config.get("add_swa_attention_sink_bias" if slides else "add_full_attention_sink_bias", False):
        yield Tensor(f"{prefix}.attention_sink_bias", (N,), 1.0, mean=1.0)


def dense_mlp(prefix: str, D: int, F: int) -> Iterator[Tensor]:
    yield matrix(f"{prefix}.gate_proj.weight", F, D)
    yield matrix(f"{prefix}.up_proj.weight", F, D)
    yield matrix(f"{prefix}.down_proj.weight", D, F, gain=2.0)


def moe(config: dict[str, Any], prefix: str) -> Iterator[Tensor]:
    D, E = config["hidden_size"], config["n_routed_experts"]
    # The router's file type follows moe_router_dtype, not the other weights (MODEL.md 2.4); its bias is always float32.
    router_float32 = config.get("moe_router_dtype") != "bfloat16"
    yield Tensor(f"{prefix}.gate.weight", (E, D), D**-0.5, always_float32=router_float32)
    yield Tensor(f"{prefix}.gate.e_score_correction_bias", (E,), 0.2, always_float32=True)
    for e in range(E):
        yield from dense_mlp(f"{prefix}.experts.{e}", D, config["moe_intermediate_size"])


def mtp_block(config: dict[str, Any], k: int, fused: bool) -> Iterator[Tensor]:
    prefix, D = f"model.mtp.layers.{k}", config["hidden_size"]
    for name in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
        yield norm(f"{prefix}.{name}.weight", D)
    yield matrix(f"{prefix}.eh_proj.weight", D, 2 * D)
    yield from attention(config, f"{prefix}.self_attn", slides=True, fused=fused)
    yield from dense_mlp(f"{prefix}.mlp", D, config["intermediate_size"])


def hub_tensors(config: dict[str, Any], fused: bool = False, mtp: int = 0) -> Iterator[Tensor]:
    """Every tensor of the checkpoint, in file order, not yet made."""
    D, W = config["hidden_size"], config["vocab_size"]
    tied = config.get("tie_word_embeddings", False)
    # A tied table is also the head, whose scale decides that of the logits.
    yield Tensor("model.embed_tokens.weight", (W, D), 2 / D**0.5 if tied else 1.0)
    for i, (slides, is_moe) in enumerate(zip(layer_pattern(config), moe_pattern(config), strict=True)):
        prefix = f"model.layers.{i}"
        yield norm(f"{prefix}.input_layernorm.weight", D)
        yield norm(f"{prefix}.post_attention_layernorm.weight", D)
        yield from attention(config, f"{prefix}.self_attn", slides, fused)
        if is_moe:
            yield from moe(config, f"{prefix}.mlp")
        else:
            yield from dense_mlp(f"{prefix}.mlp", D, config["intermediate_size"])
    yield norm("model.norm.weight", D)
    if not tied:
        yield matrix("lm_head.weight", W, D, gain=2.0)
    for k in range(mtp):
        yield from mtp_block(config, k, fused)


def write_hub(folder: str | Path, config: dict[str, Any], seed: int = 0, dtype: str = "float32", fused: bool = False,
              shards: int = 1, mtp: int = 0) -> None:
    """Write config.json and a random checkpoint in hub layout into `folder` (made if absent).

    One file model.safetensors, or `shards` files with an index; only one shard is in memory at a time. `fused` writes
    rank-interleaved qkv_proj and says so in config.json; `mtp` adds that many MTP blocks, of which config.json states
    only what the caller put there. Errors: ValueError when there are fewer tensors than shards.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layout = {"attention_projection_layout": "fused_qkv"} if fused else {}
    (folder / "config.json").write_text(json.dumps(config | layout, indent=2) + "\n")
    groups = spread(list(hub_tensors(config, fused, mtp)), shards)
    names: dict[str, str] = {}
    for n, group in enumerate(groups, 1):
        file = "model.safetensors" if shards == 1 else f"model-{n:05d}-of-{shards:05d}.safetensors"
        arrays = {t.name: t.values(seed).astype(np.float32 if t.always_float32 else DTYPES[dtype]) for t in group}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(arrays, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def spread(tensors: list[Tensor], shards: int) -> list[list[Tensor]]:
    """Cut the list into `shards` runs of about equal element counts, none empty."""
    if not 1 <= shards <= len(tensors):
        raise ValueError(f"shards={shards}: expected 1 to {len(tensors)}, the number of tensors")
    sizes = np.cumsum([np.prod(t.shape) for t in tensors])
    cuts = np.searchsorted(sizes, sizes[-1] * np.arange(1, shards) / shards) + 1
    # At least one tensor on each side of every cut, whatever the sizes.
    cuts = np.clip(np.maximum.accumulate(cuts - np.arange(shards - 1)) + np.arange(shards - 1),
                   np.arange(1, shards), np.arange(len(tensors) - shards + 1, len(tensors)))
    edges = [0, *cuts.tolist(), len(tensors)]
    return [tensors[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]


def weights_digest(folder: str | Path) -> str:
    """SHA-256 over the names and float32 bytes of a one-file checkpoint, in name order."""
    digest = hashlib.sha256()
    for name, value in sorted(load_file(Path(folder) / "model.safetensors").items()):
        digest.update(name.encode() + value.astype(np.float32).tobytes())
    return digest.hexdigest()
