"""Experts in host memory: the numbers of the resident model, in the bytes of the plan, with the experts used most here.

"Identical" is bit for bit: the same blocks in the same order, each with the same products. Where a mesh has `data`, a
model whose weights are gathered scales attention's in other pieces, so there the resident one is loaded replicated.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_release import write_release
from release_cases import FUSED, small_config

import jaxllm
from jaxllm.checkpoint import open_source
from jaxllm.checkpoint.selected import Selected
from jaxllm.config import Config
from jaxllm.experts import experts_by_block, lay_out
from jaxllm.experts_offloaded import experts_from_host, stretches
from jaxllm.generate.step import decode
from jaxllm.offloaded import HOST, Offloaded, choose, grouped, places
from jaxllm.tpu.chips import slice_of
from jaxllm.tpu.held import Held
from jaxllm.tpu.offload import offload_plan
from jaxllm.tpu.steps import Work
from jaxllm.usage import Usage, identity

E = 8
KINDS = ("mxfp4", "fp8", "bfloat16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind -> a release of one layer, with twice as many experts as there are devices."""
    config = small_config(**FUSED, num_hidden_layers=1, hybrid_layer_pattern=[1], moe_layer_freq=[1],
                          n_routed_experts=2 * E, moe_router_dtype="bfloat16")
    found = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in found.items():
        write_release(config, folder, kind=kind)
    return found


