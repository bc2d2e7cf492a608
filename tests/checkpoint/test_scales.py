"""Scale leaves: their sizes for the released models, which hub row each row takes, and what cannot be packed."""
import re
from pathlib import Path

import numpy as np
import pytest
from hub_maker import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.checkpoint.entry import Entry, Rows
from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.kinds import MXFP4, Kind, int4, kinds_of_leaves
from jaxllm.checkpoint.names import Table, matrix, model, stack
from jaxllm.checkpoint.readings import row_labels
from jaxllm.checkpoint.scales import Scale, codes_entry, grid, scale_leaf
from jaxllm.config import Config

CONFIGS = Path(__file__).parents[2] / "configs"
FP8 = Kind("fp8", (128, 128))
PACKED = re.compile(r"\.(q_DNH|k_DKH|v_DKV|gate_DF|up_DF|down_FD|gate_EDI|up_EDI|down_EID)$")


def released(folder: str, reading: str) -> Table:
    config = Config.from_hub(CONFIGS / folder)
    kinds = {entry.path: FP8 for entry in model(config, 3) if PACKED.search(entry.path)}
    if (config.quantization_config or {}).get("store_dtype") == "mxfp4":
        kinds |= {path: MXFP4 for path in kinds if ".moe." in path}
    return Table(config, 3, kinds, reading)


def test_v2_flash_sizes():
    """Shapes of MODEL.md 4.3, and segments of half a block where heads of 192 cut blocks of 128."""
    table = released("MiMo-V2-Flash-hub", "stacked")
    hub = {name.removeprefix("model.").removesuffix(".weight_scale_inv"): shape for name, shape in table.shapes.items()
           if name.endswith("_scale_inv")}
    for i, k_rows, v_rows in ((0, 8, 4), (5, 8, 4), (1, 12, 8)):
        assert [hub[f"layers.{i}.self_attn.{name}_proj"] for name in "qkv"] == [(96, 32), (k_rows, 32), (v_rows, 32)]
    assert [hub[f"mtp.layers.2.self_attn.{name}_proj"] for name in "qkv"] == [(96, 32), (12, 32), (8, 32)]
    assert hub["layers.0.mlp.gate_proj"] == (128, 32) and hub["layers.0.mlp.down_proj"] == (32, 128)
    assert hub["layers.1.mlp.experts.255.up_proj"] == (16, 32)
    ours = {path.removesuffix(".scale"): entry.shape for path, entry in table.entries.items() if "scale_D" not in path}
    assert [ours[f"layers.0.attention.{name}"] for name in ("q_DNH", "k_DKH", "v_DKV")] == [
        (32, 64, 3), (32, 4, 3), (32, 4, 2)]
    assert ours["layers.1.attention.v_DKV"] == (32, 8, 1) and ours["layers.1.moe.down_EID"] == (256, 16, 32)


@pytest.mark.parametrize(("folder", "reading", "full", "sliding"), [
    ("MiMo-V2.5", "ranks=4", (108, 32), (116, 32)), ("MiMo-V2.5", "plain", (106, 32), (116, 32)),
    ("MiMo-V2.5-Pro", "ranks=8", (216, 48), (216, 48)), ("MiMo-V2.5-Pro", "plain", (212, 48), (212, 48)),
    ("MiMo-V2.6-Flash", "ranks=4", (108, 32), (116, 32))])
def test_fused_sizes(folder, reading, full, sliding):
    """Shapes of MODEL.md 4.4 and 4.6."""
    shapes = released(folder, reading).shapes
    name = "model.layers.{}.self_attn.qkv_proj.weight_scale_inv"
    assert shapes[name.format(0)] == full and shapes[name.format(1)] == sliding
    assert shapes["model.mtp.layers.0.self_attn.qkv_proj.weight_scale_inv"] == sliding
    if folder == "MiMo-V2.6-Flash":
        expert = "model.layers.1.mlp.experts.7.{}_proj.weight"
        assert shapes[expert.format("gate")] == (2048, 2048) and shapes[expert.format("gate") + "_scale"] == (2048, 128)
        assert shapes[expert.format("down")] == (4096, 1024) and shapes[expert.format("down") + "_scale"] == (4096, 64)


