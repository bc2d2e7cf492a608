"""The work of experts on one device: M tokens, each with A of them, as products over the rows that chose each expert.

The R = M*A routed rows are sorted by expert, so each expert is one matrix product over as many rows as chose it. No row
is ever dropped, whatever the imbalance. Weights may be packed, adapted, or of a narrower dtype than the activations:
they are decoded or widened as they are used, one expert at a time.
"""
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.experts_in_turns import (
    Experts,
    Gradients,
    count_rows,
    experts_in_turns,
    gradients_in_turns,
    has_grouped_product,
)
from jaxllm.linear import einsum, matmul
from jaxllm.quant import Weight, take, trained_part, with_trained_part

MANY_TOKENS = 64      # from here on a GPU computes all experts at once (docs/log.md)


def block_rows(num_rows: int, num_experts: int) -> int:
    """Rows per block for `num_rows` routed rows: small blocks waste few rows, large ones read the weights less often.

    The power of two at twice an expert's mean share, between its mean share and 16 where the mean is above that, at
    most 128, or where an expert has several times as many, 512: the fastest within 10% of all that were tried from 1 to
    2048 rows on two cores (docs/log.md).
    """
    def power(x: float) -> int:
        return 1 << max(0, math.ceil(math.log2(x)))
    mean = num_rows / num_experts
    return min(128 if mean < 512 else 512, max(min(16, power(2 * mean)), power(mean)))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The routed rows in blocks that each belong to one expert."""
    num: int                # the most that any imbalance can need
    num_used: jax.Array
    expert_n: jax.Array
    row_nb: jax.Array       # among the R = M*A; R fills up a block
    token_nb: jax.Array     # among the M; M fills up a block

    def loop(self, compute: Callable[[jax.Array, Any], Any], start: Any) -> Any:
        """compute(n, state) of every block that is used, one after the other."""
        def visit(n: jax.Array, state: Any) -> Any:
            return jax.lax.cond(n < self.num_used, compute, lambda n, state: state, n, state)
        return jax.lax.fori_loop(0, self.num, visit, start)


def lay_out(local_MA: jax.Array, e: int) -> Blocks:
    """local_MA == e means an expert of another device: these rows are in no block."""
    M, A = local_MA.shape
    R = M * A
    rows = block_rows(R, e)
    num = min(R, e + R // rows)
    order_R = jnp.argsort(local_MA.reshape(R))
    count_e = count_rows(local_MA, e)
    end_e = jnp.cumsum(count_e)                                     # of each expert's rows among the sorted ones
    blocks_e = -(-count_e // rows)
    end_block_e = jnp.cumsum(blocks_e)
    block_n = jnp.arange(num, dtype=jnp.int32)
    expert_n = jnp.minimum(jnp.sum(block_n[:, None] >= end_block_e[None, :], axis=1, dtype=jnp.int32), e - 1)
    begin_n = (end_e - count_e)[expert_n] + (block_n - (end_block_e - blocks_e)[expert_n]) * rows
    sorted_nb = begin_n[:, None] + jnp.arange(rows, dtype=jnp.int32)[None, :]
    is_row_nb = sorted_nb < end_e[expert_n][:, None]
    row_nb = order_R[jnp.minimum(sorted_nb, R - 1)]
    return Blocks(num, end_block_e[-1], expert_n, jnp.where(is_row_nb, row_nb, R), jnp.where(is_row_nb, row_nb // A, M))


@jax.custom_vjp
def apply_experts(x_MD: jax.Array, local_MA: jax.Array, weight_MA: jax.Array, experts: Experts) -> jax.Array:
    """Sum over each token's experts local_MA (e: one of another device, adds nothing) by weights weight_MA (float32):
    float32 [M, D]. All must vary over the same mesh axes. Gradients: of x, the weights and what of the experts
    `trained_part` has.
    """
    gpu = experts_on_gpu if is_plain(experts) else experts_by_block      # ragged_dot wants all experts decoded
    tpu = experts_in_turns if all(map(has_grouped_product, experts)) else experts_by_block
    return jax.lax.platform_dependent(x_MD, local_MA, weight_MA, *experts, cuda=gpu, rocm=gpu, tpu=tpu,
                                      default=experts_by_block)


def is_plain(experts: Sequence[Weight]) -> bool:
    return all(isinstance(w, jax.Array) for w in experts)


def experts_by_block(x_MD: jax.Array, local_MA: jax.Array, weight_MA: jax.Array, *experts: Weight) -> jax.Array:
    """A loop over blocks reads one expert's weights a time: those of an expert that nobody chose are never read."""
    blocks, weight_R = lay_out(local_MA, experts[0].shape[0]), weight_MA.reshape(-1)

    def compute(n: jax.Array, out_MD: jax.Array) -> jax.Array:
        return add_block(n, out_MD, x_MD, weight_R, blocks, tuple(take(w, blocks.expert_n[n]) for w in experts))

    return blocks.loop(compute, jnp.zeros_like(x_MD, jnp.float32))


