"""Plans of training: state as the product's own plan of a run has it, exactly; FLOPs, bytes sent and days by hand."""
import functools
import json
import math
from pathlib import Path

import pytest
from hub_maker import tiny_config

from jaxllm.axes import make_abstract_mesh, make_mesh
from jaxllm.checkpoint.stated import stated_params
from jaxllm.cli import main
from jaxllm.config import Config
from jaxllm.tpu.chips import slice_of
from jaxllm.tpu.held import Held
from jaxllm.tpu.rates import is_near, rates_of
from jaxllm.tpu.steps import training_of
from jaxllm.tpu.train_held import Trained
from jaxllm.tpu.train_plan import plan, plans
from jaxllm.tpu.train_work import flops_of_token, kept_bytes, mean_seen, sent_bytes
from jaxllm.train.memory import device_bytes
from jaxllm.train.state import make_plan

CONFIGS = Path(__file__).parent.parent.parent / "configs"
FLASH = str(CONFIGS / "MiMo-V2-Flash")
RUN = 15 * 10**12


def trained(config: Config, batch: int, context: int, rank: int | None = None, weights: str | None = None) -> Trained:
    return Trained(Held("model", config, stated_params(config, weights)), training_of(config, batch, context, rank))


@functools.cache
def flash(rank: int | None = None) -> Trained:
    return trained(Config.from_hub(FLASH), 64, 4096, rank, "mxfp4" if rank else None)


@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2", "expert=2,tensor=4", "data=8"])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_state_is_that_of_the_run(mesh, rank, dtype):
    """Every byte of the state, of what is frozen, and of the batch."""
    config = Config.from_dict(tiny_config() | {"torch_dtype": dtype}, "tiny")
    found = trained(config, 8, 64, rank, "mxfp4" if rank else None)
    ours = make_plan(found.run, config, make_mesh(mesh), found.held.all_params if rank else {}, 0)
    state = found.state(make_abstract_mesh(mesh))
    abstract = ours.abstract()
    assert state["optimizer"] == device_bytes((abstract.opt_state, abstract.step))
    weights = sum(nbytes for kind, nbytes in state.items() if kind not in ("optimizer", "batch"))
    assert weights == device_bytes((abstract.trained, abstract.biases, [ours.held[path] for path in ours.frozen]))
    assert (state["adapters"] > 0) == bool(rank)
    assert found.num_trained(make_abstract_mesh(mesh)) * 4 == device_bytes(abstract.trained)      # master, or float32
    assert state["batch"] == 8 * 64 // make_mesh(mesh).shape["data"] * (4 + 4 + 1)


def test_flops_by_hand():
    """Six for each number that a token is multiplied with, and for each of what it sees on average; the same again
    without the head's for rematerialisation. Of adapters: those of their base but for its own gradient."""
    config, found = Config.from_hub(FLASH), flops_of_token(flash())
    table, counts = config.vocab_size * config.hidden_size, config.count_parameters()
    seen = 64 * (192 + 128) * (9 * (4096 + 1) / 2 + 39 * sum(min(i + 1, 128) for i in range(4096)) / 4096)
    assert mean_seen(config.layers[1], 4096) == pytest.approx(sum(min(i + 1, 128) for i in range(4096)) / 4096)
    assert found["forward"] == pytest.approx(2 * (counts.active - table + seen))
    assert found["gradients"] == pytest.approx(2 * found["forward"])
    assert found["again"] == pytest.approx(2 * (counts.active - 2 * table + seen))
    adapted = flops_of_token(flash(rank=16))
    adapters = adapted["forward"] - found["forward"]
    assert 0 < adapters < 0.02 * found["forward"]
    assert adapted["gradients"] == pytest.approx(found["forward"] + 2 * seen + 2 * adapters)


def test_nothing_is_sent_alone():
    assert set(sent_bytes(flash(), make_abstract_mesh(None)).values()) == {0}
    assert sent_bytes(flash(), make_abstract_mesh("data=8"))["model"] == 0


def test_what_is_kept():
    """Rematerialised: of each layer its input, scores and choice; of the last its output and that one's gradient."""
    found = kept_bytes(flash(), make_abstract_mesh("data=8,expert=8"))
    M = 64 * 4096 // 8
    assert found == 50 * M * 4096 * 2 + 47 * M * (256 + 8) * 4
    assert kept_bytes(flash(), make_abstract_mesh("data=8,expert=8"), remat=False) > 3 * found


def test_ten_thousand_gpus():
    """What 15T tokens take of 10,000 H100s: by hand, FLOPs over rate. 625 places along data divide no dim of the model,
    so nothing fits on all of them, and 8,192 take part."""
    held, on = flash().held, slice_of("h100:10000")
    work = training_of(held.config, 16384, 4096, None, RUN)
    whole = plan(held, on, make_abstract_mesh("data=1250,expert=8"), work)
    assert not whole.fits
    assert whole.days["asked"] == pytest.approx(RUN * 9.1496e10 / (10_000 * 989.4e12 * 0.4) / 86400, rel=1e-3)   # 4.01
    best = plans(held, on, work)[0]
    assert best.fits and best.on.name == "h100:8192" and math.prod(best.mesh.values()) == 8192
    assert best.days["asked"] == pytest.approx(whole.days["asked"] * 10_000 / 8192)
    assert best.days["bounded"] >= best.days["asked"]
    assert best.seconds["between chips"] >= best.sent["data"] / 50e9      # hosts are apart by 400 Gbit/s a GPU
    assert rates_of(slice_of("h100:8"))["between chips"] == 450e9
    assert is_near(on, {"expert": 4, "tensor": 2}) and not is_near(on, {"expert": 8, "tensor": 2})


def test_the_command(capsys, tmp_path):
    files = tmp_path / "plan.json", tmp_path / "plan.png"
    assert main(["plan", FLASH, "--step", "train", "--on", "v5p:4x4x8", "--batch", "128", "--tokens", "15e12",
                 "--json", str(files[0]), "--png", str(files[1])]) == 0
    out = capsys.readouterr().out
    assert "1.5e+13 tokens at 40% of the chips' rate" in out and "without rematerialisation" in out
    best = json.loads(files[0].read_text())[0]
    assert best["fits"] and best["run_tokens"] == RUN and best["days"]["asked"] > 100
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_too_large(capsys):
    assert main(["plan", str(CONFIGS / "mimo-nano"), "--on", "v6e:2x2", "--step", "train", "--batch", "65536"]) == 2
    assert "does not fit v6e:2x2: a device would hold" in (error := capsys.readouterr().err)
    assert "the smallest that fits is v6e:" in error and error.count("\n") == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (["--step", "train", "--tokens", "-5"], "tokens = -5: expected a positive whole number"),
    (["--step", "train", "--tokens", "many"], "argument --tokens: invalid whole value: 'many'"),
    (["--step", "train", "--lora", "0"], "lora = 0: expected a positive whole number"),
    (["--step", "train", "--tokens", "inf"], "argument --tokens: invalid whole value: 'inf'"),
    (["--step", "train", "--context", "0"], "context = 0: expected a positive whole number"),
    (["--step", "train", "--context", "1"], "context = 1: expected at least 2"),
    (["--step", "train", "--batch", "0"], "batch = 0: expected a positive whole number"),
    (["--lora", "16"], "--lora is for --step train, not decode"),
    (["--step", "train", "--batch", "3", "--mesh", "data=2,expert=2"], "batch = 3 cannot be split over mesh axis data"),
])
def test_refused(capsys, arguments, message):
    assert main(["plan", FLASH, "--on", "v6e:2x2", *arguments]) == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1
