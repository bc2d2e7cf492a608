"""Cross entropy of a head's predictions, a piece of the places at a time: no array of all logits ever exists.

The gradients of a piece are made with its value, while its logits are there, and wait for the backward pass; so the
head's products are made once each, as if all logits had been kept.
"""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.axes import degree, spec
from jaxllm.linear import einsum
from jaxllm.quant import Packed, decode

Head = jax.Array | Packed
PIECE = 2**21      # logits at once on a CPU, at most: of 2^19 .. 2^25 the fastest on two cores, by a fifth or more
PLACES = 2048      # of a device at once elsewhere: from 1,100 on a v6e multiplies longer than it reads the head


@jax.custom_vjp
def sum_of_nats(x_BTD: jax.Array, head_DW: Head, target_BT: jax.Array, counted_BT: jax.Array) -> jax.Array:
    """-log p(target) in nats, float32, summed over the places that are counted; x is what the head reads.

    Gradients of x, and of a head that is not packed.
    """
    def piece(*places: jax.Array) -> tuple[jax.Array, Any]:
        return nats_of(logits_of(places[0], head_DW), *places[1:])[0], ()
    return _over_pieces(piece, (), x_BTD, target_BT, counted_BT, head_DW)[0]


def logits_of(x_BTD: jax.Array, head_DW: Head) -> jax.Array:
    return einsum("btd,dw->btw", x_BTD, head_DW)


def nats_of(logits_BTW: jax.Array, target_BT: jax.Array, counted_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(nats summed over the places that are counted, their gradient in the logits)."""
    id_W = jax.reshard(jnp.arange(logits_BTW.shape[-1], dtype=jnp.int32), spec("vocab"))
    is_target_BTW = id_W[None, None, :] == target_BT[..., None]      # no look-up: W is split over the mesh
    peak_BT = logits_BTW.max(-1)
    weight_BTW = jnp.exp(logits_BTW - peak_BT[..., None])
    total_BT = weight_BTW.sum(-1)
    found_BT = jnp.where(is_target_BTW, logits_BTW, 0.0).sum(-1)
    nats = jnp.where(counted_BT, peak_BT + jnp.log(total_BT) - found_BT, 0.0).sum()
    d_logits_BTW = weight_BTW * (1 / total_BT)[..., None] - is_target_BTW.astype(jnp.float32)
    return nats, jnp.where(counted_BT[..., None], d_logits_BTW, 0.0)


def _forward(x_BTD: jax.Array, head_DW: Head, target_BT: jax.Array, counted_BT: jax.Array) -> tuple[jax.Array, Any]:
    plain = (head_DW,) if isinstance(head_DW, jax.Array) else ()
    turned = [head.T for head in plain]      # once, and not in every piece

    def piece(x: jax.Array, target: jax.Array, counted: jax.Array) -> tuple[jax.Array, Any]:
        nats, d_logits = nats_of(logits_of(x, head_DW), target, counted)
        d_logits = d_logits.astype(x.dtype)
        (head_WD,) = turned or (decode(head_DW, x.dtype).T,)
        d_x = einsum("btw,wd->btd", d_logits, head_WD, spec("batch", None, None)).astype(x.dtype)
        # Turned before it is multiplied, which a CPU does a third faster than to turn it on the way.
        x_DBT = jax.lax.optimization_barrier(x.transpose(2, 0, 1))
        return nats, (d_x, *(einsum("dbt,btw->dw", x_DBT, d_logits, spec("embed", "vocab")) for _ in plain))

    start = tuple(jnp.zeros_like(head, jnp.float32) for head in plain)
    nats, d_x_BTD, d_head = _over_pieces(piece, start, x_BTD, target_BT, counted_BT, head_DW)
    return nats, (d_x_BTD, tuple(d.astype(head.dtype) for d, head in zip(d_head, plain, strict=True)))


def _backward(gradients: Any, d_nats: jax.Array) -> tuple[Any, ...]:
    d_x, d_head = jax.tree.map(lambda g: (g.astype(jnp.float32) * d_nats).astype(g.dtype), gradients)
    return d_x, *(d_head or (None,)), None, None


sum_of_nats.defvjp(_forward, _backward)


def _over_pieces(function: Callable[..., tuple[jax.Array, Any]], start: Any, x_BTD: jax.Array, target_BT: jax.Array,
                 counted_BT: jax.Array, head_DW: Head) -> Any:
    """function(x, target, counted) -> (sum, (gradient of x, *of the head) or ()) over the pieces of T, in turn: the
    sum of the sums, the gradients of x, and from `start` the sum of the others."""
    B, T, _ = x_BTD.shape
    b = B // degree(jax.sharding.get_abstract_mesh(), "batch")

    def num_pieces(rows: int, most: int) -> int:
        return next(n for n in range(1, T + 1) if T % n == 0 and (rows * (T // n) <= most or n == T))

    def over(num: int) -> Callable[..., Any]:
        def cut(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x.reshape(B, num, T // num, *x.shape[2:]), 1, 0)

        def add(state: Any, piece: Any) -> Any:
            total, rest = state
            value, gradients = function(*piece)
            d_x, *d_rest = gradients or (None,)
            return (total + value, jax.tree.map(lambda all, one: all + one.astype(all.dtype), rest, tuple(d_rest))), d_x

        def run(start: Any, *places: jax.Array) -> Any:
            (total, rest), d_x = jax.lax.scan(add, (jnp.float32(0), start), tuple(map(cut, places)))
            d_x_BTD = jax.tree.map(lambda d: jax.lax.reshape(
                jnp.moveaxis(d, 0, 1), x_BTD.shape, out_sharding=spec("batch", None, None)), d_x)
            return total, d_x_BTD, rest
        return run
    return jax.lax.platform_dependent(start, x_BTD, target_BT, counted_BT, default=over(num_pieces(b, PLACES)),
                                      cpu=over(num_pieces(B * head_DW.shape[1], PIECE)))
