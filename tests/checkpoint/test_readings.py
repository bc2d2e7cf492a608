"""Which reading of attention rows is taken: the one that the scales leave, the stated one, or none at all."""
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_files import edit_json, whole
from hub_maker import tiny_config, write_hub
from packed_files import edit_packed, write_packed
from safetensors.numpy import load_file, save_file
from test_layouts import FUSED, REAL, assert_reads

from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.hub import INDEX
from jaxllm.checkpoint.hubsource import HubSource

K_SCALE = "model.layers.0.self_attn.k_proj.weight_scale_inv"
QKV_SCALE = "model.layers.0.self_attn.qkv_proj.weight_scale_inv"
SLIDES = REAL | {"hybrid_layer_pattern": [1, 1]}      # of the Flash sizes, full layers alone tell ranks from plain


def make(folder: Path, reading: str, changes: dict[str, Any], **others: Any) -> Path:
    write_packed(folder, tiny_config(**changes), "fp8", reading, **others)
    return folder


@pytest.mark.parametrize(("reading", "changes"), [
    ("ranks=4", FUSED), ("plain", FUSED), ("stacked", {}), ("grid", {})])
@pytest.mark.parametrize("mtp", [0, 1])
def test_shapes_decide(tmp_path, reading, changes, mtp):
    """At the sizes of the Flash models, in a few layers, scale shapes leave one reading."""
    source = assert_reads(make(tmp_path, reading, REAL | changes, mtp=mtp), reading)
    assert source.reading == reading


def test_shapes_outweigh_the_metadata(tmp_path):
    """A re-export as [Q; K; V] that kept the metadata of the release."""
    make(tmp_path, "plain", REAL | FUSED, metadata={"tp_size": "4"})
    assert assert_reads(tmp_path, "plain").reading == "plain"


