"""How well a model predicts text, in bits per byte, and how close its predictions are to those of a reference.

What is counted: every token of a document but the first, which nothing stands before (these models have no token that
begins a text). The nats of those tokens are summed over a file and divided by the UTF-8 bytes of the text that the
tokens stand for, so that the first token's bytes do not count either. A document that is longer than `context` is read
in windows of `context` tokens which overlap by half: each token is counted once, with all of the document before it or
at least context / 2 tokens. Documents see nothing of each other.

Against a reference, over the same tokens: the mean Kullback-Leibler divergence KL(reference || model) of the
predictions in nats, the share of places where both hold the same token for the likeliest (the lower id of equals), and
retention, the reference's bits per byte over the model's.
"""
import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxllm.documents import Text, batches_of, cut_up, read_documents
from jaxllm.generate.engine import Model
from jaxllm.generate.step import fetch, on_mesh, place
from jaxllm.model import Transformer

CONTEXT = 2048      # tokens of a window at most, however long a text the model allows: bounds memory and work
PARTS = 8           # logits are made of so many parts of a batch in turn
TOTAL = "all"       # name of the sum over the files
MEASURES = {        # as in JSON -> as in the table, digits after the point
    "bits_per_byte": ("bits per byte", 4), "retention_percent": ("retention, %", 2),
    "kl_nats_per_token": ("KL, nats a token", 5), "top1_agreement_percent": ("same likeliest, %", 2)}
Named = tuple[str, Model]


@dataclasses.dataclass(frozen=True)
class Score:
    """Sums over the tokens that are counted. Of a model without a reference the last three are NaN."""
    tokens: int
    nbytes: int
    nats: float
    reference_nats: float = math.nan
    kl_nats: float = math.nan      # KL(reference || model)
    agreed: float = math.nan       # places where the likeliest token is the reference's

    @property
    def measures(self) -> dict[str, float]:
        """Those of `MEASURES` that there are."""
        found = (self.nats / math.log(2) / self.nbytes, 100 * self.reference_nats / self.nats,
                 self.kl_nats / self.tokens, 100 * self.agreed / self.tokens)
        return {name: value for name, value in zip(MEASURES, found, strict=True) if not math.isnan(value)}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """scores[model][file]; the sum over files has the name `TOTAL`."""
    scores: dict[str, dict[str, Score]]
    reference: str | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: model -> file -> what was counted, and the measures."""
        return {"reference": self.reference, "models": {
            name: {file: {"tokens": score.tokens, "bytes": score.nbytes} | score.measures
                   for file, score in by_file.items()} for name, by_file in self.scores.items()}}

    def table(self) -> str:
        """One block for each measure: a line for each model, a column for each file."""
        heads = {file: Path(file).name.split(".jsonl")[0] for file in next(iter(self.scores.values()))}
        label = max(map(len, [*self.scores, *(title for title, _ in MEASURES.values())]))
        blocks = []
        for measure, (title, digits) in MEASURES.items():
            rows = {name: {file: f"{score.measures[measure]:.{digits}f}" for file, score in by_file.items()}
                    for name, by_file in self.scores.items() if measure in by_file[TOTAL].measures}
            blocks += ["\n".join(f"{name:{label}}" + "".join(f"{row[file]:>{max(9, len(heads[file]) + 2)}}"
                                                            for file in heads)
                                 for name, row in {title: heads, **rows}.items())] if rows else []
        return "\n\n".join(blocks)


def evaluate(models: Iterable[Named], files: Sequence[str | os.PathLike[str]], against: Named | None = None,
             context: int = CONTEXT, progress: bool = False) -> Evaluation:
    """Scores of each (name, model) on each JSON Lines file of documents: every line an object with a string `text`.

    Files may be compressed (.xz, .gz). `against` is the reference, on the same mesh; its own scores come first.
    `models` is gone through once, so it may be a generator that loads one at a time. `progress` shows bars on stderr.
    Errors: ValueError naming the file and the line, a model without a tokenizer, or one that cuts the text otherwise
    than the reference does.
    """
    documents = {str(file): read_documents(file) for file in files}
    if len(documents) < len(files) or not files or TOTAL in documents:
        raise ValueError(f"files to evaluate on: found {list(documents)}; expected one or more, each once, and none "
                         f"called {TOTAL!r}")
    scores: dict[str, dict[str, Score]] = {}
    for name, model in models:
        if name in scores or against and name == against[0]:
            raise ValueError(f"the model {name} is named twice; each is evaluated once")
        texts = read_alike(name, model, against, documents, context)
        found = score(model, texts, against[1] if against else None, name if progress else None)
        found[TOTAL] = total(list(found.values()))
        if against:
            scores.setdefault(against[0], {file: of_reference(one) for file, one in found.items()})
        scores[name] = found
    return Evaluation(scores, against[0] if against else None)


def read_alike(name: str, model: Model, against: Named | None, documents: dict[str, list[str]], context: int
               ) -> dict[str, Text]:
    """The documents as the model reads them. Errors: ValueError if its reference reads them otherwise."""
    both = [model] + ([against[1]] if against else [])
    context = min(context, *(one.config.max_position_embeddings for one in both))
    texts = {file: cut_up(file, found, model.tokenizer, context) for file, found in documents.items()}
    if against:
        problem = None
        if model.mesh != against[1].mesh:
            problem = f"lie on different meshes, {model.mesh} and {against[1].mesh}: load both on one"
        elif model.config.vocab_size != against[1].config.vocab_size:
            problem = (f"have vocabularies of {model.config.vocab_size} and {against[1].config.vocab_size}, so their "
                       "predictions cannot be compared: evaluate each without a reference")
        elif any(text != cut_up(file, documents[file], against[1].tokenizer, context) for file, text in texts.items()):
            problem = ("cut the text into different tokens, so their predictions cannot be compared: evaluate each "
                       "without a reference")
        if problem:
            raise ValueError(f"{name} and its reference {against[0]} {problem}")
    return texts


def score(model: Model, texts: dict[str, Text], reference: Model | None = None, label: str | None = None
          ) -> dict[str, Score]:
    """Sums over the counted tokens of each text; with a bar called `label`, if it has one."""
    transformers = (model.transformer,) + ((reference.transformer,) if reference else ())
    sums = {file: np.zeros(4 if reference else 1) for file in texts}
    batches = list(batches_of([(file, window) for file, text in texts.items() for window in text.windows],
                              model.mesh.shape["data"]))
    for batch in tqdm(batches, desc=label, disable=label is None, leave=False):
        tokens, first, length = (place(model.transformer, x, "batch", *(None,) * (x.ndim - 1))
                                 for x in (batch.tokens_BT, batch.first_B, batch.length_B))
        with on_mesh(model.transformer):
            rows = sums_of_rows(transformers, tokens, first, length)
        for file, row in zip(batch.files, np.transpose(fetch(model.transformer, *rows)), strict=False):
            sums[file] += row
    return {file: Score(text.tokens, text.nbytes, *sums[file].tolist()) for file, text in texts.items()}


def total(scores: Sequence[Score]) -> Score:
    return Score(*map(sum, zip(*map(dataclasses.astuple, scores), strict=True)))


def of_reference(score: Score) -> Score:
    """The reference's own score, from that of a model against it."""
    return dataclasses.replace(score, nats=score.reference_nats, kl_nats=0.0, agreed=score.tokens)


