"""Whole runs: what they leave, and that a killed, stopped or damaged one goes on with the numbers of an undisturbed."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hub_maker import tiny_config
from jax.experimental.compilation_cache import compilation_cache

import jaxllm
from jaxllm.checkpoint import CheckpointError, export, open_source
from jaxllm.train import loop
from jaxllm.train.loop import train
from jaxllm.train.output import output_of
from jaxllm.train.run import Run

ROOT = Path(__file__).parents[2]
NANO = ROOT / "configs/mimo-nano"
SMALL = {"num_hidden_layers": 2, "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "vocab_size": 8192,
         "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_nextn_predict_layers": 1}
STEPS = 40


def settings(folder: Path, **changes) -> Run:
    return Run(**{"output": str(folder), "config": tiny_config(**SMALL), "tokenizer": str(NANO),
                  "data": {str(NANO / "udhr/train.de.jsonl"): 1.0, str(NANO / "udhr/train.zh.jsonl"): 2.0},
                  "steps": STEPS, "context": 32, "batch": 4, "learning_rate": 1e-2, "warmup": 2, "decay": 10,
                  "save_every": 4, "log_every": 1, "bias_update": 0.01} | changes)


def losses(folder: Path) -> dict[int, tuple[float, ...]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: (line["loss"], line["mtp_0"], line["grad_norm"], line["balance"]) for line in lines}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """All runs here have the same few programs; a cache of this module's own saves most of its time."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = train(settings(folder), progress=False)
    assert done.is_finished and done.step == STEPS
    return folder


def test_what_a_run_leaves(undisturbed, tmp_path):
    """Losses that fall, three checkpoints, curves; a folder that loads and exports as a model does."""
    found = losses(undisturbed)
    assert list(found) == list(range(1, STEPS + 1)) and found[STEPS][0] < found[1][0] - 1
    assert {path.name for path in (undisturbed / "checkpoints").iterdir()} == {"32", "36", "40"}
    assert (undisturbed / "curves.png").read_bytes().startswith(b"\x89PNG")
    model = jaxllm.load(undisturbed)
    export(undisturbed, tmp_path / "hub", weights="float32", progress=False)
    again = jaxllm.load(tmp_path / "hub")
    np.testing.assert_array_equal(model.logits([[1, 2, 3]]), again.logits([[1, 2, 3]]))
    assert any("mtp" in name for name in json.loads((tmp_path / "hub/model.safetensors.index.json").read_text())[
        "weight_map"])


def test_bfloat16_with_a_float32_master(undisturbed, tmp_path):
    """What is kept is float32; the losses are those of float32 within 1%, as bfloat16 has 8 bits."""
    train(settings(tmp_path / "run", dtype="bfloat16", master=True, steps=10, decay=2), progress=False)
    found, expected = losses(tmp_path / "run"), losses(undisturbed)
    np.testing.assert_allclose([found[n][:2] for n in range(1, 9)], [expected[n][:2] for n in range(1, 9)], rtol=1e-2)
    assert any(found[n][0] != expected[n][0] for n in found)
    assert {dtype for _, dtype in open_source(tmp_path / "run").params.values()} == {np.dtype("float32")}


def test_blocks_of_a_model_can_be_left_out(undisturbed, tmp_path):
    """A run computes the MTP block of its model, unless that counts nothing: then it stays as it was, bit for bit."""
    for weight in (0.3, 0.0):
        train(settings(tmp_path / str(weight), model=str(undisturbed), steps=1, warmup=0, decay=0, mtp_weight=weight),
              progress=False)
    both, = losses(tmp_path / "0.3").values()
    line = json.loads((tmp_path / "0.0/metrics.jsonl").read_text())
    assert line["loss"] == pytest.approx(both[0]) and "mtp_0" not in line
    before, with_it, without = (open_source(folder) for folder in (undisturbed, tmp_path / "0.3", tmp_path / "0.0"))
    blocks = {path: (slice(None),) * len(shape) for path, (shape, _) in before.params.items() if path[:4] == "mtp."}
    assert blocks and all(np.array_equal(without.read(path, all_), before.read(path, all_))
                          for path, all_ in blocks.items())
    assert not any(np.array_equal(with_it.read(path, all_), before.read(path, all_)) for path, all_ in blocks.items())


KILLED = """
import dataclasses, json, sys
from pathlib import Path
from jaxllm.train.loop import train
from jaxllm.train.run import Run
folder, begun = sys.argv[1:]
run = Run.from_dict(json.loads(begun), "test")
train(run, resume=Path(folder, "run.json").exists(), progress=False)
"""


def start(folder: Path, tmp_path: Path) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
                        "JAXLLM_COMPILE_CACHE": str(tmp_path / "cache")}
    with open(tmp_path / "log", "a") as log:
        return subprocess.Popen([sys.executable, "-c", KILLED, str(folder), settings(folder).to_json()], env=env,
                                stdout=log, stderr=log)


def test_killed_at_random_it_goes_on_with_the_same_numbers(undisturbed, tmp_path):
    """Five times kill -9 after a random number of further steps, wherever it then is; then to the end."""
    folder, moments = tmp_path / "run", random.Random(0)
    reached = 0
    for _ in range(5):
        target = reached + moments.randint(1, 6)
        process = start(folder, tmp_path)
        while process.poll() is None and lines_in(folder) < target:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
        reached = max((int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()),
                      default=0)
    process = start(folder, tmp_path)
    assert process.wait(120) == 0, (tmp_path / "log").read_text()
    assert losses(folder) == losses(undisturbed)


