"""What a release of MiMo-V2 holds: every tensor's name, dtype and shape, out of a hub config (MODEL.md 3.4, 4 and 6).

Nothing of jaxllm is used, so that reading such files back tests both sides. Letters: D model, N query heads, K kv
heads, H q/k head, V v head, F dense hidden, E experts, I expert hidden, W vocabulary; matrices are [out, in].
"""
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

KINDS = ("fp8", "mxfp4", "bfloat16")
BLOCK, GROUP = 128, 32          # FP8: one scale for 128 x 128 codes; MXFP4: one for 32 codes of a row
ITEMSIZE = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}


@dataclass(frozen=True)
class Tensor:
    """One tensor to be written: safetensors `dtype`, `shape`, and which `values`, a method of Pools, it takes."""
    name: str
    dtype: str
    shape: tuple[int, ...]
    values: str
    std: float = 1.0      # of the weights; codes have one of their own, and the scale makes up for it
    mean: float = 0.0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass
class Unit:
    """Tensors that stay together in a file: a matrix with its scale, or all of an expert. `expert` of how many."""
    tensors: list[Tensor]
    expert: tuple[int, int] = (0, 1)
    is_mtp: bool = False
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors)


def cut_config(config: dict[str, Any], kind: str, layers: int | None = None, experts: int | None = None,
               mtp: int = 0) -> dict[str, Any]:
    """`config` with its first `layers` layers, `experts` experts and a quantization_config that says `kind`."""
    depth, config = config["num_hidden_layers"], dict(config)
    if layers is not None and not 1 <= layers <= depth:
        raise ValueError(f"layers={layers}: expected 1 to {depth}, the config's num_hidden_layers")
    config["num_hidden_layers"] = layers or depth
    for key in ("hybrid_layer_pattern", "moe_layer_freq"):
        if isinstance(config.get(key), list):
            config[key] = config[key][:layers]
    if experts is not None:
        config["n_routed_experts"] = experts
        config["num_experts_per_tok"] = min(experts, config["num_experts_per_tok"])
    if "num_nextn_predict_layers" in config:       # V2.6 states them, the releases before it just hold them
        config["num_nextn_predict_layers"] = mtp
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = "bfloat16"
    stated = config.pop("quantization_config", {})
    if kind != "bfloat16":
        config["quantization_config"] = quantization(config["num_hidden_layers"], kind, "store_dtype" in stated)
    return config


def quantization(layers: int, kind: str, says_store_dtype: bool) -> dict[str, Any]:
    """MODEL.md 1.3: both kinds are "fp8" by quant_method; some FP8 releases say store_dtype, all MXFP4 ones do."""
    # The last name is no tensor's; it stands for the MTP blocks' o_proj.
    ignored = [f"model.layers.{i}.self_attn.o_proj" for i in range(layers)] + ["model.decoder.self_attn.o_proj"]
    stored = {"store_dtype": "mxfp4", "mxfp4_block_size": GROUP} if kind == "mxfp4" else \
        {"store_dtype": "fp8"} if says_store_dtype else {}
    return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK], **stored, "ignored_layers": ignored}


def layer_kinds(config: dict[str, Any]) -> list[tuple[bool, bool]]:
    """(slides, has experts) of each layer, with the dialect's defaults for absent keys (MODEL.md 1.1)."""
    layers, every = config["num_hidden_layers"], config.get("hybrid_block_size")
    slides = config.get("hybrid_layer_pattern") or [every and (i + 1) % every for i in range(layers)]
    freq = config.get("moe_layer_freq") or [0] * layers
    moe = freq if isinstance(freq, list) else [i % freq == 0 for i in range(layers)]
    return [(bool(s), bool(m)) for s, m in zip(slides, moe, strict=True)]


def head_sizes(config: dict[str, Any], slides: bool) -> tuple[int, int, int, int]:
    """(N, K, H, V) of a full or sliding layer."""
    N, K = config["num_attention_heads"], config["num_key_value_heads"]
    H = config.get("head_dim") or config["hidden_size"] // N
    if not slides:
        return N, K, H, config.get("v_head_dim") or H
    H = config.get("swa_head_dim") or H
    return (config.get("swa_num_attention_heads") or N, config.get("swa_num_key_value_heads") or K, H,
            config.get("swa_v_head_dim") or H)


