"""What `jaxllm info` says, against numbers that the arrays themselves, or hand arithmetic, give."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hub_maker import tiny_config, write_hub

import jaxllm
from jaxllm.checkpoint.incomplete import MARKER
from jaxllm.info import describe, device_bytes
from jaxllm.paths import parameters

CONFIGS = Path(__file__).parent.parent / "configs"
MESH = "data=2,expert=2,tensor=2"


def table(text):
    """Label of a line -> the numbers in its columns, for all lines that have both; "total" is that of the bytes."""
    found = {}
    for line in text.split("\n"):
        if row := re.match(r"^(?:\w+)? +(\S.*?)  +([\d,]+)(?: +([\d,]+))?(?:  .*)?$", line):
            found[row[1]] = [int(number.replace(",", "")) for number in row.groups()[1:] if number]
    return found


def written(folder, **changes):
    write_hub(folder, tiny_config(torch_dtype="bfloat16", **changes), dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return written(tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("mesh", [None, MESH, "tensor=8"])      # 8: more than there are kv heads, which are repeated
def test_bytes_are_those_of_the_loaded_model(hub, mesh):
    model, text = jaxllm.load(hub, mesh=mesh, dtype="bfloat16"), describe(hub, mesh)
    arrays = parameters(model.transformer)
    for device in model.mesh.devices.flat:
        held = sum(shard.data.nbytes for array in arrays.values() for shard in array.addressable_shards
                   if shard.device == device)
        assert table(text)["total"] == [sum(array.nbytes for array in arrays.values()), held]
    assert "\n".join(" " * 14 + line for line in device_bytes(arrays)[1:]) in text


@pytest.mark.parametrize("mesh", [None, MESH, "tensor=8"])
def test_cache_bytes_are_those_of_a_cache(hub, mesh):
    """One sequence's share of real caches, whose length changes nothing but the full layers."""
    config, real_mesh = jaxllm.Config.from_hub(hub), jaxllm.make_mesh(mesh)

    def cache(tokens):
        return jaxllm.init_cache(config, real_mesh, batch=8, max_len=tokens, dtype=jnp.bfloat16).layers

    def size(tokens):
        return sum(array.nbytes for array in jax.tree.leaves(cache(tokens))) // 8

    def on_a_device(tokens):
        sequences = 8 // (real_mesh.shape["data"] * real_mesh.shape["expert"])
        return sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(cache(tokens))) // sequences

    numbers = table(describe(hub, mesh))
    assert numbers["each token"] == [size(101) - size(100), on_a_device(101) - on_a_device(100)]
    assert numbers["each sequence"] == [size(100) - 100 * numbers["each token"][0],
                                        on_a_device(100) - 100 * numbers["each token"][1]]
    assert numbers["at 512 tokens"] == [size(512), on_a_device(512)]


def test_a_model_that_fits_no_machine_here():
    """2 trillion bytes on 512 devices that are not there; MODEL.md 4.8 has the counts."""
    text = describe(CONFIGS / "MiMo-V2.6-Pro", "data=2,expert=64,tensor=4")
    numbers = table(text)
    # vectors: two norms a layer and the last one, sinks of the 60 sliding layers, biases of the 69 expert layers
    vectors = 6144 * (2 * 70 + 1) + 60 * 128 + 69 * 384
    assert numbers["active for a token"] == [41_731_227_648, 41_731_227_648 + vectors]
    assert numbers["each MTP block"] == [644_874_240]
    experts = 69 * 384 * 3 * 6144 * 2048 * 17 // 32      # half a byte, and a scale for each 32
    assert numbers["experts"] == [experts, experts // 512]
    assert numbers["routers"] == [69 * 384 * 6144 * 4, 69 * 384 * 6144 * 4 // 512]
    assert numbers["each token"] == [10 * 8 * (192 + 128) * 2, 10 * 8 * (192 + 128) * 2 // 4]
    assert numbers["each sequence"] == [60 * 128 * 8 * (192 + 128) * 2, 60 * 128 * 8 * (192 + 128) * 2 // 4]
    assert f"{1_021_247_225_856:,}" in text and f"{1_021_247_225_856 + vectors:,}" in text
    assert "up to 1/128 of a batch" in text


def test_it_asks_for_no_device():
    """In a process of its own, whose JAX could not make one."""
    code = "import sys; from jaxllm.info import describe; print(describe(sys.argv[1], 'expert=64,tensor=8'))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(CONFIGS / "MiMo-V2-Flash")],
                          capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "no_such_platform"})
    assert done.returncode == 0, done.stderr
    assert "308,778,369,024" in done.stdout
    failing = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], capture_output=True,
                             env=os.environ | {"JAX_PLATFORMS": "no_such_platform"})
    assert failing.returncode != 0


