"""The dense SwiGLU MLP (arXiv 2002.05202), without biases and without a clamp."""
import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.axes import spec
from jaxllm.linear import einsum, param


class MLP(nnx.Module):
    def __init__(self, D: int, F: int, dtype: jnp.dtype, *, rngs: nnx.Rngs | None):
        self.gate_DF = param(rngs, (D, F), ("embed", "mlp"), dtype)
        self.up_DF = param(rngs, (D, F), ("embed", "mlp"), dtype)
        self.down_FD = param(rngs, (F, D), ("mlp", "embed"), dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Output [B, T, D], split as the input is."""
        stream, x_BTD = jax.typeof(x_BTD).sharding.spec, jax.reshard(x_BTD, spec("batch", None, None))
        gate = einsum("btd,df->btf", x_BTD, self.gate_DF[...])
        up = einsum("btd,df->btf", x_BTD, self.up_DF[...])
        hidden = (jax.nn.silu(gate) * up).astype(x_BTD.dtype)
        return einsum("btf,fd->btd", hidden, self.down_FD[...], stream).astype(x_BTD.dtype)
