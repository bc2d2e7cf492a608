"""The MiMo-V2 transformer: embedding, pre-norm layers of attention and MLP or experts, final norm, head.

Numerics, the same everywhere: weights and activations in the model's dtype (experts may be narrower, moe.py); matrix
products accumulate in float32; softmax, norms, rope and routing in float32; router, its bias and the sinks are float32
parameters.
Sources: MiMo-V2-Flash report (arXiv 2601.02780); the hub's modeling files.
"""
import dataclasses
import math
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxllm.attention import Attention
from jaxllm.axes import MESH_AXES, degree, expert_dims, mesh_axes, spec, stream
from jaxllm.cache import Cache, LayerCache
from jaxllm.config import Config, LayerSpec
from jaxllm.linear import matmul_in_parts, param
from jaxllm.mlp import MLP
from jaxllm.moe import MoE, Routing
from jaxllm.mtp import MTPBlock
from jaxllm.norm import RMSNorm
from jaxllm.rope import rope_angles


class Layer(nnx.Module):
    def __init__(self, config: Config, layer: LayerSpec, dtype: jnp.dtype, *, rngs: nnx.Rngs | None):
        D, epsilon = config.hidden_size, config.layernorm_epsilon
        self.attention_norm = RMSNorm(D, epsilon, dtype, rngs=rngs)
        self.attention = Attention(D, layer, config.attention_value_scale, dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(D, epsilon, dtype, rngs=rngs)
        if layer.is_moe:
            self.moe = MoE(config, dtype, rngs=rngs)
        else:
            self.mlp = MLP(D, config.intermediate_size, dtype, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], start_B: jax.Array, end_B: jax.Array,
                 cache: LayerCache | None, begin_BT: jax.Array | None = None
                 ) -> tuple[jax.Array, LayerCache | None, Routing | None]:
        """Residual stream [B, T, D], the cache with these tokens in it, and where experts are, which were chosen."""
        out, cache = self.attention(self.attention_norm(x_BTD), rope, start_B, end_B, cache, begin_BT)
        x_BTD = x_BTD + out
        if not self.attention.layer.is_moe:
            return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache, None
        out, routing = self.moe(self.mlp_norm(x_BTD))
        return x_BTD + out, cache, routing


