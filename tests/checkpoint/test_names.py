"""The table: where each row goes, against numpy written out here, and the way back."""
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hub_files import edit_tensors, whole
from hub_maker import tiny_config, write_hub
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxllm.checkpoint.entry import transpose
from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.checkpoint.names import Table
from jaxllm.config import Config

MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def folder(tmp_path):
    write_hub(tmp_path, tiny_config())
    return tmp_path


def everything(source: HubSource) -> dict[str, np.ndarray]:
    return {path: source.read(path, whole(shape)) for path, (shape, _) in source.params.items()}


def split_by_hand(config: dict, hub: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    """The parameters of layer i of a split checkpoint, by reshapes alone."""
    swa = "swa_" if config["hybrid_layer_pattern"][i] else ""
    N, K, H, V = (config[swa + key] for key in
                  ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"))
    D, name = config["hidden_size"], f"model.layers.{i}"
    ours = {
        "attention_norm.scale_D": hub[f"{name}.input_layernorm.weight"],
        "mlp_norm.scale_D": hub[f"{name}.post_attention_layernorm.weight"],
        "attention.q_DNH": hub[f"{name}.self_attn.q_proj.weight"].reshape(N, H, D).transpose(2, 0, 1),
        "attention.k_DKH": hub[f"{name}.self_attn.k_proj.weight"].reshape(K, H, D).transpose(2, 0, 1),
        "attention.v_DKV": hub[f"{name}.self_attn.v_proj.weight"].reshape(K, V, D).transpose(2, 0, 1),
        "attention.o_NVD": hub[f"{name}.self_attn.o_proj.weight"].reshape(D, N, V).transpose(1, 2, 0),
    }
    if swa:
        ours["attention.sink_N"] = hub[f"{name}.self_attn.attention_sink_bias"]
    if config["moe_layer_freq"][i]:
        ours["moe.router_DE"] = hub[f"{name}.mlp.gate.weight"].T
        ours["moe.bias_E"] = hub[f"{name}.mlp.gate.e_score_correction_bias"]
        for path, proj in zip(("moe.gate_EDI", "moe.up_EDI", "moe.down_EID"), MLP, strict=True):
            ours[path] = np.stack([hub[f"{name}.mlp.experts.{e}.{proj}.weight"].T
                                   for e in range(config["n_routed_experts"])])
    else:
        for path, proj in zip(("mlp.gate_DF", "mlp.up_DF", "mlp.down_FD"), MLP, strict=True):
            ours[path] = hub[f"{name}.mlp.{proj}.weight"].T
    return {f"layers.{i}.{path}": array for path, array in ours.items()}


def test_split_layout_by_hand(folder):
    """All parameters of the model, and no others, with the values that the definition of each layout gives."""
    config, hub = tiny_config(), load_file(folder / "model.safetensors")
    expected = {"embed_WD": hub["model.embed_tokens.weight"], "norm.scale_D": hub["model.norm.weight"],
                "head_DW": hub["lm_head.weight"].T}
    for i in range(config["num_hidden_layers"]):
        expected |= split_by_hand(config, hub, i)
    found = everything(HubSource(folder))
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_mtp_blocks_by_hand(tmp_path):
    """config.json says nothing of MTP blocks; the names do."""
    config = tiny_config()
    write_hub(tmp_path, config, mtp=3)
    source, hub = HubSource(tmp_path), load_file(tmp_path / "model.safetensors")
    assert source.num_mtp == 3
    for k in range(3):
        name, ours = f"model.mtp.layers.{k}", {path: array for path, array in everything(source).items()
                                               if path.startswith(f"mtp.{k}.")}
        D, N, K, H, V = 64, 8, 4, 24, 16
        expected = {
            "embed_norm.scale_D": hub[f"{name}.enorm.weight"], "hidden_norm.scale_D": hub[f"{name}.hnorm.weight"],
            "join_CD": hub[f"{name}.eh_proj.weight"].T,
            "attention_norm.scale_D": hub[f"{name}.input_layernorm.weight"],
            "attention.q_DNH": hub[f"{name}.self_attn.q_proj.weight"].reshape(N, H, D).transpose(2, 0, 1),
            "attention.k_DKH": hub[f"{name}.self_attn.k_proj.weight"].reshape(K, H, D).transpose(2, 0, 1),
            "attention.v_DKV": hub[f"{name}.self_attn.v_proj.weight"].reshape(K, V, D).transpose(2, 0, 1),
            "attention.o_NVD": hub[f"{name}.self_attn.o_proj.weight"].reshape(D, N, V).transpose(1, 2, 0),
            "attention.sink_N": hub[f"{name}.self_attn.attention_sink_bias"],
            "mlp_norm.scale_D": hub[f"{name}.pre_mlp_layernorm.weight"],
            "mlp.gate_DF": hub[f"{name}.mlp.gate_proj.weight"].T, "mlp.up_DF": hub[f"{name}.mlp.up_proj.weight"].T,
            "mlp.down_FD": hub[f"{name}.mlp.down_proj.weight"].T,
            "norm.scale_D": hub[f"{name}.final_layernorm.weight"],
        }
        assert ours.keys() == {f"mtp.{k}.{path}" for path in expected}
        for path, array in expected.items():
            np.testing.assert_array_equal(ours[f"mtp.{k}.{path}"], array, err_msg=path)


@st.composite
def fused_configs(draw) -> dict:
    """Small geometries of a fused checkpoint: one full and one sliding layer, any head widths, 1 to 4 chunks."""
    size = st.integers(1, 3)
    chunks, H, swa_H = draw(st.integers(1, 4)), 2 * draw(size), 2 * draw(size)
    swa_K = chunks * draw(size)
    return tiny_config(
        hidden_size=draw(st.integers(1, 5)), num_hidden_layers=2, hybrid_layer_pattern=[0, 1], moe_layer_freq=[0, 0],
        attention_projection_layout="fused_qkv", partial_rotary_factor=1.0,
        num_key_value_heads=chunks, num_attention_heads=chunks * draw(size), head_dim=H, v_head_dim=draw(size),
        swa_num_key_value_heads=swa_K, swa_num_attention_heads=swa_K * draw(size), swa_head_dim=swa_H,
        swa_v_head_dim=draw(size))


@settings(deadline=None)      # the first example also pays for imports
@given(config=fused_configs(), data=st.data())
def test_fused_rows_are_cut_by_rank(config, data):
    """Row by row against MODEL.md 4.4: chunk c holds the q heads, then the k heads, then the v heads of rank c."""
    table = Table(Config.from_dict(config), num_mtp=1)
    chunks, D = config["num_key_value_heads"], config["hidden_size"]
    for name, path, swa in (("model.layers.0", "layers.0", ""), ("model.layers.1", "layers.1", "swa_"),
                            ("model.mtp.layers.0", "mtp.0", "swa_")):
        N, K, H, V = (config[swa + key] for key in
                      ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"))
        shapes = {"q_DNH": (D, N, H), "k_DKH": (D, K, H), "v_DKV": (D, K, V)}
        wanted = {letters: np.empty(shape, np.float32) for letters, shape in shapes.items()}
        fused, row = np.random.default_rng(0).standard_normal((N * H + K * H + K * V, D), np.float32), 0
        for chunk in range(chunks):
            for array in wanted.values():
                per_chunk = array.shape[1] // chunks
                for head in range(chunk * per_chunk, (chunk + 1) * per_chunk):
                    for inner in range(array.shape[2]):
                        array[:, head, inner] = fused[row]
                        row += 1
        tensor = f"{name}.self_attn.qkv_proj.weight"
        assert row == len(fused) and table.shapes[tensor] == fused.shape
        for letters, array in wanted.items():
            index = tuple(draw_slice(data, size) for size in array.shape)
            entry = table.entries[f"{path}.attention.{letters}"]
            np.testing.assert_array_equal(entry.read(lambda _, cut, fused=fused: fused[cut], index), array[index])
        back = table.to_hub(tensor, lambda at, cut, wanted=wanted: wanted[at.rsplit(".", 1)[1]][cut])
        np.testing.assert_array_equal(back, fused)


def draw_slice(data: st.DataObject, size: int) -> slice:
    start = data.draw(st.integers(0, size - 1))
    return slice(start, data.draw(st.integers(start + 1, size)))


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_slice_of_any_parameter(tmp_path_factory, data):
    """A slice is the same slice of the whole, for every kind of entry."""
    source = tiny_source(tmp_path_factory)
    path = data.draw(st.sampled_from(sorted(source.params)))
    index = tuple(draw_slice(data, size) for size in source.params[path][0])
    np.testing.assert_array_equal(source.read(path, index), everything(source)[path][index])


def tiny_source(tmp_path_factory, cache: list[HubSource] = []) -> HubSource:      # noqa: B006 (made once)
    if not cache:
        folder = tmp_path_factory.mktemp("hub")
        write_hub(folder, tiny_config(num_hidden_layers=2, hybrid_layer_pattern=[0, 1], moe_layer_freq=[0, 1]), mtp=1)
        cache.append(HubSource(folder))
    return cache[0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (64, 1), (31, 5), (32, 64), (100, 33)])
@pytest.mark.parametrize("dtype", [np.uint8, ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("has_cpu", [True, False])
def test_transpose(monkeypatch, shape, dtype, has_cpu):
    """Bits move untouched, NaNs of any payload included; with JAX_PLATFORMS=tpu there is no CPU device to do it."""
    if not has_cpu:
        monkeypatch.setattr("jaxllm.checkpoint.entry._host", lambda: None)
    bits = np.random.default_rng(0).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    block = bits.view(dtype)[..., 0]
    found = transpose(block)
    assert found.dtype == dtype and found.flags.c_contiguous
    assert found.tobytes() == np.ascontiguousarray(block.T).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_way_back_is_bit_identical(tmp_path, dtype, fused):
    write_hub(tmp_path, tiny_config(), dtype=dtype, fused=fused, shards=3, mtp=2)
    source = HubSource(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        for name, array in load_file(file).items():
            back = source.table.to_hub(name, source.read)
            assert back.dtype == array.dtype and back.shape == array.shape and back.tobytes() == array.tobytes(), name


def test_a_fused_checkpoint_is_the_split_one(tmp_path):
    write_hub(tmp_path / "split", tiny_config(), mtp=1)
    write_hub(tmp_path / "fused", tiny_config(), mtp=1, fused=True)
    split, fused = everything(HubSource(tmp_path / "split")), everything(HubSource(tmp_path / "fused"))
    assert split.keys() == fused.keys()
    for path, array in split.items():
        np.testing.assert_array_equal(fused[path], array, err_msg=path)


def test_tied_embeddings_have_no_head(tmp_path):
    write_hub(tmp_path, tiny_config(tie_word_embeddings=True))
    assert "head_DW" not in HubSource(tmp_path).params
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    with pytest.raises(CheckpointError, match=r"not known 1: lm_head.weight"):
        HubSource(tmp_path)


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"moe_layer_freq": [0] * 6}, {"add_full_attention_sink_bias": True},
    {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 12, "swa_v_head_dim": 8},
])
def test_sizes_are_those_of_the_configs_arithmetic(changes):
    config = Config.from_dict(tiny_config(**changes))
    count, sizes = config.count_parameters(), sizes_of(Table(config))
    assert sum(sizes.values()) == count.total + count.vectors


@pytest.mark.parametrize("folder", ["MiMo-V2-Flash", "MiMo-V2.5", "MiMo-V2.5-Pro"])
def test_the_tables_of_released_models(folder):
    """Numbers and shapes of MODEL.md 4.3 to 4.5: every text tensor of V2-Flash (split), V2.5 and V2.5-Pro (fused)."""
    config = Config.from_hub(Path(__file__).parents[2] / "configs" / folder)
    table, count = Table(config, num_mtp=3), config.count_parameters()
    matrices = sum(math.prod(shape) for shape in table.shapes.values() if len(shape) == 2)
    assert matrices == count.total + 3 * count.mtp_block
    assert sum(sizes_of(table).values()) == sum(math.prod(shape) for shape in table.shapes.values())
    if folder == "MiMo-V2-Flash":
        assert table.shapes["model.layers.5.self_attn.k_proj.weight"] == (768, 4096)
        assert table.shapes["model.layers.1.self_attn.v_proj.weight"] == (1024, 4096)
    else:
        full, sliding = {"MiMo-V2.5": (13568, 14848), "MiMo-V2.5-Pro": (27136, 27136)}[folder]
        assert table.shapes["model.layers.0.self_attn.qkv_proj.weight"][0] == full
        assert table.shapes["model.layers.1.self_attn.qkv_proj.weight"][0] == sliding
        assert table.shapes["model.mtp.layers.2.self_attn.qkv_proj.weight"][0] == sliding


def sizes_of(table: Table) -> dict[str, int]:
    return {path: math.prod(entry.shape) for path, entry in table.entries.items()}
