"""Config is strict: every refusal names its key, whatever a file holds, and valid configs survive every round trip."""
import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import BARE, CONFIGS, TINY

from jaxllm.config import Config, ConfigError
from jaxllm.config_hub import FIXED, FOLDED, IGNORED

SWA_PAIR = ("swa_num_attention_heads", "swa_num_key_value_heads")


# ---- refusals ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, names", [
    ({"num_key_value_head": 2}, ["num_key_value_head", "2", "'num_key_value_heads'"]),
    ({"rms_norm_eps": 1e-6}, ["rms_norm_eps", "1e-06", "nearest"]),
    ({"model_type": "mimo"}, ["'mimo'", "'mimo_v2_flash', 'mimo_v2'", "7B"]),
    ({"model_type": "qwen3"}, ["'qwen3'", "mimo_v2", "drafters"]),
    ({"model_type": ["mimo_v2"]}, ["model_type", "mimo_v2"]),
    ({"model_type": None}, ["model_type", "missing"]),
    ({"hidden_size": None}, ["hidden_size", "missing"]),
    ({"vocab_size": None}, ["vocab_size", "missing"]),
    ({"rope_theta": None}, ["rope_theta", "missing"]),
    ({"hidden_size": 0}, ["hidden_size", "0", "integer"]),
    ({"hidden_size": -32}, ["hidden_size", "-32"]),
    ({"hidden_size": True}, ["hidden_size", "True"]),
    ({"hidden_size": 32.0}, ["hidden_size", "32.0"]),
    ({"vocab_size": "64"}, ["vocab_size", "'64'"]),
    ({"vocab_size": 2**31}, ["vocab_size", "2147483647"]),
    ({"intermediate_size": [48]}, ["intermediate_size", "[48]"]),
    ({"num_hidden_layers": 1001}, ["num_hidden_layers", "1001", "1000"]),
    ({"num_hidden_layers": 4}, ["hybrid_layer_pattern", "3 entries", "num_hidden_layers is 4"]),
    ({"hybrid_layer_pattern": [0, 1]}, ["hybrid_layer_pattern", "[0, 1]", "2 entries"]),
    ({"hybrid_layer_pattern": [0, 1, 2]}, ["hybrid_layer_pattern", "[0, 1, 2]", "0 and 1"]),
    ({"hybrid_layer_pattern": [False, True, True]}, ["hybrid_layer_pattern", "True"]),
    ({"hybrid_layer_pattern": "011"}, ["hybrid_layer_pattern", "'011'"]),
    ({"hybrid_block_size": 0}, ["hybrid_block_size", "0"]),
    ({"moe_layer_freq": [0, 1, 1, 1]}, ["moe_layer_freq", "4 entries"]),
    ({"moe_layer_freq": [0, 1, 0.5]}, ["moe_layer_freq", "0.5"]),
    ({"moe_layer_freq": 0}, ["moe_layer_freq", "0"]),
    ({"moe_layer_freq": True}, ["moe_layer_freq", "True"]),
    ({"num_attention_heads": 5}, ["num_attention_heads", "5", "num_key_value_heads 2"]),
    ({"swa_num_attention_heads": 6}, ["swa_num_attention_heads", "6", "swa_num_key_value_heads 4"]),
    ({"head_dim": None, "num_attention_heads": 6}, ["num_attention_heads", "6", "hidden_size 32"]),
    ({"attention_projection_layout": "fused_qkv", "swa_num_key_value_heads": 1},
     ["swa_num_key_value_heads", "num_key_value_heads 2", "fused_qkv"]),
    ({"attention_projection_layout": "fused"}, ["attention_projection_layout", "'fused'", "'split', 'fused_qkv'"]),
    ({"partial_rotary_factor": 0.3}, ["partial_rotary_factor", "0.3", "head_dim 12", "3", "even"]),
    ({"partial_rotary_factor": 0.01}, ["partial_rotary_factor", "0.01", "even"]),
    ({"partial_rotary_factor": 1.5}, ["partial_rotary_factor", "1.5", "(0, 1]"]),
    ({"partial_rotary_factor": 0}, ["partial_rotary_factor", "0"]),
    ({"rope_theta": math.nan}, ["rope_theta", "JSON"]),
    ({"attention_value_scale": math.inf}, ["attention_value_scale", "JSON"]),
    ({"attention_value_scale": 1e300}, ["attention_value_scale", "1e+300", "float32"]),
    ({"rope_theta": 10**400}, ["rope_theta", "float32"]),
    ({"layernorm_epsilon": -1e-5}, ["layernorm_epsilon", "-1e-05"]),
    ({"layernorm_epsilon": True}, ["layernorm_epsilon", "True"]),
    ({"layernorm_epsilon": "1e-5"}, ["layernorm_epsilon", "'1e-5'"]),
    ({"rope_scaling": {"rope_type": "yarn"}}, ["rope_scaling.rope_type", "'yarn'", "'default'"]),
    ({"rope_scaling": {"type": "default", "factor": 4}}, ["rope_scaling.factor", "4", "type"]),
    ({"rope_scaling": "default"}, ["rope_scaling", "'default'", "object"]),
    ({"rope_parameters": {"full_attention": {}}}, ["rope_parameters.full_attention", "rope_theta"]),
    ({"rope_parameters": {"rope_theta": "1e7"}}, ["rope_parameters.rope_theta", "'1e7'"]),
    ({"sliding_window": 0}, ["sliding_window", "0"]),
    ({"sliding_window": None}, ["sliding_window", "hybrid_layer_pattern"]),
    ({"sliding_window_size": 9}, ["sliding_window_size", "9", "contradicts", "8"]),
    ({"sliding_window_size": "9"}, ["sliding_window_size", "'9'"]),
    ({"sliding_window_counts_query": 1}, ["sliding_window_counts_query", "1", "true or false"]),
    ({"torch_dtype": "float8"}, ["torch_dtype", "'float8'", "'bfloat16'"]),
    ({"dtype": "float32"}, ["torch_dtype", "contradicts", "'float32'"]),
    ({"n_routed_experts": None}, ["n_routed_experts", "moe_layer_freq"]),
    ({"moe_intermediate_size": None}, ["moe_intermediate_size", "moe_layer_freq"]),
    ({"n_group": 3}, ["n_routed_experts", "8", "n_group 3"]),
    ({"n_group": 8}, ["n_group", "8", "at least two"]),
    ({"topk_group": 5}, ["topk_group", "5", "n_group 4"]),
    ({"num_experts_per_tok": 5}, ["num_experts_per_tok", "5", "only 4", "topk_group 2 of n_group 4"]),
    ({"moe_router_dtype": "float16"}, ["moe_router_dtype", "'float16'", "absent, 'float32', 'bfloat16'"]),
    ({"n_shared_experts": 1}, ["n_shared_experts", "1", "accepted: 0, absent"]),
    ({"n_shared_experts": False}, ["n_shared_experts", "False"]),
    ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
    ({"scoring_func": "softmax"}, ["scoring_func", "'softmax'", "'sigmoid'"]),
    ({"topk_method": "greedy"}, ["topk_method", "'greedy'", "'noaux_tc'"]),
    ({"attention_bias": True}, ["attention_bias", "True", "False"]),
    ({"attention_bias": 0}, ["attention_bias", "0", "False"]),
    ({"norm_topk_prob": 1}, ["norm_topk_prob", "1", "true or false"]),
    ({"tie_word_embeddings": "no"}, ["tie_word_embeddings", "'no'"]),
    ({"eos_token_id": 64}, ["eos_token_id", "64", "vocab_size 64"]),
    ({"eos_token_id": [3, 99]}, ["eos_token_id", "99", "vocab_size 64"]),
    ({"eos_token_id": [3, None]}, ["eos_token_id", "None"]),
    ({"pad_token_id": -1}, ["pad_token_id", "-1"]),
    ({"num_nextn_predict_layers": -1}, ["num_nextn_predict_layers", "-1"]),
    ({"quantization_config": "fp8"}, ["quantization_config", "'fp8'", "object"]),
    ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config.quant_method", "'awq'", "'fp8'"]),
    ({"quantization_config": {}}, ["quantization_config.quant_method", "None", "'fp8'"]),
    ({"quantization_config": {"quant_method": "fp8", "store_dtype": "nvfp4"}},
     ["quantization_config.store_dtype", "'nvfp4'", "'mxfp4'"]),
    ({"architectures": {1, 2}}, ["architectures", "JSON"]),
])
def test_refused(changes, names):
    with pytest.raises(ConfigError) as error:
        Config.from_dict(TINY | changes, source="somewhere/config.json")
    for name in ["somewhere/config.json", *names]:
        assert name in str(error.value)


