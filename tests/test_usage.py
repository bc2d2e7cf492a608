"""Counts of experts: those that the routers chose, of the tokens that count; written, read back, and refused."""
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.cli import main
from jaxllm.config import Config
from jaxllm.documents import read_documents
from jaxllm.generate.step import on_mesh
from jaxllm.train.batch import Batch
from jaxllm.train.forward import hidden_states
from jaxllm.usage import Usage, expert_layers, identity, read_usage
from jaxllm.usage_count import count_usage

NANO = Path(__file__).parent.parent / "configs" / "mimo-nano"
TEXTS = ["Choose File - Save As to save the document under another name.", "Drucken", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "some.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXTS))
    return file


@pytest.fixture(scope="module")
def model():
    return jaxllm.load(NANO)


def test_counts_are_those_of_packed_documents(model, text):
    """Counted otherwise: the documents one after the other in one row, without padding. One of a single token has
    nothing to predict, and is not read."""
    layers = expert_layers(model.config)
    documents = [ids for ids in map(model.tokenizer.encode, read_documents(text)) if len(ids) > 1]
    begin = np.concatenate([np.full(len(ids), sum(map(len, documents[:i]))) for i, ids in enumerate(documents)])
    row = Batch(np.concatenate(documents)[None].astype(np.int32), begin[None].astype(np.int32), np.ones((1, 1), bool))
    with on_mesh(model.transformer):
        _, routings = jax.jit(hidden_states, static_argnums=2)(model.transformer, row, False)
    expected = {layer: np.bincount(np.asarray(routings[f"layers.{layer}"].expert_BTA).ravel(), minlength=16)
                for layer in layers}
    tokens = row.tokens_BT.size
    assert len(documents) == 2 < len(TEXTS)
    found = count_usage(model, [text])
    assert found.tokens == tokens and list(found.count) == layers
    for layer in layers:
        assert found.count[layer].tolist() == expected[layer].tolist()
        assert found.count[layer].sum() == tokens * model.config.num_experts_per_tok
    assert 0.25 < found.shares(4)[layers[0]] < 1 and found.shares(16)[layers[0]] == 1


def test_the_command_and_the_way_back(text, tmp_path, capsys):
    """Counted with most experts in host memory, used by generate: the same words as ever."""
    file = tmp_path / "usage.json"
    assert main(["usage", str(NANO), "--text", str(text), "--out", str(file), "--resident-experts", "2"]) == 0
    assert f"{file}: " in (told := capsys.readouterr().out) and "of 16 experts the 4 used most have" in told
    config = Config.from_hub(NANO)
    found = read_usage(file, config)
    found.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == file.read_text()
    arguments = ["generate", str(NANO), "To save", "--max-new-tokens", "4"]
    assert main([*arguments, "--resident-experts", "3", "--usage", str(file)]) == 0
    offloaded = capsys.readouterr().out
    assert main(arguments) == 0 and capsys.readouterr().out == offloaded


@pytest.mark.parametrize(("change", "message"), [
    ({"model": {"num_hidden_layers": 70}}, "counted with another model"),
    ({"tokens": 0}, "tokens = 0"), ({"tokens": 1.5}, "tokens = 1.5"), ({"tokens": 11}, "sum to tokens \\* 4"),
    ({"layers": {}}, "counts layers \\[\\]; the model's experts are in \\[1, 2, 3, 4, 5\\]"),
    ({"layers": None}, "is no count of experts"), ({"layers": {"x": []}}, "is no count of experts"),
    ("[", "is no count of experts"), ("[]", "is no count of experts"),
    ({1: [40]}, "found 1 that sum to 40"), ({1: [-1, 41] + [0] * 14}, "layer 1: expected counts of 16 experts"),
    ({1: [0.5, 39.5] + [0] * 14}, "layer 1: expected counts")])
def test_refused(change, message, tmp_path):
    config = Config.from_hub(NANO)
    count = np.zeros(16, np.int64)
    count[:4] = 10
    file = tmp_path / "usage.json"
    Usage(identity(config), 10, dict.fromkeys(expert_layers(config), count)).write(file)
    assert read_usage(file, config).tokens == 10
    stated = json.loads(file.read_text())
    if isinstance(change, dict) and 1 in change:
        change = {"layers": stated["layers"] | {"1": change[1]}}
    file.write_text(change if isinstance(change, str) else json.dumps(stated | change))
    with pytest.raises(ValueError, match=message):
        read_usage(file, config)


def test_nothing_to_count(model, text):
    with pytest.raises(ValueError, match="tokens = 0"):
        count_usage(model, [text], 0)
