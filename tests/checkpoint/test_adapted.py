"""Adapters merged into an export: the logits are those of the model that has them beside its weights."""
import numpy as np
import pytest
from adapters import random_adapter, write_base
from hub_files import whole
from make_release import write_release
from release_cases import CASES
from release_reader import read_tensors

import jaxllm
from jaxllm import lora
from jaxllm.checkpoint import CheckpointError, convert, export, open_source
from jaxllm.checkpoint.adapted import Merged
from jaxllm.checkpoint.names import Table
from jaxllm.checkpoint.peft import save_adapter
from jaxllm.checkpoint.projections import LORA_A, LORA_B
from jaxllm.config import Config


def made(folder, target_modules="all-linear"):
    """(base, config, adapter), the latter saved in the folder `adapter` beside it."""
    source, config = open_source(folder), Config.from_hub(folder)
    adapter = random_adapter(source, config, target_modules)
    save_adapter(folder.with_name("adapter"), adapter, config, source, source.reading)
    return source, config, adapter


@pytest.mark.parametrize(("case", "layout"), [("v25", "keep"), ("v26_flash", "split")])
def test_merged_is_unmerged(case, layout, tmp_path):
    """FP8 and MXFP4 experts, out of a converted folder; attention is fused, and stays so or is split."""
    config, options = CASES[case]
    write_release(config, tmp_path / "hub", **options)
    adapter = made(tmp_path / "hub")[2]
    convert(tmp_path / "hub", tmp_path / "converted", progress=False)
    export(tmp_path / "converted", tmp_path / "merged", weights="float32", layout=layout,
           merge_lora=tmp_path / "adapter", progress=False)
    tokens_BT = np.random.default_rng(0).integers(0, config["vocab_size"], (1, 24), dtype=np.int32)
    model = jaxllm.load(tmp_path / "converted", dtype="float32")
    model.transformer = lora.adapt(model.transformer, lora.place(adapter.arrays, model.transformer), adapter.scale)
    unmerged, merged = model.logits(tokens_BT), jaxllm.load(tmp_path / "merged", dtype="float32").logits(tokens_BT)
    np.testing.assert_allclose(merged, unmerged, rtol=0, atol=1e-4)      # of logits of size 10


@pytest.mark.parametrize(("dtype", "weights", "expected"), [
    ("float32", "keep", "float32"), ("float32", "bfloat16", "bfloat16"), ("bfloat16", "keep", "bfloat16"),
    ("bfloat16", "float32", "float32")])
def test_added_in_float32_and_rounded_once(dtype, weights, expected, tmp_path):
    write_base(tmp_path / "base", dtype=dtype, fused=True)
    source, config, adapter = made(tmp_path / "base", ["q_proj", "o_proj", "down_proj"])
    export(tmp_path / "base", tmp_path / "merged", weights=weights, merge_lora=tmp_path / "adapter", progress=False)
    before, after, table = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "merged"), Table(config)

    def added(path, index):
        """By einsum, in float64."""
        values = np.zeros(table.entries[path].shape)
        if path + LORA_A in adapter.arrays:
            letters = path.rsplit("_", 1)[-1].lower()
            stack, ins = ("e", letters[1]) if letters[0] == "e" else ("", letters[:2 if letters == "nvd" else 1])
            outs = letters.removeprefix(stack + ins)
            values += adapter.scale * np.einsum(f"{stack}{ins}r,{stack}r{outs}->{letters}", *(
                adapter.arrays[path + which].astype(np.float64) for which in (LORA_A, LORA_B)))
        return values[index].astype(np.float32)

    for name in table.uses:
        assert after[name].dtype == expected or "mlp.gate." in name or "sink" in name, name      # are not narrowed
        exact = before[name].astype(np.float32) + table.to_hub(name, added)
        # float32: another order of three products; bfloat16: of numbers of up to 8, half a step of 2^-5
        np.testing.assert_allclose(after[name].astype(np.float32), exact, rtol=0,
                                   atol=2e-6 if after[name].dtype == np.float32 else 2**-6)


def test_a_slice_is_a_slice_of_the_whole(tmp_path):
    write_base(tmp_path / "base")
    source, _, adapter = made(tmp_path / "base")
    merged = Merged(source, adapter)
    for path in ("layers.0.attention.o_NVD", "layers.0.attention.q_DNH", "layers.1.moe.down_EID", "norm.scale_D"):
        shape = merged.params[path][0]
        index = tuple(slice(size // 3, size - 1) for size in shape)
        np.testing.assert_allclose(merged.read(path, index), merged.read(path, whole(shape))[index], rtol=0, atol=2e-6)
    assert merged.describe("layers.1.moe.down_EID") == "layers.1.moe.down_EID with its adapter"
    assert "model.norm.weight" in merged.describe("norm.scale_D")


def test_packed_weights_cannot_stay_packed(tmp_path):
    """Those that have no adapter can."""
    config, options = CASES["v26_flash"]
    write_release(config, tmp_path / "hub", **options)
    made(tmp_path / "hub", ["o_proj", "down_proj"])
    with pytest.raises(CheckpointError, match="weights that stay packed .*layers.0.mlp.down_FD.*--weights bfloat16"):
        export(tmp_path / "hub", tmp_path / "merged", merge_lora=tmp_path / "adapter", progress=False)
    assert not (tmp_path / "merged").exists()
    (tmp_path / "adapter").rename(tmp_path / "first")
    made(tmp_path / "hub", ["o_proj"])
    export(tmp_path / "hub", tmp_path / "merged", merge_lora=tmp_path / "adapter", progress=False)
    before, after = read_tensors(tmp_path / "hub"), read_tensors(tmp_path / "merged")
    assert {name for name in before if before[name].tobytes() != after[name].tobytes()} == {
        name for name in before if name.endswith("o_proj.weight") and ".mtp." not in name}


def test_an_adapter_of_another_base(tmp_path):
    for name, seed in (("base", 0), ("other", 1)):
        write_base(tmp_path / name / name, seed=seed)
    made(tmp_path / "base" / "base")
    with pytest.raises(CheckpointError, match="is an adapter of another base"):
        export(tmp_path / "other" / "other", tmp_path / "merged", merge_lora=tmp_path / "base" / "adapter",
               progress=False)
    assert not (tmp_path / "merged").exists()
