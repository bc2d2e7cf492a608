"""Where every array lies: its PartitionSpec and the shape of its shards, by name and mesh; and that nothing large is
held twice without a reason."""
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_maker import tiny_config, write_hub
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxllm
from jaxllm.gathered import stored
from jaxllm.generate.load import abstract_model, as_stored
from jaxllm.generate.request import make_request
from jaxllm.generate.step import _advance, on_mesh, place, start
from jaxllm.paths import parameters

CONFIGS = Path(__file__).parent.parent / "configs"
MESHES = ("data=2,expert=2,tensor=2", "expert=8", "tensor=8", "data=8")
BOTH, PLACES = ("expert", "tensor"), ("tensor", "expert")

# A full dense layer and a sliding one with experts and sinks. B 16, S 32 and 8, D 64, N 8, K 2 and 4, H 24, V 16,
# F 128, E 24, I 40, W 256: mostly different, so that no shape is right by accident.
TINY = tiny_config(vocab_size=256, num_hidden_layers=2, hybrid_layer_pattern=[0, 1], moe_layer_freq=[0, 1],
                   intermediate_size=128, n_routed_experts=24, moe_intermediate_size=40)
BATCH, MAX_LEN = 16, 32

# Name: PartitionSpec to compute with, the dim that is split over `data` too on the first and the last mesh (-: none),
# then the shape of one device's shard on each of MESHES. Of the 2 and 4 kv heads there are 8 where
# the tensor axis has 8 places: each device holds the one that its query heads read.
PARAMETERS = {
    "embed_WD": (P(BOTH, None), "WW", (32, 64), (32, 64), (32, 64), (32, 64)),
    "head_DW": (P(None, BOTH), "DW", (32, 64), (64, 32), (64, 32), (64, 32)),
    "norm.scale_D": (P(None), "--", (64,), (64,), (64,), (64,)),
    "layers.0.attention_norm.scale_D": (P(None), "--", (64,), (64,), (64,), (64,)),
    "layers.0.attention.q_DNH": (P("expert", "tensor", None), "DD", (16, 4, 24), (8, 8, 24), (64, 1, 24), (8, 8, 24)),
    "layers.0.attention.k_DKH": (P("expert", "tensor", None), "DD", (16, 1, 24), (8, 2, 24), (64, 1, 24), (8, 2, 24)),
    "layers.0.attention.v_DKV": (P("expert", "tensor", None), "DD", (16, 1, 16), (8, 2, 16), (64, 1, 16), (8, 2, 16)),
    "layers.0.attention.o_NVD": (P("tensor", None, "expert"), "DD", (4, 16, 16), (8, 16, 8), (1, 16, 64), (8, 16, 8)),
    "layers.0.mlp_norm.scale_D": (P(None), "--", (64,), (64,), (64,), (64,)),
    "layers.0.mlp.gate_DF": (P(None, BOTH), "DF", (32, 32), (64, 16), (64, 16), (64, 16)),
    "layers.0.mlp.up_DF": (P(None, BOTH), "DF", (32, 32), (64, 16), (64, 16), (64, 16)),
    "layers.0.mlp.down_FD": (P(BOTH, None), "DF", (32, 32), (16, 64), (16, 64), (16, 64)),
    "layers.1.attention_norm.scale_D": (P(None), "--", (64,), (64,), (64,), (64,)),
    "layers.1.attention.q_DNH": (P("expert", "tensor", None), "DD", (16, 4, 24), (8, 8, 24), (64, 1, 24), (8, 8, 24)),
    "layers.1.attention.k_DKH": (P("expert", "tensor", None), "DD", (16, 2, 24), (8, 4, 24), (64, 1, 24), (8, 4, 24)),
    "layers.1.attention.v_DKV": (P("expert", "tensor", None), "DD", (16, 2, 16), (8, 4, 16), (64, 1, 16), (8, 4, 16)),
    "layers.1.attention.o_NVD": (P("tensor", None, "expert"), "DD", (4, 16, 16), (8, 16, 8), (1, 16, 64), (8, 16, 8)),
    "layers.1.attention.sink_N": (P("tensor"), "--", (4,), (8,), (1,), (8,)),
    "layers.1.mlp_norm.scale_D": (P(None), "--", (64,), (64,), (64,), (64,)),
    "layers.1.moe.router_DE": (P(PLACES, None), "ED", (16, 12), (8, 24), (8, 24), (8, 24)),
    "layers.1.moe.bias_E": (P(None), "--", (24,), (24,), (24,), (24,)),
    "layers.1.moe.gate_EDI": (P(PLACES, None, None), "DD", (6, 32, 40), (3, 64, 40), (24, 64, 5), (24, 8, 40)),
    "layers.1.moe.up_EDI": (P(PLACES, None, None), "DD", (6, 32, 40), (3, 64, 40), (24, 64, 5), (24, 8, 40)),
    "layers.1.moe.down_EID": (P(PLACES, None, None), "DD", (6, 40, 32), (3, 40, 64), (24, 5, 64), (24, 40, 8)),
}
# Experts are whole on a mesh with an axis `expert`, and cut where there is none.
CUT = {"layers.1.moe.gate_EDI": P("expert", None, "tensor"), "layers.1.moe.up_EDI": P("expert", None, "tensor"),
       "layers.1.moe.down_EID": P("expert", "tensor", None)}