def test_layers_at_a_glance():
    text = describe(CONFIGS / "mimo-nano")
    assert "layers        0 full dense | 1-2 sliding moe | 3 full moe | 4-5 sliding moe\n" in text
    for line in ("full    8 query and 2 kv heads of 48, values of 32",
                 "sliding 8 query and 4 kv heads of 48, values of 32, window 128, sinks",
                 "dense   hidden 768", "moe     16 experts of 128, 4 a token"):
        assert f" {line}\n" in text


def test_what_a_model_lacks_is_not_told(tmp_path):
    text = describe(written(tmp_path, hybrid_layer_pattern=[0] * 6, moe_layer_freq=[0] * 6, tie_word_embeddings=True,
                            add_swa_attention_sink_bias=False))
    assert "0-5 full dense\n" in text
    for absent in ("sliding", "moe", "experts", "routers'", "MTP", "each sequence", "of the sequences"):
        assert absent not in text
    assert table(text)["embedding and head"][0] == 96 * 64 * 2        # one table


@pytest.mark.parametrize("name", sorted(file.parent.name for file in CONFIGS.glob("*/config.json")))
def test_every_config_here(name):
    lines = describe(CONFIGS / name, "data=2,expert=8,tensor=8" if name == "mimo-nano" else
                     "data=4,expert=32,tensor=4").split("\n")
    assert lines[0] == str(CONFIGS / name)
    assert max(map(len, lines[1:])) <= 120 and all(line == line.rstrip() for line in lines)


def weights_line(text):
    return re.search(r"^weights +(.*(?:\n {14}\S.*)*)", text, re.M)[1]


def test_weights_in_a_folder(hub, tmp_path):
    num, nbytes = re.fullmatch(r"hub layout, (\d+) arrays of bfloat16 and float32, ([\d,]+) bytes",
                               weights_line(describe(hub))).groups()
    jaxllm.convert(hub, tmp_path / "out", progress=False)
    assert weights_line(describe(tmp_path / "out")) == \
        f"converted, {num} arrays of bfloat16 and float32, {nbytes} bytes"
    stored = (hub / "model.safetensors").stat().st_size
    assert 0.95 * stored < int(nbytes.replace(",", "")) < stored        # the file has a header, too


def test_a_config_alone(hub, tmp_path):
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text((hub / "config.json").read_text())
    assert weights_line(describe(tmp_path)) == "none in this folder"
    assert weights_line(describe(tmp_path / "config.json")) == "none in this folder"


def test_quantised_layouts(hub, tmp_path):
    config = json.loads((hub / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "store_dtype": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert weights_line(describe(tmp_path)) == "none in this folder; attention, dense MLPs in fp8; experts in mxfp4"
    del config["quantization_config"]["store_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert weights_line(describe(tmp_path)) == "none in this folder; attention, dense MLPs, experts in fp8"


def test_bytes_of_a_release():
    """The totals of MODEL.md 4.5 and 4.6: 302.87 GB of fp8 experts, 531.35 GB of mxfp4 ones."""
    for name, experts in (("MiMo-V2.5", 302_869_118_976), ("MiMo-V2.6-Pro", 531_351_207_936)):
        lines = describe(CONFIGS / name, "expert=32").splitlines()
        line = next(line for line in lines if line.split()[:1] == ["experts"])
        assert line.split()[1:] == [f"{experts:,}", f"{experts // 32:,}"]


def test_bad_input(hub, tmp_path):
    with pytest.raises(ValueError, match=r"absent.config\.json: no such file"):
        describe(tmp_path / "absent")
    with pytest.raises(ValueError, match="n_routed_experts = 8 cannot be split over mesh axis expert = 3"):
        describe(hub, "expert=3")
    with pytest.raises(ValueError, match="unknown axis 'experts'"):
        describe(hub, "experts=2")
    (tmp_path / "config.json").write_text((hub / "config.json").read_text())
    (tmp_path / MARKER).touch()
    with pytest.raises(ValueError, match="a conversion or an export that is not finished"):
        describe(tmp_path)
    (tmp_path / MARKER).unlink()
    (tmp_path / "model.safetensors").write_bytes((hub / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors.*truncated"):
        describe(tmp_path)
