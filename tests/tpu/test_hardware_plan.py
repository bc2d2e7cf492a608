"""Plans: bytes are those of arrays that exist, or of the released models' own tables; bounds are counted by hand."""
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hub_maker import tiny_config

import jaxllm
from jaxllm.checkpoint.stated import stated_params
from jaxllm.cli import main
from jaxllm.config import Config
from jaxllm.gathered import stored
from jaxllm.generate.load import abstract_model, as_stored
from jaxllm.paths import parameters
from jaxllm.tpu.chips import slice_of
from jaxllm.tpu.held import Held
from jaxllm.tpu.plan import flops, plan, plans
from jaxllm.tpu.sent import sent_bytes
from jaxllm.tpu.steps import Work
from jaxllm.train.memory import device_bytes

CONFIGS = Path(__file__).parent.parent.parent / "configs"
DECODE = Work("decode", 64, 32768, 1)
PRO = str(CONFIGS / "MiMo-V2.6-Pro")


def held(name: str) -> Held:
    config = Config.from_hub(CONFIGS / name)
    return Held(name, config, stated_params(config))


@pytest.mark.parametrize(("name", "mesh"), [
    ("MiMo-V2.6-Pro", "expert=8,tensor=8"), ("MiMo-V2-Flash", "data=2,expert=4,tensor=2"), ("MiMo-V2.5", "tensor=16"),
    ("mimo-nano", "expert=2,tensor=2"), ("mimo-nano", "tensor=16")])
def test_bytes_are_those_of_every_layer(name, mesh):
    """One layer of each kind, counted as often as it occurs, is the whole model; or no mesh for it."""
    found, mesh = held(name), jaxllm.make_abstract_mesh(mesh)
    try:
        model = abstract_model(found.config, mesh, found.dtype)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error).split(":")[0][:40]):
            found.weights(mesh)
        return
    params = stated_params(found.config)
    leaves = [as_stored(path, stored(leaf), params) for path, leaf in parameters(model).items()]
    assert sum(found.weights(mesh).values()) == sum(map(device_bytes, leaves))


@pytest.mark.parametrize(("mesh", "batch"), [("expert=4,tensor=2", 8), ("expert=4,tensor=2", 6), ("expert=8", 1),
                                             ("data=2,tensor=4", 8)])
def test_cache_is_that_of_real_arrays(mesh, batch):
    config = Config.from_dict(tiny_config(), "tiny")
    cache = jaxllm.init_cache(config, jaxllm.make_mesh(mesh), batch, 300, 2, jnp.dtype(config.dtype))
    held, work = Held("tiny", config, stated_params(config)), Work("verify", batch, 300, 2)
    found = held.cache(jaxllm.make_abstract_mesh(mesh), work)
    assert found == sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(cache.layers))


def test_work_of_a_step():
    """Two operations for each active parameter and token, and for each number of keys and values that a query meets."""
    pro = held("MiMo-V2.6-Pro")
    attention = 128 * (192 + 128) * (10 * 32768 + 60 * 128)
    assert flops(pro, DECODE) == 2 * 64 * (41_731_227_648 + attention)
    alone = jaxllm.make_abstract_mesh(None)
    assert sent_bytes(pro, slice_of("v6e:8x8"), alone, DECODE) == 0      # nothing on one device
    found = plan(pro, slice_of("v6e:8x8"), jaxllm.make_abstract_mesh("expert=8,tensor=8"), DECODE)
    assert found.seconds["HBM"] == found.needed / 1638e9 and found.limit == "HBM"
    assert found.tokens_s == 64 / found.step_seconds
    few = plan(pro, slice_of("v6e:8x8"), jaxllm.make_abstract_mesh("expert=8,tensor=8"),
               Work("decode", 1, 32768, 1))
    read = few.needed - few.held["cache"] - (sum(few.held.values()) - few.held["cache"] - few.held["experts"])
    assert read == pytest.approx(few.held["experts"] * 8 / 384, rel=0.2)      # one token reads 8 experts, and no table


def test_the_best_mesh_comes_first():
    found = plans(held("MiMo-V2.6-Pro"), slice_of("v6e:8x8"), DECODE)
    assert found[0].mesh == {"data": 1, "expert": 8, "tensor": 8} and found[0].fits
    fitting = [sum(x.seconds.values()) for x in found if x.fits]
    assert fitting == sorted(fitting) and len({tuple(x.mesh.values()) for x in found}) == len(found) > 10


def test_the_command(capsys, tmp_path):
    files = tmp_path / "plan.json", tmp_path / "plan.png"
    assert main(["plan", PRO, "--on", "v6e:8x8", "--json", str(files[0]), "--png", str(files[1])]) == 0
    out = capsys.readouterr().out
    assert out.startswith("v6e:8x8") and "HBM is what limits it" in out and len(out.splitlines()) == 5 + 3
    best = json.loads(files[0].read_text())[0]
    assert best["fits"] and best["mesh"]["tensor"] == 8 and files[1].read_bytes().startswith(b"\x89PNG")
    assert main(["plan", str(CONFIGS / "mimo-nano"), "--on", "all", "--context", "4096"]) == 0
    chips = [int(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert chips == sorted(chips) and len(chips) > 10


@pytest.mark.parametrize(("arguments", "message"), [
    (["--on", "v6e:3x3"], "slice 'v6e:3x3': unknown"),
    (["--on", "v6e:4x4"], "does not fit v6e:4x4: a device would hold 42.1 GB of 33.6 GB, 8.5 GB too much; the "
                          "smallest that fits is v6e:4x8"),
    (["--on", "v6e:8x8", "--mesh", "expert=7"], "vocab_size = 152576 cannot be split over mesh axis expert = 7"),
    (["--on", "v6e:8x8", "--mesh", "expert=8"], "the mesh has 8 devices, but v6e:8x8 has 64"),
    (["--on", "v6e:8x8", "--mesh", "data=64", "--batch", "8"], "batch = 8 cannot be split over mesh axis data = 64"),
    (["--on", "v6e:8x8", "--batch", "0"], "batch = 0: expected a positive whole number"),
    (["--on", "v6e:8x8", "--context", "1048577"], "context = 1048577 is more than the model's 1048576"),
    (["--on", "all", "--batch", "1000000"], "no slice of the table holds it with 1000000 rows of 32768"),
])
def test_refused(capsys, arguments, message):
    assert main(["plan", PRO, *arguments]) == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1
