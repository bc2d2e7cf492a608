"""Adapters in PEFT's files: both ways the same numbers as PEFT itself has, and nothing taken that does not fit."""
import json
import os
from hashlib import sha256

import ml_dtypes
import numpy as np
import pytest
from adapters import BASE, OURS, random_adapter, write_base
from hub_files import ROOT, edit_json, tree
from make_release import write_release
from release_cases import CASES as RELEASES
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm import lora
from jaxllm.checkpoint import CheckpointError, convert, open_source, tensorwriter
from jaxllm.checkpoint.names import Table
from jaxllm.checkpoint.peft import CONFIG, TENSORS, Adapter, checksum, save_adapter, to_pairs
from jaxllm.checkpoint.peft_load import load_adapter
from jaxllm.checkpoint.projections import LORA_A, LORA_B, split_dims, targets
from jaxllm.config import Config

GOLDEN = ROOT / "tests" / "golden" / "peft"
TOLERANCE = 5e-5      # float32 logits of up to 10 by two implementations, as in test_export_golden.py


class Base:
    def __init__(self, folder, fused=False):
        write_base(folder, fused=fused)
        self.source, self.config = open_source(folder), Config.from_hub(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Base(tmp_path_factory.mktemp("models") / BASE)


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    return Base(tmp_path_factory.mktemp("fused") / BASE, fused=True)


@pytest.fixture(scope="module")
def model(base):
    return jaxllm.load(base.source.folder)


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "logits.npz")


@pytest.fixture
def saved(base, tmp_path):
    """(folder, what is in it)."""
    adapter = random_adapter(base.source, base.config, ["q_proj", "down_proj"])
    save_adapter(tmp_path / "adapter", adapter, base.config, base.source)
    return tmp_path / "adapter", adapter


def logits_with(model, adapter, tokens_BT):
    plain = model.transformer
    model.transformer = lora.adapt(plain, lora.place(adapter.arrays, plain), adapter.scale)
    try:
        return model.logits(tokens_BT)
    finally:
        model.transformer = plain


def delta(adapter, path):
    """scale * a @ b in the shape of the parameter."""
    a, b = adapter.arrays[path + LORA_A], adapter.arrays[path + LORA_B]
    stack = len(split_dims(path, a.shape)[0])
    ins, outs = a.shape[stack:-1], b.shape[stack + 1:]
    flat = a.reshape(*a.shape[:stack], -1, a.shape[-1]) @ b.reshape(*b.shape[:stack + 1], -1)
    return adapter.scale * flat.reshape(*a.shape[:stack], *ins, *outs)


def read_json(file):
    return json.loads(file.read_text())


# ---- PEFT's numbers ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["modules", "experts", "gate_up"])
def test_what_peft_saved_computes_what_it_computed(name, base, model, golden):
    """rslora, patterns of rank and alpha, and experts joined as transformers has them, with or without down_proj."""
    adapter = load_adapter(GOLDEN / name, base.config, base.source)
    found = logits_with(model, adapter, golden["tokens_BT"])
    np.testing.assert_allclose(found, golden[name], rtol=0, atol=TOLERANCE)
    assert np.abs(golden[name] - golden["base"]).max() > 1      # it matters


def test_what_we_save_is_what_peft_read(base, model, golden, tmp_path):
    adapter = random_adapter(base.source, base.config, **OURS)
    save_adapter(tmp_path / "ours", adapter, base.config, base.source)
    assert sha256((tmp_path / "ours" / TENSORS).read_bytes()).hexdigest() == golden["ours_sha256"]
    np.testing.assert_allclose(logits_with(model, adapter, golden["tokens_BT"]), golden["ours"], rtol=0, atol=TOLERANCE)
    stated = read_json(tmp_path / "ours" / CONFIG)
    assert (stated["r"], stated["lora_alpha"], stated["rank_pattern"]) == (3, 4.5, {"gate_up_proj": 6})
    assert stated["target_parameters"] == ["gate_up_proj", "down_proj"] and stated["task_type"] == "CAUSAL_LM"


# ---- there and back ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("target_modules", [
    "all-linear", ["q_proj", "k_proj"], ["model.layers.0.mlp.up_proj", "o_proj"], r".*\.experts\.\d+\.(gate|up)_proj"])
