"""Choosing the next token: greedy, or drawn after temperature, top-k and top-p (nucleus, arXiv 1904.09751).

A row's draw depends on its own seed, its own position and its own logits alone: the noise comes from a counter-based
generator keyed by seed and position, one number per vocabulary entry. So neither its batch nor the mesh can change it.
"""
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxllm.axes import spec

Kind = Literal["greedy", "sampled", "truncated"]    # of the batch: what its most demanding row needs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of each row."""
    temperature_B: jax.Array    # float32; 0 is greedy
    top_k_B: jax.Array          # int32; 0 keeps all
    top_p_B: jax.Array          # float32 in (0, 1]; 1 keeps all
    seed_B: jax.Array           # uint32


def sample(logits_BW: jax.Array, sampling: Sampling, position_B: jax.Array, kind: Kind) -> jax.Array:
    """Tokens [B], int32, from float32 logits [B, W] for the places position_B of their rows.

    Temperature divides the logits, top-k keeps the k likeliest, top-p then keeps the fewest of those whose probability
    reaches p. `kind` (static) is "greedy" if every row is, "truncated" if some row has a top_k or top_p.
    """
    logits_BW = jax.reshard(logits_BW, spec("batch", None))
    greedy_B = argmax(logits_BW)
    if kind == "greedy":
        return greedy_B
    is_greedy_B = sampling.temperature_B == 0
    scaled_BW = logits_BW - logits_BW.max(-1, keepdims=True)       # so that a tiny temperature overflows to -inf only
    scaled_BW /= jnp.where(is_greedy_B, 1.0, sampling.temperature_B)[:, None]
    noise_BW = jax.vmap(gumbel, (0, 0, None))(sampling.seed_B, position_B, logits_BW.shape[-1])
    if kind == "sampled":
        drawn_B = argmax(scaled_BW + noise_BW)
    else:
        drawn_B = draw_truncated(scaled_BW, noise_BW, sampling.top_k_B, sampling.top_p_B)
    return jnp.where(is_greedy_B, greedy_B, drawn_B)


def argmax(x_BW: jax.Array, id_BW: jax.Array | None = None) -> jax.Array:
    """int32 [B]: the least id (default: place) of each row's maximum; W - 1 for a row of NaN.

    Two reductions, which CPUs vectorise: ten times as fast as `jnp.argmax`, which they do not.
    """
    W = x_BW.shape[-1]
    id_BW = jnp.arange(W, dtype=jnp.int32)[None, :] if id_BW is None else id_BW
    return jnp.where(x_BW == x_BW.max(-1, keepdims=True), id_BW, W - 1).min(-1)


def gumbel(seed: jax.Array, position: jax.Array, num: int) -> jax.Array:
    """Standard Gumbel noise [num] of one place: the argmax of logits plus it is a draw from their softmax."""
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (num,), jnp.float32)


def draw_truncated(scaled_BW: jax.Array, noise_BW: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Tokens [B] drawn from the likeliest entries that top-k and top-p keep; among equals the lower id ranks first."""
    W = scaled_BW.shape[-1]
    id_BW = jnp.argsort(scaled_BW, axis=-1, descending=True, stable=True)
    ranked_BW = jnp.take_along_axis(scaled_BW, id_BW, axis=-1)
    limit_B = jnp.where(top_k_B == 0, W, top_k_B)
    ranked_BW = jnp.where(jnp.arange(W, dtype=jnp.int32)[None, :] < limit_B[:, None], ranked_BW, -jnp.inf)
    probability_BW = jax.nn.softmax(ranked_BW, axis=-1)
    before_BW = jnp.cumsum(probability_BW, axis=-1) - probability_BW
    kept_BW = (before_BW < top_p_B[:, None]) | (top_p_B == 1)[:, None]     # a sum of 1 may come out just below or above
    kept_BW |= jnp.arange(W, dtype=jnp.int32)[None, :] == 0                # the likeliest, whatever p
    total_BW = jnp.where(kept_BW, ranked_BW, -jnp.inf) + jnp.take_along_axis(noise_BW, id_BW, axis=-1)
    return argmax(total_BW, id_BW.astype(jnp.int32))
