"""Other implementations of MiMo-V2 behind one small interface: the source of golden arrays and of peers' timings.

Each class is built from a hub folder and computes in float32: `logits(tokens_BT)` is a full forward, and
`greedy(prompts_BT, num_new)` writes `num_new` tokens for prompts of one length and times its prefill and its decode
steps. The packages are imported when a class is built.

Transformers  MiMoV2FlashForCausalLM, eager attention. Its config knows one geometry (sliding layers: twice the kv
              heads, the same head sizes, always sinks; full layers: never sinks); where a checkpoint differs, the
              attention modules are refitted and run unchanged.
Mlx           mlx_lm.models.mimo_v2_flash, which takes the hub's keys as they are.
LlamaCpp      in llamacpp.py.
"""
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from hub_maker import attention_sizes, layer_pattern, moe_pattern  # noqa: E402  (needs the path above)

NUM_THREADS = 2


class Greedy(NamedTuple):
    """Tokens written, [B, num_new]; seconds until the first of them was known, and from there until the last was."""
    tokens_BT: np.ndarray
    prefill_s: float
    decode_s: float


def read_hub(folder: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config.json, float32 weights by hub name) of a one-file checkpoint."""
    import ml_dtypes  # noqa: F401  (makes bfloat16 known to numpy, and so to safetensors)
    from safetensors.numpy import load_file

    config = json.loads((Path(folder) / "config.json").read_text())
    weights = load_file(Path(folder) / "model.safetensors")
    return config, {name: value.astype(np.float32) for name, value in weights.items()}


def window_keys(config: dict[str, Any]) -> int:
    """Keys a query of a sliding layer sees, itself included, under either reading of `sliding_window`."""
    return config["sliding_window"] + (0 if config.get("sliding_window_counts_query", True) else 1)


def rope_settings(config: dict[str, Any]) -> tuple[float, float, float]:
    """(theta of full layers, theta of sliding layers, rotary share); `rope_parameters` overrides the flat keys."""
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config["rope_theta"])
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    return theta, config.get("swa_rope_theta") or theta, share


class Transformers:
    """transformers' class, told everything: its own reading of a hub config gets layer types and rope wrong."""

    def __init__(self, folder: str | Path, experts: str = "eager"):
        import torch
        import transformers

        torch.set_num_threads(NUM_THREADS)
        self.torch, self.version = torch, f"{transformers.__version__}, torch {torch.__version__}"
        config, weights = read_hub(folder)
        self.model = transformers.MiMoV2FlashForCausalLM(self.config(config)).eval()
        self.model.set_attn_implementation("eager")
        self.model.set_experts_implementation(experts)
        self.load(config, weights)

    @staticmethod
    def config(config: dict[str, Any]) -> Any:
        from transformers import MiMoV2FlashConfig

        full_theta, swa_theta, share = rope_settings(config)
        N, K, H, V = attention_sizes(config, slides=False)
        # The class sizes every rotary part from the full layers' head; half a dimension more guards its int().
        swa_share = (int(attention_sizes(config, slides=True)[2] * share) + 0.5) / H
        kinds = (("full_attention", full_theta, share), ("sliding_attention", swa_theta, swa_share))
        rope = {kind: {"rope_type": "default", "rope_theta": float(theta), "partial_rotary_factor": factor}
                for kind, theta, factor in kinds}
        same = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings",
                "hidden_act", "moe_intermediate_size", "num_experts_per_tok", "n_routed_experts", "n_group",
                "topk_group", "norm_topk_prob", "routed_scaling_factor")
        return MiMoV2FlashConfig(
            num_attention_heads=N, num_key_value_heads=K, head_dim=H, v_head_dim=V, rope_parameters=rope,
            layer_types=["sliding_attention" if slides else "full_attention" for slides in layer_pattern(config)],
            mlp_layer_types=["sparse" if is_moe else "dense" for is_moe in moe_pattern(config)],
            sliding_window=window_keys(config), rms_norm_eps=config["layernorm_epsilon"],
            attention_value_scale=config.get("attention_value_scale"),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            eos_token_id=None, pad_token_id=None, bos_token_id=None,
            **{key: config[key] for key in same if key in config})

    def load(self, config: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
        """Refit the attention modules to the checkpoint's geometry, then fill every parameter from its hub tensor."""
        nn, D = self.torch.nn, config["hidden_size"]
        for layer, slides in zip(self.model.model.layers, layer_pattern(config), strict=True):
            N, K, H, V = attention_sizes(config, slides)
            attn = layer.self_attn
            attn.head_dim, attn.v_head_dim, attn.num_key_value_groups, attn.scaling = H, V, N // K, H**-0.5
            attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj = (
                nn.Linear(size_in, size_out, bias=False)
                for size_in, size_out in ((D, N * H), (D, K * H), (D, K * V), (N * V, D)))
            has_sinks = config.get("add_swa_attention_sink_bias" if slides else "add_full_attention_sink_bias", False)
            attn.sinks = nn.Parameter(self.torch.zeros(N)) if has_sinks else None
        state = {name: self.torch.from_numpy(value) for name, value in self.renamed(config, weights)}
        self.model.load_state_dict(state)
        self.model.requires_grad_(False)

    @staticmethod
    def renamed(config: dict[str, Any], weights: dict[str, np.ndarray]) -> Any:
        """(transformers' name, value) of every parameter; experts stacked, gate over up."""
        for name, value in weights.items():
            if ".experts." not in name:
                yield name.replace("attention_sink_bias", "sinks"), value
        if config.get("tie_word_embeddings"):
            yield "lm_head.weight", weights["model.embed_tokens.weight"]
        for i in (i for i, is_moe in enumerate(moe_pattern(config)) if is_moe):
            experts = [f"model.layers.{i}.mlp.experts.{e}" for e in range(config["n_routed_experts"])]
            yield f"model.layers.{i}.mlp.experts.gate_up_proj", np.stack(
                [np.concatenate([weights[f"{e}.gate_proj.weight"], weights[f"{e}.up_proj.weight"]]) for e in experts])
            yield f"model.layers.{i}.mlp.experts.down_proj", np.stack(
                [weights[f"{e}.down_proj.weight"] for e in experts])

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        with self.torch.inference_mode():
            return self.model(self.torch.from_numpy(tokens_BT).long()).logits.numpy()

    def greedy(self, prompts_BT: np.ndarray, num_new: int) -> Greedy:
        torch = self.torch
        with torch.inference_mode():
            start = time.perf_counter()
            out = self.model(torch.from_numpy(prompts_BT).long(), use_cache=True, logits_to_keep=1)
            tokens = [out.logits[:, -1].argmax(-1)]
            first = time.perf_counter()
            for _ in range(num_new - 1):
                out = self.model(tokens[-1][:, None], cache=out.cache, use_cache=True)
                tokens.append(out.logits[:, -1].argmax(-1))
            return Greedy(torch.stack(tokens, 1).numpy(), first - start, time.perf_counter() - first)


class Mlx:
    """mlx-lm's model on its CPU device."""

    def __init__(self, folder: str | Path):
        from importlib.metadata import version

        import mlx.core as mx
        from mlx_lm.models import mimo_v2_flash

        mx.set_default_device(mx.cpu)
        self.mx, self.version = mx, f"{version('mlx-lm')}, mlx {version('mlx')}"
        config, weights = read_hub(folder)
        if config.get("tie_word_embeddings"):
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        full_theta, swa_theta, share = rope_settings(config)
        told = config | {
            "sliding_window_size": window_keys(config), "rope_theta": full_theta, "swa_rope_theta": swa_theta,
            "partial_rotary_factor": share, "hybrid_layer_pattern": [int(kind) for kind in layer_pattern(config)],
            "moe_layer_freq": [int(kind) for kind in moe_pattern(config)]}
        self.model = mimo_v2_flash.Model(mimo_v2_flash.ModelArgs.from_dict(told))
        arrays = self.model.sanitize({name: mx.array(value) for name, value in weights.items()})
        self.model.load_weights(list(arrays.items()), strict=True)
        mx.eval(self.model.parameters())

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        return np.array(self.model(self.mx.array(tokens_BT)))

    def greedy(self, prompts_BT: np.ndarray, num_new: int) -> Greedy:
        mx, cache = self.mx, self.model.make_cache()
        start = time.perf_counter()
        hidden_BTD = self.model.model(mx.array(prompts_BT), cache)
        tokens = [mx.argmax(self.model.lm_head(hidden_BTD[:, -1]), axis=-1)]
        mx.eval(tokens[-1])
        first = time.perf_counter()
        for _ in range(num_new - 1):
            tokens.append(mx.argmax(self.model(tokens[-1][:, None], cache)[:, -1], axis=-1))
            mx.eval(tokens[-1])
        end = time.perf_counter()
        return Greedy(np.array(mx.stack(tokens, 1)), first - start, end - first)