def test_comes_back(target_modules, base, tmp_path):
    adapter = random_adapter(base.source, base.config, target_modules, r=2, scale=0.75)
    save_adapter(tmp_path / "adapter", adapter, base.config, base.source)
    back = load_adapter(tmp_path / "adapter", base.config, base.source)
    assert back.scale == adapter.scale and back.arrays.keys() == adapter.arrays.keys()
    for path, array in adapter.arrays.items():
        np.testing.assert_array_equal(back.arrays[path], array, err_msg=path)


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj"], ["k_proj", "v_proj", "down_proj"]])
def test_fused_rows_are_those_of_the_hub(target_modules, fused, tmp_path):
    """qkv_proj is one module: what it adds is, row for row, what the table makes of what ours add."""
    adapter = random_adapter(fused.source, fused.config, target_modules)
    table = Table(fused.config)
    for name, (a, b) in to_pairs(adapter.arrays, fused.config).items():
        def read(path, index):
            zero = np.zeros(table.entries[path].shape, np.float32)
            return (delta(adapter, path) if path + LORA_A in adapter.arrays else zero)[index].astype(np.float32)
        # sums of up to nine products of size 1
        np.testing.assert_allclose(adapter.scale * b @ a, table.to_hub(f"{name}.weight", read), rtol=0, atol=1e-5)
    save_adapter(tmp_path / "adapter", adapter, fused.config, fused.source)
    assert read_json(tmp_path / "adapter" / CONFIG)["target_modules"][0] == "qkv_proj"
    back = load_adapter(tmp_path / "adapter", fused.config, fused.source)
    for path in targets(fused.config, ["qkv_proj"]):
        expected = delta(adapter, path) if path + LORA_A in adapter.arrays else 0 * delta(back, path)
        np.testing.assert_allclose(delta(back, path), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["v25", "v25_plain"])
def test_either_reading_of_fused_rows(case, tmp_path):
    config, options = RELEASES[case]
    write_release(config, tmp_path / "hub", **options)
    source, config = open_source(tmp_path / "hub"), Config.from_hub(tmp_path / "hub")
    adapter = random_adapter(source, config, ["qkv_proj"], r=1)
    save_adapter(tmp_path / "adapter", adapter, config, source, source.reading)
    back = load_adapter(tmp_path / "adapter", config, source, source.reading)
    for path in targets(config, ["qkv_proj"]):
        np.testing.assert_allclose(delta(back, path), delta(adapter, path), rtol=0, atol=1e-5)


def test_bfloat16_is_saved_as_such(base, tmp_path):
    adapter = random_adapter(base.source, base.config, ["o_proj"])
    short = {path: array.astype(ml_dtypes.bfloat16) for path, array in adapter.arrays.items()}
    save_adapter(tmp_path / "adapter", Adapter(short, 1.0), base.config, base.source)
    back = load_adapter(tmp_path / "adapter", base.config, base.source)
    for path, array in short.items():
        np.testing.assert_array_equal(back.arrays[path], array.astype(np.float32))


# ---- whole or absent ---------------------------------------------------------------------------------------------

def test_nothing_is_overwritten(base, saved, tmp_path):
    folder, adapter = saved
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="adapter cannot be written: .*expected a new or empty folder, in one"):
        save_adapter(folder, adapter, base.config, base.source)
    assert tree(tmp_path) == before


def test_a_full_disk_leaves_nothing(base, tmp_path, monkeypatch):
    def fail(fd):
        raise OSError(28, os.strerror(28))
    monkeypatch.setattr(tensorwriter.os, "fsync", fail)
    adapter = random_adapter(base.source, base.config, ["q_proj"])
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_adapter(tmp_path / "adapter", adapter, base.config, base.source)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="No such file or directory; expected a new or empty folder, in one"):
        save_adapter(tmp_path / "not" / "there", adapter, base.config, base.source)


@pytest.mark.parametrize("path", ["mtp.0.attention.q_DNH.lora_a", "layers.1.moe.router_DE.lora_a", "layers.9.x.lora_b"])
def test_arrays_that_peft_has_no_place_for(path, base, tmp_path):
    adapter = random_adapter(base.source, base.config, ["q_proj"])
    with pytest.raises(CheckpointError, match=rf"no adapters of this model's projections: 1: {path}; expected"):
        save_adapter(tmp_path / "adapter", Adapter({**adapter.arrays, path: np.ones((2, 2))}, 1.0), base.config,
                     base.source)
    with pytest.raises(CheckpointError, match="no adapters of this model's projections: 0: "):
        save_adapter(tmp_path / "adapter", Adapter({}, 1.0), base.config, base.source)


