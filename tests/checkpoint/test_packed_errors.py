"""Packed layouts that are wrong in one way each: what is wrong, where, and what was expected."""
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hub_files import edit_json, whole
from hub_maker import tiny_config, write_hub
from packed_files import edit_packed, write_packed
from test_layouts import SMALL

from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.config import ConfigError

FP8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
GATE, UP = "model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.experts.{}.up_proj.weight"
Q = "model.layers.1.self_attn.q_proj.weight"
Edit = Callable[[dict[str, np.ndarray]], object]


def refused(folder: Path, *problems: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        HubSource(folder)
    for problem in problems:
        assert problem in str(caught.value), str(caught.value)


def put(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def rename(old: str, new: str) -> Edit:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.fixture
def fp8(tmp_path):
    write_packed(tmp_path, tiny_config(), "fp8", "stacked", **SMALL)
    return tmp_path


@pytest.fixture
def mxfp4(tmp_path):
    write_packed(tmp_path, tiny_config(), "mxfp4", "stacked", **SMALL)
    return tmp_path


@pytest.mark.parametrize(("name", "change", "found", "expected"), [
    (GATE + "_scale_inv", lambda scale: scale[1:], [5, 4], [6, 4]),
    (GATE + "_scale_inv", lambda scale: scale.T, [4, 6], [6, 4]),
    (GATE + "_scale_inv", lambda scale: scale[:, 0], [6], [6, 4]),
    (UP.format(3) + "_scale", lambda scale: scale[:, :1], [32, 1], [32, 2]),
    (UP.format(3), lambda codes: codes[:, 1:], [32, 31], [32, 32]),
    (Q, lambda codes: codes[1:], [191, 64], [192, 64])])
def test_a_wrong_shape_is_named(mxfp4, name, change, found, expected):
    edit_packed(mxfp4, put(name, change))
    refused(mxfp4, f"{mxfp4}/model.safetensors: {name!r} has shape {found}, expected {expected} by ")


def test_a_scale_of_no_dims_has_no_reading(fp8):
    name = "model.layers.0.self_attn.k_proj.weight_scale_inv"
    edit_packed(fp8, put(name, lambda scale: scale[0, 0]))
    refused(fp8, "no reading of its attention rows fits", f"{name}: 4 rows expected, 0 found")


# ---- values, when they are read ----------------------------------------------------------------------------------

def spoil(folder: Path, name: str, value: object, place: tuple[int, int]) -> None:
    def change(tensors):
        tensors[name][place] = value
    edit_packed(folder, change)


def refuses_to_read(folder: Path, leaf: str, name: str, problem: str) -> None:
    """The leaf is refused where it holds the value, and only there."""
    source = HubSource(folder)
    shape = source.params[leaf][0]
    with pytest.raises(CheckpointError, match=re.escape(f"{folder}/model.safetensors: {name!r} holds {problem}")):
        source.read(leaf, whole(shape))
    source.read(leaf, (*whole(shape)[:-1], slice(0, 1)))


@pytest.mark.parametrize("value", [np.nan, 0.0, -0.0, -1.0, np.inf, -np.inf])
def test_scales_that_are_none(fp8, value):
    spoil(fp8, GATE + "_scale_inv", value, (4, 2))
    refuses_to_read(fp8, "layers.0.mlp.gate_DF.scale", GATE + "_scale_inv",
                    "a scale that is not a finite number above 0, at [4, 2]")


@pytest.mark.parametrize("value", [np.nan, 0.0, -1.0, np.inf])
def test_int4_scales_that_are_none(tmp_path, value):
    write_packed(tmp_path, tiny_config(), "int4")
    spoil(tmp_path, UP.format(5) + "_scale", value, (9, 1))
    refuses_to_read(tmp_path, "layers.1.moe.up_EDI.scale", UP.format(5) + "_scale",
                    "a scale that is not a finite number above 0, at [9, 1]")


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_codes_of_nan(fp8, byte):
    spoil(fp8, UP.format(6), np.uint8(byte).view(FP8), (30, 7))
    refuses_to_read(fp8, "layers.1.moe.up_EDI.codes", UP.format(6), "the code of NaN, at [30, 7]")


def test_the_exponent_255(mxfp4):
    spoil(mxfp4, UP.format(6) + "_scale", 255, (31, 1))
    refuses_to_read(mxfp4, "layers.1.moe.up_EDI.scale", UP.format(6) + "_scale",
                    "the exponent byte 255, which is NaN, at [31, 1]")


def test_extreme_values_are_none_of_these(tmp_path):
    """The largest and smallest codes and scales, of either sign where there is one."""
    write_packed(tmp_path, tiny_config(), "mxfp4", "stacked", **SMALL)
    for name, value in ((Q, -448.0), (GATE, 448.0), (UP.format(0), 255)):
        spoil(tmp_path, name, value, (0, 0))
    for name, value in ((UP.format(0), 0), (UP.format(1), 254)):
        spoil(tmp_path, name + "_scale", value, (0, 0))
    spoil(tmp_path, Q + "_scale_inv", np.float32(1e-45), (0, 0))
    source = HubSource(tmp_path)
    for path, (shape, _) in source.params.items():
        source.read(path, whole(shape))


# ---- names and dtypes --------------------------------------------------------------------------------------------

def test_a_weight_without_its_scale(fp8):
    edit_packed(fp8, lambda tensors: tensors.pop(GATE + "_scale_inv"))
    refused(fp8, f"{GATE!r} is float8_e4m3fn, whose scale is expected as '{GATE}_scale_inv'; found no scale")


def test_a_scale_without_its_weight(fp8):
    edit_packed(fp8, lambda tensors: tensors.pop(GATE))
    refused(fp8, f"missing 1: {GATE};", "not known 0")
    write_packed(fp8, tiny_config(), "fp8", "stacked", **SMALL)
    edit_packed(fp8, put(GATE, lambda codes: codes.astype(BF16)))
    refused(fp8, f"'{GATE}_scale_inv' is the scale of {GATE!r}, which is bfloat16 and has none")
    write_packed(fp8, tiny_config(), "fp8", "stacked", **SMALL)
    edit_packed(fp8, lambda tensors: tensors.update({"model.norm.weight_scale_inv": np.ones((1, 1), np.float32)}))
    refused(fp8, "'model.norm.weight_scale_inv' is the scale of 'model.norm.weight', which is bfloat16 and has none")
    write_packed(fp8, tiny_config(), "fp8", "stacked", **SMALL)
    edit_packed(fp8, lambda tensors: tensors.update({"model.other.weight_scale_inv": np.ones((1, 1), np.float32)}))
    refused(fp8, "missing 0", "not known 1: model.other.weight_scale_inv")


def test_scale_names_swapped(mxfp4):
    edit_packed(mxfp4, rename(GATE + "_scale_inv", GATE + "_scale"))
    refused(mxfp4, f"{GATE!r} is float8_e4m3fn, whose scale is expected as '{GATE}_scale_inv'; found '{GATE}_scale'")
    write_packed(mxfp4, tiny_config(), "mxfp4", "stacked", **SMALL)
    edit_packed(mxfp4, rename(UP.format(0) + "_scale", UP.format(0) + "_scale_inv"))
    refused(mxfp4, f"is uint8, whose scale is expected as '{UP.format(0)}_scale'; found '{UP.format(0)}_scale_inv'")


@pytest.mark.parametrize(("name", "dtype", "expected"), [
    (GATE + "_scale_inv", BF16, "float32 (fp8)"), (UP.format(0) + "_scale", np.float32,
                                                  "uint8 (mxfp4) or bfloat16 (int4)")])
def test_scales_of_another_dtype(mxfp4, name, dtype, expected):
    edit_packed(mxfp4, put(name, lambda scale: scale.astype(dtype)))
    refused(mxfp4, f"{name!r} is {np.dtype(dtype)}, expected {expected}")


def test_packed_without_quantization_config(fp8):
    edit_json(fp8 / "config.json", lambda config: config.pop("quantization_config"))
    refused(fp8, "is stored as fp8, but config.json's quantization_config (absent) says not packed")


def test_plain_where_the_config_says_fp8(tmp_path):
    write_hub(tmp_path, tiny_config(quantization_config={"quant_method": "fp8"}), dtype="bfloat16")
    refused(tmp_path, "'model.layers.0.self_attn.q_proj.weight' is stored as bfloat16, but config.json's "
            "quantization_config (quant_method fp8, store_dtype absent) says fp8")


def test_mxfp4_without_store_dtype(mxfp4):
    edit_json(mxfp4 / "config.json", lambda config: config["quantization_config"].pop("store_dtype"))
    refused(mxfp4, f"{UP.format(0).replace('up', 'gate')!r} is stored as mxfp4", "store_dtype absent) says fp8")


def test_fp8_experts_with_store_dtype_mxfp4(fp8):
    edit_json(fp8 / "config.json", lambda config: config["quantization_config"].update(store_dtype="mxfp4"))
    refused(fp8, "is stored as fp8", "(quant_method fp8, store_dtype mxfp4) says mxfp4")


def test_packed_though_ignored(fp8):
    edit_json(fp8 / "config.json", lambda config: config["quantization_config"].update(
        ignored_layers=["model.layers.1.self_attn"]))
    refused(fp8, f"{Q!r} is stored as fp8", "says not packed", "among ignored_layers")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.gate.weight"])
def test_what_is_never_packed(fp8, name):
    def change(tensors):
        rows, columns = tensors[name].shape
        tensors[name] = np.ones((rows, columns), FP8)
        tensors[name + "_scale_inv"] = np.ones((-(-rows // 16), columns // 16), np.float32)
    edit_packed(fp8, change)
    refused(fp8, f"{name!r} is stored as fp8", "says not packed", "of a sort that is never packed")


def test_o_proj_is_as_the_file_holds(fp8):
    """Without ignored_layers, as some copies of released configs are; with them it must be plain."""
    name = "model.layers.1.self_attn.o_proj"
    def change(tensors):
        tensors[name + ".weight"] = np.ones((64, 128), FP8)
        tensors[name + ".weight_scale_inv"] = np.ones((4, 8), np.float32)
    edit_packed(fp8, change)
    assert HubSource(fp8).kinds["layers.1.attention.o_NVD"].name == "fp8"
    edit_json(fp8 / "config.json", lambda config: config["quantization_config"].update(ignored_layers=[name]))
    refused(fp8, f"'{name}.weight' is stored as fp8")


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e5m2])
def test_dtypes_that_no_kind_has(fp8, dtype):
    def change(tensors):
        tensors[GATE] = tensors[GATE].view(np.uint8).view(dtype)
        del tensors[GATE + "_scale_inv"]
    edit_packed(fp8, change)
    refused(fp8, f"{GATE!r} is stored as {np.dtype(dtype)}, but config.json's quantization_config")


# ---- experts -----------------------------------------------------------------------------------------------------

def test_mixed_kinds_across_experts(mxfp4):
    def change(tensors):
        tensors[UP.format(2)] = np.ones((32, 64), FP8)
        tensors[UP.format(2) + "_scale_inv"] = np.ones((2, 4), np.float32)
        del tensors[UP.format(2) + "_scale"]
    edit_packed(mxfp4, change)
    refused(mxfp4, f"{UP.format(2)!r} is fp8, expected mxfp4 as {UP.format(0)!r}, which is stacked with it in "
            "layers.1.moe.up_EDI")


def test_mixed_kinds_of_one_layer(mxfp4):
    """down_proj of all experts in another kind than gate_proj and up_proj."""
    def change(tensors):
        for e in range(8):
            name = UP.format(e).replace("up", "down")
            tensors[name] = np.ones((64, 32), FP8)
            tensors[name + "_scale_inv"] = np.ones((4, 2), np.float32)
            del tensors[name + "_scale"]
    edit_packed(mxfp4, change)
    refused(mxfp4, f"{UP.format(0).replace('up', 'down')!r} is stored as fp8", "says mxfp4")


def test_experts_missing(mxfp4):
    edit_packed(mxfp4, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".2.mlp.experts.7." in name])
    refused(mxfp4, "missing 3: model.layers.2.mlp.experts.7.down_proj.weight, ")


# ---- sizes and configs -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("changes", "problem"), [
    ({"hidden_size": 65}, "is stored as mxfp4, two codes a byte, but its in-dim has 65, an odd number"),
    ({"hidden_size": 80}, "is stored as mxfp4 in groups of 32, which do not divide its in-dims [80]")])
