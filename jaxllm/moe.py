"""Mixture of experts: sigmoid routing with a selection bias (DeepSeek-V3, arXiv 2412.19437, section 2.1), dropless.

Every device holds some experts whole or in slices and computes what its tokens ask of them: the M*A routed rows are
sorted by expert, so each expert is one matrix product over as many rows as chose it, and the sum over devices gives the
output. No row is ever dropped, whatever the imbalance.
"""
import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.axes import spec
from jaxllm.config import Config
from jaxllm.linear import einsum, param


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


def experts_by_block(x_MD: jax.Array, local_R: jax.Array, gate_eDI: jax.Array, up_eDI: jax.Array, down_eID: jax.Array
                     ) -> jax.Array:
    """Expert outputs of all routed rows, float32 [R, D]; row r is token r // A under expert local_R[r].

    Rows with local_R == e (no expert of this device) give zero. The rows are laid out in blocks that each belong to one
    expert, and a loop over the blocks reads one expert's weights a time: an expert that nobody chose is never read.
    """
    M, D = x_MD.shape
    R, e = local_R.shape[0], gate_eDI.shape[0]
    A, rows = R // M, block_rows(R, e)
    num_blocks = min(R, e + R // rows)                              # the most that any imbalance can need
    order_R = jnp.argsort(local_R)
    sorted_R = local_R[order_R]
    count_e = jnp.sum(local_R[:, None] == jnp.arange(e, dtype=jnp.int32)[None, :], axis=0, dtype=jnp.int32)
    start_e = jnp.cumsum(count_e) - count_e                         # of each expert's rows among the sorted ones
    last_block_e = jnp.cumsum(-(-count_e // rows))
    first_block_e = last_block_e - -(-count_e // rows)
    block_n = jnp.arange(num_blocks, dtype=jnp.int32)
    expert_n = jnp.sum(block_n[:, None] >= last_block_e[None, :], axis=1, dtype=jnp.int32)
    expert_n = jnp.minimum(expert_n, e - 1)
    begin_n = start_e[expert_n] + (block_n - first_block_e[expert_n]) * rows
    row_nb = jnp.clip(begin_n[:, None] + jnp.arange(rows, dtype=jnp.int32)[None, :], 0, R - 1)
    token_nb = order_R[row_nb] // A

    def compute(n: jax.Array, out: jax.Array) -> jax.Array:
        x = x_MD[token_nb[n]]
        gate, up, down = (jax.lax.dynamic_index_in_dim(w, expert_n[n], 0, keepdims=False)
                          for w in (gate_eDI, up_eDI, down_eID))
        hidden = (jax.nn.silu(einsum("bd,di->bi", x, gate)) * einsum("bd,di->bi", x, up)).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, einsum("bi,id->bd", hidden, down)[None], n, 0)

    def visit(n: jax.Array, out: jax.Array) -> jax.Array:
        return jax.lax.cond(n < last_block_e[-1], compute, lambda n, out: out, n, out)

    zeros_nbD = jnp.zeros_like(x_MD, jnp.float32, (num_blocks, rows, D))
    out_nbD = jax.lax.fori_loop(0, num_blocks, visit, zeros_nbD)
    # where each routed row went: its place within its expert, from its expert's first block on
    own = jnp.minimum(sorted_R, e - 1)
    place_R = (first_block_e[own] * rows + jnp.arange(R, dtype=jnp.int32) - start_e[own])[jnp.argsort(order_R)]
    out_RD = out_nbD.reshape(num_blocks * rows, D)[jnp.minimum(place_R, num_blocks * rows - 1)]
    return jnp.where((local_R < e)[:, None], out_RD, 0.0)


def experts_by_ragged_dot(x_MD: jax.Array, local_R: jax.Array, gate_eDI: jax.Array, up_eDI: jax.Array,
                          down_eID: jax.Array) -> jax.Array:
    """As `experts_by_block`, by the grouped matrix product that GPU and TPU compilers have."""
    M = x_MD.shape[0]
    R, e = local_R.shape[0], gate_eDI.shape[0]
    order_R = jnp.argsort(local_R)
    count_e = jnp.sum(local_R[:, None] == jnp.arange(e, dtype=jnp.int32)[None, :], axis=0, dtype=jnp.int32)
    precision = jax.lax.Precision.HIGHEST if x_MD.dtype == jnp.float32 else None

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, w, count_e, precision=precision, preferred_element_type=jnp.float32)

    x_RD = x_MD[order_R // (R // M)]
    hidden = (jax.nn.silu(product(x_RD, gate_eDI)) * product(x_RD, up_eDI)).astype(x_MD.dtype)
    out_RD = product(hidden, down_eID)[jnp.argsort(order_R)]
    return jnp.where((local_R < e)[:, None], out_RD, 0.0)          # rows past the last group may hold anything


def local_experts(x_bTD: jax.Array, expert_bTA: jax.Array, weight_bTA: jax.Array, gate_eDI: jax.Array,
                  up_eDI: jax.Array, down_eID: jax.Array) -> jax.Array:
    """The weighted sum of the chosen experts, float32 [b, T, D], summed over the devices that share the experts."""
    b, T, D = x_bTD.shape
    A, e = expert_bTA.shape[-1], gate_eDI.shape[0]
    local = expert_bTA.reshape(-1) - jax.lax.axis_index("expert") * e
    local_R = jnp.where((local >= 0) & (local < e), local, e)
    x_MD = jax.lax.pcast(x_bTD.reshape(-1, D), ("expert", "tensor"), to="varying")
    out_RD = jax.lax.platform_dependent(x_MD, local_R, gate_eDI, up_eDI, down_eID,
                                        cpu=experts_by_block, default=experts_by_ragged_dot)
    out_bTAD = out_RD.reshape(b, T, A, D)
    out = sum(out_bTAD[:, :, a] * weight_bTA[:, :, a, None] for a in range(A))     # one loop on CPU; a reduction is not
    return jax.lax.psum(out, ("expert", "tensor"))


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
