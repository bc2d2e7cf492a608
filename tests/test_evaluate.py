"""Scores against numpy on the model's own logits, on one device and eight; what can be compared; what 4 bits cost."""
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_maker import tiny_config, write_hub

import jaxllm
from jaxllm.documents import read_documents, windows_of
from jaxllm.evaluate import TOTAL, evaluate
from jaxllm.generate.engine import Model
from jaxllm.paths import parameter_path

NANO = Path("configs/mimo-nano")
HELDOUT = NANO / "heldout"
TEXTS = {"short.jsonl": ["Open the file menu.", "Zellen löschen", "x"], "long.jsonl": ["セルの書式を設定します。" * 4]}
CONTEXT = 16      # what the long one does not fit


@pytest.fixture(scope="module")
def nano() -> Model:
    return jaxllm.load(NANO)


def changed(model: Model) -> Model:
    """The model with another embedding, not far from its own."""
    transformer = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.3 * jnp.roll(x, 1, axis=1) if parameter_path(path) == "embed_WD" else x,
        model.transformer)
    return Model(transformer, model.mesh, model.tokenizer, model.stop_ids)


@pytest.fixture(scope="module")
def other(nano: Model) -> Model:
    return changed(nano)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for name, texts in TEXTS.items():
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [tmp_path / name for name in TEXTS]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def by_hand(model: Model, reference: Model, texts: list[str]) -> tuple[float, float, float]:
    """(bits per byte, mean KL, share of equal likeliest tokens) of documents."""
    nats, kl, same, nbytes = [], [], [], 0
    for text in texts:
        ids = model.tokenizer.encode(text)
        nbytes += len(text.encode()) - len(model.tokenizer.piece(ids[0], at_start=True))
        for window in windows_of(ids, CONTEXT):
            ours, theirs = (log_softmax(one.logits([window.tokens])[0]) for one in (model, reference))
            for i in range(window.first, len(window.tokens)):
                nats.append(-ours[i - 1, window.tokens[i]])
                kl.append((np.exp(theirs[i - 1]) * (theirs[i - 1] - ours[i - 1])).sum())
                same.append(ours[i - 1].argmax() == theirs[i - 1].argmax())
    return sum(nats) / math.log(2) / nbytes, float(np.mean(kl)), float(np.mean(same))