# ---- what does not fit -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("change", "complaint"), [
    ({"use_dora": True}, "use_dora = True; expected it to be off"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]; expected it to be off"),
    ({"layers_to_transform": [0]}, "layers_to_transform"), ({"bias": "all"}, "bias = 'all'"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"), ({"unheard_of": 1}, "unheard_of"),
    ({"exclude_modules": ["q_proj"]}, "exclude_modules"), ({"init_lora_weights": "pissa"}, "'pissa'; expected one of"),
    ({"peft_type": "LOHA"}, "peft_type = 'LOHA'; expected LORA"), ({"r": 0}, "r = 0; expected a whole number above 0"),
    ({"r": 4}, "q_proj.lora_A.weight' has rank 3, expected 4 by adapter_config.json's r or rank_pattern"),
    ({"rank_pattern": {"q_proj": 5}}, "q_proj.lora_A.weight' has rank 3, expected 5"),
    ({"rank_pattern": {"(": 3}}, "rank_pattern = {'.': 3}; expected names"), ({"lora_alpha": "8"}, "lora_alpha = '8'"),
    ({"lora_alpha": 0}, "lora_alpha = 0; expected a number above 0"),
    ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern"), ({"target_modules": 3}, "target_modules = 3"),
    ({"target_modules": ["down_proj"]}, "q_proj.lora_A.weight' is of a module that adapter_config.json does not name"),
    ({"target_modules": ["q_proj", "down_proj", "o_proj"]}, "layers.0.self_attn.o_proj.lora_A.weight' is missing"),
    ({"target_parameters": ["experts.gate_up_proj"]}, r"layers.1.mlp.experts.0.gate_proj.lora_A.weight' is missing"),
    ({"target_parameters": "down_proj"}, "target_parameters"), ({"use_rslora": 1}, "use_rslora = 1; expected true"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path = 3"),
])
def test_settings(change, complaint, base, saved):
    edit_json(saved[0] / CONFIG, lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=complaint):
        load_adapter(saved[0], base.config, base.source)


def test_settings_that_change_nothing(base, saved):
    edit_json(saved[0] / CONFIG, lambda config: config.update(
        lora_dropout=0.1, peft_version="9", megatron_core="x", unheard_of=None, init_lora_weights="gaussian"))
    assert load_adapter(saved[0], base.config, base.source).scale == saved[1].scale


Q, DOWN = (f"base_model.model.model.layers.{name}" for name in ("0.self_attn.q_proj", "1.mlp.experts.3.down_proj"))


@pytest.mark.parametrize(("change", "complaint"), [
    (lambda t: t.pop(f"{Q}.lora_B.weight"), "q_proj.lora_B.weight' is missing"),
    (lambda t: [t.pop(f"{Q}.lora_{x}.weight") for x in "AB"], "0.self_attn.q_proj.lora_A.weight' is missing, which"),
    (lambda t: [t.pop(f"{DOWN}.lora_{x}.weight") for x in "AB"], "experts.3.down_proj.lora_A.weight' is missing"),
    (lambda t: t.update({f"{Q}.lora_B.weight": np.ones((7, 3), np.float32)}),
     r"q_proj.lora_B.weight' has shape \[7, 3\], expected \[192, 3\]; is it an adapter of another base"),
    (lambda t: t.update({f"{Q}.lora_A.weight": np.ones((3, 9), np.float32)}), r"shape \[3, 9\], expected \[3, 64\]"),
    (lambda t: t.update({f"{Q}.lora_A.weight": np.full((3, 64), np.nan, np.float32)}), "lora_A.weight' holds NaN"),
    (lambda t: t.update({f"{Q}.lora_A.weight": np.ones((3, 64), np.int32)}), "q_proj.lora_A.weight', int32 .* no part"),
    (lambda t: t.update({f"{Q}.lora_magnitude_vector": np.ones(3, np.float32)}), "lora_magnitude_vector', float32 .3."),
    (lambda t: t.update({f"base_model.model.model.layers.9.self_attn.q_proj.lora_{x}.weight": np.ones(s, np.float32)
                         for x, s in (("A", (3, 64)), ("B", (192, 3)))}), "layers.9.* a module that the base does not"),
])
def test_tensors(change, complaint, base, saved):
    """Without the metadata, which says whose the adapter is."""
    edit_adapter(saved[0], change)
    with pytest.raises(CheckpointError, match=complaint):
        load_adapter(saved[0], base.config, base.source)


def test_no_tensors(base, saved):
    edit_adapter(saved[0], dict.clear)
    with pytest.raises(CheckpointError, match="adapter_model.safetensors holds no tensors"):
        load_adapter(saved[0], base.config, base.source)


