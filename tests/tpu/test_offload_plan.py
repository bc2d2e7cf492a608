"""Plans with experts in host memory: expectations against draws, bytes against the model's, and what is refused."""
import json
from pathlib import Path

import numpy as np
import pytest
from hub_maker import tiny_config

from jaxllm.checkpoint.stated import stated_params
from jaxllm.cli import main
from jaxllm.config import Config
from jaxllm.tpu.chips import slice_of
from jaxllm.tpu.held import Held
from jaxllm.tpu.offload import expected, largest, offload_plans, parse_size
from jaxllm.tpu.steps import Work
from jaxllm.usage import Usage, expert_layers, identity

CONFIGS = Path(__file__).parent.parent.parent / "configs"
PRO = str(CONFIGS / "MiMo-V2.6-Pro")


@pytest.fixture(scope="module")
def pro():
    config = Config.from_hub(PRO)
    return Held("MiMo-V2.6-Pro", config, stated_params(config))


@pytest.mark.parametrize("copies", [1, 2])
def test_the_expected_maximum(copies):
    """Against 200,000 draws, whose mean is known to about 1 / sqrt(200000) = 0.002; 0.01 is four of that and more."""
    need = np.array([[0.9, 0.1, 0.5], [0.3, 0.3, 0.3]])
    draws = np.random.default_rng(0).random((200_000, copies, *need.shape)) < need
    assert largest(need, copies) == pytest.approx(draws.sum(-1).max((1, 2)).mean(), abs=0.01)
    assert largest(need[:1], 1) == pytest.approx(1.5)      # of one place, the sum
    assert largest(need[:, :0], copies) == 0


def test_what_a_step_needs(pro):
    """By hand: with all chosen alike 384 * (1 - (1 - 8/384)^n) of 69 layers; by a count what stays costs nothing."""
    config, layers = pro.config, len(expert_layers(pro.config))
    for tokens in (1, 64):
        need = 384 * (1 - (1 - 8 / 384) ** tokens)
        assert expected(config, 1, 0, tokens, 1, None) == pytest.approx((layers * need, layers * need))
        assert expected(config, 1, 96, tokens, 1, None)[1] == pytest.approx(layers * need * 288 / 384)
    count = np.zeros(384, np.int64)
    count[np.arange(0, 384, 12)] = 25      # 32 experts, each by a quarter of 100 tokens
    usage = Usage(identity(config), 100, dict.fromkeys(expert_layers(config), count))
    assert expected(config, 1, 32, 1, 1, usage) == pytest.approx((layers * 8, 0))
    assert expected(config, 1, 16, 1, 1, usage)[1] == pytest.approx(layers * 4)
    assert expected(config, 8, 0, 1, 1, usage)[0] == pytest.approx(layers)      # of a device, the mean; and the most:
    assert 2 * layers < expected(config, 8, 0, 1, 1, usage)[1] < 3 * layers


@pytest.mark.parametrize("batch", [1, 64])
def test_as_many_stay_as_fit(pro, batch):
    on, work = slice_of("gpu:8x32GB"), Work("decode", batch, 32768, 1)
    best = offload_plans(pro, on, work, 10**12)[0]
    stacks = 531_351_207_936      # bytes of all experts, as `jaxllm info` states them
    assert best.mesh == {"data": 1, "expert": 1, "tensor": 8} and best.experts == 384
    assert best.expert * 8 * 384 * 69 == stacks == best.host * 8 + best.resident * best.expert * 8 * 69
    assert best.peak <= best.on.chip.usable_hbm.value < best.peak + 1.05 * 69 * best.expert      # one more would not
    assert best.limit == "host bus" and best.seconds["host bus"] == best.over_bus / 63e9
    assert best.over_bus == int(best.fetched * best.expert) + best.sent      # cards without links send over it too
    assert best.tokens_s == pytest.approx(batch * 63e9 / best.over_bus)
    assert best.tokens_s_in_turn < best.tokens_s


def test_all_stay_where_they_fit():
    config = Config.from_dict(tiny_config(), "tiny")
    best = offload_plans(Held("tiny", config, stated_params(config)), slice_of("rtx4090:2"),
                         Work("decode", 2, 64, 1), 10**9)[0]
    assert best.resident == best.experts and best.host == best.fetched == 0


def test_the_command(capsys, tmp_path):
    """A skewed count needs less than all alike."""
    config = Config.from_hub(PRO)
    count, file, out = np.full(384, 10), tmp_path / "usage.json", tmp_path / "plan.json"
    count[:64] = 130      # a sixth of the experts has 8320 of 11520 choices
    Usage(identity(config), 1440, dict.fromkeys(expert_layers(config), count)).write(file)
    found = {}
    for usage in ([], ["--usage", str(file)]):
        assert main(["plan", PRO, "--on", "gpu:8x24GB", "--host", "1TB", "--batch", "8", "--json", str(out),
                     "--png", str(tmp_path / "plan.png"), *usage]) == 0
        found[bool(usage)] = json.loads(out.read_text())[0]
        told = capsys.readouterr().out
        assert "of a device's 384 of each layer stay" in told and "host bus is what limits it" in told
        assert ("as in the usage file" in told) == bool(usage)
    assert found[True]["tokens_s"] > 1.3 * found[False]["tokens_s"] and found[True]["resident"] > 64
    assert found[False]["host_in_all"] == 8 * found[False]["host"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["gpu:8x24GB", "--host", "300GB"], "need 477 GB of host memory, and 300 GB less a tenth for all else are 273 GB: "
                                        "205 GB too little"),
    (["gpu:2x24GB", "--host", "1TB"], "with all experts in host memory: a device would hold 73.8 GB of 25.8 GB, "
                                      "48 GB too much"),
    (["tpu7x:2x2x1", "--host", "1TB"], "the rate between host and tpu7x is not known (no public page found)"),
    (["gpu:8x24GB", "--host", "1"], "--host 1: expected a size as in 1TB or 512GB"),
    (["all", "--host", "1TB"], "name the slice with --on"),
    (["gpu:8x24GB", "--usage", "x"], "--usage says which experts stay on a device, and goes with --host"),
    (["gpu:8x24GB", "--host", "1TB", "--mesh", "expert=4"], "the mesh has 4 devices"),
])
def test_refused(capsys, arguments, message):
    assert main(["plan", PRO, "--on", *arguments]) == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_no_experts():
    config = Config.from_dict(tiny_config(num_hidden_layers=1, hybrid_layer_pattern=[0], moe_layer_freq=[0]), "tiny")
    with pytest.raises(ValueError, match="tiny has no experts"):
        offload_plans(Held("tiny", config, stated_params(config)), slice_of("rtx4090:2"), Work("decode", 2, 64, 1), 1)


@pytest.mark.parametrize(("text", "nbytes"), [("1TB", 10**12), ("512gb", 512 * 10**9), ("1.5 TiB", 3 * 2**39)])
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "TB", "-1TB", "0GB", "1 PB", "1e3GB", "1TBs"])
def test_sizes_refused(text):
    with pytest.raises(ValueError, match="expected a size as in 1TB or 512GB"):
        parse_size(text)
