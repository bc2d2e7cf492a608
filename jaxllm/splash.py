"""Attention of many new tokens to themselves and to the cache on a TPU: kernels/prefill_attention.py on each device.

The plain-JAX oracle is `jaxllm.attention.attend_cached`.
"""
import math
from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.cache import LayerCache, with_previous, write_ring, write_run
from jaxllm.kernels.prefill_attention import LANES, Part, attend_before, attend_newest, round_up


def attend_by_splash(window: int | None, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKV: jax.Array, start_B: jax.Array,
                     end_B: jax.Array, cache: LayerCache, sink_N: jax.Array | None, interpret: bool = False
                     ) -> tuple[jax.Array, LayerCache]:
    """`attend_cached` for any number of new tokens; with a window, the ring has at least as many slots."""
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (q_BTNH, cache))
    run = partial(attend_locally, window, specs[1].v_BKSV[2], interpret)
    return jax.shard_map(run, out_specs=specs, check_vma=False)(    # splash does not say over what its results vary
        q_BTNH, k_BTKH, v_BTKV, start_B, end_B, cache, sink_N)


def attend_locally(window: int | None, axis: str | None, interpret: bool, q_bTnH: jax.Array, k_bTkH: jax.Array,
                   v_bTkV: jax.Array, start_b: jax.Array, end_b: jax.Array, cache: LayerCache,
                   sink_n: jax.Array | None) -> tuple[jax.Array, LayerCache]:
    """The same on one device; `axis` is the mesh axis over which the slots are split, if any."""
    (b, T, n, H), k = q_bTnH.shape, k_bTkH.shape[2]
    scaled_bTnH = (q_bTnH.astype(jnp.float32) * (1 / math.sqrt(H))).astype(q_bTnH.dtype)
    q_PGTH = scaled_bTnH.swapaxes(1, 2).reshape(b * k, n // k, T, H)
    sink_PG = None if sink_n is None else jnp.tile(sink_n.reshape(k, n // k), (b, 1))
    before = 0 if window is None else round_up(window - 1, LANES)
    keys, values = with_previous(cache, k_bTkH, v_bTkV, start_b, before)
    found = attend_newest(q_PGTH, in_pairs(keys), in_pairs(values), jnp.repeat(start_b - before, k), window, sink_PG,
                          interpret=interpret)
    if window is None:
        first = 0 if axis is None else jax.lax.axis_index(axis) * cache.num_slots     # positions count from this slot
        cache = write_run(cache, k_bTkH, v_bTkV, start_b - first, jnp.minimum(end_b - first, cache.num_slots))
        slots = q_PGTH, in_pairs(cache.k_BKHS), in_pairs(cache.v_BKSV), jnp.repeat(start_b - first, k)
        found = (attend_before(found, *slots, interpret=interpret) if axis is None else
                 found.join(attend_before(Part.empty_like(found), *slots, interpret=interpret).join_over(axis)))
    else:
        cache = write_ring(cache, k_bTkH, v_bTkV, start_b, end_b)
    return found.out_PGTV.astype(q_bTnH.dtype).reshape(b, n, T, -1).swapaxes(1, 2), cache


def in_pairs(x_bk: jax.Array) -> jax.Array:
    """Rows and kv heads as one dim."""
    return x_bk.reshape(-1, *x_bk.shape[2:])