def blocks(size: int) -> int:
    return -(-size // BLOCK)


def matrix(name: str, rows: int, width: int, kind: str, gain: float = 1.0, scale_rows: int | None = None) -> Unit:
    """A projection [rows, width] that maps inputs of unit variance to outputs of standard deviation `gain`.

    `scale_rows`: rows of an FP8 scale whose blocks are not simply counted from row 0.
    """
    std, weight = gain / width**0.5, f"{name}.weight"
    if kind == "bfloat16":
        return Unit([Tensor(weight, "BF16", (rows, width), "normal", std)])
    if kind == "fp8":
        shape = (blocks(rows) if scale_rows is None else scale_rows, blocks(width))
        return Unit([Tensor(weight, "F8_E4M3", (rows, width), "fp8_codes"),
                     Tensor(f"{weight}_scale_inv", "F32", shape, "fp8_scales", std)])
    if width % GROUP:
        raise ValueError(f"{weight}: {width} inputs; MXFP4 wants a multiple of {GROUP}")
    return Unit([Tensor(weight, "U8", (rows, width // 2), "fp4_codes"),
                 Tensor(f"{weight}_scale", "U8", (rows, width // GROUP), "fp4_scales", std)])


def vector(name: str, size: int, std: float, mean: float = 0.0, dtype: str = "BF16") -> Unit:
    return Unit([Tensor(name, dtype, (size,), "normal", std, mean)])


def norm(name: str, size: int) -> Unit:
    return vector(f"{name}.weight", size, 0.2, mean=1.0)


def join(units: Iterable[Unit], **place: Any) -> Unit:
    return Unit([tensor for unit in units for tensor in unit.tensors], **place)


def attention(config: dict[str, Any], prefix: str, slides: bool, kind: str, qkv: str) -> Iterator[Unit]:
    D, (N, K, H, V) = config["hidden_size"], head_sizes(config, slides)
    if config.get("attention_projection_layout") == "fused_qkv":
        # MODEL.md 4.4: every layer has as many ranks as a full one has kv heads; blocks of rows begin anew with each.
        ranks, rows = config["num_key_value_heads"], N * H + K * (H + V)
        if N % ranks or K % ranks:
            raise ValueError(f"{prefix}.qkv_proj: {N} query and {K} kv heads are not divisible by {ranks} ranks")
        chunks = ranks if qkv == "released" else 1
        yield matrix(f"{prefix}.qkv_proj", rows, D, kind, scale_rows=chunks * blocks(rows // chunks))
    else:
        # MODEL.md 4.3: on full layers the blocks are those of each kv head's stacked K and V rows; the one that
        # straddles them is in K's scale.
        stacked = kind == "fp8" and qkv == "released" and not slides
        in_k, in_v = blocks(H), blocks(H + V) - blocks(H)
        if stacked and not in_v:
            raise ValueError(f"{prefix}: v heads of {V} after k heads of {H} begin no block of {BLOCK}, so stacked "
                             "scales leave v_proj none; use qkv='plain' or larger heads")
        yield matrix(f"{prefix}.q_proj", N * H, D, kind)
        yield matrix(f"{prefix}.k_proj", K * H, D, kind, scale_rows=K * in_k if stacked else None)
        yield matrix(f"{prefix}.v_proj", K * V, D, kind, scale_rows=K * in_v if stacked else None)
    yield matrix(f"{prefix}.o_proj", D, N * V, "bfloat16", gain=2.0)
    if config.get("add_swa_attention_sink_bias" if slides else "add_full_attention_sink_bias"):
        yield vector(f"{prefix}.attention_sink_bias", N, 1.0, mean=1.0)


def mlp(prefix: str, D: int, F: int, kind: str) -> list[Unit]:
    return [matrix(f"{prefix}.gate_proj", F, D, kind), matrix(f"{prefix}.up_proj", F, D, kind),
            matrix(f"{prefix}.down_proj", D, F, kind, gain=2.0)]


def moe(config: dict[str, Any], prefix: str, kind: str) -> Iterator[Unit]:
    D, E = config["hidden_size"], config["n_routed_experts"]
    router = "BF16" if config.get("moe_router_dtype") == "bfloat16" else "F32"
    yield Unit([Tensor(f"{prefix}.gate.weight", router, (E, D), "normal", D**-0.5)])
    yield vector(f"{prefix}.gate.e_score_correction_bias", E, 0.2, dtype="F32")
    for e in range(E):
        yield join(mlp(f"{prefix}.experts.{e}", D, config["moe_intermediate_size"], kind), expert=(e, E))


def mtp_block(config: dict[str, Any], k: int, kind: str, qkv: str) -> Iterator[Unit]:
    prefix, D = f"model.mtp.layers.{k}", config["hidden_size"]
    for name in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
        yield norm(f"{prefix}.{name}", D)
    yield matrix(f"{prefix}.eh_proj", D, 2 * D, "bfloat16")
    yield from attention(config, f"{prefix}.self_attn", slides=True, kind=kind, qkv=qkv)
    yield from mlp(f"{prefix}.mlp", D, config["intermediate_size"], kind)


def release(config: dict[str, Any], kind: str, mtp: int = 0, qkv: str = "released", towers: bool = False,
            ) -> Iterator[Unit]:
    """Everything that a release of a config that was cut holds, in file order."""
    D, W = config["hidden_size"], config["vocab_size"]
    dense_kind = "bfloat16" if kind == "bfloat16" else "fp8"          # experts alone are ever MXFP4
    yield Unit([Tensor("model.embed_tokens.weight", "BF16", (W, D), "normal", 1.0)])
    for i, (slides, has_experts) in enumerate(layer_kinds(config)):
        prefix = f"model.layers.{i}"
        yield norm(f"{prefix}.input_layernorm", D)
        yield from attention(config, f"{prefix}.self_attn", slides, dense_kind, qkv)
        yield norm(f"{prefix}.post_attention_layernorm", D)
        if has_experts:
            yield from moe(config, f"{prefix}.mlp", kind)
        else:
            yield from mlp(f"{prefix}.mlp", D, config["intermediate_size"], dense_kind)
    yield norm("model.norm", D)
    if not config.get("tie_word_embeddings"):
        yield matrix("lm_head", W, D, "bfloat16", gain=2.0)
    for k in range(mtp):
        yield join(mtp_block(config, k, dense_kind, qkv), is_mtp=True)
    if towers:
        for key in ("vision_config", "audio_config"):
            if key not in config:
                raise ValueError(f"towers: the config has no {key!r}; only V2.5, V2.6-Flash and V2.6-Pro have towers")
        yield from vision(config)
        yield from audio(config)


def vision(config: dict[str, Any]) -> Iterator[Unit]:
    """MODEL.md 6.1: 364 tensors in the releases."""
    c = config["vision_config"]
    D, F, width = c["hidden_size"], c["intermediate_size"], 64      # of a head; no key states it
    heads, kv_heads = c["num_heads"], c["num_key_value_heads"]
    pixels = (c["in_chans"], c["temporal_patch_size"], c["patch_size"], c["patch_size"])
    yield Unit([Tensor("visual.patch_embed.proj.weight", "BF16", (D, *pixels), "normal", math.prod(pixels)**-0.5)])
    for i, window in enumerate(c["vit_window_attn_types"]):
        prefix = f"visual.blocks.{i}"
        yield norm(f"{prefix}.norm1", D)
        yield from biased(f"{prefix}.attn.qkv", (heads + 2 * kv_heads) * width, D)
        yield from biased(f"{prefix}.attn.proj", D, heads * width)
        if window >= 0:
            yield vector(f"{prefix}.attn.sinks", heads, 1.0)
        yield norm(f"{prefix}.norm2", D)
        for name, rows, columns in (("gate", F, D), ("up", F, D), ("down", D, F)):
            yield from biased(f"{prefix}.mlp.{name}_proj", rows, columns)
    yield norm("visual.merger.ln_q", D)
    merged = D * c["spatial_merge_size"]**2
    yield matrix("visual.merger.mlp.0", merged, merged, "bfloat16")
    yield matrix("visual.merger.mlp.2", c["out_hidden_size"], merged, "bfloat16")


def audio(config: dict[str, Any]) -> Iterator[Unit]:
    """MODEL.md 6.2, steps 3 and 4: code embeddings, a small Qwen2, a projection; 95 tensors in the releases."""
    c = config["audio_config"]
    D, F, prefix = c["input_local_dim"], c["input_local_intermediate_size"], "audio_encoder.input_local_transformer"
    for level in range(c["audio_channels"]):
        shape = (int(c["speech_vocab_size"]), D)
        yield Unit([Tensor(f"speech_embeddings.{level}.weight", "BF16", shape, "normal", 1.0)])
    for i in range(c["input_local_layers"]):
        layer = f"{prefix}.layers.{i}"
        yield norm(f"{layer}.input_layernorm", D)
        for name in "qkv":
            yield from biased(f"{layer}.self_attn.{name}_proj", D, D)
        yield matrix(f"{layer}.self_attn.o_proj", D, D, "bfloat16")
        yield norm(f"{layer}.post_attention_layernorm", D)
        yield from mlp(f"{layer}.mlp", D, F, "bfloat16")
    yield norm(f"{prefix}.norm", D)
    grouped = D * c["group_size"]
    yield matrix("audio_encoder.projection.mlp.0", 4 * grouped, grouped, "bfloat16")
    yield matrix("audio_encoder.projection.mlp.2", c["out_hidden_size"], 4 * grouped, "bfloat16")


def biased(name: str, rows: int, width: int) -> Iterator[Unit]:
    yield matrix(name, rows, width, "bfloat16")
    yield vector(f"{name}.bias", rows, 0.02)


def count_elements(units: Iterable[Unit]) -> Counter[str]:
    """safetensors dtype -> elements; "tensors" -> how many tensors; "bytes" -> their bytes."""
    count: Counter[str] = Counter()
    for tensor in (tensor for unit in units for tensor in unit.tensors):
        count += Counter({tensor.dtype: math.prod(tensor.shape), "tensors": 1, "bytes": tensor.nbytes})
    return count
