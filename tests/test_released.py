"""Every released config at its full size on abstract meshes of 512 devices: shapes, shardings and bytes, no memory."""
import dataclasses
import math
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxllm
from jaxllm.gathered import stored
from jaxllm.generate.load import abstract_model, as_stored
from jaxllm.model import check_mesh
from jaxllm.paths import parameters
from jaxllm.tpu.held import Held

FOLDERS = sorted((Path(__file__).parent.parent / "configs").glob("MiMo-*"))
MESHES = ("expert=64,tensor=8", "data=2,expert=32,tensor=8", "data=8,expert=8,tensor=8", "expert=128,tensor=4",
          "data=64,tensor=8", "data=16,expert=32")
SECONDS = 10          # of CPU time for one model; it takes 0.5
MEGABYTES = 100       # for module trees and traces, which take 10; the smallest of these models has 620,000


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def config(request):
    return jaxllm.Config.from_hub(request.param)


@pytest.fixture(autouse=True)
def nothing_is_allocated():
    """No array comes to be, and the process does not grow by more than MEGABYTES."""
    arrays, resident = jax.live_arrays(), resident_megabytes()
    yield
    assert len(jax.live_arrays()) == len(arrays)
    assert resident_megabytes() - resident < MEGABYTES


def resident_megabytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def bytes_per_device(tree):
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def parts(config):
    """Numbers of elements of the model's parts, out of its parameter counts."""
    count, D, L = config.count_parameters(), config.hidden_size, config.num_hidden_layers
    E, A = config.n_routed_experts, config.num_experts_per_tok
    experts = (count.total - count.routers - count.active) * E // (E - A)      # what a token leaves out is E - A of E
    vocabulary = 2 * config.vocab_size * D
    dense = 3 * D * config.intermediate_size * (L - sum(config.moe_layer_freq))
    norms, biases = D * (2 * L + 1), E * sum(config.moe_layer_freq)
    return {"experts": experts, "vocabulary": vocabulary, "dense": dense, "routers": count.routers, "norms": norms,
            "attention": count.total - experts - vocabulary - dense - count.routers,
            "biases": biases, "sinks": count.vectors - norms - biases}


def expected_bytes_per_device(config, mesh, itemsize):
    """In closed form: each device has its part of all matrices, and all of the vectors but sinks, which go with their
    heads. Routers, biases and sinks are float32, the rest has `itemsize` bytes."""
    tensor, part = mesh.shape["tensor"], parts(config)
    repeated = sum((max(layer.num_kv_heads, tensor) - layer.num_kv_heads) * (layer.head_dim + layer.v_head_dim)
                   for layer in config.layers) * config.hidden_size
    matrices = part["experts"] + part["vocabulary"] + part["dense"] + part["attention"] + repeated
    return itemsize * (matrices // mesh.size + part["norms"]) + 4 * (
        part["routers"] // mesh.size + part["biases"] + part["sinks"] // tensor)


def abstract_cache(config, mesh, batch, max_len, in_flight=1):
    return jax.eval_shape(lambda: jaxllm.init_cache(config, mesh, batch, max_len, in_flight))


def test_all_releases_are_here():
    assert [folder.name for folder in FOLDERS] == [
        "MiMo-V2-Flash", "MiMo-V2-Flash-hub", "MiMo-V2.5", "MiMo-V2.5-Pro", "MiMo-V2.5-Pro-FP4-DFlash",
        "MiMo-V2.6-Flash", "MiMo-V2.6-Pro"]


@pytest.mark.parametrize("mesh, dtype", [(mesh, "bfloat16") for mesh in MESHES] + [(MESHES[0], "float32")])
def test_parameters(config, mesh, dtype):
    mesh = jaxllm.make_abstract_mesh(mesh)
    assert mesh.size == 512
    begin = time.process_time()
    model = abstract_model(config, mesh, jnp.dtype(dtype))
    assert time.process_time() - begin < SECONDS
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(model))
    held = {path: as_stored(path, stored(leaf), {}) for path, leaf in parameters(model).items()}
    assert bytes_per_device(held) == expected_bytes_per_device(config, mesh, jnp.dtype(dtype).itemsize)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("in_flight", [1, 4])
def test_caches(config, mesh, in_flight):
    """64 rows of 262,144 tokens: split over data and tensor, and over expert by rows where these divide. Where not, a
    full layer's slots are, and sliding layers lie on each of its places."""
    mesh = jaxllm.make_abstract_mesh(mesh)
    cache = abstract_cache(config, mesh, 64, 2**18, in_flight)
    data, expert, tensor = (mesh.shape[axis] for axis in ("data", "expert", "tensor"))
    sliding = dataclasses.replace(config, hybrid_layer_pattern=(1,) * config.num_hidden_layers)
    ring = jaxllm.cache_bytes(sliding, 64, 2**18, 2, in_flight, tensor) // config.num_hidden_layers
    rings = ring * sum(config.hybrid_layer_pattern)
    full = jaxllm.cache_bytes(config, 64, 2**18, 2, in_flight, tensor) - rings
    copies = 1 if 64 % (data * expert) == 0 else expert
    assert bytes_per_device(cache.layers) * mesh.size == full + copies * rings
    assert bytes_per_device(cache.length_B) == 4 * 64 // mesh.shape["data"]


def test_prefill_and_decode(config):
    """Steps through a layer of each kind: each product and collective is typed on the mesh. Results stay split."""
    small = Held("", config, {}).small
    assert set(small.layers) == set(config.layers)
    config = small
    mesh = jaxllm.make_abstract_mesh("data=2,expert=32,tensor=8")
    model, cache = abstract_model(config, mesh, jnp.dtype("bfloat16")), abstract_cache(config, mesh, 64, 8192)
    for num_tokens in (512, 1):
        tokens_BT = jax.ShapeDtypeStruct((64, num_tokens), jnp.int32, sharding=NamedSharding(mesh, P("data", None)))
        length_B = jax.ShapeDtypeStruct((64,), jnp.int32, sharding=NamedSharding(mesh, P("data")))
        with jax.sharding.use_abstract_mesh(mesh):
            logits_BW, new = jax.eval_shape(jaxllm.prefill, model, cache, tokens_BT, length_B)
        assert logits_BW.shape == (64, config.vocab_size) and logits_BW.dtype == jnp.float32
        assert logits_BW.sharding.spec == P("data", ("expert", "tensor"))
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), new) == \
            jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), cache)


@pytest.mark.parametrize("mesh, message", [
    ("expert=512", "n_routed_experts = {config.n_routed_experts} cannot be split over mesh axis expert = 512"),
    ("tensor=512", "num_attention_heads = {config.num_attention_heads} cannot be split over mesh axis tensor = 512"),
    ("expert=96,tensor=4", "vocab_size = 152576 cannot be split over mesh axis expert = 96 x tensor = 4"),
])
def test_meshes_that_do_not_fit(config, mesh, message):
    with pytest.raises(ValueError, match=message.format(config=config)):
        check_mesh(config, jaxllm.make_abstract_mesh(mesh))
