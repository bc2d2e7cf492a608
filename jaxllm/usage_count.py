"""Counting how often each expert is chosen over some text."""
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.axes import spec
from jaxllm.calibrate import CONTEXT, TOKENS, first_windows
from jaxllm.documents import batches_of, cut_up, read_documents
from jaxllm.generate.engine import Model
from jaxllm.generate.step import fetch, on_mesh, place
from jaxllm.model import Transformer, rope_kind
from jaxllm.rope import rope_angles
from jaxllm.usage import Usage, expert_layers, identity


def count_usage(model: Model, files: Sequence[str | os.PathLike[str]], tokens: int = TOKENS) -> Usage:
    """What the routers choose over the first documents of JSON Lines files (as `evaluate` reads them), of each file an
    equal number of tokens, about `tokens` in all.

    Errors: ValueError for a model without experts, for tokens < 1, or naming the file and the line; OSError.
    """
    layers = expert_layers(model.config)
    if not layers or tokens < 1:
        raise ValueError(f"counting experts: {len(layers)} layers have experts, and tokens = {tokens}; expected one or "
                         "more of both")
    windows, context = [], min(CONTEXT, model.config.max_position_embeddings)
    for file in map(str, files):
        text = cut_up(file, read_documents(file), model.tokenizer, context)
        windows += [(file, window) for window in first_windows(text.windows, max(1, tokens // len(files)))]
    total, num = np.zeros((len(layers), model.config.n_routed_experts or 0), np.int64), 0
    for batch in batches_of(windows, model.mesh.shape["data"]):
        tokens_BT, length_B = (place(model.transformer, batch.tokens_BT, "batch", None),
                               place(model.transformer, batch.length_B, "batch"))
        with on_mesh(model.transformer):
            count_LE = chosen(model.transformer, tokens_BT, length_B)
        total += fetch(model.transformer, count_LE)[0]
        num += int(batch.length_B.sum())
    return Usage(identity(model.config), num, dict(zip(layers, total, strict=True)))


@jax.jit
def chosen(model: Transformer, tokens_BT: jax.Array, length_B: jax.Array) -> jax.Array:
    """int32 [L, E], a row for each layer with experts: how many of the first length_B tokens of each row chose each."""
    T, E = tokens_BT.shape[1], model.config.n_routed_experts
    start_B = jnp.zeros_like(length_B)
    position_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    counted_BT = position_BT < length_B[:, None]
    x_BTD, rows = model.embed(tokens_BT), []
    for layer in model.layers:
        rope = rope_angles(position_BT, *rope_kind(layer.attention.layer))
        x_BTD, _, routing = layer(x_BTD, rope, start_B, length_B, None)
        if routing is not None:
            expert = jnp.where(counted_BT[..., None], routing.expert_BTA, -1)
            is_E = expert[..., None] == jnp.arange(E, dtype=jnp.int32)[None, None, None, :]
            rows.append(jax.reshard(is_E.sum((0, 1, 2), dtype=jnp.int32), spec(None)))
    return jnp.stack(rows)
