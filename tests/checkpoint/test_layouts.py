"""Every released layout, read into leaves and decoded, against an independent reading; and every tensor made again."""
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_files import whole
from hub_maker import attention_sizes, layer_pattern, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_files import read_by_hand, write_packed
from release_reader import read_tensors

from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.codec import packed_dim, unpack

FUSED = {"attention_projection_layout": "fused_qkv", "model_type": "mimo_v2"}
# tiny_config has the proportions of the releases, heads of 24 and 16 with blocks of 16 for 192 and 128 with 128.
SMALL = {"weight_block_size": [16, 16]}
REAL = {"num_hidden_layers": 2, "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "head_dim": 192,
        "swa_head_dim": 192, "v_head_dim": 128, "swa_v_head_dim": 128, "hidden_size": 160, "intermediate_size": 200,
        "moe_intermediate_size": 160, "n_routed_experts": 3, "num_key_value_heads": 4, "swa_num_key_value_heads": 8}
PRO = {"num_attention_heads": 16, "swa_num_attention_heads": 16, "num_key_value_heads": 8}
CASES: dict[str, tuple[dict[str, Any], str, str | None, dict[str, Any]]] = {
    "V2-Flash": (REAL, "fp8", "stacked", {}),
    "V2-Flash, small": ({}, "fp8", "stacked", SMALL),
    "V2-Flash in grids": (REAL, "fp8", "grid", {}),
    "V2.5": (REAL | FUSED, "fp8", "ranks=4", {"store_dtype": "fp8"}),
    "V2.5, small": (FUSED, "fp8", "ranks=2", SMALL),
    "V2.5 as [Q; K; V]": (REAL | FUSED, "fp8", "plain", {}),
    "V2.5-Pro": (REAL | PRO | FUSED, "fp8", "ranks=8", {}),
    "V2.6": (REAL | FUSED, "mxfp4", "ranks=4", {}),
    "split mxfp4": ({}, "mxfp4", "stacked", SMALL),
    "fp8 of all": ({}, "fp8", "stacked", SMALL | {"everything": True}),
    "int4": (REAL | {"intermediate_size": 96}, "int4", None, {}),
    "int4 of all": (FUSED, "int4", "ranks=2", {"everything": True}),
    "int4 of all, wide groups": (FUSED | {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128},
                                 "int4", "ranks=2", {"everything": True, "group_size": 128}),
}


