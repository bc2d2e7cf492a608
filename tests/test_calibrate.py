"""Grams against the model's own layers: what a matrix makes of its inputs has the gram that follows from theirs."""
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.axes import spec
from jaxllm.calibrate import collect_grams
from jaxllm.checkpoint import CheckpointError, load_arrays
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.checkpoint.repack import Repacked
from jaxllm.checkpoint.requantise import requantised
from jaxllm.documents import cut_up, read_documents
from jaxllm.evaluate import TOTAL, evaluate
from jaxllm.generate.engine import Model
from jaxllm.generate.load import abstract_model, as_stored
from jaxllm.generate.step import on_mesh, place
from jaxllm.model import Transformer
from jaxllm.paths import parameter_path, parameters
from jaxllm.rope import rope_angles

NANO = Path("configs/mimo-nano")
TEXTS = ["Open the file menu and choose a template.", "Zellen löschen oder einfügen", "セルの書式を設定します。"]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("calibration") / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


@pytest.fixture(scope="module")
def nano() -> jaxllm.Model:
    return jaxllm.load(NANO)


@pytest.fixture(scope="module")
def grams(nano, file) -> dict[str, np.ndarray]:
    return collect_grams(nano, [file])


def gram(x: jax.Array) -> np.ndarray:
    rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return rows.T @ rows


@jax.jit
def inputs(model: Transformer, ids_1T: jax.Array) -> dict[str, jax.Array]:
    """What meets the matrices at the start of each block, and what those at its end make of theirs."""
    x, found = model.embed_WD[...].at[ids_1T].get(out_sharding=spec("batch", None, None)), {}
    start, length = jnp.zeros(1, jnp.int32), jnp.full(1, ids_1T.shape[1], jnp.int32)
    for i, layer in enumerate(model.layers):
        kind = layer.attention.layer
        rope = rope_angles(jnp.arange(ids_1T.shape[1], dtype=jnp.int32)[None], kind.rotary_dim, kind.rope_theta)
        out = layer.attention(layer.attention_norm(x), rope, start, length, None)[0]
        found |= {f"{i} in": layer.attention_norm(x), f"{i} attended": out, f"{i} mlp in": layer.mlp_norm(x + out)}
        if not kind.is_moe:
            found[f"{i} mlp out"] = layer.mlp(layer.mlp_norm(x + out))
        x = layer(x, rope, start, length, None)[0]
    return found | {"head": model.norm(x)}


def test_against_the_layers(nano, grams):
    """Each text alone, without padding; layer by layer as the model computes. float32 sums: 1e-4 of the largest."""
    wanted: dict[str, np.ndarray] = {}
    model = nano.transformer
    for text in TEXTS:
        with on_mesh(model):
            found = inputs(model, place(model, np.array([nano.tokenizer.encode(text)]), "batch", None))
        wanted = {name: wanted.get(name, 0) + gram(x) for name, x in found.items()}
    for i, layer in enumerate(model.layers):
        for name in ("q_DNH", "k_DKH", "v_DKV"):
            check(grams[f"layers.{i}.attention.{name}"], wanted[f"{i} in"])
        check(through(grams[f"layers.{i}.attention.o_NVD"], layer.attention.o_NVD), wanted[f"{i} attended"])
        for name in ("moe.gate_EDI", "moe.up_EDI") if layer.attention.layer.is_moe else ("mlp.gate_DF", "mlp.up_DF"):
            check(grams[f"layers.{i}.{name}"], wanted[f"{i} mlp in"])
    check(through(grams["layers.0.mlp.down_FD"], model.layers[0].mlp.down_FD), wanted["0 mlp out"])
    check(grams["head_DW"], wanted["head"])
    assert len(grams) == 6 * 6 + 1 + 1


def through(gram_II: np.ndarray, weight: object) -> np.ndarray:
    """The gram of what a matrix makes of inputs with this gram."""
    w = np.asarray(weight[...], np.float64).reshape(len(gram_II), -1)
    return w.T @ gram_II @ w


