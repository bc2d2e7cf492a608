"""What tools/make_release.py writes, against MODEL.md's shapes and totals, the safetensors library, and arithmetic."""
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hub_maker import hub_tensors, tiny_config
from make_release import write_release
from release_cases import CASES, FUSED, small_config
from release_layout import count_elements, cut_config, release
from release_reader import read_release, read_tensors
from safetensors import safe_open

ROOT = Path(__file__).parent.parent


def load_config(name):
    return json.loads((ROOT / "configs" / name / "config.json").read_text())


def plan(name, kind, layers=None, experts=None, **options):
    config = cut_config(load_config(name), kind, layers, experts, options.get("mtp", 0))
    return {tensor.name: tensor for unit in release(config, kind, **options) for tensor in unit.tensors}


# ---- shapes: MODEL.md 3.4, 4.1, 4.3, 4.4, 4.6 ----------------------------------------------------------------------

COMMON = {
    "model.embed_tokens.weight": ("BF16", (152576, 4096)), "lm_head.weight": ("BF16", (152576, 4096)),
    "model.norm.weight": ("BF16", (4096,)), "model.layers.0.input_layernorm.weight": ("BF16", (4096,)),
    "model.layers.1.self_attn.o_proj.weight": ("BF16", (4096, 8192)),
    "model.layers.1.self_attn.attention_sink_bias": ("BF16", (64,)),
    "model.layers.0.mlp.up_proj.weight": ("F8_E4M3", (16384, 4096)),
    "model.layers.0.mlp.up_proj.weight_scale_inv": ("F32", (128, 32)),
    "model.layers.0.mlp.down_proj.weight": ("F8_E4M3", (4096, 16384)),
    "model.layers.0.mlp.down_proj.weight_scale_inv": ("F32", (32, 128)),
    "model.layers.1.mlp.gate.e_score_correction_bias": ("F32", (256,)),
    "model.mtp.layers.0.eh_proj.weight": ("BF16", (4096, 8192)),
    "model.mtp.layers.0.self_attn.o_proj.weight": ("BF16", (4096, 8192)),
    "model.mtp.layers.0.mlp.down_proj.weight_scale_inv": ("F32", (32, 128)),
}
FP8_EXPERT = {
    "model.layers.1.mlp.gate.weight": ("F32", (256, 4096)),
    "model.layers.5.mlp.experts.255.gate_proj.weight": ("F8_E4M3", (2048, 4096)),
    "model.layers.5.mlp.experts.255.gate_proj.weight_scale_inv": ("F32", (16, 32)),
    "model.layers.5.mlp.experts.255.down_proj.weight": ("F8_E4M3", (4096, 2048)),
    "model.layers.5.mlp.experts.255.down_proj.weight_scale_inv": ("F32", (32, 16)),
}
SPLIT = {
    "model.layers.5.self_attn.q_proj.weight": ("F8_E4M3", (12288, 4096)),
    "model.layers.5.self_attn.q_proj.weight_scale_inv": ("F32", (96, 32)),
    "model.layers.5.self_attn.k_proj.weight": ("F8_E4M3", (768, 4096)),
    "model.layers.5.self_attn.k_proj.weight_scale_inv": ("F32", (8, 32)),
    "model.layers.5.self_attn.v_proj.weight": ("F8_E4M3", (512, 4096)),
    "model.layers.5.self_attn.v_proj.weight_scale_inv": ("F32", (4, 32)),
    "model.layers.1.self_attn.k_proj.weight_scale_inv": ("F32", (12, 32)),
    "model.layers.1.self_attn.v_proj.weight_scale_inv": ("F32", (8, 32)),
    "model.mtp.layers.2.self_attn.q_proj.weight_scale_inv": ("F32", (96, 32)),
    "model.mtp.layers.2.self_attn.k_proj.weight": ("F8_E4M3", (1536, 4096)),
    "model.mtp.layers.2.self_attn.k_proj.weight_scale_inv": ("F32", (12, 32)),
    "model.mtp.layers.2.self_attn.v_proj.weight_scale_inv": ("F32", (8, 32)),
}
FLASH_FUSED = {
    "model.layers.5.self_attn.qkv_proj.weight": ("F8_E4M3", (13568, 4096)),
    "model.layers.5.self_attn.qkv_proj.weight_scale_inv": ("F32", (108, 32)),
    "model.layers.1.self_attn.qkv_proj.weight": ("F8_E4M3", (14848, 4096)),
    "model.layers.1.self_attn.qkv_proj.weight_scale_inv": ("F32", (116, 32)),
    "model.mtp.layers.0.self_attn.qkv_proj.weight_scale_inv": ("F32", (116, 32)),
}
FLASH_MXFP4 = {
    "model.layers.1.mlp.gate.weight": ("BF16", (256, 4096)),
    "model.layers.5.mlp.experts.255.gate_proj.weight": ("U8", (2048, 2048)),
    "model.layers.5.mlp.experts.255.gate_proj.weight_scale": ("U8", (2048, 128)),
    "model.layers.5.mlp.experts.255.down_proj.weight": ("U8", (4096, 1024)),
    "model.layers.5.mlp.experts.255.down_proj.weight_scale": ("U8", (4096, 64)),
}
PRO_FUSED = {f"model.{layer}.self_attn.qkv_proj.{part}": kind for layer in ("layers.1", "layers.7", "mtp.layers.0")
             for part, kind in (("weight", ("F8_E4M3", (27136, 6144))), ("weight_scale_inv", ("F32", (216, 48))))}