def add_block(n: jax.Array, out_MD: jax.Array, x_MD: jax.Array, weight_R: jax.Array, blocks: Blocks,
              chosen: Sequence[Weight]) -> jax.Array:
    """out_MD and what the expert of block n, whose weights are `chosen`, makes of the block's rows."""
    gate, up, down = chosen
    x = x_MD.at[blocks.token_nb[n]].get(mode="clip")
    hidden = (jax.nn.silu(matmul(x, gate)) * matmul(x, up)).astype(x.dtype)
    y = matmul(hidden, down) * weight_R.at[blocks.row_nb[n]].get(mode="clip")[:, None]
    return out_MD.at[blocks.token_nb[n]].add(y, mode="drop")


def experts_by_ragged_dot(x_MD: jax.Array, local_MA: jax.Array, weight_MA: jax.Array, *experts: jax.Array) -> jax.Array:
    """The same by the grouped matrix product that GPU and TPU compilers have."""
    (M, A), e = local_MA.shape, experts[0].shape[0]
    local_R = local_MA.reshape(M * A)
    order_R = jnp.argsort(local_R)
    count_e = count_rows(local_MA, e)
    precision = jax.lax.Precision.HIGHEST if x_MD.dtype == jnp.float32 else None

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, w.astype(x.dtype), count_e, precision=precision,
                                  preferred_element_type=jnp.float32)

    gate_eDI, up_eDI, down_eID = experts
    x_RD = x_MD[order_R // A]
    hidden = (jax.nn.silu(product(x_RD, gate_eDI)) * product(x_RD, up_eDI)).astype(x_MD.dtype)
    y_RD = product(hidden, down_eID) * weight_MA.reshape(M * A)[order_R][:, None]
    y_RD = jnp.where((local_R[order_R] < e)[:, None], y_RD, 0.0)   # rows past the last group may hold anything
    return jnp.zeros_like(x_MD, jnp.float32).at[order_R // A].add(y_RD)


def experts_at_once(x_MD: jax.Array, local_MA: jax.Array, weight_MA: jax.Array, *experts: jax.Array) -> jax.Array:
    """All experts for all tokens, those that a token did not choose by weight 0."""
    gate_eDI, up_eDI, down_eID = (w.astype(x_MD.dtype) for w in experts)
    chosen_MAe = local_MA[:, :, None] == jnp.arange(gate_eDI.shape[0], dtype=jnp.int32)[None, None, :]
    weight_Me = jnp.where(chosen_MAe, weight_MA[:, :, None], 0.0).sum(1)
    hidden = jax.nn.silu(einsum("md,edi->mei", x_MD, gate_eDI)) * einsum("md,edi->mei", x_MD, up_eDI)
    return einsum("mei,eid->md", (hidden * weight_Me[:, :, None]).astype(x_MD.dtype), down_eID)


def experts_on_gpu(x_MD: jax.Array, *inputs: jax.Array) -> jax.Array:
    """XLA's grouped product is all experts for all R = M*A rows on a GPU, and costs as much once it is more than
    reading the weights."""
    return (experts_at_once if x_MD.shape[0] >= MANY_TOKENS else experts_by_ragged_dot)(x_MD, *inputs)


def gradients_by_block(x_MD: jax.Array, local_MA: jax.Array, weight_MA: jax.Array, experts: Experts,
                       d_out_MD: jax.Array) -> Gradients:
    """The loop of `experts_by_block` again: each block's hidden values are made once more, and nothing is kept of them.

    The router's weight multiplies the hidden values here and not the output, which is the same sum, so its gradient
    does not need the output again.
    """
    blocks, weight_R = lay_out(local_MA, experts[0].shape[0]), weight_MA.reshape(-1)

    def compute(n: jax.Array, state: Gradients) -> Gradients:
        token, row, expert = blocks.token_nb[n], blocks.row_nb[n], blocks.expert_n[n]
        chosen = tuple(take(w, expert) for w in experts)

        def block(x_bD: jax.Array, weight_b: jax.Array, trained: Any) -> jax.Array:
            gate, up, down = with_trained_part(chosen, trained)
            hidden = jax.nn.silu(matmul(x_bD, gate)) * matmul(x_bD, up) * weight_b[:, None]
            return matmul(hidden.astype(x_bD.dtype), down)

        _, pull = jax.vjp(block, x_MD.at[token].get(mode="clip"), weight_R.at[row].get(mode="clip"),
                          trained_part(chosen))
        dx, dweight, dtrained = pull(d_out_MD.at[token].get(mode="fill", fill_value=0))
        dx_MD, dweight_R, total = state
        return (dx_MD.at[token].add(dx.astype(jnp.float32), mode="drop"), dweight_R.at[row].set(dweight, mode="drop"),
                jax.tree.map(lambda all, one: all.at[expert].add(one.astype(jnp.float32)), total, dtrained))

    start = (jnp.zeros_like(x_MD, jnp.float32), jnp.zeros_like(weight_R),
             jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), trained_part(experts)))
    dx_MD, dweight_R, total = blocks.loop(compute, start)
    return (dx_MD.astype(x_MD.dtype), dweight_R.reshape(weight_MA.shape),
            jax.tree.map(lambda all, w: all.astype(w.dtype), total, trained_part(experts)))