def check(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape and np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_the_model_is_left_as_it_was(nano, grams):
    assert nano.transformer.layers[0].attention.o_NVD.shape == (8, 32, 256)
    assert nano.transformer.layers[0].mlp.down_FD.shape == (768, 256)


def test_eight_devices_as_one(grams, file):
    spread = collect_grams(jaxllm.load(NANO, "data=2,expert=2,tensor=2"), [file])
    assert spread.keys() == grams.keys()
    for path, one in grams.items():
        check(spread[path], one)


def test_so_many_tokens_of_each_file(nano, file, tmp_path):
    """The trace of a gram of normed rows says how many there were: here, whole documents until there are enough."""
    text = cut_up("", read_documents(file), nano.tokenizer, 512)
    lengths = [len(window.tokens) for window in text.windows]
    (tmp_path / "second.jsonl").write_bytes(file.read_bytes())
    few = collect_grams(nano, [file, tmp_path / "second.jsonl"], tokens=2 * (lengths[0] + 1))
    first_two = tmp_path / "two.jsonl"
    first_two.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:2]))
    check(few["head_DW"], 2 * collect_grams(nano, [first_two])["head_DW"])


def loaded(source: object, like: jaxllm.Model) -> jaxllm.Model:
    """The model with the parameters of a source."""
    model = jax.tree_util.tree_map_with_path(
        lambda path, leaf: as_stored(parameter_path(path), leaf, source.params),
        abstract_model(like.config, like.mesh, jnp.dtype(jnp.float32)))
    arrays = load_arrays(source, parameters(model))
    return Model(jax.tree_util.tree_map_with_path(lambda path, _: arrays[parameter_path(path)], model), like.mesh,
                 like.tokenizer, ())


def test_a_calibrated_conversion_is_resumed_to_the_same_bytes(file, tmp_path, monkeypatch):
    """What was collected in the first run is not kept: the second collects it again, and finds the same."""
    def calibrated(name: str, file: Path = file, resume: bool = False) -> Path:
        grams = collect_grams(jaxllm.load(NANO), [file])
        return jaxllm.convert(NANO, tmp_path / name, weights="mxfp4", grams=grams, resume=resume, progress=False).folder

    def fail(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        if path.startswith("layers.4.moe.down_EID"):
            raise CheckpointError("read failed")
        return real(self, path, index)

    real = Repacked.read
    monkeypatch.setattr("jaxllm.checkpoint.journal.EVERY_SECONDS", 0)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="read failed"):
        patch.setattr(Repacked, "read", fail)
        calibrated("resumed")
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": TEXTS[0]}))
    with pytest.raises(CheckpointError, match="other options"):
        calibrated("resumed", tmp_path / "other.jsonl", resume=True)
    again, once = calibrated("resumed", resume=True), calibrated("at once")
    assert {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()} == {
        path.relative_to(once): path.read_bytes() for path in once.rglob("*") if path.is_file()}


def test_what_it_is_for(nano, tmp_path):
    """All matrices at 4 bits: with the grams of some pages the divergence on others is less than three quarters.

    docs/quantisation.md has less, with more text to calibrate on. Pages of like length: little to compile.
    """
    pages = [text for language in ("en", "zh")
             for text in read_documents(NANO / "heldout" / f"heldout.{language}.jsonl.xz")
             if 128 < len(nano.tokenizer.encode(text)) <= 256]
    for name, part in (("seen", pages[::2]), ("unseen", pages[1::4])):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    source, grams = HubSource(NANO), collect_grams(nano, [tmp_path / "seen"])
    models = [(name, loaded(requantised(source, "mxfp4", ["all"], grams=given), nano))
              for name, given in (("plain", None), ("calibrated", grams))]
    scores = evaluate(models, [tmp_path / "unseen"], ("float", nano)).scores
    kl = {name: scores[name][TOTAL].measures["kl_nats_per_token"] for name, _ in models}
    assert kl["calibrated"] < 0.75 * kl["plain"]