def edit_adapter(folder, change):
    tensors = dict(load_file(folder / TENSORS))
    change(tensors)
    save_file(tensors, folder / TENSORS)


def test_experts_of_other_ranks(base, saved):
    edit_json(saved[0] / CONFIG, lambda config: config.update(rank_pattern={r"experts\.3\.down_proj": 2}))
    edit_adapter(saved[0], lambda t: t.update({f"{DOWN}.lora_A.weight": np.ones((2, 32), np.float32),
                                               f"{DOWN}.lora_B.weight": np.ones((64, 2), np.float32)}))
    with pytest.raises(CheckpointError, match="experts.3.down_proj.lora_A.weight' has rank 2, other experts 3"):
        load_adapter(saved[0], base.config, base.source)


def test_another_base(base, saved, tmp_path):
    """One of the same shapes and name, but other weights; what PEFT wrote says only the name."""
    folder = saved[0]
    write_base(tmp_path / BASE, seed=1)
    other = open_source(tmp_path / BASE)
    with pytest.raises(CheckpointError, match="model.safetensors is an adapter of another base .*base.*: its checksum"):
        load_adapter(folder, base.config, other)
    edit_adapter(folder, lambda tensors: None)      # as PEFT writes it
    load_adapter(folder, base.config, other)
    edit_json(folder / CONFIG, lambda config: config.update(base_model_name_or_path="XiaomiMiMo/MiMo-V2-Flash"))
    with pytest.raises(CheckpointError, match="_name_or_path = 'XiaomiMiMo/MiMo-V2-Flash', the base is 'base'; if"):
        load_adapter(folder, base.config, other)


def test_the_checksum_is_of_the_model_and_not_of_its_form(base, tmp_path):
    convert(base.source.folder, tmp_path / "converted", weights="int4", classes=["all"], progress=False)
    write_base(tmp_path / "short", dtype="bfloat16", mtp=1)
    for folder in ("converted", "short"):
        assert checksum(open_source(tmp_path / folder)) == checksum(base.source)


def test_files_that_are_not_there(base, saved):
    (saved[0] / TENSORS).unlink()
    with pytest.raises(CheckpointError, match="is no adapter: expected adapter_config.json and adapter_model.safet"):
        load_adapter(saved[0], base.config, base.source)


# ---- names -------------------------------------------------------------------------------------------------------

def test_targets(base, fused):
    assert targets(base.config, ["q_proj"]) == ["layers.0.attention.q_DNH", "layers.1.attention.q_DNH"]
    assert targets(base.config, ["layers.0.mlp.down_proj"]) == ["layers.0.mlp.down_FD"]
    assert targets(base.config, ["mlp.down_proj", "down_proj"]) == ["layers.0.mlp.down_FD", "layers.1.moe.down_EID"]
    assert targets(base.config, r"model\.layers\.1\..*_proj") == [f"layers.1.{name}" for name in (
        "attention.q_DNH", "attention.k_DKH", "attention.v_DKV", "attention.o_NVD", "moe.gate_EDI", "moe.up_EDI",
        "moe.down_EID")]
    assert len(targets(base.config, "all-linear")) == 14 == len(targets(fused.config, "all-linear"))
    assert targets(fused.config, ["qkv_proj"]) == targets(fused.config, ["q_proj", "k_proj", "v_proj"])


@pytest.mark.parametrize(("target_modules", "complaint"), [
    (["gate"], "'gate' names 'model.layers.1.mlp.gate', which has no adapter: router, norms"),
    (["q_proj", "lm_head"], "'lm_head' names 'lm_head', which has no adapter"),
    (["input_layernorm"], "no adapter"), (r".*\.mlp\..*", "names 'model.layers.1.mlp.gate', which has no adapter"),
    (["qkv_proj", "q_proj"], "1: 'qkv_proj' names no module of this model; it has q_proj, k_proj, v_proj, o_proj"),
    ("q_proj", "names no module .* a text is one regular expression for names in full"),
    (["layers.2.self_attn.q_proj"], "names no module"), ([], "target_modules is empty"),
    ("(", r"target_modules = '\(' is no regular expression"),
    (["experts.3.up_proj"], "some experts of layers.1.moe.up_EDI but not 'model.layers.1.mlp.experts.0.up_proj'"),
])
def test_targets_that_are_none(target_modules, complaint, base):
    with pytest.raises(ValueError, match=complaint):
        targets(base.config, target_modules)
