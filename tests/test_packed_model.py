"""Whole models with packed weights: the numbers of the decoded ones, in the bytes of the file, on any mesh."""
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from make_release import write_release
from release_cases import CASES
from release_reader import read_release
from safetensors.numpy import save_file
from test_sharding import carried

import jaxllm
from jaxllm.checkpoint import open_source
from jaxllm.checkpoint.stated import stated_params
from jaxllm.gathered import stored
from jaxllm.generate.load import abstract_model, as_stored
from jaxllm.paths import parameters

CONFIGS = Path(__file__).parent.parent / "configs"
MODELS = ("v2_flash", "v26_flash", "v26_pro")
MESHES = ("tensor=8", "expert=4,tensor=2", "data=2,expert=2,tensor=2")      # 8: as many as, or more than, kv heads
TOKENS = np.random.default_rng(0).integers(0, 288, (2, 24))


@pytest.fixture(scope="module", params=MODELS)
def folders(request, tmp_path_factory):
    """(release, the same model in float32 by the tests' own reading of it, split)."""
    packed, plain = (tmp_path_factory.mktemp(f"{request.param}_{form}") for form in ("packed", "plain"))
    config, options = CASES[request.param]
    write_release(config, packed, **options)
    config = json.loads((packed / "config.json").read_text())
    config |= {"quantization_config": None, "attention_projection_layout": "split", "torch_dtype": "float32"}
    (plain / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(value) for name, value in read_release(packed).items()},
              plain / "model.safetensors")
    return packed, plain


@pytest.fixture(scope="module")
def expected(folders):
    return jaxllm.load(folders[1]).logits(TOKENS)


def test_logits_of_packed_weights(folders, expected):
    """One device, float32: bit for bit, as the decoded numbers are."""
    logits = jaxllm.load(folders[0]).logits(TOKENS)
    assert np.array_equal(logits, expected) and 1 < logits.std() < 4


@pytest.mark.parametrize("mesh", MESHES)
def test_logits_and_bytes_on_a_mesh(folders, expected, mesh):
    packed, plain = folders
    model = jaxllm.load(packed, mesh)
    # another order of float32 sums, as between meshes of plain models (test_mesh.py), here with values to 8
    np.testing.assert_allclose(model.logits(TOKENS), expected, atol=5e-5, rtol=0)
    assert max(held_bytes(model)) == pytest.approx(file_bytes(model, packed) / 8, rel=0.02)


def held_bytes(model):
    """Of each device."""
    shards = [shard for array in jax.tree.leaves(model.transformer) for shard in array.addressable_shards]
    return [sum(shard.data.nbytes for shard in shards if shard.device == device) for device in model.mesh.devices.flat]


def file_bytes(model, folder):
    """Of what a model holds, as the folder stores it; these configs' few kv heads as often as the mesh needs them, and
    plain parameters in what it computes in."""
    params, total = open_source(folder).params, 0
    for path, leaf in parameters(abstract_model(model.config, model.mesh, model.dtype)).items():
        for part in (f"{path}.codes", f"{path}.scale") if f"{path}.codes" in params else (path,):
            shape, dtype = params[part]
            heads = leaf.shape[1] / shape[1] if path.endswith(("k_DKH", "v_DKV")) else 1
            total += np.prod(shape) * heads * (leaf.dtype if part == path else dtype).itemsize
    return total


@pytest.mark.parametrize("mesh", ["tensor=8", "expert=8", "data=8", "expert=4,tensor=2", "data=2,expert=2,tensor=2",
                                  "data=2,tensor=4", "data=4,expert=16,tensor=4"])
@pytest.mark.parametrize("name", ["MiMo-V2-Flash-hub", "MiMo-V2.5", "MiMo-V2.5-Pro", "MiMo-V2.6-Flash",
                                  "MiMo-V2.6-Pro"])
def test_bytes_of_released_models(name, mesh):
    """At full size: those of the files, divided by the devices."""
    config, mesh = jaxllm.Config.from_hub(CONFIGS / name), jaxllm.make_abstract_mesh(mesh)
    params = stated_params(config)
    leaves = [leaf for path, leaf in parameters({
        path: as_stored(path, stored(leaf), params)
        for path, leaf in parameters(abstract_model(config, mesh, jax.numpy.dtype("bfloat16"))).items()}).items()]
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    in_file = sum(math.prod(shape) * dtype.itemsize for shape, dtype in params.values())
    assert held == pytest.approx(in_file / mesh.size, rel=0.02)


def test_a_loop_decodes_in_each_step(folders):
    """No number of a packed matrix is decoded before the loop over steps and kept through it."""
    model = jaxllm.load(folders[0])
    sizes = {math.prod(leaf.shape) for path, leaf in parameters(abstract_model(
        model.config, model.mesh, model.dtype)).items() if path.endswith(("q_DNH", "gate_DF", "gate_EDI"))}
    floats = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", carried(model))]
    assert floats and not sizes & set(floats)


def test_text_is_the_same_on_every_mesh(tmp_path):
    config, options = CASES["v25"]
    write_release(config, tmp_path, **options)
    texts = [jaxllm.load(tmp_path, mesh).generate([[1, 2, 3], [7]], max_new_tokens=12) for mesh in (None, *MESHES)]
    assert all([row.tokens for row in text] == [row.tokens for row in texts[0]] for text in texts)


def test_other_dtypes_to_compute_in(folders):
    """Decoded weights are rounded as plain ones are when they are loaded."""
    packed, plain = (jaxllm.load(folder, dtype="bfloat16") for folder in folders)
    assert packed.dtype == jax.numpy.bfloat16
    assert np.array_equal(packed.logits(TOKENS), plain.logits(TOKENS))


def test_config_alone_states_the_leaves(folders):
    """As far as they are packed, to the shape; it knows of no MTP blocks, and of plain dtypes only the usual one."""
    packed, _ = folders
    held = open_source(packed).params
    stated = stated_params(jaxllm.Config.from_hub(packed))
    assert stated.keys() == {path for path in held if not path.startswith("mtp.")}
    assert all(held[path][0] == shape for path, (shape, _) in stated.items())
    assert all(held[path][1] == dtype for path, (_, dtype) in stated.items() if path.endswith((".codes", ".scale")))


def test_a_mesh_that_cuts_through_a_byte():
    leaf = jax.ShapeDtypeStruct((4, 6, 8), np.float32, sharding=jax.sharding.NamedSharding(
        jaxllm.make_mesh("tensor=2"), jax.sharding.PartitionSpec(None, "tensor", None)))
    params = {"layers.1.moe.down_EID.codes": ((4, 3, 8), np.dtype(np.uint8)),
              "layers.1.moe.down_EID.scale": ((4, 1, 8), np.dtype(np.uint8))}
    with pytest.raises(ValueError, match=r"down_EID: a mesh that splits dim 1 of \[4, 6, 8\] into pieces of 3"):
        as_stored("layers.1.moe.down_EID", leaf, params)