def lines_in(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_sigterm_stops_it_with_a_checkpoint(undisturbed, tmp_path, capsys, monkeypatch):
    real = loop.Report.advance

    def advance(self):
        real(self)
        if self._bar.n == 0 and not (tmp_path / "sent").exists() and lines_in(tmp_path / "run") == 6:
            (tmp_path / "sent").touch()
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(loop.Report, "advance", advance)
    done = train(settings(tmp_path / "run"), progress=False)
    assert (done.step, done.is_finished) == (7, False) and "stopped after step 7 of 40" in capsys.readouterr().out
    done = train(settings(tmp_path / "run"), resume=True, progress=False)
    assert done.is_finished and losses(tmp_path / "run") == losses(undisturbed)


def test_a_damaged_checkpoint_is_passed_over(undisturbed, tmp_path, capsys):
    folder = tmp_path / "run"
    train(settings(folder, steps=12, decay=0), progress=False)
    part = max((folder / "checkpoints/12").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    done = train(settings(folder, steps=14, decay=0), resume=True, progress=False)
    assert done.step == 14
    assert "12" in (shown := capsys.readouterr().out) and "is damaged" in shown and "going on from step 8" in shown


def test_another_mesh_goes_on(tmp_path):
    """Within 1e-5 of the loss, as asked of a checkpoint that is restored onto another mesh."""
    folder = tmp_path / "run"
    train(settings(folder, steps=8, decay=0), progress=False)
    before, lines = losses(folder), (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "checkpoints/8").rename(tmp_path / "away")      # done again on eight devices, in its own time
    train(settings(folder, steps=8, decay=0, mesh="data=2,expert=2,tensor=2"), resume=True, progress=False)
    after = losses(folder)
    assert max(abs(a - b) for step in before for a, b in zip(before[step][:1], after[step][:1], strict=True)) <= 1e-5
    assert lines[-1] != (folder / "metrics.jsonl").read_text().splitlines()[-1]


def test_a_part_is_trained_and_the_rest_comes_from_where_it_began(undisturbed, tmp_path):
    """MTP blocks for a model that has fewer: everything else stays as it was, bit for bit."""
    done = train(settings(tmp_path / "run", model=str(undisturbed), config={"num_nextn_predict_layers": 2},
                          train=("mtp.*",), steps=3, warmup=0, decay=0), progress=False)
    export(done.folder, tmp_path / "hub", weights="float32", progress=False)
    assert jaxllm.load(tmp_path / "hub").logits([[5, 6]]).tolist() == jaxllm.load(undisturbed).logits([[5, 6]]).tolist()
    names = json.loads((tmp_path / "hub/model.safetensors.index.json").read_text())["weight_map"]
    assert "model.mtp.layers.1.eh_proj.weight" in names


@pytest.mark.parametrize("how", ["stop", "skip"])
def test_a_loss_that_is_no_number(tmp_path, how):
    """Steps so large that the next loss is none: the state stays what it was, and the run stops by name, or goes on."""
    run = settings(tmp_path / "run", steps=6, decay=0, on_nonfinite=how, learning_rate=1e30, clip=1e30, save_every=1)
    if how == "skip":
        done = train(run, progress=False)
        last = (tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1]
        assert done.is_finished and json.loads(last)["skipped"]
        return
    with pytest.raises(ValueError, match=r"step \d: the loss is .*last good checkpoint is step \d: lower learning_rat"):
        train(run, progress=False)
    kept = jax.tree.leaves(jaxllm.load(tmp_path / "run").transformer)
    assert all(np.isfinite(np.asarray(x)).all() for x in kept)


def test_outputs_that_are_taken(undisturbed, tmp_path):
    with pytest.raises(ValueError, match="already holds something .*; go on with it by --resume, or choose another"):
        train(settings(undisturbed), progress=False)
    with pytest.raises(ValueError, match="holds no run .*, so there is nothing to resume"):
        train(settings(tmp_path / "none"), resume=True, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        train(settings(tmp_path / "file"), progress=False)


def test_what_a_run_killed_at_its_beginning_leaves_is_no_run(tmp_path):
    """A lock and half a file: a new run begins there."""
    for name in ("lock", "run.json.part"):
        (tmp_path / name).touch()
    with output_of(settings(tmp_path), resume=False) as folder:
        assert folder == tmp_path
    with pytest.raises(ValueError, match="holds no run"), output_of(settings(tmp_path), resume=True):
        pass


def test_a_finished_run_has_nothing_left_to_do(undisturbed):
    before = losses(undisturbed)
    assert train(settings(undisturbed), resume=True, progress=False) == loop.Trained(undisturbed, STEPS, True)
    assert losses(undisturbed) == before


def test_another_architecture_or_tokenizer_is_refused(undisturbed):
    """Named by what differs; nothing is touched."""
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="is of another architecture: 1: hidden_size is 32 there and 64 here"):
        train(settings(undisturbed, config=tiny_config(**SMALL | {"hidden_size": 64})), resume=True, progress=False)
    assert all(path.read_bytes() == content for path, content in before.items())