def ours(config: dict[str, Any], values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our parameters, plain, by reshapes of hub values [out, in]."""
    found = {"embed_WD": values["model.embed_tokens.weight"], "norm.scale_D": values["model.norm.weight"],
             "head_DW": values["lm_head.weight"].T}
    layers = [(f"layers.{i}", f"model.layers.{i}", bool(slides)) for i, slides in enumerate(layer_pattern(config))]
    blocks = [(f"mtp.{k}", f"model.mtp.layers.{k}", True) for k in range(3) if f"model.mtp.layers.{k}.enorm.weight" in
              values]
    for path, name, slides in layers + blocks:
        N, K, H, V = attention_sizes(config, slides)
        D = config["hidden_size"]
        for ours, proj, heads in (("q_DNH", "q", (N, H)), ("k_DKH", "k", (K, H)), ("v_DKV", "v", (K, V))):
            found[f"{path}.attention.{ours}"] = values[f"{name}.self_attn.{proj}_proj.weight"].T.reshape(D, *heads)
        found[f"{path}.attention.o_NVD"] = values[f"{name}.self_attn.o_proj.weight"].T.reshape(N, V, D)
        for proj, letters in (("gate", "DI"), ("up", "DI"), ("down", "ID")):
            if f"{name}.mlp.{proj}_proj.weight" in values:
                dense = f"{path}.mlp.{proj}_{letters.replace('I', 'F')}"
                found[dense] = values[f"{name}.mlp.{proj}_proj.weight"].T
            elif f"{name}.mlp.experts.0.{proj}_proj.weight" in values:
                found[f"{path}.moe.{proj}_E{letters}"] = np.stack(
                    [values[f"{name}.mlp.experts.{e}.{proj}_proj.weight"].T for e in range(config["n_routed_experts"])])
        if f"{name}.eh_proj.weight" in values:
            found[f"{path}.join_CD"] = values[f"{name}.eh_proj.weight"].T
    return found


def decoded(source: HubSource) -> dict[str, np.ndarray]:
    """The parameters in float32, out of leaves read whole."""
    leaves = {path: source.read(path, whole(shape)) for path, (shape, _) in source.params.items()}
    for path, (shape, dtype) in source.params.items():
        assert leaves[path].shape == shape and leaves[path].dtype == dtype, path
    return {path.removesuffix(".codes"): unpack(leaf, leaves[path.replace(".codes", ".scale")], packed_dim(path))
            if path.endswith(".codes") else leaf.astype(np.float32)
            for path, leaf in leaves.items() if not path.endswith(".scale")}


def assert_reads(folder: Path, reading: str | None, stated: str | None = None) -> HubSource:
    """Every matrix as by hand, and every hub tensor made again bit by bit."""
    source = HubSource(folder, stated)
    expected = ours(json.loads((folder / "config.json").read_text()), read_by_hand(folder, reading))
    found = decoded(source)
    assert {path for path in found if len(found[path].shape) > 1} - expected.keys() == {
        path for path in found if path.endswith("router_DE")}
    for path, array in expected.items():
        assert found[path].tobytes() == np.ascontiguousarray(array).tobytes(), path
    for name, array in read_tensors(folder).items():
        back = source.table.to_hub(name, source.read)
        assert back.dtype == array.dtype and back.shape == array.shape and back.tobytes() == array.tobytes(), name
    return source


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[HubSource, str]:
    changes, kind, reading, keys = CASES[request.param]
    folder = tmp_path_factory.mktemp("packed")
    metadata = {"tp_size": reading.removeprefix("ranks=")} if reading and reading.startswith("ranks=") else None
    write_packed(folder, tiny_config(**changes), kind, reading, mtp=1, metadata=metadata, **keys)
    return HubSource(folder), reading


def test_values_and_the_way_back(case):
    source, reading = case
    assert source.reading == reading
    assert_reads(source.folder, reading)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_slice_of_any_leaf(case, data):
    source, _ = case
    path = data.draw(st.sampled_from(sorted(source.params)))
    shape = source.params[path][0]
    starts = [data.draw(st.integers(0, size - 1)) for size in shape]
    index = tuple(slice(start, data.draw(st.integers(start + 1, size)))
                  for start, size in zip(starts, shape, strict=True))
    assert source.read(path, index).tobytes() == np.ascontiguousarray(
        source.read(path, whole(shape))[index]).tobytes()


def test_only_the_tensors_of_a_leaf_are_read(case, monkeypatch):
    """What tensors_of names is what a conversion may count on, no more and no less."""
    source, _ = case
    asked: set[str] = set()
    read = source.hub.read
    monkeypatch.setattr(source.hub, "read", lambda name, index: (asked.add(name), read(name, index))[1])
    for path, (shape, _) in source.params.items():
        asked.clear()
        source.read(path, whole(shape))
        assert sorted(asked) == sorted(source.tensors_of(path)), path


def test_a_scale_slice_reads_few_rows(case, monkeypatch):
    """One head, or one column of it, asks for no more scales than it takes."""
    source, _ = case
    sizes: list[int] = []
    read = source.hub.read
    monkeypatch.setattr(source.hub, "read", lambda *at: (found := read(*at), sizes.append(found.size))[0])
    for path, (shape, _) in source.params.items():
        if path.endswith(".scale"):
            sizes.clear()
            source.read(path, tuple(slice(0, 1) for _ in shape))
            inner = shape[-1] if path.endswith(("DNH.scale", "DKH.scale", "DKV.scale")) else \
                shape[1] if path.endswith("NVD.scale") else 1      # a head is read whole, then cut
            assert sum(sizes) <= inner, path


@st.composite
def odd_models(draw) -> tuple[dict[str, Any], str, list[int]]:
    """Any small geometry, any block, any reading of it."""
    size = st.integers(1, 3)
    heads, block = draw(size), [draw(st.integers(1, 9)), draw(st.integers(1, 9))]
    K, swa_K = heads, heads * draw(size)
    fused = draw(st.booleans())
    config = tiny_config(
        hidden_size=draw(st.integers(1, 20)), num_hidden_layers=2, hybrid_layer_pattern=[0, 1], moe_layer_freq=[0, 1],
        intermediate_size=draw(st.integers(1, 20)), moe_intermediate_size=draw(st.integers(1, 20)),
        n_routed_experts=2, num_experts_per_tok=1, partial_rotary_factor=1.0,
        num_key_value_heads=K, num_attention_heads=K * draw(size), head_dim=2 * draw(st.integers(1, 6)),
        v_head_dim=draw(st.integers(1, 12)), swa_num_key_value_heads=swa_K, swa_num_attention_heads=swa_K * draw(size),
        swa_head_dim=2 * draw(st.integers(1, 6)), swa_v_head_dim=draw(st.integers(1, 12)), **(FUSED if fused else {}))
    H, V = config["head_dim"], config["v_head_dim"]
    readings = [f"ranks={K}", "plain"] if fused else ["grid"]
    if not fused and -(-(H + V) // block[0]) > -(-H // block[0]):      # v_proj has a scale of its own
        readings.append("stacked")
    return config, draw(st.sampled_from(readings)), block


@settings(deadline=None, max_examples=60)
@given(model=odd_models())
def test_odd_geometries(model, tmp_path_factory):
    config, reading, block = model
    folder = tmp_path_factory.mktemp("odd")
    write_packed(folder, config, "fp8", reading, mtp=1, weight_block_size=block, everything=True)
    assert_reads(folder, reading, stated=reading)
