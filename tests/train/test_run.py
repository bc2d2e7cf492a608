"""Run files: what they may say, and every mistake by its name."""
import json

import pytest
from hub_maker import tiny_config

from jaxllm.train.run import Run, read_run, resumed

GOOD = """
import math
_base = 100
output = "out"
config = {"hidden_size": 8}
tokenizer = "../tokenizer"
data = {"text/*.jsonl": 2, "more.jsonl.xz": 1.0}
heldout = {"de": "held.jsonl"}
steps = 3 * _base
learning_rate = math.sqrt(1e-6)
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "runs").mkdir()
    path = tmp_path / "runs" / "a.py"
    path.write_text(GOOD)
    return path


def test_a_run_file(file, tmp_path, monkeypatch):
    """Values may be computed; paths are below the file's folder, those of overrides below the current one."""
    run = read_run(file)
    runs = file.parent
    assert (run.steps, run.learning_rate, run.output) == (300, 0.001, str(runs / "out"))
    assert run.tokenizer == str(tmp_path / "tokenizer") and run.heldout == {"de": str(runs / "held.jsonl")}
    assert run.data == {str(runs / "text/*.jsonl"): 2.0, str(runs / "more.jsonl.xz"): 1.0}
    monkeypatch.chdir(tmp_path)
    changed = read_run(file, ["output=here", "steps=5", "train=('mtp.*',)", "mesh=data=2", "remat=True"])
    assert (changed.output, changed.steps, changed.train) == (str(tmp_path / "here"), 5, ("mtp.*",))
    assert changed.mesh == "data=2" and changed.remat is True
    assert Run.from_dict(json.loads(changed.to_json()), "json") == changed


@pytest.mark.parametrize(("line", "message"), [
    ("learning_rat = 1", "a.py: unknown key 'learning_rat'; the nearest known key is 'learning_rate'"),
    ("steps = 'ten'", "steps = 'ten': expected a whole number"),
    ("steps = 0", "steps = 0: expected 1 or more"),
    ("context = 1", "context = 1: expected 2 or more"),
    ("learning_rate = 0", "learning_rate = 0.0: expected a finite number above 0"),
    ("beta1 = 1.0", "beta1 = 1.0: expected at least 0 and below 1"),
    ("data = {}", "data = {}: expected"),
    ("data = {'a': -1.0}", "data = .*expected one or more files, each with a share above 0"),
    ("schedule = 'step'", "schedule = 'step': expected 'cosine' or 'linear'"),
    ("config = None", "neither model nor config is given"),
    ("tokenizer = None", "tokenizer is missing: with a config, name the folder"),
    ("warmup = 200; decay = 200", "warmup = 200 and decay = 200 are more than steps = 300"),
    ("final_learning_rate = 1.0", "final_learning_rate = 1.0 is above learning_rate"),
    ("batch = 6; accumulate = 4", "batch = 6 rows cannot be cut into accumulate = 4 parts"),
    ("mesh = 'rows=2'", "mesh 'rows=2': unknown axis 'rows'"),
    ("master = True", "master = True is for dtype = 'bfloat16'"),
    ("1 / 0", "a.py cannot be run: ZeroDivisionError"),
    ("steps = (", "a.py cannot be run: SyntaxError"),
])
def test_mistakes(file, line, message):
    file.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_run(file)


def test_missing_things(file, tmp_path):
    with pytest.raises(ValueError, match="none.py is no file: expected a run file"):
        read_run(tmp_path / "none.py")
    file.write_text("output = 'x'\nconfig = {'a': 1}\ntokenizer = 't'\ndata = {'a': 1}\n")
    with pytest.raises(ValueError, match="'steps' is missing; it has no default"):
        read_run(file)
    with pytest.raises(ValueError, match="--override 'steps': expected key=value"):
        read_run(file, ["steps"])


def test_what_may_change_when_a_run_is_resumed(file, tmp_path):
    run = read_run(file)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.json").write_text(run.to_json())
    again = resumed(tmp_path / "out", ["steps=500", "mesh=data=4"])
    assert (again.steps, again.mesh, again.output) == (500, "data=4", str(tmp_path / "out"))
    with pytest.raises(ValueError, match="--override seed would make it another run; .* only steps, mesh,"):
        resumed(tmp_path / "out", ["seed=1"])
    with pytest.raises(ValueError, match="holds no run .*so there is nothing to resume"):
        resumed(tmp_path)
    (tmp_path / "out/run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is damaged"):
        resumed(tmp_path / "out")


def test_a_model_whose_config_is_changed():
    """Both may be given: a block more than the model has, say."""
    run = Run(output="o", model="m", config=tiny_config(), data={"a": 1.0}, steps=1)
    assert run.model == "m" and run.config["hidden_size"] == 64
