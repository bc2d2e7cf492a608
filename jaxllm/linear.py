"""Weights, and products with them: how a parameter is declared, and in what precision it is used."""
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.axes import spec


def param(rngs: nnx.Rngs, shape: Sequence[int], names: Sequence[str | None], dtype: jnp.dtype,
          std: float = 0.02) -> nnx.Param:
    """A parameter split over the mesh in context as its logical names say; normal(0, std), constant 1 if std is 0."""
    sharding = spec(*names)
    if std == 0:
        return nnx.Param(jnp.ones(shape, dtype, out_sharding=sharding))
    value = jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=sharding)
    return nnx.Param((std * value).astype(dtype))


def einsum(equation: str, x: jax.Array, w: jax.Array, out_sharding: PartitionSpec | None = None) -> jax.Array:
    """`jnp.einsum` accumulated and returned in float32. Float32 operands are multiplied as such on every platform."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, w, precision=precision, preferred_element_type=jnp.float32,
                      out_sharding=out_sharding)
