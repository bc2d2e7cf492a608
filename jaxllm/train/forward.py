"""The model on packed documents: hidden states of every place, and what the routers chose."""
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.axes import spec
from jaxllm.config import LayerSpec
from jaxllm.gathered import anew
from jaxllm.model import Layer, Transformer, rope_kind
from jaxllm.moe import Routing
from jaxllm.mtp import MTPBlock
from jaxllm.rope import rope_angles
from jaxllm.train.batch import Batch

Rope = tuple[jax.Array, jax.Array]


class Places:
    """Where the tokens of a batch stand: each document begins at position 0, and sees nothing before it."""

    def __init__(self, batch: Batch):
        B, T = batch.tokens_BT.shape
        self.begin_BT = jnp.asarray(batch.begin_BT)
        self.position_BT = jnp.arange(T, dtype=jnp.int32)[None, :] - self.begin_BT
        self.start_B = jnp.zeros((B,), jnp.int32, out_sharding=spec("batch"))
        self.end_B = self.start_B + T

    def rope(self, layer: LayerSpec) -> Rope:
        return rope_angles(self.position_BT, *rope_kind(layer))


def hidden_states(model: Transformer, batch: Batch, remat: bool) -> tuple[jax.Array, dict[str, Routing]]:
    """Hidden states [B, T, D] before the final norm, and path of a layer with experts -> its routing.

    `remat`: of each layer only the input is kept for the gradient, all else is made again.
    """
    places = Places(batch)
    ropes = {rope_kind(layer): places.rope(layer) for layer in model.config.layers}

    def through(layer: Layer, x_BTD: jax.Array, rope: Rope) -> tuple[jax.Array, Routing | None]:
        layer, x_BTD = anew(layer, x_BTD)
        x_BTD, _, routing = layer(x_BTD, rope, places.start_B, places.end_B, None, places.begin_BT)
        return x_BTD, routing

    x_BTD, routings = model.embed(jnp.asarray(batch.tokens_BT)), {}
    for i, layer in enumerate(model.layers):
        with jax.named_scope(f"layer_{i}"):
            x_BTD, routing = kept(through, remat)(layer, x_BTD, ropes[rope_kind(layer.attention.layer)])
        if routing is not None:
            routings[f"layers.{i}"] = routing
    return x_BTD, routings


def mtp_states(model: Transformer, batch: Batch, hidden_BTD: jax.Array, remat: bool) -> list[jax.Array]:
    """What the head reads [B, T, D] of each MTP block: block k predicts the token k + 2 places on."""
    places = Places(batch)

    def through(block: MTPBlock, embedded_BTD: jax.Array, hidden_BTD: jax.Array, rope: Rope) -> jax.Array:
        return block(embedded_BTD, hidden_BTD, rope, places.start_B, places.end_B, None, places.begin_BT)[0]

    return [kept(through, remat)(block, model.embed(jnp.roll(jnp.asarray(batch.tokens_BT), -1 - k, axis=1)), hidden_BTD,
                                 places.rope(block.attention.layer)) for k, block in enumerate(model.mtp)]


def kept(function: Callable, remat: bool) -> Callable:
    return jax.checkpoint(function) if remat else function
