"""Config: the released files, parameter counts, the dialect's corners, and a config as a value."""
import dataclasses
import json
import math
import pathlib
import pickle

import jax
import jax.numpy as jnp
import pytest

from jaxllm.config import Config, ConfigError, LayerSpec
from jaxllm.config_hub import FIXED, FOLDED, IGNORED

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
FLASH = ("MiMo-V2-Flash", "MiMo-V2-Flash-hub", "MiMo-V2.5", "MiMo-V2.6-Flash")
PRO = ("MiMo-V2.5-Pro", "MiMo-V2.5-Pro-FP4-DFlash", "MiMo-V2.6-Pro")
FLASH_FULL = (0, 5, 11, 17, 23, 29, 35, 41, 47)
PRO_FULL = (0, 7, 15, 23, 31, 39, 47, 55, 62, 69)

TINY = {
    "model_type": "mimo_v2_flash", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64,
    "max_position_embeddings": 256, "layernorm_epsilon": 1e-5, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 12, "v_head_dim": 8, "swa_num_attention_heads": 8, "swa_num_key_value_heads": 4, "swa_head_dim": 16,
    "swa_v_head_dim": 10, "rope_theta": 5000000, "swa_rope_theta": 10000, "partial_rotary_factor": 0.5,
    "sliding_window": 8, "hybrid_layer_pattern": [0, 1, 1], "moe_layer_freq": [0, 1, 1], "n_routed_experts": 8,
    "num_experts_per_tok": 3, "moe_intermediate_size": 20, "n_group": 4, "topk_group": 2,
    "add_swa_attention_sink_bias": True, "attention_value_scale": 0.707, "num_nextn_predict_layers": 1,
    "eos_token_id": [3, 5], "bos_token_id": 1, "pad_token_id": 0, "torch_dtype": "bfloat16",
}
# The least that a config can say: nothing but what has no default.
BARE = {
    "model_type": "mimo_v2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 64,
    "max_position_embeddings": 256, "layernorm_epsilon": 1e-5, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rope_theta": 10000.0,
}


def tiny(**changes):
    return Config.from_dict(TINY | changes)


def bare(**changes):
    return Config.from_dict(BARE | changes)


# ---- released models ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FLASH + PRO)
def test_released_layers(name):
    config = Config.from_hub(CONFIGS / name)
    heads, full_kv, depth, full = (64, 4, 48, FLASH_FULL) if name in FLASH else (128, 8, 70, PRO_FULL)
    theta = 5e6 if name.startswith("MiMo-V2-Flash") else 1e7
    assert len(config.layers) == depth
    for i, layer in enumerate(config.layers):
        shared = dict(num_heads=heads, head_dim=192, v_head_dim=128, rotary_dim=64, is_moe=i > 0)
        if i in full:
            assert layer == LayerSpec(num_kv_heads=full_kv, rope_theta=theta, window=None, has_sinks=False, **shared)
        else:
            assert layer == LayerSpec(num_kv_heads=8, rope_theta=1e4, window=128, has_sinks=True, **shared)
    assert config.mtp_layer == dataclasses.replace(config.layers[1], is_moe=False)


@pytest.mark.parametrize("name", FLASH + PRO)
def test_released_facts(name):
    config = Config.from_hub(CONFIGS / name)
    flash, v26 = name in FLASH, "V2.6" in name
    assert config.attention_value_scale == (0.707 if flash else 0.612)
    assert config.layernorm_epsilon == (1e-6 if name == "MiMo-V2.6-Flash" else 1e-5)
    assert config.attention_projection_layout == ("split" if name.startswith("MiMo-V2-Flash") else "fused_qkv")
    assert config.moe_router_dtype == ("bfloat16" if v26 else None)
    assert config.num_nextn_predict_layers == (3 if v26 else None)
    assert config.eos_token_ids == (() if name.startswith("MiMo-V2-Flash") else (151645,))
    assert config.quantization_config["quant_method"] == "fp8"
    assert config.quantization_config.get("store_dtype") == (
        "mxfp4" if v26 or "FP4" in name else "fp8" if name == "MiMo-V2.5" else None)
    assert (config.dtype, config.n_group, config.routed_scaling_factor) == ("bfloat16", 1, 1.0)


@pytest.mark.parametrize("name", FLASH + PRO)
def test_released_parameter_counts(name):
    count = Config.from_hub(CONFIGS / name).count_parameters()
    if name in FLASH:
        assert (count.total, count.mtp_block) == (308_778_369_024, 329_252_864)
        assert round(count.active / 1e9, 3) == 15.396
    else:
        assert (count.total, count.mtp_block) == (1_021_247_225_856, 644_874_240)
        assert round(count.active / 1e9, 2) == 41.73


def test_both_spellings_of_flash_are_one_model():
    short, hub = (Config.from_hub(CONFIGS / name) for name in FLASH[:2])
    assert dataclasses.replace(short, quantization_config=None) == dataclasses.replace(hub, quantization_config=None)


