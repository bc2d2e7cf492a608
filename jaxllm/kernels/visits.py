"""Where a grouped product goes: rows sorted by expert lie in tiles, and a visit is one expert's rows within one tile.

The idea is that of MegaBlocks (arXiv 2211.15841), as grouped products on TPUs have it. No row is padded or dropped.
"""
import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """One expert's rows within one tile of rows, in the order of both. An idle one has no rows and is there to zero a
    tile that has none. `num` are used, the arrays are as long as any imbalance can need."""
    num: jax.Array          # int32
    tile_v: jax.Array
    expert_v: jax.Array     # of an idle one, that of the last before it, which then need not be read again
    begin_v: jax.Array      # rows within the tile
    end_v: jax.Array
    tiles_used: jax.Array   # those with rows, at least 1


def lay_out(count_e: jax.Array, R: int, rows: int) -> Visits:
    """Visits of tiles of `rows` rows.

    Made of sums under a mask, without cumulative sums and gathers: XLA makes three programs of them and not two dozen.
    """
    e, num_tiles = count_e.shape[0], -(-R // rows)
    expert_e, visit = jnp.arange(e, dtype=jnp.int32), jnp.arange(num_tiles + e - 1, dtype=jnp.int32)

    def masked_sum(mask: jax.Array, x_e: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, x_e[None, :], 0), axis=1, dtype=jnp.int32)

    is_before = expert_e[None, :] < expert_e[:, None]
    begin_e = masked_sum(is_before, count_e)
    end_e = begin_e + count_e
    first_e = jax.lax.div(begin_e, rows)
    visits_e = jnp.where(count_e > 0, jax.lax.div(end_e - 1, rows) - first_e + 1, 0)
    begin_visit_e = masked_sum(is_before, visits_e)
    used = jnp.sum(visits_e, dtype=jnp.int32)
    tiles_used = jax.lax.div(jnp.sum(count_e, dtype=jnp.int32) + rows - 1, rows)
    of_used = jnp.minimum(visit, jnp.maximum(used - 1, 0))[:, None]
    is_expert = (of_used >= begin_visit_e[None, :]) & (of_used < (begin_visit_e + visits_e)[None, :])
    tile = visit + masked_sum(is_expert, first_e - begin_visit_e)
    is_idle = visit >= used
    tile = jnp.where(is_idle, tiles_used + visit - used, tile)
    begin = jnp.where(is_idle, 0, jnp.maximum(masked_sum(is_expert, begin_e) - tile * rows, 0))
    end = jnp.where(is_idle, 0, jnp.minimum(masked_sum(is_expert, end_e) - tile * rows, rows))
    return Visits(used + num_tiles - tiles_used, tile, masked_sum(is_expert, expert_e), begin, end,
                  jnp.maximum(tiles_used, 1))
