"""metrics.jsonl and curves.png of a run, also of one that goes on; what a step takes of each device."""
import errno
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.image import imread

from jaxllm.axes import make_mesh
from jaxllm.train import report as reports
from jaxllm.train.memory import describe_memory, show
from jaxllm.train.report import Report, draw_curves, read_metrics

METRICS = {"loss": 2.5, "mtp_0": 3.5, "grad_norm": 1.0, "learning_rate": 1e-3}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(reports, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def run(folder: Path, clock, steps, begin: int = 0, **metrics) -> None:
    with Report(folder, begin, 10, progress=True) as report:
        for step in steps:
            report.advance()
            clock.seconds += 2
            report.log(step, step * 100, METRICS | metrics)
            report.write()


def test_a_line_for_each_logged_step(tmp_path, clock):
    run(tmp_path, clock, [5, 10])
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 5, **METRICS, "tokens": 500, "tokens_per_second": 250.0, "seconds": 2.0},
        {"step": 10, **METRICS, "tokens": 1000, "tokens_per_second": 250.0, "seconds": 4.0}]


def test_a_float32_comes_back_to_the_bit(tmp_path, clock):
    value = float(np.float32(0.1))
    run(tmp_path, clock, [1], loss=value)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == value


def test_a_run_that_goes_on_has_no_step_twice(tmp_path, clock):
    """Steps after the restored one are cut, and so is the line that a killed run was writing; time goes on."""
    run(tmp_path, clock, [2, 4, 6])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    clock.seconds += 1000      # between the two there is no training
    run(tmp_path, clock, [6, 8], begin=5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["seconds"]) for line in lines] == [(2, 2), (4, 4), (6, 6), (8, 8)]
    assert lines[2]["tokens_per_second"] == 50      # one step since the restored one


def test_what_is_no_number_is_null(tmp_path, clock):
    run(tmp_path, clock, [1, 2], loss=float("nan"), grad_norm=float("inf"))
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)
    assert line["loss"] is None and line["grad_norm"] is None


def test_an_evaluation_is_no_training(tmp_path, clock):
    with Report(tmp_path, 0, 10, progress=False) as report:
        clock.seconds += 1
        report.log(1, 100, METRICS)
        clock.seconds += 50
        report.add_heldout({"en": 1.5})
        report.write()
        clock.seconds += 1
        report.log(2, 200, METRICS)
        report.write()
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first["heldout"] == {"en": 1.5} and second["tokens_per_second"] == 100 and second["seconds"] == 2


def test_the_curves(tmp_path, monkeypatch):
    """A panel for the losses, one for each held-out file's bits per byte if there are any, one for the rate."""
    from matplotlib.figure import Figure
    drawn = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, file: (drawn.append(figure), real(figure, file)))
    lines = [{"step": step, **METRICS, "loss": None if step == 2 else 1 / step} for step in (1, 2, 3)]
    draw_curves(lines, tmp_path / "curves.png")
    lines[2]["heldout"] = {"en": 1.5, "de": 1.7}
    draw_curves(lines, tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png").shape[:2] == (900, 800)
    assert [[axes.get_ylabel() for axes in figure.axes] for figure in drawn] == [
        ["loss, nats a token", "learning rate"],
        ["loss, nats a token", "held-out bits per byte", "learning rate"]]
    loss, heldout, _ = drawn[1].axes
    assert {line.get_label(): line.get_xydata().tolist() for line in loss.lines}["loss"] == [[1, 1], [3, 1 / 3]]
    assert {line.get_label(): line.get_xydata().tolist() for line in heldout.lines} == {"en": [[3, 1.5]],
                                                                                      "de": [[3, 1.7]]}
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_a_disk_that_is_full(tmp_path, clock, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(reports, "draw_curves", full)
    with pytest.raises(ValueError, match=r"curves.png cannot be written \(No space left on device\): free space, and"):
        run(tmp_path, clock, [1])
    with pytest.raises(KeyError):      # what went wrong first is told
        with Report(tmp_path, 1, 10, progress=False):
            raise KeyError
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ValueError, match="metrics.jsonl cannot be written"):
        with Report(tmp_path / "none", 0, 10, progress=False):
            pass


def test_the_bar_is_quiet_without_a_terminal(tmp_path, clock, capsys):
    run(tmp_path, clock, [1])
    assert capsys.readouterr().err == ""


def test_the_memory_line():
    mesh = make_mesh("data=2,tensor=2")

    def array(*shape: int) -> jax.Array:
        spec = PartitionSpec(*("tensor", "data")[:len(shape) - 1 and 2])      # vectors are whole on each device
        return jax.device_put(jnp.zeros(shape), NamedSharding(mesh, spec))
    state = SimpleNamespace(trained={"a": array(64, 32)}, biases={"b": array(8)}, opt_state=(array(64, 32), array(2)))
    step = jax.jit(lambda x: jnp.linalg.norm(jnp.sin(x) @ jnp.cos(x.T))).lower(jnp.zeros((1000, 500))).compile()
    line = describe_memory(state, {"c": array(1000)}, step)
    assert line.startswith("each device: trained 2,048 parameters, 2.05 kB, frozen 4 kB, router biases 32 B, optimizer "
                           "2.06 kB, activations ")
    assert 4 <= float(re.search(r"activations ([\d.]+) MB", line)[1]) <= 12      # the product alone is 4 MB


@pytest.mark.parametrize("nbytes, text", [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (56_240_000, "56.2 MB"),
                                          (3e9, "3 GB"), (5e15, "5e+03 TB")])
def test_bytes_for_people(nbytes, text):
    assert show(nbytes) == text