def test_embedded_model():
    config = Config.from_hub(CONFIGS / "mimo-nano" / "config.json")    # a file works as well as its folder
    assert [layer.window for layer in config.layers] == [None, 128, 128, None, 128, 128]
    assert {layer.rotary_dim for layer in config.layers} == {16}
    assert (config.num_nextn_predict_layers, config.eos_token_ids) == (3, (0,))


# ---- counts against shapes written out -----------------------------------------------------------------------------

def hub_shapes(c, num_layers, tied):
    """Shapes of the text model's tensors by hub name, spelled out for TINY's geometry without the code under test."""
    shapes = {"embed": (64, 32), "norm": (32,)} | ({} if tied else {"lm_head": (64, 32)})
    for i in range(num_layers):
        N, K, H, V = (4, 2, 12, 8) if c["hybrid_layer_pattern"][i] == 0 else (8, 4, 16, 10)
        shapes |= {f"{i}.q": (N * H, 32), f"{i}.k": (K * H, 32), f"{i}.v": (K * V, 32), f"{i}.o": (32, N * V)}
        shapes |= {f"{i}.norm1": (32,), f"{i}.norm2": (32,)}
        if c["hybrid_layer_pattern"][i]:
            shapes[f"{i}.sink"] = (N,)
        experts = range(8) if c["moe_layer_freq"][i] else [None]
        F = 20 if c["moe_layer_freq"][i] else 48
        for e in experts:
            shapes |= {f"{i}.{e}.gate": (F, 32), f"{i}.{e}.up": (F, 32), f"{i}.{e}.down": (32, F)}
        if c["moe_layer_freq"][i]:
            shapes |= {f"{i}.router": (8, 32), f"{i}.bias": (8,)}
    return shapes


@pytest.mark.parametrize("tied", [False, True])
def test_counts_equal_the_sum_over_shapes(tied):
    count = tiny(tie_word_embeddings=tied).count_parameters()
    shapes = hub_shapes(TINY, 3, tied)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    matrices = {name for name, shape in shapes.items() if len(shape) == 2}
    routers = {name for name in matrices if name.endswith("router")}
    idle = {name for name in matrices for e in range(3, 8) if f".{e}." in name}    # three of eight experts are active
    assert count.total == sum(size[name] for name in matrices)
    assert count.routers == sum(size[name] for name in routers)
    assert count.active == sum(size[name] for name in matrices - routers - idle)
    assert count.vectors == sum(size.values()) - count.total
    assert count.mtp_block == 64 * 32 + 32 * (8 * 16 + 4 * 16 + 4 * 10 + 8 * 10) + 3 * 32 * 48


# ---- the dialect's corners -----------------------------------------------------------------------------------------

def test_absent_keys():
    config = bare()
    layer = LayerSpec(num_heads=4, num_kv_heads=2, head_dim=8, v_head_dim=8, rotary_dim=8, rope_theta=1e4, window=None,
                      has_sinks=False, is_moe=False)
    assert config.layers == (layer,) * 4
    assert config.attention_projection_layout == "split" and config.norm_topk_prob is True
    assert config.attention_value_scale == 1.0 and config.routed_scaling_factor == 1.0
    assert config.tie_word_embeddings is False and config.eos_token_ids == ()
    assert config.num_nextn_predict_layers is None and config.quantization_config is None
    assert (config.n_group, config.topk_group) == (1, 1)


def test_swa_defaults_are_the_full_values():
    config = bare(hybrid_layer_pattern=[0, 1, 0, 1], sliding_window=4)
    assert config.layers[1] == dataclasses.replace(config.layers[0], window=4)


def test_absent_swa_v_head_dim_is_swa_head_dim():
    config = bare(head_dim=16, v_head_dim=6, swa_head_dim=10, sliding_window=4)
    assert (config.v_head_dim, config.swa_v_head_dim) == (6, 10)
    assert bare(head_dim=16).v_head_dim == 16


@pytest.mark.parametrize("block, pattern", [(1, (0, 0, 0, 0)), (2, (1, 0, 1, 0)), (3, (1, 1, 0, 1)), (9, (1, 1, 1, 1))])
def test_hybrid_block_size(block, pattern):
    assert bare(hybrid_block_size=block, sliding_window=4).hybrid_layer_pattern == pattern


def test_a_stated_pattern_wins_over_hybrid_block_size():
    config = bare(hybrid_block_size=2, hybrid_layer_pattern=[0, 0, 0, 1], sliding_window=4)
    assert config.hybrid_layer_pattern == (0, 0, 0, 1)


