"""Rotary position embedding on the first part of each head (RoFormer, arXiv 2104.09864), in its half-split form.

Pair (i, i + r) of the first 2r dims turns by position * theta**(-i/r), i < r; the other dims pass. Angles in float32.
"""
import jax
import jax.numpy as jnp
import numpy as np


def rope_angles(position_BT: jax.Array, rotary_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each float32 [B, T, rotary_dim/2], of integer positions [B, T]."""
    exponent = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
    inv_freq = jnp.asarray(theta ** -exponent, jnp.float32)        # once, exact: float32 powers err at long context
    angle = position_BT[:, :, None].astype(jnp.float32) * inv_freq[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x_BTNH: jax.Array, cos_BTr: jax.Array, sin_BTr: jax.Array) -> jax.Array:
    """`x_BTNH` with its first 2r dims rotated; computed in float32, returned in x's dtype."""
    r = cos_BTr.shape[-1]
    cos, sin = cos_BTr[:, :, None, :], sin_BTr[:, :, None, :]
    x1, x2 = (x_BTNH[..., i * r:(i + 1) * r].astype(jnp.float32) for i in (0, 1))
    turned = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]
    return jnp.concatenate([part.astype(x_BTNH.dtype) for part in turned] + [x_BTNH[..., 2 * r:]], axis=-1)