def test_no_reading_fits(tmp_path):
    make(tmp_path, "ranks=4", REAL | FUSED, mtp=1)
    edit_packed(tmp_path, lambda tensors: tensors.update({QKV_SCALE: tensors[QKV_SCALE][1:]}))
    rows = 4 * -(-(2 * 192 + 192 + 128) // 128), -(-4 * (2 * 192 + 192 + 128) // 128)
    with pytest.raises(CheckpointError) as caught:
        HubSource(tmp_path)
    assert f"{tmp_path}: no reading of its attention rows fits their scales" in str(caught.value)
    assert f"ranks=4 ({QKV_SCALE}: {rows[0]} rows expected, {rows[0] - 1} found, " in str(caught.value)
    assert f"plain ({QKV_SCALE}: {rows[1]} rows expected, {rows[0] - 1} found, " in str(caught.value)


def test_every_layer_must_fit(tmp_path):
    """The full layer of one reading, and MTP of neither."""
    make(tmp_path, "stacked", REAL, mtp=1)
    name = "model.mtp.layers.0.self_attn.v_proj.weight_scale_inv"
    edit_packed(tmp_path, lambda tensors: tensors.update({name: tensors[name][1:]}))
    with pytest.raises(CheckpointError, match=f"no reading.*stacked \\({name}: 8 rows expected, 7 found"):
        HubSource(tmp_path)


@pytest.mark.parametrize("reading", ["ranks=4", "plain"])
def test_several_fit(tmp_path, reading):
    """Rows a rank that fill whole blocks: nothing but a statement can tell the readings apart."""
    make(tmp_path, reading, SLIDES | FUSED)
    expected = ("several readings of its attention rows fit; state the one it was written with (--reading). "
                f"Readings: ranks=4 ({QKV_SCALE}: 32 rows expected, 32 found); plain (")
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        HubSource(tmp_path)
    assert_reads(tmp_path, reading, stated=reading)


def test_the_metadata_decides_between_those_that_fit(tmp_path):
    make(tmp_path, "ranks=2", SLIDES | FUSED, metadata={"tp_size": "2"})
    assert assert_reads(tmp_path, "ranks=2").reading == "ranks=2"
    assert assert_reads(tmp_path, "ranks=4", stated="ranks=4").reading == "ranks=4"      # the user has the last word
    shard = "model-00001-of-00001.safetensors"
    (tmp_path / "model.safetensors").rename(tmp_path / shard)
    index = {"metadata": {"tp_size": 4}, "weight_map": dict.fromkeys(names_in(tmp_path / shard), shard)}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert HubSource(tmp_path).reading == "ranks=4"      # the index's word counts more than a shard's


def names_in(file: Path) -> list[str]:
    header = file.read_bytes()
    return [name for name in json.loads(header[8:8 + int.from_bytes(header[:8], "little")]) if name != "__metadata__"]


def test_split_readings_that_both_fit(tmp_path):
    """One kv head: [K; V] of it has as many blocks as K and V have."""
    make(tmp_path, "stacked", REAL | {"num_key_value_heads": 1})
    with pytest.raises(CheckpointError, match=f"several readings .* grid \\({K_SCALE}: 2 rows .*; stacked \\("):
        HubSource(tmp_path)
    assert_reads(tmp_path, "stacked", stated="stacked")
    assert_reads(tmp_path, "grid", stated="grid")


def test_readings_that_label_alike_are_one(tmp_path):
    """Heads of whole blocks: [K; V] of a head begins and ends where the grids do."""
    make(tmp_path / "split", "grid", REAL | {"head_dim": 256, "v_head_dim": 128, "partial_rotary_factor": 0.25})
    assert assert_reads(tmp_path / "split", "stacked").reading == "grid"
    make(tmp_path / "fused", "plain", REAL | FUSED | {"num_key_value_heads": 1})
    assert assert_reads(tmp_path / "fused", "plain").reading == "plain"


@pytest.mark.parametrize(("changes", "reading", "stated", "problem"), [
    (REAL | FUSED, "ranks=4", "plain", "the stated reading 'plain' does not fit the scales .* rows expected"),
    (REAL | FUSED, "ranks=4", "ranks=2", "the stated reading 'ranks=2' does not fit"),
    (REAL | FUSED, "ranks=4", "ranks=3", "'ranks=3' does not divide the heads of every layer"),
    (REAL | FUSED, "ranks=4", "stacked", "'stacked' is none of 'fused_qkv' attention; accepted: ranks=N, plain"),
    (REAL | FUSED, "ranks=4", "ranks=0", "'ranks=0' is none of"), (REAL | FUSED, "ranks=4", "4", "'4' is none of"),
    (REAL, "stacked", "grid", "the stated reading 'grid' does not fit the scales"),
    (REAL, "stacked", "ranks=4", "'ranks=4' is none of 'split' attention; accepted: stacked, grid")])
def test_statements_that_are_wrong(tmp_path, changes, reading, stated, problem):
    make(tmp_path, reading, changes)
    with pytest.raises(CheckpointError, match=problem):
        HubSource(tmp_path, stated)


@pytest.mark.parametrize(("tp_size", "problem"), [
    ("many", "states tp_size 'many', expected a whole number above 0"), ("0", "states tp_size '0'"),
    ("3", "states tp_size 3, which does not divide the heads of every layer")])
def test_metadata_that_is_wrong(tmp_path, tp_size, problem):
    make(tmp_path, "ranks=4", REAL | FUSED, metadata={"tp_size": tp_size})
    with pytest.raises(CheckpointError, match=problem):
        HubSource(tmp_path)
    assert_reads(tmp_path, "ranks=4", stated="ranks=4")


def test_unquantised_fused_rows(tmp_path):
    """No scales to hold a reading against: the statement, else the metadata, else what the layout declares."""
    write_hub(tmp_path / "fused", tiny_config(), fused=True, mtp=1)
    write_hub(tmp_path / "split", tiny_config(), mtp=1)
    split = HubSource(tmp_path / "split")
    assert split.reading is None
    with pytest.raises(CheckpointError, match="'grid' was stated, but q_proj, k_proj and v_proj are split"):
        HubSource(tmp_path / "split", "grid")
    file = tmp_path / "fused/model.safetensors"
    declared, tensors = HubSource(tmp_path / "fused"), load_file(file)
    for name in tensors:
        if name.endswith("qkv_proj.weight"):
            parts = [load_file(tmp_path / "split/model.safetensors")[name.replace("qkv", proj)] for proj in "qkv"]
            tensors[name] = np.concatenate(parts)
    save_file(tensors, file, {"tp_size": "1"})
    plain, stated = HubSource(tmp_path / "fused"), HubSource(tmp_path / "fused", "ranks=2")
    assert (declared.reading, plain.reading, stated.reading) == ("ranks=2", "plain", "ranks=2")
    differs = False
    for path, (shape, _) in split.params.items():
        assert np.array_equal(plain.read(path, whole(shape)), split.read(path, whole(shape))), path
        differs |= not np.array_equal(stated.read(path, whole(shape)), split.read(path, whole(shape)))
    assert differs


def test_attention_that_is_ignored_has_no_scales(tmp_path):
    """fp8 elsewhere leaves fused rows to the declared layout."""
    make(tmp_path, "ranks=4", REAL | FUSED)
    def plain(tensors):
        for name in [name for name in tensors if name.endswith("qkv_proj.weight")]:
            tensors[name] = tensors[name].astype(np.float32)
            del tensors[name + "_scale_inv"]
    edit_packed(tmp_path, plain)
    edit_json(tmp_path / "config.json", lambda config: config["quantization_config"].update(
        ignored_layers=["model.layers.0.self_attn", "model.layers.1.self_attn.qkv_proj"]))
    assert HubSource(tmp_path).reading == "ranks=4"