@pytest.mark.parametrize("freq, pattern", [(1, (1, 1, 1, 1)), (2, (1, 0, 1, 0)), (3, (1, 0, 0, 1))])
def test_integer_moe_layer_freq(freq, pattern):
    config = bare(moe_layer_freq=freq, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    assert tuple(layer.is_moe for layer in config.layers) == pattern


def test_experts_without_expert_layers_are_all_dense():
    assert not any(layer.is_moe for layer in bare(n_routed_experts=4).layers)


def test_rope_parameters_override_flat_keys():
    config = bare(partial_rotary_factor=1.0, rope_scaling={"rope_type": "default", "type": "default"},
                  rope_parameters={"rope_theta": 7e6, "partial_rotary_factor": 0.5, "rope_type": "default"})
    assert (config.rope_theta, config.partial_rotary_factor, config.layers[0].rotary_dim) == (7e6, 0.5, 4)
    assert bare(rope_theta=None, rope_parameters={"rope_theta": 3e6}).swa_rope_theta == 3e6


@pytest.mark.parametrize("counts_query, window", [(True, 8), (False, 9)])
def test_window_convention(counts_query, window):
    for config in (tiny(sliding_window_counts_query=counts_query),
                   dataclasses.replace(tiny(), sliding_window_counts_query=counts_query)):
        assert [layer.window for layer in config.layers] == [None, window, window]
        assert config.mtp_layer.window == window


def test_window_by_its_other_name():
    assert bare(sliding_window_size=16).sliding_window == 16
    assert bare(sliding_window_size=16, sliding_window=16).sliding_window == 16


def test_null_means_absent():
    assert bare(**dict.fromkeys(("swa_head_dim", "routed_scaling_factor", "n_shared_experts", "rope_scaling",
                                 "hybrid_block_size", "moe_layer_freq", "eos_token_id"))) == bare()


def test_other_corners():
    assert tiny(n_shared_experts=0, hidden_act="silu", attention_bias=False) == tiny()
    assert tiny(swa_num_key_value_heads=8).layers[1].num_kv_heads == 8
    assert tiny(routed_scaling_factor=2.5).routed_scaling_factor == 2.5
    assert [layer.has_sinks for layer in tiny(add_full_attention_sink_bias=True).layers] == [True, True, True]
    assert tiny(eos_token_id=7).eos_token_ids == (7,) and tiny().eos_token_ids == (3, 5)
    assert tiny(dtype="bfloat16") == tiny()


def test_mtp_layer_needs_a_window():
    with pytest.raises(ConfigError, match="sliding_window"):
        _ = bare().mtp_layer


def test_ignored_keys_change_nothing_but_are_kept():
    for key, reason in IGNORED.items():
        assert reason
        config = tiny(**{key: {"anything": [1]}})
        assert config == tiny() and config.to_dict()[key] == {"anything": [1]}
    fields = {field.name for field in dataclasses.fields(Config)}
    assert not (set(IGNORED) & (fields | set(FIXED) | set(FOLDED))) and not (fields & (set(FIXED) | set(FOLDED)))


# ---- a value among values ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [path.parent.name for path in sorted(CONFIGS.glob("*/config.json"))])
def test_to_dict_is_what_was_read(name):
    file = CONFIGS / name / "config.json"
    hub = json.loads(file.read_text())
    config = Config.from_hub(file)
    assert list(config.to_dict().items()) == list(hub.items())
    assert Config.from_dict(config.to_dict()) == config and hash(Config.from_dict(hub)) == hash(config)
    assert pickle.loads(pickle.dumps(config)) == config


def test_replace_checks_and_round_trips():
    base = Config.from_hub(CONFIGS / "MiMo-V2.6-Flash")
    changed = dataclasses.replace(base, rope_theta=5e6, sliding_window=64, num_attention_heads=32, eos_token_id=(1, 2))
    assert changed != base and changed.layers[0].num_heads == 32 and changed.layers[1].num_heads == 64
    hub = changed.to_dict()
    assert Config.from_dict(hub) == changed
    assert hub["vision_config"] == base.to_dict()["vision_config"]
    with pytest.raises(ConfigError, match="num_attention_heads"):
        dataclasses.replace(base, num_attention_heads=63)
    halved = dataclasses.replace(bare(), num_attention_heads=2)    # swa heads were four by default, and stay so
    assert halved.swa_num_attention_heads == 4 and Config.from_dict(halved.to_dict()) == halved


def test_no_mutable_state_leaks():
    hub = json.loads((CONFIGS / "MiMo-V2.5" / "config.json").read_text())
    config = Config.from_dict(hub)
    before = json.dumps(config.to_dict())
    hub["quantization_config"]["quant_method"] = hub["vision_config"] = "changed"
    config.to_dict()["quantization_config"].clear()
    changed = dataclasses.replace(config, sliding_window=64)
    changed.to_dict()["quantization_config"].clear()
    given = {"quant_method": "fp8"}
    constructed = dataclasses.replace(config, quantization_config=given)
    given.clear()
    assert constructed.quantization_config == {"quant_method": "fp8"}
    assert json.dumps(config.to_dict()) == before and changed.quantization_config["quant_method"] == "fp8"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1


def test_static_argument_of_jit_is_recognised_as_equal():
    traced = []

    def scale(config, x):
        traced.append(config)
        return x * config.attention_value_scale

    compiled = jax.jit(scale, static_argnums=0)
    quantization = {"quant_method": "fp8"}
    for scale_value in (0.5, 0.5, 0.25):
        config = tiny(attention_value_scale=scale_value, quantization_config=quantization)
        assert compiled(config, jnp.float32(2)) == 2 * scale_value    # exact: powers of two
    assert len(traced) == 2    # one trace a distinct config, not one an object
