"""Small models with the real head sizes, 192 and 128, in every released layout: what write_release is called with.

Widths are no multiples of 128, so blocks at the edges are partial; ranks and kv heads are those of the releases, so
scales straddle K and V as they do there.
"""
from typing import Any

from hub_maker import tiny_config

HEADS = dict(num_attention_heads=16, swa_num_attention_heads=16, head_dim=192, swa_head_dim=192, v_head_dim=128,
             swa_v_head_dim=128, num_key_value_heads=4, swa_num_key_value_heads=8)
SIZES = dict(hidden_size=160, vocab_size=288, intermediate_size=200, moe_intermediate_size=96, n_routed_experts=4,
             num_hidden_layers=3, hybrid_layer_pattern=[0, 1, 0], moe_layer_freq=[0, 1, 1])
FUSED = dict(architectures=["MiMoV2ForCausalLM"], model_type="mimo_v2", attention_projection_layout="fused_qkv")
EIGHT = dict(num_key_value_heads=8, swa_num_key_value_heads=8)
ONE = dict(num_attention_heads=2, swa_num_attention_heads=2, num_key_value_heads=1, swa_num_key_value_heads=1)
WIDE = dict(hidden_size=256, intermediate_size=384, moe_intermediate_size=256)    # no partial blocks along widths


def small_config(**changes: Any) -> dict[str, Any]:
    """A V2-Flash of three layers (full, sliding, full; the first dense), 4 experts, width 160, with `changes`."""
    return tiny_config(**(HEADS | SIZES | changes))


# name -> (config, keyword arguments of write_release)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "v2_flash": (small_config(), {"kind": "fp8", "mtp": 3}),
    "v2_flash_grid": (small_config(), {"kind": "fp8", "mtp": 3, "qkv": "plain"}),
    "v2_flash_wide": (small_config(**WIDE), {"kind": "fp8", "mtp": 3}),
    "v25": (small_config(**FUSED), {"kind": "fp8", "mtp": 3}),
    "v25_plain": (small_config(**FUSED), {"kind": "fp8", "mtp": 3, "qkv": "plain"}),
    "v25_pro": (small_config(**FUSED, **EIGHT), {"kind": "fp8", "mtp": 3}),
    "v26_flash": (small_config(**FUSED, moe_router_dtype="bfloat16"), {"kind": "mxfp4", "mtp": 3}),
    "v26_pro": (small_config(**FUSED, **EIGHT, moe_router_dtype="bfloat16"), {"kind": "mxfp4", "mtp": 3}),
    "one_kv_head": (small_config(**FUSED, **ONE), {"kind": "fp8", "mtp": 1}),
    "one_kv_head_split": (small_config(**ONE), {"kind": "fp8", "mtp": 1}),
    "split_mxfp4": (small_config(), {"kind": "mxfp4", "mtp": 1}),
    "bfloat16": (small_config(**FUSED), {"kind": "bfloat16", "mtp": 1}),
}