PRO_MXFP4 = {
    "model.layers.5.mlp.experts.383.gate_proj.weight": ("U8", (2048, 3072)),
    "model.layers.5.mlp.experts.383.gate_proj.weight_scale": ("U8", (2048, 192)),
    "model.layers.5.mlp.experts.383.down_proj.weight": ("U8", (6144, 1024)),
    "model.layers.5.mlp.experts.383.down_proj.weight_scale": ("U8", (6144, 64)),
}


@pytest.mark.parametrize("name, kind, expected", [
    ("MiMo-V2-Flash", "fp8", COMMON | FP8_EXPERT | SPLIT),
    ("MiMo-V2.5", "fp8", COMMON | FP8_EXPERT | FLASH_FUSED),
    ("MiMo-V2.6-Flash", "mxfp4", COMMON | FLASH_FUSED | FLASH_MXFP4),
    ("MiMo-V2.5-Pro", "fp8", PRO_FUSED),
    ("MiMo-V2.6-Pro", "mxfp4", PRO_FUSED | PRO_MXFP4),
])
def test_released_shapes(name, kind, expected):
    tensors = plan(name, kind, layers=8, mtp=3)
    assert {key: (tensors[key].dtype, tensors[key].shape) for key in expected} == expected


@pytest.mark.parametrize("name, kind, expected", [
    # V2.5: 310.775B counts every element, scales too; of the others the elements by dtype are published as well.
    ("MiMo-V2.5", "fp8", {"tensors": "7.3081e+04", "bytes": "3.1503e+11", "all": "3.10775e+11"}),
    ("MiMo-V2.6-Flash", "mxfp4", {"tensors": "7.3081e+04", "bytes": "1.7292e+11", "BF16": "4.10e+09", "F32": "2.48e+05",
                                  "F8_E4M3": "3.86e+09", "U8": "1.6086e+11"}),
    ("MiMo-V2.6-Pro", "mxfp4", {"tensors": "1.60040e+05", "bytes": "5.6603e+11", "BF16": "1.065e+10", "F32": "8.57e+05",
                                "F8_E4M3": "1.338e+10", "U8": "5.3135e+11"}),
])
def test_released_totals(name, kind, expected):
    """Text model, three MTP blocks and both towers, to the last digit that is published (MODEL.md 4.5, 4.6)."""
    count = count_elements(release(cut_config(load_config(name), kind, mtp=3), kind, mtp=3, towers=True))
    count["all"] = sum(count[dtype] for dtype in ("F32", "BF16", "F8_E4M3", "U8"))
    digits = {key: len(value) - len("1.e+00") for key, value in expected.items()}
    assert {key: f"{count[key]:.{digits[key]}e}" for key in expected} == expected


def test_parts_of_the_totals():
    """MTP is 48 tensors and 1.19 GB, the towers 364 and 95 tensors, 729M and 261.1M parameters (MODEL.md 4.5, 6)."""
    tensors = plan("MiMo-V2.5", "fp8", mtp=3, towers=True)
    def part(*prefixes):
        return [tensor for name, tensor in tensors.items() if name.startswith(prefixes)]
    def elements(*prefixes):
        return sum(int(np.prod(tensor.shape)) for tensor in part(*prefixes))
    mtp, vision, audio = "model.mtp.", "visual.", ("audio_encoder.", "speech_embeddings.")
    assert (len(part(mtp)), len(part(vision)), len(part(*audio))) == (48, 364, 95)
    assert round(sum(tensor.nbytes for tensor in part(mtp)) / 1e9, 2) == 1.19
    assert (round(elements(vision) / 1e6), round(elements(*audio) / 1e6, 1)) == (729, 261.1)


