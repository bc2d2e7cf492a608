"""The work of experts of which some are in host memory (offloaded.py), on one device.

The blocks are those of `experts_by_block` in the same order, so the sums are the same, bit for bit. Between two that
belong to experts of the host there may be blocks of resident ones: while these, and the first, are computed, the
second is on its way. Each chosen expert crosses the bus once a step, and no other does. On the device there are two at
a time, one that is used and one that comes.
"""
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.experts import Blocks, add_block, apply_experts, lay_out
from jaxllm.offloaded import Offloaded, fetch
from jaxllm.quant import Weight, take

Chosen = tuple[Weight, ...]      # gate_DI, up_DI, down_ID of one expert


def apply_held_experts(x_MD: jax.Array, local_MA: jax.Array, weight_MA: jax.Array, experts: Any) -> jax.Array:
    """`apply_experts` of three stacks, wherever they lie."""
    if isinstance(experts[0], Offloaded):
        return experts_from_host(x_MD, local_MA, weight_MA, *experts)
    return apply_experts(x_MD, local_MA, weight_MA, experts)


def experts_from_host(x_MD: jax.Array, local_MA: jax.Array, weight_MA: jax.Array, *experts: Offloaded) -> jax.Array:
    """As `apply_experts`; it has no gradient."""
    r, resident = experts[0].num_resident, [w.resident for w in experts if w.resident is not None]
    blocks, weight_R = lay_out(local_MA, experts[0].shape[0]), weight_MA.reshape(-1)
    place_n = experts[0].place_E[blocks.expert_n]
    begin_s, num_fetched = stretches(blocks, place_n >= r)

    def brought(s: jax.Array) -> Chosen:
        """The expert from the host that stretch s begins with."""
        return tuple(fetch(w.host, place_n[begin_s[s]] - r) for w in experts)

    def stretch(s: jax.Array, fetched: Chosen, out_MD: jax.Array) -> jax.Array:
        def visit(n: jax.Array, out_MD: jax.Array) -> jax.Array:
            def add(chosen: Chosen) -> jax.Array:
                return add_block(n, out_MD, x_MD, weight_R, blocks, chosen)
            if r == 0:
                return add(fetched)
            return jax.lax.cond(place_n[n] < r, lambda: add(tuple(take(w, place_n[n]) for w in resident)),
                                lambda: add(fetched))
        return jax.lax.fori_loop(begin_s[s], begin_s[s + 1], visit, out_MD)

    def step(s: jax.Array, state: tuple[Chosen, jax.Array]) -> tuple[Chosen, jax.Array]:
        return brought(s + 1), stretch(s, *state)

    nothing = jax.tree.map(lambda x: jnp.zeros_like(x_MD, x.dtype, shape=x.shape), jax.eval_shape(brought, 0))
    state = jax.lax.fori_loop(0, num_fetched, step, (nothing, jnp.zeros_like(x_MD, jnp.float32)))
    return stretch(num_fetched, *state)      # apart, since nothing is fetched while it is computed


def stretches(blocks: Blocks, is_host_n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where stretches of blocks begin, and how many of them begin with an expert of the host. The first, number 0, has
    none and may be empty; behind the last stands the end."""
    n = jnp.arange(blocks.num, dtype=jnp.int32)
    is_new_n = jnp.diff(blocks.expert_n, prepend=-1) != 0
    begins_n = is_host_n & is_new_n & (n < blocks.num_used)
    begin_n = jnp.sort(jnp.where(begins_n, n, blocks.num_used))
    return jnp.concatenate([jnp.zeros_like(begin_n[:1]), begin_n, blocks.num_used[None]]), begins_n.sum(dtype=jnp.int32)
