"""A hub folder against its config.json: what does not fit is named, what is no part of the text model is left out."""
import json
import re

import ml_dtypes
import numpy as np
import pytest
from hub_files import edit_json, edit_tensors
from hub_maker import tiny_config, write_hub
from safetensors.numpy import load_file, save_file

from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.checkpoint.names import count_mtp, left_out


@pytest.fixture
def folder(tmp_path):
    write_hub(tmp_path, tiny_config())
    return tmp_path


def test_towers_and_buffers_are_left_out_and_listed(folder):
    tower = {"visual.patch_embed.weight": np.zeros((2, 3, 2, 2, 2), np.float32),
             "audio_encoder.projection.mlp.0.weight": np.zeros((2, 2), np.uint8),
             "speech_embeddings.0.weight": np.zeros((2, 2), np.float32)}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    edit_tensors(folder, lambda tensors: tensors.update(tower | buffer))
    (folder / "audio_tokenizer").mkdir()
    save_file({"encoder.conv1.weight": np.zeros(3, np.float32)}, folder / "audio_tokenizer/model.safetensors")
    assert HubSource(folder).left_out == {
        "audio_encoder": ["audio_encoder.projection.mlp.0.weight"], "speech_embeddings": ["speech_embeddings.0.weight"],
        "visual": ["visual.patch_embed.weight"], "rotary_emb.inv_freq": [*buffer],
        "audio_tokenizer/": ["audio_tokenizer/model.safetensors"]}
    assert left_out(["model.visual.weight", "lm_head.weight", "visuals.x"]) == {}      # only at the top level


def test_missing_and_extra_tensors_are_one_error(folder):
    def change(tensors):
        tensors["model.layers.1.self_attn.q_norm.weight"] = tensors.pop("model.norm.weight")
        tensors["model.layers.6.input_layernorm.weight"] = tensors.pop("model.layers.2.mlp.experts.3.up_proj.weight")
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError) as caught:
        HubSource(folder)
    assert "missing 2: model.layers.2.mlp.experts.3.up_proj.weight, model.norm.weight;" in str(caught.value)
    assert ("not known 2: model.layers.1.self_attn.q_norm.weight, model.layers.6.input_layernorm.weight;"
            in str(caught.value))


def test_long_lists_are_cut(folder):
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True, n_routed_experts=16))
    with pytest.raises(CheckpointError, match=re.escape("missing 120: ")) as caught:
        HubSource(folder)
    assert len(str(caught.value)) < 800 and "not known 1: lm_head.weight" in str(caught.value)


def test_mtp_blocks_must_be_whole_and_numbered_from_0(tmp_path):
    write_hub(tmp_path, tiny_config(), mtp=2)
    edit_tensors(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".mtp.layers.0." in name])
    with pytest.raises(CheckpointError, match="missing 14: model.mtp.layers.0.*; not known 14: model.mtp.layers.1."):
        HubSource(tmp_path)
    assert count_mtp(["model.mtp.layers.10000000000.enorm.weight", "model.mtp.x", "model.layers.3.x"]) == 1


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight",
                                  "model.layers.1.self_attn.attention_sink_bias",
                                  "model.layers.3.mlp.experts.7.down_proj.weight"])
def test_a_wrong_shape_is_named(folder, name):
    shape = load_file(folder / "model.safetensors")[name].shape
    wrong = (*shape[:-1], shape[-1] + 1)
    edit_tensors(folder, lambda tensors: tensors.update({name: np.zeros(wrong, np.float32)}))
    with pytest.raises(CheckpointError) as caught:
        HubSource(folder)
    assert f"{folder}/model.safetensors: {name!r} has shape {list(wrong)}, expected {list(shape)}" in str(caught.value)


def test_a_transposed_tensor_is_a_wrong_shape(folder):
    name = "model.layers.0.mlp.gate_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name].T)}))
    with pytest.raises(CheckpointError, match=r"has shape \[64, 96\], expected \[96, 64\]"):
        HubSource(folder)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.bool_])
def test_a_wrong_dtype_is_named(folder, dtype):
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].astype(dtype)}))
    with pytest.raises(CheckpointError, match=f"'lm_head.weight' is {np.dtype(dtype)}, expected float32, bfloat16"):
        HubSource(folder)


def test_experts_of_one_stack_share_a_dtype(folder):
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].astype(np.float16)}))
    with pytest.raises(CheckpointError, match=f"'{name}' is float16, expected float32 as .*stacked with it"):
        HubSource(folder)


def test_each_parameter_keeps_its_own_dtype(tmp_path):
    write_hub(tmp_path, tiny_config(), dtype="bfloat16")
    params = HubSource(tmp_path).params
    assert params["layers.1.moe.router_DE"][1] == np.float32 and params["layers.1.moe.bias_E"][1] == np.float32
    assert params["layers.1.moe.gate_EDI"][1] == ml_dtypes.bfloat16


def test_a_config_of_another_model_is_noticed(folder):
    edit_json(folder / "config.json", lambda config: config.update(hidden_size=128))
    with pytest.raises(CheckpointError, match="expected .* by .*config.json"):
        HubSource(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type"):
        HubSource(folder)