@pytest.mark.parametrize("fused", [False, True])
def test_names_and_shapes_are_those_of_the_other_maker(fused):
    """hub_maker lists plain checkpoints on its own; absent keys and tied embeddings included."""
    for changes in ({}, {"tie_word_embeddings": True}, {"hybrid_layer_pattern": None, "hybrid_block_size": 2},
                    {"moe_layer_freq": 2}, {"moe_layer_freq": None}, {"swa_head_dim": None, "swa_v_head_dim": 8},
                    {"add_full_attention_sink_bias": True}):
        config = tiny_config(**changes) | (FUSED if fused else {})
        ours = {tensor.name: tensor.shape for unit in release(config, "bfloat16", mtp=2) for tensor in unit.tensors}
        assert ours == {tensor.name: tensor.shape for tensor in hub_tensors(config, fused, mtp=2)}


# ---- config.json ---------------------------------------------------------------------------------------------------

def test_config_is_cut():
    full = load_config("MiMo-V2.6-Flash")
    config = cut_config(full, "mxfp4", layers=3, experts=4, mtp=1)
    assert config["num_hidden_layers"] == 3 and config["hybrid_layer_pattern"] == [0, 1, 1]
    assert config["moe_layer_freq"] == [0, 1, 1]
    assert (config["n_routed_experts"], config["num_experts_per_tok"]) == (4, 4)
    assert config["num_nextn_predict_layers"] == 1
    quantization = config["quantization_config"]
    assert quantization.pop("ignored_layers") == [
        *(f"model.layers.{i}.self_attn.o_proj" for i in range(3)), "model.decoder.self_attn.o_proj"]
    assert quantization == {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128], "store_dtype": "mxfp4", "mxfp4_block_size": 32}
    assert len(full["hybrid_layer_pattern"]) == 48      # the caller's config is left alone


@pytest.mark.parametrize("name, kind", [
    ("MiMo-V2-Flash-hub", "fp8"), ("MiMo-V2.5", "fp8"), ("MiMo-V2.5-Pro", "fp8"), ("MiMo-V2.5-Pro-FP4-DFlash", "mxfp4"),
    ("MiMo-V2.6-Flash", "mxfp4"), ("MiMo-V2.6-Pro", "mxfp4")])
def test_uncut_config_is_the_released_one(name, kind):
    released = load_config(name)
    released["quantization_config"].pop("packed_modules_mapping", None)       # {} in V2-Flash: says nothing
    assert cut_config(released, kind, mtp=3) == released


def test_bfloat16_says_no_quantisation():
    assert "quantization_config" not in cut_config(load_config("MiMo-V2.5"), "bfloat16")


# ---- files ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CASES)
def test_files_are_safetensors_and_hold_the_plan(name, tmp_path):
    config, options = CASES[name]
    total = write_release(config, tmp_path, shards=2, **options)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    expected = {tensor.name: tensor for unit in release(
        cut_config(config, options["kind"]), **{key: options[key] for key in options}) for tensor in unit.tensors}
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "numpy") as stored:
            assert stored.metadata() == {"format": "pt"}
            for key in stored.keys():
                assert index["weight_map"][key] == file.name
                piece = stored.get_slice(key)
                found[key] = piece.get_dtype(), tuple(piece.get_shape())
    assert found == {key: (tensor.dtype, tensor.shape) for key, tensor in expected.items()}
    assert index["weight_map"].keys() == found.keys()
    assert total == index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert {key for key, file in index["weight_map"].items() if file == "model_mtp.safetensors"} == \
        {key for key in found if ".mtp." in key}
    fused = "qkv_proj" in str(found) and options.get("qkv") != "plain"
    assert index["metadata"].get("tp_size") == (config["num_key_value_heads"] if fused else None)