class Transformer(nnx.Module):
    """A MiMo-V2 text model on the mesh in context. Parameters: normal(0, 0.02) matrices and biases, norms of ones.

    On a mesh whose tensor degree exceeds a layer's number of kv heads, each head of k and v is stored degree / heads
    times, so that every device has the one it needs. `num_mtp` MTP blocks come with it, for those who call them.
    """

    def __init__(self, config: Config, mesh: Mesh | AbstractMesh, dtype: jnp.dtype, *, rngs: nnx.Rngs | None,
                 num_mtp: int = 0):
        check_mesh(config, mesh)
        D, W = config.hidden_size, config.vocab_size
        self.config = config
        self.embed_WD = param(rngs, (W, D), ("vocab", "embed"), dtype)
        self.layers = nnx.List([Layer(config, layer, dtype, rngs=rngs) for layer in stored_layers(config, mesh)])
        self.norm = RMSNorm(D, config.layernorm_epsilon, dtype, rngs=rngs)
        self.head_DW = None if config.tie_word_embeddings else param(rngs, (D, W), ("embed", "vocab"), dtype)
        self.mtp = nnx.List([MTPBlock(config, stored_layer(config.mtp_layer, mesh), dtype, rngs=rngs)
                             for _ in range(num_mtp)])

    def __call__(self, tokens_BT: jax.Array, cache: Cache | None = None, length_B: jax.Array | None = None
                 ) -> tuple[jax.Array, Cache | None]:
        """Hidden states [B, T, D] before the final norm, and the cache with these tokens in it.

        The tokens follow those in the cache; the first length_B of each row count (all if None), the rest is padding,
        whose hidden states mean nothing. Without a cache they stand at positions 0..T-1.
        """
        B, T = tokens_BT.shape
        start_B = cache.length_B if cache else jnp.zeros((B,), jnp.int32, out_sharding=spec("batch"))
        end_B = start_B + (T if length_B is None else length_B)
        position_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
        ropes = {kind: rope_angles(position_BT, *kind) for kind in {rope_kind(layer) for layer in self.config.layers}}
        x, new = self.embed(tokens_BT), []
        x = jax.reshard(x, spec(*stream(B, T, x.nbytes // (B * T), jax.sharding.get_abstract_mesh()), None))
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                x, layer_cache, _ = layer(x, ropes[rope_kind(layer.attention.layer)], start_B, end_B,
                                          cache.layers[i] if cache else None)
                new.append(layer_cache)
        x = jax.reshard(x, spec("batch", None, None))
        return x, Cache(tuple(cast(list[LayerCache], new)), end_B) if cache else None

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        return self.embed_WD[...].at[tokens_BT].get(out_sharding=spec("batch", None, None))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits, float32 [B, T, W], the vocabulary split over the mesh, from hidden states before the final norm."""
        return self.head(self.norm(x_BTD))

    def head(self, x_BTD: jax.Array) -> jax.Array:
        """Logits from hidden states after a final norm, the model's own or that of an MTP block."""
        head_DW = self.embed_WD[...].T if self.head_DW is None else self.head_DW[...]
        return matmul_in_parts(x_BTD, head_DW)


def rope_kind(layer: LayerSpec) -> tuple[int, float]:
    return layer.rotary_dim, layer.rope_theta


def stored_layers(config: Config, mesh: Mesh | AbstractMesh) -> list[LayerSpec]:
    """The layers as a model on this mesh stores them: kv heads repeated up to the tensor degree."""
    return [stored_layer(layer, mesh) for layer in config.layers]


def stored_layer(layer: LayerSpec, mesh: Mesh | AbstractMesh) -> LayerSpec:
    return dataclasses.replace(layer, num_kv_heads=max(layer.num_kv_heads, degree(mesh, "kv_heads")))


def check_mesh(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """ValueError naming dimension, size and mesh axes if some dim cannot be split over this mesh."""
    if set(mesh.axis_names) != set(MESH_AXES) or set(mesh.axis_types) != {AxisType.Explicit}:
        raise ValueError(f"the mesh must have the explicit axes {', '.join(MESH_AXES)}, as of make_mesh; found {mesh}")
    split: list[tuple[str, int | None, str | None]] = [("vocab_size", config.vocab_size, "vocab")]
    if not all(layer.is_moe for layer in config.layers):
        split.append(("intermediate_size", config.intermediate_size, "mlp"))
    if any(layer.is_moe for layer in config.layers):
        assert config.n_routed_experts is not None
        experts, inner = expert_dims(config.n_routed_experts, mesh)
        split += [("n_routed_experts", config.n_routed_experts, experts),
                  ("moe_intermediate_size", config.moe_intermediate_size, inner)]
    for sliding, prefix in ((False, ""), (True, "swa_")):
        for layer in {layer for layer in config.layers if (layer.window is not None) == sliding}:
            split.append((f"{prefix}num_attention_heads", layer.num_heads, "heads"))
            K, tensor = layer.num_kv_heads, degree(mesh, "kv_heads")
            if math.gcd(K, tensor) != min(K, tensor):
                raise ValueError(f"{prefix}num_key_value_heads = {K} does not fit mesh axis tensor = {tensor}: one "
                                 f"must divide the other (heads are split, or repeated to fill the axis)")
    for key, size, name in dict.fromkeys(split):
        parts = degree(mesh, name)
        assert size is not None
        if size % parts:
            axes = " x ".join(f"{axis} = {mesh.shape[axis]}" for axis in mesh_axes(name))
            raise ValueError(f"{key} = {size} cannot be split over mesh axis {axes}: choose a mesh that splits it into "
                             f"a divisor of {size}, not into {parts}")