@pytest.fixture(scope="module")
def usage(folders, tmp_path_factory):
    """A file in which experts 5, 2, 7, and of the second half 11 and 14, are used most."""
    config = Config.from_hub(folders["fp8"])
    count = np.array([3, 4, 90, 5, 6, 99, 7, 80, 1, 2, 3, 40, 5, 6, 50, 10])
    file = tmp_path_factory.mktemp("usage") / "usage.json"
    Usage(identity(config), int(count.sum()) // config.num_experts_per_tok, {0: count}).write(file)
    return file


def run(model: jaxllm.Model, batch: int) -> list[np.ndarray]:
    """Logits of a prefill with rows of several lengths, and of two steps of decoding after it."""
    rng = np.random.default_rng(batch)
    tokens, length = rng.integers(0, 288, (batch, 20)), rng.integers(1, 21, batch)
    cache = jaxllm.init_cache(model.config, model.mesh, batch, 64, dtype=model.dtype)
    logits, cache = jaxllm.prefill(model.transformer, cache, tokens.astype(np.int32), length.astype(np.int32))
    found = [np.asarray(logits)]
    for _ in range(2):
        logits, cache = decode(model.transformer, cache, found[-1].argmax(-1).astype(np.int32))
        found.append(np.asarray(logits))
    return found


@pytest.mark.parametrize(("kind", "mesh", "resident", "batch", "least"), [
    ("mxfp4", None, 3, 1, None), ("fp8", "expert=8", 0, 8, None), ("mxfp4", "expert=4,tensor=2", 1, 8, 0),
    ("bfloat16", "data=2,expert=2,tensor=2", 2, 8, None)])
def test_logits_are_identical_and_bytes_as_planned(folders, usage, monkeypatch, kind, mesh, resident, batch, least):
    """least = 0: tokens are sent to their experts, however few."""
    if least is not None:
        monkeypatch.setattr("jaxllm.axes.LEAST_STREAM", least)
    whole = jaxllm.load(folders[kind], mesh, replicate=True)
    model = jaxllm.load(folders[kind], mesh, resident_experts=resident, usage=usage)
    for found, expected in zip(run(model, batch), run(whole, batch), strict=True):
        assert np.array_equal(found, expected) and np.isfinite(found).all() and found.std() > 0.1
    planned = offload_plan(Held(kind, model.config, open_source(folders[kind]).params), slice_of("gpu:8x24GB"),
                           jaxllm.make_abstract_mesh(mesh), Work("decode", batch, 64, 1), resident)
    for device in model.mesh.devices.flat:
        assert nbytes(model.transformer.layers[0].moe, device, HOST) == planned.host
        experts = [getattr(model.transformer.layers[0].moe, name)[...] for name in ("gate_EDI", "up_EDI", "down_EID")]
        assert nbytes(experts, device, "device") == planned.held["experts"] - 2 * planned.expert      # room
        assert nbytes(model.transformer, device, HOST) == planned.host      # and nothing else is there


def nbytes(tree, device: jax.Device, kind: str) -> int:
    return sum(shard.data.nbytes for x in jax.tree.leaves(tree) if x.sharding.memory_kind == kind
               for shard in x.addressable_shards if shard.device == device)


@pytest.mark.parametrize(("mesh", "parts"), [(None, 1), ("expert=2", 2)])
def test_the_residents_are_those_used_most(folders, usage, mesh, parts):
    """Of each part; every expert is once where its place says, with the bytes of the file."""
    stack = jaxllm.load(folders["mxfp4"], mesh, resident_experts=2, usage=usage).transformer.layers[0].moe.up_EDI[...]
    assert isinstance(stack, Offloaded) and stack.shape == (2 * E, 160, 96)
    place, e = np.asarray(stack.place_E), 2 * E // parts
    assert np.flatnonzero(place < 2).tolist() == ([2, 5] if parts == 1 else [2, 5, 11, 14])
    source, resident, host = open_source(folders["mxfp4"]), stack.resident, stack.host
    for part in ("codes", "scale"):
        whole = source.read("layers.0.moe.up_EDI." + part, (slice(None),) * 3)
        here, there = np.asarray(getattr(resident, part)), np.asarray(getattr(host, part))
        for expert, at in enumerate(place):
            first = expert // e
            found = here[first * 2 + at] if at < 2 else there[first * (e - 2) + at - 2]
            assert np.array_equal(found.reshape(whole[expert].shape), whole[expert])


def test_without_a_count_the_first_stay():
    assert [x.tolist() for x in choose(np.zeros(6, np.int64), 2, 1)] == [[0, 3], [1, 2, 4, 5]]
    kept, others = choose(np.array([1, 5, 5, 0, 2, 9]), 2, 2)
    assert kept.tolist() == [1, 2, 4, 5] and others.tolist() == [0, 3]      # in the order of their numbers
    assert places(kept, others, 2).tolist() == [2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("resident", [0, 3, 7])
@pytest.mark.parametrize("choice", ["free", "all resident", "none resident", "one expert", "another device"])
def test_the_loop_is_that_of_resident_experts(resident, choice):
    """Bit for bit, whichever experts are chosen: also none of those that would be fetched, or only such."""
    rng, M, A = np.random.default_rng(resident), 9, 3
    x_MD, weight_MA = rng.standard_normal((M, 32), np.float32), rng.random((M, A), np.float32)
    stacks = [rng.standard_normal(shape, np.float32) for shape in ((E, 32, 24), (E, 32, 24), (E, 24, 32))]
    kept, others = choose(rng.integers(0, 50, E), 1, resident)
    among = {"free": np.arange(E + 1), "all resident": kept, "none resident": others, "one expert": others[-1:],
             "another device": np.array([E])}[choice]
    local_MA = rng.choice(np.concatenate([among, [E]]), (M, A)).astype(np.int32)
    place = places(kept, others, 1)
    memory = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=HOST)
    offloaded = [Offloaded(stack[kept] if resident else None, jax.device_put(stack[others], memory),
                           jnp.asarray(place)) for stack in stacks]
    inputs = [jnp.asarray(x) for x in (x_MD, local_MA, weight_MA)]
    found = jax.jit(experts_from_host)(*inputs, *offloaded)
    expected = jax.jit(experts_by_block)(*inputs, *map(jnp.asarray, stacks))
    assert np.array_equal(found, expected) and (np.abs(expected).max() > 1) == bool((among < E).any())


@pytest.mark.parametrize("M", [1, 40, 600])
def test_what_is_chosen_is_fetched_once(M):
    """However many blocks an expert has; the stretches cover the blocks, and each begins with another expert."""
    rng = np.random.default_rng(M)
    local_MA = rng.choice(np.array([0, 2, 3, 6, E]), (M, 4)).astype(np.int32)
    blocks, is_host_E = lay_out(jnp.asarray(local_MA), E), np.array([0, 1, 1, 0, 1, 1, 1, 1], bool)
    begin_s, num = stretches(blocks, jnp.asarray(is_host_E)[blocks.expert_n])
    fetched = np.asarray(blocks.expert_n)[np.asarray(begin_s)[1:int(num) + 1]]
    assert fetched.tolist() == sorted({2, 6} & set(local_MA.ravel().tolist()))
    assert begin_s[0] == 0 and begin_s[int(num) + 1] == blocks.num_used > (10 if M == 600 else 0)


def test_rows_in_any_order(folders):
    source, path = open_source(folders["mxfp4"]), "layers.0.moe.down_EID.codes"
    some = Selected(source, {"some.down_EID.codes": (path, np.array([5, 0, 6]))})
    whole = source.read(path, (slice(None),) * 3)
    assert some.params.keys() == source.params.keys() - {path} | {"some.down_EID.codes"}
    assert some.params["some.down_EID.codes"] == ((3, *whole.shape[1:]), whole.dtype)
    assert np.array_equal(some.read("some.down_EID.codes", (slice(1, 3), slice(2, 9), slice(None))),
                          whole[[0, 6], 2:9])


def test_rows_of_bytes_are_grouped_where_a_device_has_whole_groups():
    mesh = jaxllm.make_abstract_mesh("tensor=2")
    sharding = jax.sharding.NamedSharding(mesh, jax.P("expert", "tensor", None))

    def shape_of(rows: int, dtype: str) -> tuple[int, ...]:
        return grouped(jax.ShapeDtypeStruct((4, rows, 5), dtype, sharding=sharding)).shape
    assert shape_of(48, "uint8") == (4, 6, 8, 5) and shape_of(48, "float8_e4m3fn") == (4, 6, 8, 5)
    assert shape_of(24, "uint8") == (4, 24, 5) and shape_of(48, "bfloat16") == (4, 48, 5)


def test_refused(folders, usage, tmp_path, monkeypatch):
    folder = folders["mxfp4"]
    dense = small_config(num_hidden_layers=1, hybrid_layer_pattern=[0], moe_layer_freq=[0])
    write_release(dense, tmp_path, kind="fp8")
    for arguments, message in [
            ((folder, "expert=4", 5), "resident_experts = 5: a device has 4 experts of each layer"),
            ((folder, None, -1), "resident_experts = -1"), ((tmp_path, None, 1), "this model has no experts")]:
        with pytest.raises(ValueError, match=message):
            jaxllm.load(arguments[0], arguments[1], resident_experts=arguments[2])
    with pytest.raises(ValueError, match="give resident_experts"):
        jaxllm.load(folder, usage=usage)
    monkeypatch.setattr("jaxllm.offloaded.HOST", "elsewhere")
    with pytest.raises(ValueError, match="cpu devices have no elsewhere memory.*device, pinned_host"):
        jaxllm.load(folder, resident_experts=1)