@pytest.mark.parametrize("key", sorted(BARE))
def test_a_missing_required_key_is_named(key):
    with pytest.raises(ConfigError, match=f"'{key}' is missing"):
        Config.from_dict({k: v for k, v in BARE.items() if k != key})


@pytest.mark.parametrize("name, text, says", [
    ("config.json", b"{", "not a usable JSON object"),
    ("config.json", b"[1, 2]", "list"),
    ("config.json", b"\xff\xfe{}", "not a usable JSON object"),
    ("config.json", b'{"hidden_size": 1, "hidden_size": 2}', "'hidden_size' is given twice"),
    ("config.json", b'{"rope_scaling": {"type": "default", "type": "default"}}', "'type' is given twice"),
    ("config.json", b"[" * 100_000, "not a usable JSON object"),
    ("config.json", json.dumps(TINY).replace("1e-05", "NaN").encode(), "layernorm_epsilon"),
    ("config.json", json.dumps(TINY).replace("5000000", "9" * 5000).encode(), "not a usable JSON object"),
    ("elsewhere.json", b"{}", "no such file"),
])
def test_bad_files_are_named(tmp_path, name, text, says):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ConfigError, match=says) as error:
        Config.from_hub(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_absent_folder_and_absent_file_are_named(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path / "nowhere.json"):
        with pytest.raises(ConfigError, match="no such file") as error:
            Config.from_hub(path)
        assert str(path) in str(error.value)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match="cannot be read"):
        Config.from_hub(tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match="expected a dict"):
        Config.from_dict([("hidden_size", 32)])