def test_experts_are_whole_and_spread_over_their_groups(tmp_path):
    config, options = CASES["v26_flash"]
    write_release(config, tmp_path, ep=4, shards=8, **options)
    names = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert names == ["model_mtp.safetensors",
                     *(f"model_pp0_ep{g}_shard{s}.safetensors" for g in range(4) for s in range(2))]
    parts = [f"{name}_proj.weight{suffix}" for name in ("gate", "up", "down") for suffix in ("", "_scale")]
    for file in tmp_path.glob("model_pp0*"):
        length = int.from_bytes(file.read_bytes()[:8], "little")
        order = [name for name in json.loads(file.read_bytes()[8:8 + length]) if ".experts." in name]
        for n in range(0, len(order), 6):
            prefix = order[n].split("gate_proj")[0]
            assert order[n:n + 6] == [prefix + part for part in parts]
            assert f"_ep{prefix.split('.')[5]}_" in file.name      # 4 experts, 4 groups


def read_bytes(folder):
    return {name: value.tobytes() for name, value in read_tensors(folder).items()}


def test_values_depend_on_seed_and_name_alone(tmp_path):
    config, options = CASES["v26_flash"]
    write_release(config, tmp_path / "one", shards=1, seed=1, **options)
    write_release(config, tmp_path / "many", shards=4, ep=4, seed=1, **options)
    write_release(config, tmp_path / "other", seed=2, **options)
    one = read_bytes(tmp_path / "one")
    assert (tmp_path / "one" / "model.safetensors").is_file()
    assert one == read_bytes(tmp_path / "many")
    assert all(value != one[name] for name, value in read_bytes(tmp_path / "other").items())
    assert len({hashlib.sha256(value).digest() for value in one.values()}) == len(one)      # no two tensors are alike


def test_a_default_number_of_files_keeps_each_under_its_size(tmp_path):
    config, options = CASES["v25"]
    total = write_release(config, tmp_path, shard_gb=0.001, **options)
    sizes = [file.stat().st_size for file in tmp_path.glob("model-*.safetensors")]
    # Cut between whole units, so a file may be larger by one: here, by an attention matrix of 0.9 MB.
    assert len(sizes) > 2 and max(sizes) < 2e6 < total


# ---- values --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["v2_flash", "v25", "v26_pro", "bfloat16"])
def test_values_are_plausible_weights(name, tmp_path):
    config, options = CASES[name]
    write_release(config, tmp_path, **options)
    spread = []
    for key, value in read_release(tmp_path).items():
        assert np.isfinite(value).all(), key
        gain = 2 if "down_proj" in key or "o_proj" in key or "lm_head" in key else 1
        if value.ndim == 2 and "embed" not in key:
            spread.append(value.std() * value.shape[1]**0.5 / gain)
            assert len(np.unique(value, axis=0)) == len(value), key
        elif "norm" in key:
            assert abs(value.mean() - 1) < 0.1 and value.std() < 0.3, key
    # Single matrices here have few scales, which lie between 0.26 and 2.1 times the middle one.
    assert 0.25 < min(spread) < max(spread) < 2.1 and abs(np.sqrt(np.mean(np.square(spread))) - 1) < 0.25


def test_codes_and_scales_are_varied(tmp_path):
    """Codes take every value but NaN; the scales of a matrix differ by factors up to 8."""
    config, options = CASES["v26_flash"]
    write_release(config, tmp_path, **options)
    stored = read_tensors(tmp_path)
    codes = np.concatenate([value.view(np.uint8).ravel() for value in stored.values()
                            if value.dtype == ml_dtypes.float8_e4m3fn])
    assert set(range(256)) - set(codes.tolist()) == {0x7f, 0xff}
    bytes_ = np.unique(stored["model.layers.1.mlp.experts.0.gate_proj.weight"])
    assert {byte & 15 for byte in bytes_.tolist()} == {byte >> 4 for byte in bytes_.tolist()} == set(range(16))
    scales = [value for key, value in stored.items() if key.endswith("_scale_inv") and value.size > 20]
    assert all(4 < value.max() / value.min() < 8.01 for value in scales) and len(scales) > 3
    exponents = stored["model.layers.1.mlp.experts.0.gate_proj.weight_scale"]
    assert len(np.unique(exponents)) == 4 and np.ptp(exponents) == 3


def test_a_wrong_reading_is_visible(tmp_path):
    """The scales of a neighbouring block move a value by a factor of more than 2 at most places."""
    config, options = CASES["v25_plain"]
    write_release(config, tmp_path, **options)
    right, wrong = (decode_shifted(tmp_path, shift) for shift in (0, 1))
    ratio = np.abs(np.log2(np.abs(right[right != 0] / wrong[right != 0])))
    assert (ratio > 0.25).mean() > 0.8 and ratio.max() > 2


