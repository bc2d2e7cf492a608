"""Mixture of experts: sigmoid routing with a selection bias (DeepSeek-V3, arXiv 2412.19437, section 2.1), dropless.

Every device holds some experts whole or in slices and computes what its tokens ask of them: the M*A routed rows are
sorted by expert, so each expert is one matrix product over as many rows as chose it, and the sum over devices gives the
output. No row is ever dropped, whatever the imbalance. Expert weights may be packed, or of a narrower dtype than the
activations: they are decoded or widened as they are used, one expert at a time.
"""
import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.axes import spec
from jaxllm.config import Config
from jaxllm.linear import einsum, matmul, param
from jaxllm.quant import Packed, Weight, take


def route(scores_BTE: jax.Array, bias_E: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """Chosen experts [B, T, A] (int32) and their weights (float32) from the router's sigmoid scores (float32).

    The bias takes part in the choice only. With n_group > 1 the choice is among the topk_group groups whose two best
    biased scores sum highest.
    """
    choice = scores_BTE + bias_E[None, None, :]
    if config.n_group > 1:
        B, T, E = choice.shape
        size = E // config.n_group
        grouped = choice.reshape(B, T, config.n_group, size)
        best = jax.lax.top_k(grouped, min(2, size))[0].sum(-1)
        kept = jax.nn.one_hot(jax.lax.top_k(best, config.topk_group)[1], config.n_group, dtype=jnp.bool).any(-2)
        choice = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(B, T, E)
    assert config.num_experts_per_tok is not None
    expert_BTA = jax.lax.top_k(choice, config.num_experts_per_tok)[1]
    weight_BTA = jnp.take_along_axis(scores_BTE, expert_BTA, axis=-1)
    if config.norm_topk_prob:
        weight_BTA /= weight_BTA.sum(-1, keepdims=True) + 1e-20
    return expert_BTA, weight_BTA * config.routed_scaling_factor


def block_rows(num_rows: int, num_experts: int) -> int:
    """Rows per block for `num_rows` routed rows: small blocks waste few rows, large ones read the weights less often.

    The power of two at twice an expert's mean share, between its mean share and 16 where the mean is above that, at
    most 128: the fastest within 10% of all that were tried from 1 to 2048 rows on two cores (docs/log.md).
    """
    def power(x: float) -> int:
        return 1 << max(0, math.ceil(math.log2(x)))
    mean = num_rows / num_experts
    return min(128, max(min(16, power(2 * mean)), power(mean)))


def experts_by_block(x_MD: jax.Array, local_MA: jax.Array, weight_MA: jax.Array, gate_eDI: Weight,
                     up_eDI: Weight, down_eID: Weight) -> jax.Array:
    """Sum over each token's experts local_MA by weights weight_MA (float32): float32 [M, D].

    local_MA == e means an expert of another device, which adds nothing. The R = M*A routed rows are laid out in blocks
    that each belong to one expert, and a loop over the blocks reads one expert's weights a time: those of an expert
    that nobody chose are never read.
    """
    (M, A), e = local_MA.shape, gate_eDI.shape[0]
    R = M * A
    rows = block_rows(R, e)
    num_blocks = min(R, e + R // rows)                              # the most that any imbalance can need
    order_R = jnp.argsort(local_MA.reshape(R))
    count_e = count_rows(local_MA, e)
    end_e = jnp.cumsum(count_e)                                     # of each expert's rows among the sorted ones
    blocks_e = -(-count_e // rows)
    end_block_e = jnp.cumsum(blocks_e)
    block_n = jnp.arange(num_blocks, dtype=jnp.int32)
    expert_n = jnp.minimum(jnp.sum(block_n[:, None] >= end_block_e[None, :], axis=1, dtype=jnp.int32), e - 1)
    begin_n = (end_e - count_e)[expert_n] + (block_n - (end_block_e - blocks_e)[expert_n]) * rows
    sorted_nb = begin_n[:, None] + jnp.arange(rows, dtype=jnp.int32)[None, :]
    row_nb = order_R[jnp.minimum(sorted_nb, R - 1)]
    token_nb = jnp.where(sorted_nb < end_e[expert_n][:, None], row_nb // A, M)      # M: fills up a block
    weight_nb = weight_MA.reshape(R)[row_nb]

    def compute(n: jax.Array, out_MD: jax.Array) -> jax.Array:
        gate, up, down = (take(w, expert_n[n]) for w in (gate_eDI, up_eDI, down_eID))
        x = x_MD.at[token_nb[n]].get(mode="clip")
        hidden = (jax.nn.silu(matmul(x, gate)) * matmul(x, up)).astype(x.dtype)
        y = matmul(hidden, down) * weight_nb[n][:, None]
        return out_MD.at[token_nb[n]].add(y, mode="drop")

    def visit(n: jax.Array, out_MD: jax.Array) -> jax.Array:
        return jax.lax.cond(n < end_block_e[-1], compute, lambda n, out_MD: out_MD, n, out_MD)

    return jax.lax.fori_loop(0, num_blocks, visit, jnp.zeros_like(x_MD, jnp.float32))


def experts_by_ragged_dot(x_MD: jax.Array, local_MA: jax.Array, weight_MA: jax.Array, gate_eDI: jax.Array,
                          up_eDI: jax.Array, down_eID: jax.Array) -> jax.Array:
    """As `experts_by_block`, by the grouped matrix product that GPU and TPU compilers have."""
    (M, A), e = local_MA.shape, gate_eDI.shape[0]
    local_R = local_MA.reshape(M * A)
    order_R = jnp.argsort(local_R)
    count_e = count_rows(local_MA, e)
    precision = jax.lax.Precision.HIGHEST if x_MD.dtype == jnp.float32 else None

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, w.astype(x.dtype), count_e, precision=precision,
                                  preferred_element_type=jnp.float32)

    x_RD = x_MD[order_R // A]
    hidden = (jax.nn.silu(product(x_RD, gate_eDI)) * product(x_RD, up_eDI)).astype(x_MD.dtype)
    y_RD = product(hidden, down_eID) * weight_MA.reshape(M * A)[order_R][:, None]
    y_RD = jnp.where((local_R[order_R] < e)[:, None], y_RD, 0.0)   # rows past the last group may hold anything
    return jnp.zeros_like(x_MD, jnp.float32).at[order_R // A].add(y_RD)


def count_rows(local_MA: jax.Array, num_experts: int) -> jax.Array:
    """int32 [e]: how many tokens chose each of this device's experts."""
    chosen_RE = local_MA.reshape(-1, 1) == jnp.arange(num_experts, dtype=jnp.int32)[None, :]
    return jnp.sum(chosen_RE, axis=0, dtype=jnp.int32)


def local_experts(x_bTD: jax.Array, expert_bTA: jax.Array, weight_bTA: jax.Array, gate_eDI: Weight,
                  up_eDI: Weight, down_eID: Weight) -> jax.Array:
    """The weighted sum of the chosen experts, float32 [b, T, D], summed over the devices that share the experts."""
    D, A, e = x_bTD.shape[-1], expert_bTA.shape[-1], gate_eDI.shape[0]
    local = expert_bTA - jax.lax.axis_index("expert") * e
    local_MA = jnp.where((local >= 0) & (local < e), local, e).reshape(-1, A)
    x_MD = jax.lax.pcast(x_bTD.reshape(-1, D), ("expert", "tensor"), to="varying")
    rows = x_MD, local_MA, weight_bTA.reshape(-1, A)
    if any(isinstance(w, Packed) for w in (gate_eDI, up_eDI, down_eID)):      # ragged_dot wants all experts decoded
        out_MD = experts_by_block(*rows, gate_eDI, up_eDI, down_eID)
    else:
        out_MD = jax.lax.platform_dependent(*rows, gate_eDI, up_eDI, down_eID,
                                            cpu=experts_by_block, default=experts_by_ragged_dot)
    return jax.lax.psum(out_MD, ("expert", "tensor")).reshape(x_bTD.shape)


class MoE(nnx.Module):
    def __init__(self, config: Config, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        D, E, I = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
        assert E is not None and I is not None
        self.config = config
        self.router_DE = param(rngs, (D, E), ("embed", None), jnp.float32)
        self.bias_E = param(rngs, (E,), (None,), jnp.float32)
        self.gate_EDI = param(rngs, (E, D, I), ("experts", "embed", "moe_mlp"), dtype)
        self.up_EDI = param(rngs, (E, D, I), ("experts", "embed", "moe_mlp"), dtype)
        self.down_EID = param(rngs, (E, I, D), ("experts", "moe_mlp", "embed"), dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        scores = jax.nn.sigmoid(einsum("btd,de->bte", x_BTD.astype(jnp.float32), self.router_DE[...]))
        expert, weight = route(scores, self.bias_E[...], self.config)
        out = jax.shard_map(local_experts, out_specs=spec("batch", None, None))(
            x_BTD, expert, weight, self.gate_EDI[...], self.up_EDI[...], self.down_EID[...])
        return out.astype(x_BTD.dtype)
