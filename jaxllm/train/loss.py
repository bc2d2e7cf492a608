"""What is made small: cross entropy of the next token, of those after it (MTP), and imbalance of the experts."""
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxllm.config import Config
from jaxllm.model import Transformer
from jaxllm.moe import Routing
from jaxllm.train.batch import Batch
from jaxllm.train.cross_entropy import sum_of_nats
from jaxllm.train.forward import hidden_states, mtp_states

Metrics = dict[str, jax.Array]


def loss(model: Transformer, batch: Batch, mtp_weight: float = 0.0, balance_weight: float = 0.0, remat: bool = False,
         totals: jax.Array | None = None) -> tuple[jax.Array, tuple[Metrics, dict[str, jax.Array]]]:
    """The loss, float32; its parts by name; and for each layer with experts how many tokens chose each, float32 [E].

    loss = nats a token + mtp_weight * mean over the MTP blocks of theirs + balance_weight * balance. `totals` are the
    `count_targets` of the whole step where the batch is a part of it: losses and gradients of the parts then add up.
    """
    totals = count_targets(batch, len(model.mtp)) if totals is None else totals
    x_BTD, routings = hidden_states(model, batch, remat)
    states = [model.norm(x_BTD), *mtp_states(model, batch, x_BTD, remat)]
    head_DW = model.embed_WD[...].T if model.head_DW is None else model.head_DW[...]
    nats = [sum_of_nats(state, head_DW, *targets(batch, k + 1)) / total
            for k, (state, total) in enumerate(zip(states, totals[:-1], strict=True))]
    metrics = {"loss": nats[0]} | {f"mtp_{k}": value for k, value in enumerate(nats[1:])}
    value = nats[0] + mtp_weight * sum(nats[1:]) / max(1, len(nats) - 1)
    if routings:
        metrics["balance"] = balance(routings, is_token(batch), model.config) / totals[-1]
        value += balance_weight * metrics["balance"]
    return value, (metrics, {path: count_tokens(routing, is_token(batch), model.config)
                             for path, routing in routings.items()})


def targets(batch: Batch, ahead: int) -> tuple[jax.Array, jax.Array]:
    """For each place the token `ahead` places on, and whether its prediction counts: only within a document."""
    tokens_BT, begin_BT, counted_BT = (jnp.asarray(x) for x in (batch.tokens_BT, batch.begin_BT, batch.counted_BT))
    place_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :]
    inside_BT = (place_T < tokens_BT.shape[1] - ahead) & (jnp.roll(begin_BT, -ahead, axis=1) == begin_BT)
    return jnp.roll(tokens_BT, -ahead, axis=1), inside_BT & jnp.roll(counted_BT, -ahead, axis=1)


def is_token(batch: Batch) -> jax.Array:
    """bool [B, T]: not padding."""
    return jnp.asarray(batch.begin_BT) <= jnp.arange(batch.tokens_BT.shape[1], dtype=jnp.int32)[None, :]


def count_targets(batch: Batch, num_mtp: int) -> jax.Array:
    """float32 [1 + num_mtp + 1]: predictions that count, of the head and of each MTP block, at least 1; and rows."""
    counts = [jnp.maximum(targets(batch, ahead)[1].sum(), 1) for ahead in range(1, num_mtp + 2)]
    return jnp.stack([*counts, jnp.int32(batch.tokens_BT.shape[0])]).astype(jnp.float32)


def balance(routings: Mapping[str, Routing], is_token_BT: jax.Array, config: Config) -> jax.Array:
    """The sequence-wise balance loss (DeepSeek-V3, arXiv 2412.19437, eq. 17-20), summed over rows, mean of the layers.

    1 for a row that is spread evenly; a row is a sequence here, whatever documents are in it.
    """
    assert config.n_routed_experts is not None and config.num_experts_per_tok is not None
    token_BT1 = is_token_BT[..., None].astype(jnp.float32)
    num_B1 = jnp.maximum(token_BT1.sum(1), 1.0)
    total = jnp.float32(0)
    for routing in routings.values():
        share_BTE = routing.scores_BTE / (routing.scores_BTE.sum(-1, keepdims=True) + 1e-20)
        mean_BE = (share_BTE * token_BT1).sum(1) / num_B1
        chosen_BE = (chosen(routing, config) * token_BT1).sum(1) / num_B1
        total += (chosen_BE * mean_BE).sum() * (config.n_routed_experts / config.num_experts_per_tok)
    return total / len(routings)


def count_tokens(routing: Routing, is_token_BT: jax.Array, config: Config) -> jax.Array:
    """float32 [E]: how many tokens chose each expert."""
    return jnp.where(is_token_BT[..., None], chosen(routing, config), 0.0).sum((0, 1))


def chosen(routing: Routing, config: Config) -> jax.Array:
    """float32 [B, T, E]: 1 where the token chose the expert."""
    id_E = jnp.arange(config.n_routed_experts, dtype=jnp.int32)
    return (routing.expert_BTA[..., None] == id_E[None, None, None, :]).any(-2).astype(jnp.float32)
