"""Runs that train adapters of a packed, frozen model: what they leave, on any mesh, merged and not, resumed and not."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hub_maker import tiny_config, write_hub

import jaxllm
from jaxllm.checkpoint import CheckpointError, convert, export, open_source
from jaxllm.checkpoint.peft import CONFIG, TENSORS
from jaxllm.info import describe
from jaxllm.train.loop import train
from jaxllm.train.run import Run, read_run

NANO = Path("configs/mimo-nano")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
TOKENS = np.random.default_rng(0).integers(0, 8192, (2, 24))
STEPS = 6


@pytest.fixture(scope="module", params=["fp8", "mxfp4"])
def base(request, tmp_path_factory):
    """A model of every kind of layer, all matrices packed."""
    folder = tmp_path_factory.mktemp("model")
    write_hub(folder / "hub", tiny_config(vocab_size=8192, num_hidden_layers=2, hybrid_layer_pattern=[0, 1],
                                          moe_layer_freq=[0, 1], hidden_size=64))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(NANO / name, folder / "hub")
    convert(folder / "hub", folder / "base", weights=request.param, classes=["all"], progress=False)
    return folder / "base"


def settings(base, folder, **changes):
    # At a rate of 3e-2 the fourth step has a choice of experts so close that a mesh makes another (3e-4 of the loss;
    # 3e-7 before it, and in all steps at 2e-2 and less).
    return Run(**{"output": str(folder), "model": str(base), "lora": LORA, "steps": STEPS, "context": 32, "batch": 8,
                  "data": {str(NANO / "udhr/train.de.jsonl"): 1.0}, "learning_rate": 1e-2, "log_every": 1,
                  "save_every": 3} | changes)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(base):
    train(settings(base, base.with_name("run")), progress=False)
    return base.with_name("run")


def test_it_learns_and_trains_nothing_else(base, run):
    found = losses(run)
    assert len(found) == STEPS and found[-1] < found[0] - 0.3
    names = json.loads((run / f"checkpoints/{STEPS}/manifest.json").read_text())["arrays"]
    trained = [name for name in names if not name.startswith("opt_state")]
    assert len(trained) > 10 and all(name.endswith((".lora_a", ".lora_b")) or name == "step" for name in trained)
    assert open_source(run).params == open_source(base).params and "of a training run, " in describe(run)
    assert np.abs(jaxllm.load(run).logits(TOKENS) - jaxllm.load(base).logits(TOKENS)).max() > 0.1


def test_its_adapter_alone_and_merged(base, run, tmp_path):
    """PEFT's files on the base are the run's model, bit for bit; merged into the weights within 1e-4 (of logits to 4,
    whose weights are then rounded to float32 once more)."""
    expected = jaxllm.load(run).logits(TOKENS)
    done = export(run, tmp_path / "adapter", progress=False)
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {CONFIG, TENSORS} and done.num_tensors > 10
    stated = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (stated["r"], stated["lora_alpha"], stated["base_model_name_or_path"]) == (4, 8, str(base))
    assert np.array_equal(jaxllm.load(base, adapter=tmp_path / "adapter").logits(TOKENS), expected)
    for name, source, merge in (("a", run, True), ("b", base, tmp_path / "adapter")):
        export(source, tmp_path / name, weights="float32", merge_lora=merge, progress=False)
        np.testing.assert_allclose(jaxllm.load(tmp_path / name).logits(TOKENS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("base", "mesh"), [("fp8", "data=2,expert=2,tensor=2"), ("mxfp4", "data=2,tensor=4")],
                         indirect=["base"])
def test_on_a_mesh(base, run, tmp_path, mesh):
    """The same losses within 1e-5, of step after step, also where kv heads are repeated; the same text of what it
    leaves."""
    train(settings(base, tmp_path / "run", mesh=mesh), progress=False)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(run), rtol=1e-5)
    texts = [jaxllm.load(run, on).generate([[1, 2, 3], [7]], max_new_tokens=8) for on in (None, mesh)]
    assert [row.tokens for row in texts[0]] == [row.tokens for row in texts[1]]


def test_resumed(base, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / f"checkpoints/{STEPS}")
    train(settings(base, folder), resume=True, progress=False)
    assert losses(folder) == losses(run)


def test_another_base(base, run, tmp_path):
    export(run, tmp_path / "adapter", progress=False)
    write_hub(tmp_path / "other", json.loads((base.with_name("hub") / "config.json").read_text()), seed=1)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(NANO / name, tmp_path / "other")
    with pytest.raises(CheckpointError, match="is an adapter of another base"):
        jaxllm.load(tmp_path / "other", adapter=tmp_path / "adapter")
    with pytest.raises(ValueError, match="is a LoRA run, which has an adapter, and .*adapter is another"):
        jaxllm.load(run, adapter=tmp_path / "adapter")
    with pytest.raises(ValueError, match="base is no LoRA run, so there is nothing to merge"):
        export(base, tmp_path / "merged", merge_lora=True, progress=False)
    with pytest.raises(ValueError, match="the adapter alone is written: weights and layout are for merge_lora"):
        export(run, tmp_path / "merged", weights="bfloat16", progress=False)


@pytest.mark.parametrize(("changes", "message"), [
    ({"lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj"]}}, "lora has the keys r, alpha, target_modules; exp"),
    ({"lora": LORA | {"r": 0}}, r"lora\['r'\] = 0: expected a whole number"),
    ({"lora": LORA | {"lora_alpha": "8"}}, r"lora\['lora_alpha'\] = '8': expected a number above 0"),
    ({"lora": LORA | {"target_modules": [1]}}, r"lora\['target_modules'\] = \[1\]: expected a list of names"),
    ({"train": ["layers.*"]}, "with lora the adapters are trained alone"),
    ({"model": None, "config": {}, "tokenizer": "t"}, "adapters are trained for a model that there is"),
])
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        settings("base", "out", **changes)


@pytest.mark.parametrize(("names", "message"), [
    (["lm_head"], "'lm_head', which has no adapter"), (["gate"], "'model.layers.1.mlp.gate', which has no adapter"),
    (["w_proj"], "'w_proj' names no module of this model")])
def test_targets_that_are_none(base, tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        train(settings(base, tmp_path / "run", lora=LORA | {"target_modules": names}), progress=False)
    assert not (tmp_path / "run").exists()


def test_the_run_that_is_checked_in():
    run = read_run("configs/runs/lora_legal.py")
    assert run.lora and len(run.heldout) == 14 and all(Path(file).exists() for file in run.data)
