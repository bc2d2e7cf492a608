"""The work of experts on a TPU: grouped products over the rows that there are, a turn of at most so many at a time.

The rows of this device's experts come first, sorted by expert, and only they are visited; so time and memory are theirs
and not those of the R = M*A that any imbalance could bring. experts.py says what is computed, and when it is so.
"""
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.kernels.grouped_matmul import grouped_matmul, is_of_words
from jaxllm.kernels.trained_matmul import trained_matmul
from jaxllm.quant import Adapted, Packed, Weight, trained_part, with_trained_part

Experts = tuple[Weight, Weight, Weight]           # gate_eDI, up_eDI, down_eID
Gradients = tuple[jax.Array, jax.Array, Any]      # of x_MD, weight_MA, and the trained part of the experts
TURN = 1024                                       # rows
TURN_BACK = 2**14                                 # in the backward pass, where a turn also decodes for three products


def has_grouped_product(weight: Weight) -> bool:
    base = weight.base if isinstance(weight, Adapted) else weight
    return not isinstance(base, Packed) or is_of_words(base)


def count_rows(local_MA: jax.Array, num_experts: int) -> jax.Array:
    """int32 [e]: how many tokens chose each of this device's experts."""
    chosen_RE = local_MA.reshape(-1, 1) == jnp.arange(num_experts, dtype=jnp.int32)[None, :]
    return jnp.sum(chosen_RE, axis=0, dtype=jnp.int32)


def sorted_rows(local_R: jax.Array, e: int) -> jax.Array:
    """The rows in the order of their experts, those of other devices (e) last. Where both fit into one number, XLA
    compiles the sort in a third of the time."""
    R = local_R.shape[0]
    if (e + 1) * R >= 2**31:
        return jnp.argsort(local_R)
    return jnp.sort(local_R * R + jnp.arange(R, dtype=jnp.int32), stable=False) % R


@dataclasses.dataclass(frozen=True)
class Turns:
    """The rows of this device's experts, so many at a time."""
    size: int
    row_R: jax.Array        # among the R = M*A; R where there is none, whole turns long
    end_e: jax.Array        # of each expert's rows among the sorted ones

    def rows(self, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(row_r, how many of them are each expert's) of a turn."""
        here_e = jnp.diff(jnp.clip(self.end_e - n * self.size, 0, self.size), prepend=0)
        return jax.lax.dynamic_slice_in_dim(self.row_R, n * self.size, self.size), here_e

    def loop(self, compute: Callable[[jax.Array, Any], Any], start: Any) -> Any:
        """compute(n, state) of every turn that has rows, one after the other."""
        if self.size == self.row_R.shape[0]:
            return compute(jnp.int32(0), start)
        return jax.lax.fori_loop(0, -(-self.end_e[-1] // self.size), compute, start)


def lay_out(local_MA: jax.Array, e: int, most: int) -> Turns:
    R = local_MA.size
    end_e, size = jnp.cumsum(count_rows(local_MA, e)), min(R, most)
    row_R = jnp.where(jnp.arange(R, dtype=jnp.int32) < end_e[-1], sorted_rows(local_MA.reshape(R), e), R)
    return Turns(size, jnp.pad(row_R, (0, -R % size), constant_values=R), end_e)


def grouped_product(x_rD: jax.Array, w: Weight, count_e: jax.Array, interpret: bool) -> jax.Array:
    """Each expert's rows times its weight, float32, 0 in rows past the last expert's. Gradients: of x, and of what
    `trained_part` has of w."""
    if isinstance(w, Packed):
        return grouped_matmul(x_rD, w, count_e, interpret)
    if isinstance(w, Adapted):
        h = grouped_product(x_rD, w.a, count_e, interpret)
        return grouped_product(x_rD, w.base, count_e, interpret) + grouped_product(
            (w.scale * h).astype(x_rD.dtype), w.b, count_e, interpret)
    return trained_matmul(x_rD, w.astype(x_rD.dtype), count_e, interpret)


def experts_in_turns(x_MD: jax.Array, local_MA: jax.Array, weight_MA: jax.Array, *experts: Weight,
                     interpret: bool = False) -> jax.Array:
    """As `apply_experts`. interpret: kernels on any platform, slowly."""
    A, turns = local_MA.shape[1], lay_out(local_MA, experts[0].shape[0], TURN)
    product, weight_R = partial(grouped_product, interpret=interpret), weight_MA.reshape(-1)

    def compute(n: jax.Array, out_MD: jax.Array) -> jax.Array:
        row_r, here_e = turns.rows(n)
        x_rD = x_MD.at[row_r // A].get(mode="clip")
        gate, up, down = experts
        hidden = (jax.nn.silu(product(x_rD, gate, here_e)) * product(x_rD, up, here_e)).astype(x_MD.dtype)
        y_rD = product(hidden, down, here_e) * weight_R.at[row_r].get(mode="clip")[:, None]
        return out_MD.at[row_r // A].add(y_rD, mode="drop")

    return turns.loop(compute, jnp.zeros_like(x_MD, jnp.float32))


def gradients_in_turns(x_MD: jax.Array, local_MA: jax.Array, weight_MA: jax.Array, experts: Experts,
                       d_out_MD: jax.Array, interpret: bool = False) -> Gradients:
    """As `gradients_by_block`: hidden values are made once more, with the router's weights in them."""
    # Of plain weights each turn reads and writes all gradients: as many rows as take the memory of one are a turn.
    e, _, I = experts[0].shape
    most = max(TURN_BACK, e * I if any(isinstance(w, jax.Array) for w in experts) else 0)
    A, turns = local_MA.shape[1], lay_out(local_MA, e, most)
    product, weight_R = partial(grouped_product, interpret=interpret), weight_MA.reshape(-1)

    def compute(n: jax.Array, state: Gradients) -> Gradients:
        row_r, here_e = turns.rows(n)
        token_r = row_r // A

        def turn(x_rD: jax.Array, weight_r: jax.Array, trained: Any) -> jax.Array:
            gate, up, down = with_trained_part(experts, trained)
            hidden = jax.nn.silu(product(x_rD, gate, here_e)) * product(x_rD, up, here_e) * weight_r[:, None]
            return product(hidden.astype(x_rD.dtype), down, here_e)

        _, pull = jax.vjp(turn, x_MD.at[token_r].get(mode="clip"), weight_R.at[row_r].get(mode="clip"),
                          trained_part(experts))
        dx, dweight, dtrained = pull(d_out_MD.at[token_r].get(mode="fill", fill_value=0))
        dx_MD, dweight_R, total = state
        return (dx_MD.at[token_r].add(dx.astype(jnp.float32), mode="drop"),
                dweight_R.at[row_r].set(dweight, mode="drop"),
                jax.tree.map(lambda all, one: all + one.astype(jnp.float32), total, dtrained))

    # Made when they are needed: XLA would make those of all layers before the first.
    nothing, d_out_MD = jax.lax.optimization_barrier((jnp.zeros_like(d_out_MD, jnp.float32, shape=()), d_out_MD))
    start = jax.tree.map(lambda w: jnp.broadcast_to(nothing, w.shape), (x_MD, weight_R, trained_part(experts)))
    dx_MD, dweight_R, total = turns.loop(compute, start)
    return (dx_MD.astype(x_MD.dtype), dweight_R.reshape(weight_MA.shape),
            jax.tree.map(lambda all, w: all.astype(w.dtype), total, trained_part(experts)))