def test_against_numpy(nano, other, files):
    """float32 sums over a few dozen tokens: 1e-5 is ten times what they may round."""
    found = evaluate([("other", other)], files, ("nano", nano), CONTEXT).scores
    assert list(found) == ["nano", "other"]
    for file, texts in zip(files, TEXTS.values(), strict=True):
        texts = [text for text in texts if len(text) > 1]      # "x" is one token, which nothing predicts
        bits, kl, same = by_hand(other, nano, texts)
        measures = found["other"][str(file)].measures
        assert measures["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        assert measures["kl_nats_per_token"] == pytest.approx(kl, rel=1e-4)
        assert measures["top1_agreement_percent"] == pytest.approx(100 * same)
        reference = by_hand(nano, nano, texts)[0]
        assert measures["retention_percent"] == pytest.approx(100 * reference / bits, rel=1e-5)
        assert found["nano"][str(file)].measures == pytest.approx(
            {"bits_per_byte": reference, "retention_percent": 100, "kl_nats_per_token": 0,
             "top1_agreement_percent": 100}, rel=1e-5)


def test_total_is_of_tokens_and_bytes_not_of_files(nano, files):
    found = evaluate([("nano", nano)], files, context=CONTEXT).scores["nano"]
    parts = [found[str(file)] for file in files]
    assert found[TOTAL].nats == sum(part.nats for part in parts)
    assert found[TOTAL].nbytes == sum(part.nbytes for part in parts)
    assert found[TOTAL].measures.keys() == {"bits_per_byte"}


def test_eight_devices_as_one(nano, other, files):
    """All three axes split. Sums of other orders: 1e-5."""
    one = evaluate([("other", other)], files, ("nano", nano), CONTEXT)
    spread = jaxllm.load(NANO, "data=2,expert=2,tensor=2")
    eight = evaluate([("other", changed(spread))], files, ("nano", spread), CONTEXT)
    for file, score in one.scores["other"].items():
        assert eight.scores["other"][file].measures == pytest.approx(score.measures, rel=1e-5)


def test_table_and_json(nano, other, files):
    found = evaluate([("other", other)], files, ("nano", nano), CONTEXT)
    blocks = [block.splitlines() for block in found.table().split("\n\n")]
    assert [block[0].split()[0] for block in blocks] == ["bits", "retention,", "KL,", "same"]
    for block in blocks:
        assert block[0].split()[-3:] == ["short", "long", "all"] and len(set(map(len, block))) == 1
        assert [line.split()[0] for line in block[1:]] == ["nano", "other"]
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["reference"] == "nano"
    score = content["models"]["other"][str(files[0])]
    assert f"{score['bits_per_byte']:.4f}" == blocks[0][2].split()[1]
    assert score["tokens"] == found.scores["other"][str(files[0])].tokens
    assert evaluate([("nano", nano)], files[:1], context=CONTEXT).table().splitlines()[1].startswith("nano ")


def test_models_are_taken_one_at_a_time(nano, other, files):
    """So a generator may load them, and let go of one before the next."""
    events = []

    def models():
        for name in ("a", "b"):
            events.append(f"load {name}")
            yield name, other
            events.append(f"done {name}")
    evaluate(models(), files[:1], ("nano", nano), CONTEXT)
    assert events == ["load a", "done a", "load b", "done b"]


def without_tokenizer(model: Model) -> Model:
    return Model(model.transformer, model.mesh, None, model.stop_ids)


def test_what_cannot_be_compared(nano, files, tmp_path, monkeypatch):
    for names in (["a", "a"], ["nano"]):
        with pytest.raises(ValueError, match=f"the model {names[0]} is named twice"):
            evaluate([(name, nano) for name in names], files[:1], ("nano", nano), CONTEXT)
    for wrong in ([], [files[0], files[0]]):
        with pytest.raises(ValueError, match="expected one or more, each once"):
            evaluate([("nano", nano)], wrong)
    with pytest.raises(ValueError, match="has no tokenizer"):
        evaluate([("bare", without_tokenizer(nano))], files[:1])
    write_hub(tmp_path / "tiny", tiny_config(num_hidden_layers=1, hybrid_layer_pattern=[0], moe_layer_freq=[0]))
    tiny = jaxllm.load(tmp_path / "tiny")
    borrowed = Model(tiny.transformer, tiny.mesh, nano.tokenizer, ())
    with pytest.raises(ValueError, match="tiny and its reference nano have vocabularies of 96 and 8192"):
        evaluate([("tiny", borrowed)], files[:1], ("nano", nano))
    with pytest.raises(ValueError, match="a and its reference nano lie on different meshes"):
        evaluate([("a", jaxllm.load(NANO, "data=2"))], files[:1], ("nano", nano))
    strange = jaxllm.load(NANO)
    monkeypatch.setattr(strange.tokenizer, "encode", lambda text: nano.tokenizer.encode(text.upper()))
    with pytest.raises(ValueError, match="strange and its reference nano cut the text into different tokens"):
        evaluate([("strange", strange)], files[:1], ("nano", nano))


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory, nano: Model) -> Path:
    """Two held-out pages of like length, so that there is little to compile, in each language."""
    file = tmp_path_factory.mktemp("heldout") / "sample.jsonl"
    for heldout in sorted(HELDOUT.glob("*.xz")):
        texts = [text for text in read_documents(heldout) if 64 < len(nano.tokenizer.encode(text)) <= 128][:2]
        with open(file, "a") as lines:
            lines.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return file


@pytest.mark.parametrize(("weights", "classes", "retention", "kl"), [
    ("fp8", "all", 99.5, 0.008), ("mxfp4", "experts", 99, 0.02), ("mxfp4", "all", 97, 0.14), ("int4", "all", 97, 0.09)])
def test_what_packing_costs(nano, sample, tmp_path, weights, classes, retention, kl):
    """About twice the loss in docs/quantisation.md: room for the noise of a short sample. Were a scale or a nibble in
    the wrong place, retention would be below 50."""
    jaxllm.convert(NANO, tmp_path / "out", weights=weights, classes=[classes], progress=False)
    found = evaluate([(weights, jaxllm.load(tmp_path / "out"))], [sample], ("float", nano))
    measures = found.scores[weights][TOTAL].measures
    assert measures["retention_percent"] > retention and 1e-4 < measures["kl_nats_per_token"] < kl