def test_v2_flash_v_takes_from_k():
    """MODEL.md 4.3: of each head of a full layer the first 64 rows of V take K's second scale row, the others V's."""
    config = Config.from_hub(CONFIGS / "MiMo-V2-Flash-hub")
    k, v = (f"model.layers.5.self_attn.{name}_proj.weight" for name in "kv")
    labels = row_labels(config, 0, "stacked", 128, {k, v})
    assert labels[k].tensors == ((k + "_scale_inv", 8),)
    assert labels[v].tensors == ((k + "_scale_inv", 8), (v + "_scale_inv", 4))
    for head in range(4):
        assert labels[k].rows[head * 192:][:192].tolist() == [2 * head] * 128 + [2 * head + 1] * 64
        assert labels[v].rows[head * 128:][:128].tolist() == [2 * head + 1] * 64 + [8 + head] * 64
    assert row_labels(config, 0, "grid", 128, {k, v})[v].rows.tolist() == [row // 128 for row in range(512)]


@given(count=st.integers(1, 60), tile=st.integers(1, 60), height=st.integers(1, 20))
def test_a_grid_row_by_row(count, tile, height):
    row, found = -1, []
    for n in range(count):
        row += n % tile % height == 0      # a block begins, with the tile or within it
        found.append(row)
    labels = grid("s", count, tile, height)
    assert labels.rows.tolist() == found and labels.tensors == (("s", row + 1),)


@pytest.mark.parametrize(("out", "in_dims", "block", "shape"), [
    ((200,), (300,), (128, 128), (75, 25)),        # segments of gcd(300, 128) = 4 and gcd(200, 128) = 8
    ((128,), (128,), (128, 128), (1, 1)), ((100,), (90,), (128, 128), (1, 1)),        # within one block
    ((4, 192), (256,), (128, 128), (2, 4, 3)), ((160,), (4, 24), (32, 16), (4, 3, 5))])
def test_segments(out, in_dims, block, shape):
    leaf = scale_leaf(matrix("m.w", "t", out, in_dims), Kind("fp8", block), {})
    assert isinstance(leaf, Scale) and leaf.shape == shape


def test_stacks_read_one_matrix():
    leaf = scale_leaf(stack("m.gate_EDI", "e.{}.w", 3, 200, 256), FP8, {})
    asked = []
    leaf.read(lambda name, cut: (asked.append(name), np.ones([s.stop - s.start for s in cut], np.float32))[1],
              (slice(1, 2), slice(None), slice(None)))
    assert leaf.shape == (3, 2, 25) and asked == ["e.1.w_scale_inv"]
    assert leaf.tensors == ("e.0.w_scale_inv", "e.1.w_scale_inv", "e.2.w_scale_inv")


@pytest.mark.parametrize(("in_dims", "group", "shape"), [
    ((64,), 32, (2, 8)), ((8, 16), 32, (4, 1, 8)), ((8, 64), 32, (8, 2, 8)), ((8, 16), 128, (1, 1, 8))])
def test_groups(in_dims, group, shape):
    """A group of o_proj may span whole heads."""
    entry = matrix("m.w", "t", (8,), in_dims)
    assert scale_leaf(entry, int4(group), {}).shape == shape
    assert codes_entry(entry, int4(group)).shape == (*in_dims[:-1], in_dims[-1] // 2, 8)


@pytest.mark.parametrize(("in_dims", "kind", "problem"), [
    ((33,), MXFP4, "m.w (of 't') is stored as mxfp4, two codes a byte, but its in-dim has 33, an odd number"),
    ((48,), MXFP4, "m.w (of 't') is stored as mxfp4 in groups of 32, which do not divide its in-dims [48]"),
    ((3, 16), int4(32), "in groups of 32, which do not divide its in-dims [3, 16]"),
    ((4, 24), int4(32), "in groups of 32, which do not divide its in-dims [4, 24]")])
def test_what_does_not_pack(in_dims, kind, problem):
    entry = matrix("m.w", "t", (8,), in_dims)
    with pytest.raises(CheckpointError, match=re.escape(problem)):
        codes_entry(entry, kind)
        scale_leaf(entry, kind, {})


@pytest.mark.parametrize("where", [(0, 0, 2), (4, 0, 1), (3, 1, 0), (1, 1, 2)])
def test_scales_that_a_block_cannot_hold(where):
    """Two heads of 12 rows in blocks of 8: the middle block holds the end of one and the start of the other."""
    entry = Entry("m.q_DNH", (2, 12), (10,), ((Rows("t", 0, 24),),))
    config = Config.from_dict(tiny_config())
    table = Table(config)
    leaf = scale_leaf(entry, Kind("fp8", (8, 4)), {})
    assert isinstance(leaf, Scale) and leaf.shape == (5, 2, 3)
    hub = np.arange(1, 10, dtype=np.float32).reshape(3, 3)
    ours = leaf.read(lambda _, cut: hub[cut], (slice(None),) * 3)
    table.shapes["t_scale_inv"], table.dtypes["t_scale_inv"] = (3, 3), np.dtype(np.float32)
    table.scale_uses["t_scale_inv"] = [(leaf, 0)]
    assert table.to_hub("t_scale_inv", lambda _, cut: ours[cut]).tolist() == hub.tolist()
    ours = ours.copy()
    ours[where] += 1
    with pytest.raises(CheckpointError, match="m.q_DNH.scale: scales differ within one block of 't_scale_inv'"):
        table.to_hub("t_scale_inv", lambda _, cut: ours[cut])


def test_k_and_v_that_share_a_block_agree():
    """The second block of a head holds the end of its K and the start of its V."""
    kinds = {f"layers.0.attention.{name}": Kind("fp8", (16, 16)) for name in ("k_DKH", "v_DKV")}
    table = Table(Config.from_dict(tiny_config()), 0, kinds, "stacked")
    k, v = (f"model.layers.0.self_attn.{name}_proj.weight_scale_inv" for name in "kv")
    def read(path, cut, of_v=2):
        return np.full(table.entries[path].shape, of_v if "v_DKV" in path else 1, np.float32)[cut]
    assert table.to_hub(v, read).tolist() == [[2] * 4] * 2
    assert table.to_hub(k, lambda path, cut: read(path, cut, of_v=1)).tolist() == [[1] * 4] * 4
    with pytest.raises(CheckpointError, match=f"layers.0.attention.v_DKV.scale: scales differ within .* {k!r}"):
        table.to_hub(k, read)


def test_kinds_are_told_by_leaves():
    """What an export knows: the leaves of a converted folder, and the blocks that its config states."""
    config = Config.from_dict(tiny_config(hidden_size=128, intermediate_size=128))
    kinds = {"layers.0.mlp.gate_DF": Kind("fp8", (16, 8)), "layers.0.mlp.up_DF": int4(32),
             "layers.0.mlp.down_FD": int4(128), "layers.1.moe.gate_EDI": MXFP4, "layers.1.attention.o_NVD": int4(128)}
    table = Table(config, 0, kinds)
    dtypes = {path: table.dtypes.get(entry.tensors[0], np.dtype(np.float32)) for path, entry in table.entries.items()}
    params = {path: (entry.shape, dtypes[path]) for path, entry in table.entries.items()}
    assert kinds_of_leaves(params, {"weight_block_size": [16, 8]}) == kinds
