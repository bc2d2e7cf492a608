"""What the matrices of a model meet: for each, the gram x.T @ x of its inputs x over some text, for `encode.pack`.

The model is not changed for it. Inputs of matrices at the start of a block are there to be taken; those of matrices at
its end (o_NVD, down_FD) come out of the block when an identity stands in the matrix's place. The experts of a layer
share one gram, of all tokens that come to the layer, for gate and up; for down there is none, since its inputs differ
from expert to expert, and all experts would have to be computed for all tokens.
"""
import os
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.axes import spec
from jaxllm.documents import Batch, Window, batches_of, cut_up, read_documents
from jaxllm.generate.engine import Model
from jaxllm.generate.step import fetch, on_mesh, place
from jaxllm.linear import einsum
from jaxllm.model import Layer, Transformer, rope_kind
from jaxllm.rope import rope_angles

TOKENS = 2**16      # that are read, an equal number of each file
CONTEXT = 512       # of a window at most


def collect_grams(model: Model, files: Sequence[str | os.PathLike[str]], tokens: int = TOKENS
                  ) -> dict[str, np.ndarray]:
    """Parameter path -> float32 [in, in], of the first documents of JSON Lines files (as `evaluate` reads them).

    Memory on the host: that of the result. Errors: ValueError naming the file and the line.
    """
    windows, context = [], min(CONTEXT, model.config.max_position_embeddings)
    for file in map(str, files):
        text = cut_up(file, read_documents(file), model.tokenizer, context)
        windows += [(file, window) for window in first_windows(text.windows, tokens // len(files))]
    grams: dict[str, np.ndarray] = {}
    for batch in batches_of(windows, model.mesh.shape["data"]):
        for paths, gram in grams_of_batch(model.transformer, batch):
            total = gram if paths[0] not in grams else grams[paths[0]] + gram
            grams |= dict.fromkeys(paths, total)
    return grams


def first_windows(windows: Iterable[Window], tokens: int) -> Iterator[Window]:
    for window in windows:
        if tokens <= 0:
            return
        tokens -= len(window.tokens)
        yield window


def grams_of_batch(model: Transformer, batch: Batch) -> Iterator[tuple[list[str], np.ndarray]]:
    """(parameters that share a gram, the gram) of each gram of the model, over the tokens of one batch."""
    tokens, length = place(model, batch.tokens_BT, "batch", None), place(model, batch.length_B, "batch")
    with on_mesh(model):
        x_BTD = model.embed_WD[...].at[tokens].get(out_sharding=spec("batch", None, None))
        for i, layer in enumerate(model.layers):
            x_BTD, found = watch(layer, x_BTD, length)
            for names, gram in zip(matrices_of(layer), fetch(model, *found), strict=True):
                yield [f"layers.{i}.{name}" for name in names], gram
        if model.head_DW is not None:
            yield ["head_DW"], fetch(model, gram_of(model.norm(x_BTD), length))[0]


def matrices_of(layer: Layer) -> list[list[str]]:
    """The matrices of a layer that meet the same inputs, in the order of what `watch` returns."""
    attention = [["attention.q_DNH", "attention.k_DKH", "attention.v_DKV"], ["attention.o_NVD"]]
    if layer.attention.layer.is_moe:
        return [*attention, ["moe.gate_EDI", "moe.up_EDI"]]
    return [*attention, ["mlp.gate_DF", "mlp.up_DF"], ["mlp.down_FD"]]


@jax.jit
def watch(layer: Layer, x_BTD: jax.Array, length_B: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """What the layer makes of the first length_B tokens of each row, and its grams."""
    start_B = jnp.zeros_like(length_B)
    position_BT = start_B[:, None] + jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None, :]
    rope = rope_angles(position_BT, *rope_kind(layer.attention.layer))
    out_BTD, *_ = layer(x_BTD, rope, start_B, length_B, None)

    def attend(x_BTD: jax.Array) -> jax.Array:
        return layer.attention(layer.attention_norm(x_BTD), rope, start_B, length_B, None)[0]

    middle_BTD = x_BTD + attend(x_BTD)
    N, V = layer.attention.layer.num_heads, layer.attention.layer.v_head_dim
    identity = jnp.eye(N * V, dtype=x_BTD.dtype).reshape(N, V, N * V)
    layer.attention.o_NVD = nnx.Param(jax.reshard(identity, spec("heads", "head_dim", "embed")))
    met = [layer.attention_norm(x_BTD), attend(x_BTD), layer.mlp_norm(middle_BTD)]
    if not layer.attention.layer.is_moe:
        identity = jnp.eye(layer.mlp.down_FD.shape[0], dtype=x_BTD.dtype)
        layer.mlp.down_FD = nnx.Param(jax.reshard(identity, spec("mlp", "embed")))
        met.append(layer.mlp(met[-1]))
    return out_BTD, [gram_of(x, length_B) for x in met]


@jax.jit
def gram_of(x_BTD: jax.Array, length_B: jax.Array) -> jax.Array:
    """x.T @ x over the first length_B tokens of each row, float32 [in, in]."""
    counted_BT = jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None, :] < length_B[:, None]
    x_BTD = jnp.where(counted_BT[..., None], x_BTD, 0).astype(jnp.float32)
    return einsum("bti,btj->ij", x_BTD, x_BTD, spec(None, None))