def decode_shifted(folder, shift):
    """The fused matrix of layer 0 with the scale rows rolled by `shift`."""
    stored, name = read_tensors(folder), "model.layers.0.self_attn.qkv_proj.weight"
    rows = np.arange(len(stored[name])) // 128
    scale = np.roll(stored[f"{name}_scale_inv"], shift, axis=0)
    return stored[name].astype(np.float32) * scale[rows][:, np.arange(160) // 128]


def test_the_reader_refuses_the_other_reading(tmp_path):
    """Scale rows of 4 ranks: 9 each on full layers; of [Q; K; V]: 34. The independent reader asserts which it has."""
    for name, other in (("v25", "plain"), ("v25_plain", "ranks"), ("v2_flash", "grid")):
        config, options = CASES[name]
        write_release(config, tmp_path / name, **options)
        with pytest.raises(AssertionError):
            read_release(tmp_path / name, other)


def test_memory_does_not_grow(tmp_path):
    """A tensor of 400 MB out of pools of 4 MB, in a process of its own, which has 40 MB with numpy alone."""
    config = small_config(hidden_size=1024, vocab_size=200000, num_hidden_layers=1, hybrid_layer_pattern=[1],
                          moe_layer_freq=[0], tie_word_embeddings=True)
    code = f"import make_release; make_release.write_release({config}, {str(tmp_path)!r}, 'fp8')\n" \
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", capture_output=True, text=True, check=True)
    assert (tmp_path / "model.safetensors").stat().st_size > 400e6
    assert int(run.stdout) < 100e3      # KB


# ---- the command, and what it refuses ------------------------------------------------------------------------------

def run_tool(*arguments):
    return subprocess.run([sys.executable, ROOT / "tools" / "make_release.py", *arguments],
                          capture_output=True, text=True, check=True).stdout


def test_command_line(tmp_path):
    nano = ROOT / "configs" / "mimo-nano"
    assert "GB/s" in run_tool(nano, tmp_path, "--kind", "fp8", "--layers", "2", "--experts", "2", "--mtp", "1",
                              "--qkv", "plain", "--shards", "2", "--seed", "3")
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 2
    for name in ("tokenizer.model", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (nano / name).read_bytes()
    assert not (tmp_path / "training").exists()


def test_plan_writes_nothing(tmp_path):
    printed = run_tool(ROOT / "configs" / "MiMo-V2.6-Flash", tmp_path / "out", "--kind", "mxfp4", "--towers", "--plan")
    assert "tensors               73,081" in printed and not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes, options, message", [
    ({}, {"kind": "int4"}, "kind='int4', qkv='released': expected one of"),
    ({}, {"kind": "fp8", "qkv": "grid"}, "qkv='grid': expected one of"),
    ({}, {"kind": "fp8", "layers": 4}, "layers=4: expected 1 to 3, the config's num_hidden_layers"),
    ({}, {"kind": "fp8", "layers": 0}, "layers=0: expected 1 to 3"),
    ({"moe_intermediate_size": 80}, {"kind": "mxfp4"}, "down_proj.weight: 80 inputs; MXFP4 wants a multiple of 32"),
    ({"swa_num_key_value_heads": 6} | FUSED, {"kind": "fp8"}, "16 query and 6 kv heads are not divisible by 4 ranks"),
    ({"head_dim": 24, "v_head_dim": 16}, {"kind": "fp8"}, "stacked scales leave v_proj none; use qkv='plain'"),
    ({}, {"kind": "fp8", "towers": True}, "no 'vision_config'; only V2.5, V2.6-Flash and V2.6-Pro have towers"),
    ({}, {"kind": "fp8", "ep": 3}, "ep=3: does not divide the 4 experts"),
    ({}, {"kind": "fp8", "ep": 2, "shards": 3}, "shards=3: expected a multiple of ep=2, up to"),
    ({}, {"kind": "fp8", "shards": 1000}, "shards=1000: expected a multiple of ep=1, up to"),
])
def test_refusals(changes, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_release(small_config(**changes), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path):
    config, options = CASES["bfloat16"]
    write_release(config, tmp_path, **options)
    with pytest.raises(FileExistsError, match="model.safetensors"):
        write_release(config, tmp_path, **options)
