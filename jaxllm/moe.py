"""Mixture of experts: sigmoid routing with a selection bias (DeepSeek-V3, arXiv 2412.19437, section 2.1), dropless.

Every device holds some experts, whole or in slices (axes.py, `expert_dims`), and computes what tokens ask of them
(experts.py). Where experts are whole and tokens lie apart, tokens go to their experts and back (dispatch.py); else
every device sees all of them, and the sum over devices gives the output.
"""
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.axes import MESH_AXES, along, expert_dims, mesh_axes, spec
from jaxllm.config import Config
from jaxllm.dispatch import PLACES, apply_spread_experts, local_experts
from jaxllm.experts_offloaded import apply_held_experts
from jaxllm.linear import einsum, param
from jaxllm.offloaded import Offloaded
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


def apply_on_device(stream: PartitionSpec, axes: tuple[str, ...], x_bTD: jax.Array, expert_bTA: jax.Array,
                    weight_bTA: jax.Array, *experts: Weight | Offloaded) -> jax.Array:
    """The weighted sum of the chosen experts, which are split along `axes`, of a device's part of a stream: float32.

    It comes with that part where tokens are sent (`is_sent`), else with the rows of all devices that share the experts.
    """
    of_device = jax.tree.map(vary, (*(x.reshape(-1, x.shape[-1]) for x in (x_bTD, expert_bTA, weight_bTA)), experts))
    if is_sent(stream, axes):
        return apply_spread_experts(*of_device).reshape(x_bTD.shape)
    x_MD, expert_MA, weight_MA, experts = of_device
    y_MD = apply_held_experts(x_MD, local_experts(expert_MA, experts[0].shape[0], axes), weight_MA, experts)
    if (dim := split_dim(stream)) is None:
        return jax.lax.psum(y_MD, PLACES).reshape(x_bTD.shape)
    return jax.lax.psum_scatter(y_MD.reshape(x_bTD.shape), PLACES, scatter_dimension=dim, tiled=True)


def is_sent(stream: PartitionSpec, axes: tuple[str, ...]) -> bool:
    """Whether tokens go to experts that are split along these axes: both are each on one of all places."""
    return axes == PLACES and split_dim(stream) is not None


def split_dim(stream: PartitionSpec) -> int | None:
    """Which dim of the residual stream [B, T, D] is split over the places that experts are."""
    return next((dim for dim, axes in enumerate(along(stream, *PLACES)) if axes), None)


def vary(x: jax.Array) -> jax.Array:
    """x as one that may differ along every mesh axis: its gradient is then summed over those along which it does not.
    """
    return jax.lax.pcast(x, tuple(axis for axis in MESH_AXES if axis not in jax.typeof(x).mat.varying), to="varying")


class MoE(nnx.Module):
    def __init__(self, config: Config, dtype: jnp.dtype, *, rngs: nnx.Rngs | None):
        D, E, I = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
        assert E is not None and I is not None
        self.config = config
        self.router_DE = param(rngs, (D, E), ("router_embed", None), jnp.float32)
        self.bias_E = param(rngs, (E,), (None,), jnp.float32)
        experts, inner = expert_dims(E, jax.sharding.get_abstract_mesh())
        self.axes = mesh_axes(experts)
        self.gate_EDI = param(rngs, (E, D, I), (experts, "embed", inner), dtype)
        self.up_EDI = param(rngs, (E, D, I), (experts, "embed", inner), dtype)
        self.down_EID = param(rngs, (E, I, D), (experts, inner, "embed"), dtype)

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, Routing]:
        stream = jax.typeof(x_BTD).sharding.spec
        x_BTd = jax.reshard(x_BTD, spec("batch", None, "router_embed")).astype(jnp.float32)
        scores = jax.nn.sigmoid(einsum("btd,de->bte", x_BTd, self.router_DE[...], stream))
        expert, weight = route(scores, self.bias_E[...], self.config)
        inputs = x_BTD, expert, weight
        if not is_sent(stream, self.axes):
            inputs = jax.tree.map(lambda x: jax.reshard(x, spec("batch", None, None)), inputs)
        out = jax.shard_map(partial(apply_on_device, stream, self.axes), out_specs=stream)(
            *inputs, self.gate_EDI[...], self.up_EDI[...], self.down_EID[...])
        return out.astype(x_BTD.dtype), Routing(scores, expert)
