"""Mixture of experts: sigmoid routing with a selection bias (DeepSeek-V3, arXiv 2412.19437, section 2.1), dropless.

Every device holds some experts whole or in slices and computes what its tokens ask of them (experts.py); the sum over
devices gives the output.
"""
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.axes import MESH_AXES, spec
from jaxllm.config import Config
from jaxllm.experts import apply_experts
from jaxllm.linear import einsum, param
from jaxllm.quant import Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What a layer's router made of its tokens."""
    scores_BTE: jax.Array      # float32, of the sigmoid
    expert_BTA: jax.Array      # int32, the chosen experts


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


def local_experts(x_bTD: jax.Array, expert_bTA: jax.Array, weight_bTA: jax.Array, gate_eDI: Weight,
                  up_eDI: Weight, down_eID: Weight) -> jax.Array:
    """The weighted sum of the chosen experts, float32 [b, T, D], summed over the devices that share the experts."""
    D, A, e = x_bTD.shape[-1], expert_bTA.shape[-1], gate_eDI.shape[0]
    local = expert_bTA - jax.lax.axis_index("expert") * e
    local_MA = jnp.where((local >= 0) & (local < e), local, e).reshape(-1, A)
    inputs = jax.tree.map(vary, (x_bTD.reshape(-1, D), local_MA, weight_bTA.reshape(-1, A),
                                 (gate_eDI, up_eDI, down_eID)))
    return jax.lax.psum(apply_experts(*inputs), ("expert", "tensor")).reshape(x_bTD.shape)


def vary(x: jax.Array) -> jax.Array:
    """x as one that may differ along every mesh axis: its gradient is then summed over those along which it does not.
    """
    return jax.lax.pcast(x, tuple(axis for axis in MESH_AXES if axis not in jax.typeof(x).mat.varying), to="varying")


class MoE(nnx.Module):
    def __init__(self, config: Config, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        D, E, I = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
        assert E is not None and I is not None
        self.config = config
        self.router_DE = param(rngs, (D, E), ("router_embed", None), jnp.float32)
        self.bias_E = param(rngs, (E,), (None,), jnp.float32)
        self.gate_EDI = param(rngs, (E, D, I), ("experts", "embed", "moe_mlp"), dtype)
        self.up_EDI = param(rngs, (E, D, I), ("experts", "embed", "moe_mlp"), dtype)
        self.down_EID = param(rngs, (E, I, D), ("experts", "moe_mlp", "embed"), dtype)

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, Routing]:
        x_BTd = jax.reshard(x_BTD.astype(jnp.float32), spec("batch", None, "router_embed"))
        scores = jax.nn.sigmoid(einsum("btd,de->bte", x_BTd, self.router_DE[...], spec("batch", None, None)))
        expert, weight = route(scores, self.bias_E[...], self.config)
        out = jax.shard_map(local_experts, out_specs=spec("batch", None, None))(
            x_BTD, expert, weight, self.gate_EDI[...], self.up_EDI[...], self.down_EID[...])
        return out.astype(x_BTD.dtype), Routing(scores, expert)
