"""RMSNorm (arXiv 1910.07467): in float32, cast back, then times a plain weight, in the order of the hub's code."""
import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.linear import param


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last dim, in x's dtype."""
    x = x_BTD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    return x.astype(x_BTD.dtype) * scale_D[None, None, :]


class RMSNorm(nnx.Module):
    def __init__(self, D: int, epsilon: float, dtype: jnp.dtype, *, rngs: nnx.Rngs | None):
        self.epsilon = epsilon
        self.scale_D = param(rngs, (D,), ("embed",), dtype, std=0)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return rms_norm(x_BTD, self.scale_D[...], self.epsilon)
