"""`jaxllm.load`: what it takes, and what it refuses by name. Broken checkpoint files: tests/checkpoint."""
import json
import re
import shutil

import jax
import numpy as np
import pytest

import jaxllm


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the random model's folder, to be spoilt."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def refused(message, *args, **kwargs):
    with pytest.raises(ValueError, match=re.escape(message)):
        jaxllm.load(*args, **kwargs)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


def test_defaults(tiny, tiny_folder):
    """One device, float32 on CPU whatever the checkpoint; a path may be a string."""
    assert dict(tiny.mesh.shape) == {"data": 1, "expert": 1, "tensor": 1} and tiny.dtype == np.float32
    assert tiny.stop_ids == () and tiny.config == jaxllm.Config.from_hub(tiny_folder)
    model = jaxllm.load(f"{tiny_folder}/")
    np.testing.assert_array_equal(model.logits([[1, 2]]), tiny.logits([[1, 2]]))


@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2", {"data": 2, "tensor": 2, "expert": 2}, "made"], ids=str)
def test_ways_to_say_a_mesh(tiny_folder, mesh):
    model = jaxllm.load(tiny_folder, mesh=jaxllm.make_mesh("data=2,expert=2,tensor=2") if mesh == "made" else mesh)
    assert dict(model.mesh.shape) == {"data": 2, "expert": 2, "tensor": 2}
    assert all(leaf.sharding.mesh == model.mesh for leaf in jax.tree.leaves(model.transformer))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_what_it_computes_in(tiny, tiny_folder, dtype):
    """Routers, sinks and logits stay float32; half precision moves logits of about 2 by a few hundredths."""
    model = jaxllm.load(tiny_folder, dtype=dtype)
    assert model.dtype == dtype
    others = {leaf.dtype.name for leaf in jax.tree.leaves(model.transformer)} - {dtype}
    assert others == ({"float32"} - {dtype})
    tokens_BT = [[1, 2, 3, 4]]
    difference = np.abs(model.logits(tokens_BT) - tiny.logits(tokens_BT)).max()
    assert difference == 0 if dtype == "float32" else 0 < difference < 0.3
    assert model.logits(tokens_BT).dtype == np.float32


def test_generation_in_bfloat16(tiny_folder):
    model = jaxllm.load(tiny_folder, dtype="bfloat16")
    assert len(set(model.generate([1, 2], max_new_tokens=12, temperature=1.0, seed=1).tokens)) > 4


@pytest.mark.parametrize("dtype", ["int8", "float64", "float8_e4m3fn", "bf16", "no such", "", 5])
def test_unknown_dtype(tiny_folder, dtype):
    refused(f"dtype = {dtype!r}: a model computes in one of float32, bfloat16, float16", tiny_folder, dtype=dtype)


def test_mesh_larger_than_the_devices(tiny_folder):
    refused("the mesh data 4 x expert 2 x tensor 2 needs 16 devices, but there are 8", tiny_folder,
            mesh="data=4,expert=2,tensor=2")


@pytest.mark.parametrize("mesh, message", [
    ("data=0", "mesh 'data=0': axis 'data' has size 0"),
    ("rows=2", "mesh 'rows=2': unknown axis 'rows'; the axes are data, expert, tensor"),
    ("data", "mesh 'data': 'data' is not axis=size"),
    ("expert=3", "n_routed_experts = 8 cannot be split over mesh axis expert = 3"),
])
def test_mesh_that_cannot_be(tiny_folder, mesh, message):
    refused(message, tiny_folder, mesh=mesh)


def test_no_such_folder(tmp_path, tiny_folder):
    refused(f"{tmp_path / 'absent'} is not a folder: expected a hub folder", tmp_path / "absent")
    file = tiny_folder / "config.json"
    refused(f"{file} is not a folder: expected a hub folder, or one that jaxllm convert wrote", file)


def test_folder_without_a_model(tmp_path, folder):
    refused(f"{tmp_path / 'config.json'}: no such file", tmp_path)
    (folder / "model.safetensors").unlink()
    refused(str(folder), folder)


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "llama"}, "'model_type'"), ({"hidden_act": "gelu"}, "'hidden_act'"),
    ({"scoring_func": "softmax"}, "'scoring_func'"), ({"no_such_key": 1}, "'no_such_key'"),
    ({"hidden_size": "gone"}, "'hidden_size'"), ({"hybrid_layer_pattern": [0]}, "'hybrid_layer_pattern'")], ids=str)
def test_unsupported_config(folder, changes, message):
    """The file and the key; what each key accepts: tests/test_config_strict.py."""
    change_config(folder, **changes)
    with pytest.raises(jaxllm.ConfigError, match=re.escape(str(folder / "config.json"))) as error:
        jaxllm.load(folder)
    assert message in str(error.value)


def test_weights_of_another_model(folder):
    change_config(folder, intermediate_size=64)
    refused("'model.layers.0.mlp.down_proj.weight' has shape [32, 96], expected [32, 64]", folder)


def test_broken_generation_config(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "end"}))
    refused(f"{folder / 'generation_config.json'}: eos_token_id is 'end'", folder)


def test_tokenizer_of_a_larger_model(folder, reciter):
    shutil.copy(reciter.folder / "tokenizer.json", folder)
    refused(f"model's vocab_size is {jaxllm.Config.from_hub(folder).vocab_size}", folder)


@pytest.mark.parametrize("tokens, shape", [
    ([1, 2], [2]), (5, []), ([], [0]), ([[]], [1, 0]), (np.zeros((0, 3), int), [0, 3]), ([[[1]]], [1, 1, 1]),
    ("text", []), (None, [])], ids=repr)
def test_logits_of_tokens_of_the_wrong_shape(tiny, tokens, shape):
    message = f"logits wants token ids [B, T], at least one, but got shape {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny.logits(tokens)


@pytest.mark.parametrize("token", [-1, 96, 2**40, 1.0, True, np.nan, "a"])
def test_logits_of_what_is_no_token(tiny, token):
    message = f"logits: {token!r} is no token id; expected whole numbers from 0 to vocab_size - 1 = 95"
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny.logits([[token]])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64])
def test_logits_of_tokens_of_any_integer_type(tiny, dtype):
    np.testing.assert_array_equal(tiny.logits(np.array([[1, 90]], dtype)), tiny.logits([[1, 90]]))


def test_logits_of_a_batch_that_the_data_axis_does_not_divide(tiny, tiny_folder):
    """Sums over devices are taken in another order: 2e-5 at logits of about 2."""
    tokens_BT = np.arange(12).reshape(3, 4)
    logits_BTW = jaxllm.load(tiny_folder, mesh="data=2,expert=2,tensor=2").logits(tokens_BT)
    assert logits_BTW.shape == (3, 4, 96) and logits_BTW.dtype == np.float32
    np.testing.assert_allclose(logits_BTW, tiny.logits(tokens_BT), rtol=0, atol=2e-5)
