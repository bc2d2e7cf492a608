"""Multi-token prediction: blocks that each predict one token further on from the main model's hidden state.

Block k reads, at place i, the token at i + 1 + k and the hidden state at i, before the final norm, and predicts the
token at i + 2 + k. All blocks read the main model's state, none the block's before it; embedding and head are the
model's own (MiMo-V2-Flash report, arXiv 2601.02780, section 2.3.2).
"""
import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.attention import Attention
from jaxllm.axes import spec
from jaxllm.cache import LayerCache
from jaxllm.config import Config, LayerSpec
from jaxllm.linear import einsum, param
from jaxllm.mlp import MLP
from jaxllm.norm import RMSNorm


class MTPBlock(nnx.Module):
    """`layer` is the config's `mtp_layer`, as a model on this mesh stores it."""

    def __init__(self, config: Config, layer: LayerSpec, dtype: jnp.dtype, *, rngs: nnx.Rngs | None):
        D, epsilon = config.hidden_size, config.layernorm_epsilon
        self.embed_norm = RMSNorm(D, epsilon, dtype, rngs=rngs)
        self.hidden_norm = RMSNorm(D, epsilon, dtype, rngs=rngs)
        self.join_CD = param(rngs, (2 * D, D), (None, "embed"), dtype)
        self.attention_norm = RMSNorm(D, epsilon, dtype, rngs=rngs)
        self.attention = Attention(D, layer, config.attention_value_scale, dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(D, epsilon, dtype, rngs=rngs)
        self.mlp = MLP(D, config.intermediate_size, dtype, rngs=rngs)
        self.norm = RMSNorm(D, epsilon, dtype, rngs=rngs)

    def __call__(self, embedded_BTD: jax.Array, hidden_BTD: jax.Array, rope: tuple[jax.Array, jax.Array],
                 start_B: jax.Array, end_B: jax.Array, cache: LayerCache | None, begin_BT: jax.Array | None = None
                 ) -> tuple[jax.Array, LayerCache | None]:
        """What the model's head reads [B, T, D], and the cache with these places in it; positions are the hidden
        states', not the tokens'."""
        joined_BTC = jnp.concatenate([self.embed_norm(embedded_BTD), self.hidden_norm(hidden_BTD)], axis=-1)
        x_BTD = einsum("btc,cd->btd", joined_BTC, self.join_CD[...], spec("batch", None, None)).astype(hidden_BTD.dtype)
        out, cache = self.attention(self.attention_norm(x_BTD), rope, start_B, end_B, cache, begin_BT)
        x_BTD = x_BTD + out
        return self.norm(x_BTD + self.mlp(self.mlp_norm(x_BTD))), cache