# ---- properties ----------------------------------------------------------------------------------------------------

@st.composite
def hub_configs(draw):
    """Valid hub dicts, with optional keys present or absent at random."""
    small = st.integers(1, 8)
    layers, kv, swa_kv, groups = (draw(small) for _ in range(4))
    per_group = draw(st.integers(2, 6))
    topk_group = draw(st.integers(1, groups))
    flags = st.lists(st.integers(0, 1), min_size=layers, max_size=layers)
    hub = {
        "model_type": draw(st.sampled_from(["mimo_v2", "mimo_v2_flash"])), "hidden_size": draw(st.integers(1, 512)),
        "intermediate_size": draw(small), "num_hidden_layers": layers, "vocab_size": draw(st.integers(10, 999)),
        "max_position_embeddings": draw(small), "layernorm_epsilon": draw(st.floats(1e-8, 1e-2)),
        "num_attention_heads": kv * draw(small), "num_key_value_heads": kv, "head_dim": 2 * draw(small),
        "rope_theta": draw(st.one_of(st.integers(1, 10**8), st.floats(1.0, 1e8))),
        "hybrid_layer_pattern": draw(flags), "moe_layer_freq": draw(flags), "sliding_window": draw(small),
        "n_routed_experts": groups * per_group, "n_group": groups, "topk_group": topk_group,
        "num_experts_per_tok": draw(st.integers(1, topk_group * per_group)), "moe_intermediate_size": draw(small),
    }
    optional = {
        "v_head_dim": small, "swa_num_attention_heads": st.just(swa_kv * draw(small)),
        "swa_num_key_value_heads": st.just(swa_kv), "swa_head_dim": small.map(lambda n: 2 * n), "swa_v_head_dim": small,
        "swa_rope_theta": st.floats(1.0, 1e6), "attention_value_scale": st.floats(0.1, 2.0),
        "tie_word_embeddings": st.booleans(), "norm_topk_prob": st.booleans(), "dtype": st.just("float16"),
        "add_swa_attention_sink_bias": st.booleans(), "add_full_attention_sink_bias": st.booleans(),
        "eos_token_id": st.one_of(st.integers(0, 9), st.lists(st.integers(0, 9))), "n_shared_experts": st.none(),
        "num_nextn_predict_layers": st.integers(0, 3), "sliding_window_counts_query": st.booleans(),
        "rope_parameters": st.fixed_dictionaries({}, optional={"rope_theta": st.floats(1.0, 1e8),
                                                               "rope_type": st.just("default")}),
    }
    hub |= {key: draw(values) for key, values in optional.items() if key not in SWA_PAIR and draw(st.booleans())}
    if draw(st.booleans()) or hub["num_attention_heads"] % swa_kv:    # absent heads fall back as a pair
        hub |= {key: draw(optional[key]) for key in SWA_PAIR}
    return hub


@settings(max_examples=200, deadline=None)
@given(hub_configs())
def test_valid_configs_round_trip(hub):
    config = Config.from_dict(hub)
    assert config.to_dict() == hub and Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(json.loads(json.dumps(hub))) == config
    spelled_out = dataclasses.replace(config, hub_json="")           # no file behind it: every field is written
    assert Config.from_dict(spelled_out.to_dict()) == config == spelled_out
    assert hash(spelled_out) == hash(config) and len(config.layers) == config.num_hidden_layers
    count = config.count_parameters()
    assert 0 < count.active <= count.total and count.routers < count.total
    for layer in config.layers:
        assert layer.num_heads % layer.num_kv_heads == 0 and 0 < layer.rotary_dim <= layer.head_dim


FIELDS = [field.name for field in dataclasses.fields(Config) if field.name != "hub_json"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70) | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["default", "fp8", "fused_qkv", "bfloat16", "mimo_v2"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["rope_type", "type", "rope_theta", "quant_method"]) | st.text(max_size=4), inner, max_size=3),
    max_leaves=5)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from([TINY, BARE, json.loads((CONFIGS / "MiMo-V2.6-Flash" / "config.json").read_text())]),
       st.sampled_from([*FIELDS, *FIXED, *FOLDED, *IGNORED]) | st.text(max_size=12), JSON, st.booleans())
def test_any_mutation_parses_or_names_its_key(hub, key, value, delete):
    mutated = {k: v for k, v in hub.items() if k != key} | ({} if delete else {key: value})
    try:
        config = Config.from_dict(mutated)
    except ConfigError as error:
        assert repr(key)[1:-1] in str(error)
    else:
        assert Config.from_dict(config.to_dict()) == config
        assert config.count_parameters().total > 0 and hash(config) is not None