def test_widths_that_do_not_pack(tmp_path, changes, problem):
    write_packed(tmp_path, tiny_config(**changes), "mxfp4", "stacked", **SMALL)
    refused(tmp_path, "layers.1.moe.gate_EDI (of 'model.layers.1.mlp.experts.0.gate_proj.weight')", problem)


@pytest.mark.parametrize(("keys", "problem"), [
    ({"quant_method": "awq"}, "'quantization_config.quant_method' is 'awq': accepted: 'fp8', 'int4'"),
    ({"quant_method": None}, "quant_method' is None: accepted: 'fp8', 'int4'"),
    ({"store_dtype": "nvfp4"}, "store_dtype' is 'nvfp4': accepted: absent, 'fp8', 'mxfp4'"),
    ({"fmt": "e5m2"}, "fmt' is 'e5m2': accepted: absent, 'e4m3'"),
    ({"mxfp4_block_size": 16}, "mxfp4_block_size' is 16: accepted: absent, 32"),
    ({"group_size": 64}, "group_size' is 64: accepted: absent, 32, 128"),
    ({"group_size": 32.0}, "group_size' is 32.0: accepted: absent, 32, 128"),
    ({"quant_method": "int4"}, "quant_method 'int4' needs group_size (32 or 128) and takes no store_dtype"),
    ({"quant_method": "int4", "group_size": 32, "store_dtype": "mxfp4"}, "takes no store_dtype"),
    *(({"weight_block_size": value}, "weight_block_size' is") for value in (128, [128], [0, 128], [128, 1.5], "ab")),
    *(({"ignored_layers": value}, "ignored_layers' is") for value in ("lm_head", [1])),
    ({"zero_point": True}, "zero_point' is True: unknown key; known: quant_method, fmt, store_dtype, ")])
def test_quantization_configs(fp8, keys, problem):
    edit_json(fp8 / "config.json", lambda config: config["quantization_config"].update(keys))
    with pytest.raises(ConfigError, match=re.escape(problem)):
        HubSource(fp8)


@pytest.mark.parametrize("keys", [{"weight_block_size": None, "ignored_layers": None, "store_dtype": None},
                                  {"activation_scheme": "dynamic", "packed_modules_mapping": {}, "fmt": "e4m3"}])
def test_quantization_configs_that_are_fine(tmp_path, keys):
    write_packed(tmp_path, tiny_config(), "fp8", "grid")
    edit_json(tmp_path / "config.json", lambda config: config["quantization_config"].update(keys))
    assert HubSource(tmp_path).kinds["layers.0.mlp.gate_DF"].block == (128, 128)