KV = P(("data", "expert"), "tensor", None, None)      # rows: no device holds what another one has
CACHE = {
    "layers.0.k_BKHS": (KV, (4, 1, 24, 32), (2, 2, 24, 32), (16, 1, 24, 32), (2, 2, 24, 32)),
    "layers.0.v_BKSV": (KV, (4, 1, 32, 16), (2, 2, 32, 16), (16, 1, 32, 16), (2, 2, 32, 16)),
    "layers.1.k_BKHS": (KV, (4, 2, 24, 8), (2, 4, 24, 8), (16, 1, 24, 8), (2, 4, 24, 8)),
    "layers.1.v_BKSV": (KV, (4, 2, 8, 16), (2, 4, 8, 16), (16, 1, 8, 16), (2, 4, 8, 16)),
    "length_B": (P("data"), (8,), (16,), (16,), (2,)),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write_hub(folder, TINY)
    return folder


@pytest.fixture(scope="module", params=MESHES)
def model(request, hub):
    return jaxllm.load(hub, mesh=request.param)


def check_places(arrays, table, mesh):
    """Every array, real or abstract, lies as the table says; none is missing in either."""
    column = [dict(jaxllm.make_mesh(text).shape) for text in MESHES].index(dict(mesh.shape))
    assert {name: (x.sharding.spec, x.sharding.shard_shape(x.shape)) for name, x in arrays.items()} == \
        {name: (spec, shapes[column]) for name, (spec, *shapes) in table.items()}
    for name, array in arrays.items():
        if isinstance(array, jax.Array):
            shards = array.addressable_shards
            assert {shard.device for shard in shards} == set(mesh.devices.flat), name
            assert {shard.data.shape for shard in shards} == {table[name][1 + column]}, name


def as_computed(mesh):
    """PARAMETERS with the PartitionSpecs in which the mesh computes with them."""
    cut = CUT if mesh.shape["expert"] == 1 else {}
    return {name: (cut.get(name, spec), *rest) for name, (spec, *rest) in PARAMETERS.items()}


def as_held(mesh):
    """PARAMETERS with the PartitionSpecs in which the mesh holds them."""
    def spec(name, computed, dims):
        dim = name.rsplit("_", 1)[1].find(dims[0] if mesh.size > mesh.shape["data"] else dims[1])
        axes = [((axis,) if isinstance(axis, str) else axis or ()) for axis in computed]
        if dim >= 0 and mesh.shape["data"] > 1:
            axes[dim] += ("data",)
        return P(*(axis[0] if len(axis) == 1 else axis or None for axis in axes))
    return {name: (spec(name, computed, dims), *shapes)
            for name, (computed, dims, *shapes) in as_computed(mesh).items()}


def test_replicated_parameters(hub):
    """Each place along `data` holds all; the text is the same."""
    split, whole = (jaxllm.load(hub, "data=4,tensor=2", replicate=replicate) for replicate in (False, True))
    wanted = parameters(abstract_model(whole.config, whole.mesh, whole.dtype))
    assert {name: x.sharding for name, x in parameters(whole.transformer).items()} == \
        {name: x.sharding for name, x in wanted.items()}
    texts = [model.generate([[1, 2, 3], [7]], max_new_tokens=8) for model in (split, whole)]
    assert [row.tokens for row in texts[0]] == [row.tokens for row in texts[1]]


def carried(model):
    """The types of what the compiled loop over decode steps takes along, as text."""
    B = 8
    request = make_request([[1, 2, 3]] * B, model.config, None, max_new_tokens=4)
    sampling, stop_ids = model._sampling(request), place(model.transformer, np.array((-1,)), None)
    cache, logits = model._prefill(request)
    state = start(model.transformer, cache, logits, sampling, stop_ids, model._column(np.full(B, 4)), 4, request.kind)
    with on_mesh(model.transformer):
        lowered = _advance.lower(model.transformer, state, sampling, stop_ids, np.int32(4), request.kind)
    found, = re.findall(r'= (\(.*\)) while\(.*op_name="jit\(_advance\)/while"', lowered.compile().as_text())
    return found


def test_a_loop_gathers_in_each_step(hub):
    found = carried(jaxllm.load(hub, "data=8"))
    assert "[24,8,40]" in found and "[24,64,40]" not in found


def test_loaded_parameters(model):
    check_places(parameters(model.transformer), as_held(model.mesh), model.mesh)


@pytest.mark.parametrize("mesh", MESHES)
def test_abstract_parameters(mesh):
    """What is planned without devices is what is loaded onto them."""
    mesh = jaxllm.make_abstract_mesh(mesh)
    arrays = parameters(abstract_model(jaxllm.Config.from_dict(TINY), mesh, jnp.dtype("bfloat16")))
    assert {name: x.sharding.spec for name, x in arrays.items()} == {
        name: row[0] for name, row in as_computed(mesh).items()}
    check_places({name: as_stored(name, stored(x), {}) for name, x in arrays.items()}, as_held(mesh), mesh)
    always_float32 = {"layers.1.moe.router_DE", "layers.1.moe.bias_E", "layers.1.attention.sink_N"}
    assert {name for name, array in arrays.items() if array.dtype != jnp.bfloat16} == always_float32
    assert all(arrays[name].dtype == jnp.float32 for name in always_float32)


def test_caches_and_logits_stay_where_they_are(model):
    """The cache when made, after prefill and after decode; the logits over the vocabulary, never whole on a device."""
    cache = jaxllm.init_cache(model.config, model.mesh, BATCH, MAX_LEN, dtype=model.dtype)
    check_places(parameters(cache), CACHE, model.mesh)
    steps = [lambda cache: jaxllm.prefill(model.transformer, cache, np.ones((BATCH, 12), np.int32)),
             lambda cache: jaxllm.decode(model.transformer, cache, np.ones(BATCH, np.int32))]
    for step in steps:
        logits_BW, cache = step(cache)
        check_places(parameters(cache), CACHE, model.mesh)
        assert logits_BW.shape == (BATCH, 256) and logits_BW.sharding.spec == P("data", BOTH)


@pytest.mark.parametrize("mesh", MESHES)
def test_logits_of_a_forward_pass_are_split(mesh):
    mesh = jaxllm.make_mesh(mesh)
    model = abstract_model(jaxllm.Config.from_dict(TINY), mesh, jnp.dtype("float32"))
    tokens_BT = jax.ShapeDtypeStruct((BATCH, 4), jnp.int32, sharding=NamedSharding(mesh, P("data", None)))
    with jax.set_mesh(mesh):
        logits_BTW = jax.eval_shape(lambda model, tokens_BT: model.logits(model(tokens_BT)[0]), model, tokens_BT)
    assert logits_BTW.sharding.spec == P("data", None, BOTH)


# An array is large from this share of the model's bytes on: 6 MB in V2-Flash, 20 MB in V2.5-Pro.
LARGE = 1e-5
# What may be held again along an axis, by a part of its name, and why. Anything else that is large must be split there.
HELD_AGAIN = {"data": {}, "expert": {}, "tensor": {"k_DKH": "a kv head is wherever query heads read it",
                                                   "v_DKV": "as k_DKH"}}


def held_again(arrays, config, mesh):
    """(path, axis) of every large array that an axis of two places or more holds again without a reason."""
    total = sum(nbytes(array) for array in arrays.values())
    return [(path, axis) for path, array in arrays.items() if nbytes(array) > LARGE * total
            for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in splitting_axes(path, array, config)
            and not any(part in path for part in HELD_AGAIN[axis])]


def splitting_axes(path, array, config):
    """The axes along which the places hold different parts. Repeated kv heads are the same part."""
    axes = {axis for dim in array.sharding.spec if dim for axis in ((dim,) if isinstance(dim, str) else dim)}
    if path.endswith(("k_DKH", "v_DKV")) and array.shape[1] > config.layers[int(path.split(".")[1])].num_kv_heads:
        axes.remove("tensor")
    return axes


def nbytes(array):
    return math.prod(array.shape) * array.dtype.itemsize


@pytest.fixture(scope="module", params=["MiMo-V2-Flash", "MiMo-V2.5-Pro"])
def released(request):
    return jaxllm.Config.from_hub(CONFIGS / request.param)


def held(config, mesh):
    return {path: as_stored(path, stored(leaf), {}) for path, leaf in parameters(
        abstract_model(config, jaxllm.make_abstract_mesh(mesh), jnp.dtype("bfloat16"))).items()}


@pytest.mark.parametrize("mesh", ["data=8,expert=8,tensor=8", "expert=128,tensor=4", "data=4,expert=16", "tensor=8"])
def test_nothing_large_is_held_again(released, mesh):
    arrays, mesh = held(released, mesh), jaxllm.make_abstract_mesh(mesh)
    assert held_again(arrays, released, mesh) == []
    # what is small does not add up either: norms, sinks and biases are 0.001% of the bytes
    small = [array for path, array in arrays.items() if not splitting_axes(path, array, released)]
    assert 0 < sum(map(nbytes, small)) < 1e-4 * sum(map(nbytes, arrays.values()))


def test_the_rule_can_fail_and_its_reasons_are_needed(released, monkeypatch):
    arrays, mesh = held(released, "data=4,tensor=32"), jaxllm.make_abstract_mesh("data=4,tensor=32")
    path = "layers.5.moe.up_EDI"
    whole = jax.ShapeDtypeStruct(arrays[path].shape, arrays[path].dtype, sharding=NamedSharding(mesh, P("expert")))
    assert held_again(arrays | {path: whole}, released, mesh) == [(path, "data"), (path, "tensor")]
    monkeypatch.setitem(HELD_AGAIN, "tensor", {})
    assert {path.split(".")[-1] for path, _ in held_again(arrays, released, mesh)} == {"k_DKH", "v_DKV"}