def gradients_through(compute: Callable[..., jax.Array]) -> Callable[..., Gradients]:
    """Those of `compute`, by differentiation."""
    def gradients(x_MD: jax.Array, local_MA: jax.Array, weight_MA: jax.Array, experts: Any, d_out_MD: jax.Array
                  ) -> Gradients:
        dx, dweight, *dexperts = jax.vjp(lambda x, weight, *w: compute(x, local_MA, weight, *w),
                                         x_MD, weight_MA, *experts)[1](d_out_MD)
        return dx, dweight, dexperts
    return gradients


def _forward(*inputs: Any) -> tuple[jax.Array, Any]:
    return apply_experts(*inputs), inputs


def _backward(inputs: Any, d_out_MD: jax.Array) -> Any:
    x_MD, local_MA, weight_MA, experts = inputs
    gpu = gradients_through(experts_on_gpu) if is_plain(experts) else gradients_by_block
    tpu = gradients_in_turns if all(map(has_grouped_product, experts)) else gradients_by_block
    dx, dweight, dexperts = jax.lax.platform_dependent(*inputs, d_out_MD, cuda=gpu, rocm=gpu, tpu=tpu,
                                                       default=gradients_by_block)
    none = jax.tree.map(lambda _: None, experts)      # no gradient of codes, scales, and what is adapted
    return dx, None, dweight, with_trained_part(none, dexperts)


apply_experts.defvjp(_forward, _backward)