@jax.jit
def sums_of_rows(models: tuple[Transformer, ...], tokens_BT: jax.Array, first_B: jax.Array, length_B: jax.Array
                 ) -> tuple[jax.Array, ...]:
    """For each row, over its tokens first_B .. length_B - 1, float32 [B] each: the nats of the model, and, if there is
    a second model, its nats, KL(second || first) and the number of places where their likeliest tokens are the same.

    The logits of an eighth of the places exist at once, and no others.
    """
    B, T = tokens_BT.shape
    hidden = [model(tokens_BT)[0] for model in models]
    target_BT = jnp.roll(tokens_BT, -1, axis=1)
    place_T = jnp.arange(1, T + 1, dtype=jnp.int32)[None, :]
    counted_BT = (place_T >= first_B[:, None]) & (place_T < length_B[:, None])

    def part(n: jax.Array) -> tuple[jax.Array, ...]:
        size = T // PARTS
        cut = [jax.lax.dynamic_slice_in_dim(x, n * size, size, 1) for x in (target_BT, counted_BT, *hidden)]
        target, counted = cut[:2]
        places = compare([model.logits(x) for model, x in zip(models, cut[2:], strict=True)], target)
        return tuple(jnp.where(counted, x, 0.0).sum(1) for x in places)

    return tuple(x.sum(0) for x in jax.lax.map(part, jnp.arange(PARTS, dtype=jnp.int32)))


def compare(logits: Sequence[jax.Array], target_BT: jax.Array) -> tuple[jax.Array, ...]:
    """float32 [B, T] for each place, from logits [B, T, W] of one model or two: as `sums_of_rows` says.

    Only sums and maxima over W, no look-up in it: the vocabulary is split over the mesh.
    """
    id_W = jnp.arange(logits[0].shape[-1], dtype=jnp.int32)[None, None, :]
    log_p = [jax.nn.log_softmax(x) for x in logits]
    nats = [-jnp.where(id_W == target_BT[..., None], x, 0.0).sum(-1) for x in log_p]
    if len(logits) == 1:
        return tuple(nats)
    ours, theirs = log_p
    kl_BT = (jnp.exp(theirs) * (theirs - ours)).sum(-1)
    best = [jnp.where(x == x.max(-1, keepdims=True), id_W, x.shape[-1]).min(-1) for x in logits]
    return (*nats, kl_BT, (best[0] == best[1]).astype(jnp.float32))
