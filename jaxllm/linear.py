"""Weights, and products with them: how a parameter is declared, and in what precision it is used, packed or not.

The gradient of a product with a packed weight decodes it again, in the same pieces: no decoded number waits for the
backward pass.
"""
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.axes import spec
from jaxllm.quant import Adapted, Packed, Weight, decode

TILE = 2**20     # numbers; of 2^17, 2^19 and 2^20 the fastest on two cores with 1 MiB of cache each


def param(rngs: nnx.Rngs | None, shape: Sequence[int], names: Sequence[str | None], dtype: jnp.dtype,
          std: float = 0.02) -> nnx.Param:
    """A parameter split over the mesh in context as its logical names say; normal(0, std), constant 1 if std is 0 or
    rngs None, as where shapes alone are wanted: to trace what is drawn takes most of the time then."""
    sharding = spec(*names)
    if std == 0 or rngs is None:
        return nnx.Param(jnp.ones(shape, dtype, out_sharding=sharding))
    value = jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=sharding)
    return nnx.Param((std * value).astype(dtype))


def einsum(equation: str, x: jax.Array, w: Weight, out_sharding: PartitionSpec | None = None) -> jax.Array:
    """`jnp.einsum` accumulated and returned in float32. Float32 operands are multiplied as such on every platform.

    A packed weight is decoded into x's dtype here, and nowhere earlier.
    """
    if isinstance(w, Adapted):
        return einsum(equation, x, w.base, out_sharding) + through_adapter(equation, x, w, out_sharding)
    if isinstance(w, Packed):
        return jax.checkpoint(lambda x, w: _einsum(equation, x, decode(w, x.dtype), out_sharding))(x, w)
    return _einsum(equation, x, w, out_sharding)


def _einsum(equation: str, x: jax.Array, w: jax.Array, out_sharding: PartitionSpec | None = None) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, w, precision=precision, preferred_element_type=jnp.float32,
                      out_sharding=out_sharding)


def through_adapter(equation: str, x: jax.Array, w: Adapted, out_sharding: PartitionSpec | None = None) -> jax.Array:
    """scale * (x @ a) @ b for the product x @ w of `equation`, float32; what is between them is rounded to x's dtype.

    The equation names the weight's in-dims, over which it sums, before its out-dims.
    """
    x_dims, w_dims, out_dims = equation.replace("->", ",").split(",")
    in_dims = "".join(dim for dim in w_dims if dim in x_dims)
    kept = "".join(dim for dim in x_dims if dim not in in_dims)
    assert w_dims.startswith(in_dims) and out_dims == kept + w_dims.removeprefix(in_dims) and "r" not in equation
    between = None if out_sharding is None else PartitionSpec(*out_sharding[:len(kept)], None)
    h = einsum(f"{x_dims},{in_dims}r->{kept}r", x, w.a.astype(x.dtype), between)
    return einsum(f"{kept}r,r{w_dims.removeprefix(in_dims)}->{out_dims}", (w.scale * h).astype(x.dtype),
                  w.b.astype(x.dtype), out_sharding)


def matmul(x_MD: jax.Array, w_DI: Weight) -> jax.Array:
    """x @ w, float32 [M, I], on one device. A large packed w is decoded piece by piece along D.

    A piece of TILE decoded numbers stays in a CPU's cache until it is multiplied, which halves the time of an expert of
    4096 x 2048, and no more than that is ever decoded at once.
    """
    if isinstance(w_DI, Adapted):
        return matmul(x_MD, w_DI.base) + through_adapter("md,di->mi", x_MD, w_DI)
    if not isinstance(w_DI, Packed):
        return einsum("md,di->mi", x_MD, w_DI.astype(x_MD.dtype))
    D, I = w_DI.shape
    blocks = w_DI.scale.shape[0]
    pieces = next(n for n in range(1, blocks + 1) if blocks % n == 0 and (D // n * I <= TILE or n == blocks))
    if pieces == 1:
        return einsum("md,di->mi", x_MD, w_DI)

    @jax.checkpoint
    def product(x_MD: jax.Array, w_DI: Packed, n: jax.Array) -> jax.Array:
        x, codes, scale = (jax.lax.dynamic_slice_in_dim(array, n * (size // pieces), size // pieces, dim)
                           for array, size, dim in ((x_MD, D, 1), (w_DI.codes, w_DI.codes.shape[0], 0),
                                                    (w_DI.scale, blocks, 0)))
        return _einsum("md,di->mi", x, decode(Packed(codes, scale, w_DI.dim), x.dtype))

    zero_MI = jnp.zeros_like(x_MD, jnp.float32, shape=(x_MD.shape[0], I))
    return jax.lax.fori_loop(0, pieces, lambda n, y_MI: y_MI + product(x_MD, w_DI, n), zero_MI)


def matmul_in_parts(x_BTD: jax.Array, w_DW: Weight) -> jax.Array:
    """x @ w, float32 [B, T, W]; of float32 operands the sum over D is taken in four parts, which are then added.

    A CPU adds D products one after the other and rounds each time to the size of the sum so far. Where that sum is
    large, as in logits, this is the largest error of a float32 forward pass; four short sums have a third of it.
    """
    if isinstance(w_DW, Adapted):
        return matmul_in_parts(x_BTD, w_DW.base) + through_adapter("btd,dw->btw", x_BTD, w_DW)
    (B, T, D), W, parts = x_BTD.shape, w_DW.shape[1], 4
    if x_BTD.dtype != jnp.float32 or D % parts:
        return einsum("btd,dw->btw", x_BTD, w_DW)
    x_PBTd = x_BTD.reshape(B, T, parts, D // parts).transpose(2, 0, 1, 3)
    w_DW = decode(w_DW, x_BTD.dtype)
    y_PBTW = einsum("pbtd,pdw->pbtw", x_PBTd, w_DW.reshape(parts, D // parts, W))
    return (y_PBTW[0] + y_PBTW[1]) + (y_PBTW[2] + y_PBTW[3])
