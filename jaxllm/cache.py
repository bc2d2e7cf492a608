"""Keys and values of the tokens so far: a growing array in full layers, a ring of fixed size in sliding ones.

Token at position p lies in slot p mod S. A full layer's S is at least the stated length, so nothing wraps. A sliding
layer's S is at least `window + in_flight - 1`: the window of the oldest token in flight and the tokens after it,
whatever the context.
Which position a slot holds follows from how many tokens the row has, so no positions are stored; a token that is taken
back (a rejected draft) is forgotten by lowering `length_B`, since its slot then reads as a position outside every
window. K is stored at its width H and V at its own, V.

Rows too few to be split over `expert` would lie on all its places. Sliding layers' do, which are small; a full layer's
slots are split there instead, place i of e holding the positions i*S/e .. (i+1)*S/e - 1.
"""
import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxllm.axes import attention_rows, spec, splits_rows
from jaxllm.config import Config, LayerSpec

TILE = 128      # slots of a TPU's tile: of arrays that are not made of these XLA copies all before a kernel reads them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's slots. K lies transposed: both products of a decode step then read rows."""
    k_BKHS: jax.Array
    v_BKSV: jax.Array

    @property
    def num_slots(self) -> int:
        return self.v_BKSV.shape[2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """All layers' slots, and how many tokens of each row they hold (int32)."""
    layers: tuple[LayerCache, ...]
    length_B: jax.Array


def num_slots(layer: LayerSpec, max_len: int, in_flight: int = 1, places: int = 1) -> int:
    """S of one layer for rows of up to `max_len` tokens, of which a decode step writes up to `in_flight`. It is split
    into `places` equal parts, which from TILE on are whole tiles."""
    least = max_len if layer.window is None else min(max_len, layer.window + in_flight - 1)
    part = -(-least // places)
    return places * (part if part < TILE else -(-part // TILE) * TILE)


def slot_places(layer: LayerSpec, batch: int, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the mesh splits a layer's slots, for so many rows."""
    return 1 if layer.window is not None or splits_rows(batch, mesh) else mesh.shape["expert"]


def cache_bytes(config: Config, batch: int, max_len: int, itemsize: int, in_flight: int = 1, tensor: int = 1,
                places: int = 1) -> int:
    """Bytes of all layers' slots, in closed form: of one copy, split over `data`, `tensor`, and where the batch divides
    `expert`. Else full layers' slots are split into that many `places`, while sliding layers lie on each of them. kv
    heads are repeated up to the tensor degree."""
    return sum(batch * max(layer.num_kv_heads, tensor) * (layer.head_dim + layer.v_head_dim) * itemsize
               * num_slots(layer, max_len, in_flight, places if layer.window is None else 1)
               for layer in config.layers)


def empty_layer(layer: LayerSpec, batch: int, max_len: int, in_flight: int, dtype: jnp.dtype) -> LayerCache:
    """An empty LayerCache, on the mesh in context. `layer.num_kv_heads` counts repeated heads too."""
    places = slot_places(layer, batch, jax.sharding.get_abstract_mesh())
    B, K, S = batch, layer.num_kv_heads, num_slots(layer, max_len, in_flight, places)
    rows, slots = attention_rows(B), "slots" if places > 1 else None
    return LayerCache(
        jnp.zeros((B, K, layer.head_dim, S), dtype, out_sharding=spec(rows, "kv_heads", None, slots)),
        jnp.zeros((B, K, S, layer.v_head_dim), dtype, out_sharding=spec(rows, "kv_heads", slots, None)))


def slot_positions(length_B: jax.Array, num: int) -> jax.Array:
    """[B, num]: the newest position below length_B that each slot can hold; negative where the slot is empty."""
    newest = length_B[:, None] - 1
    return newest - (newest - jnp.arange(num, dtype=jnp.int32)[None, :]) % num


def write(cache: LayerCache, k_BTKH: jax.Array, v_BTKV: jax.Array, start_B: jax.Array, end_B: jax.Array) -> LayerCache:
    """The cache after tokens at positions start_B + (0..T-1), of which those at or past end_B are padding.

    Of more tokens than slots only the newest are written, and none at positions below 0. On one device, inside
    shard_map.
    """
    num = cache.num_slots
    position_BT = start_B[:, None] + jnp.arange(k_BTKH.shape[1], dtype=jnp.int32)[None, :]
    first_B1, end_B1 = jnp.maximum(end_B - num, 0)[:, None], end_B[:, None]
    kept = (position_BT < end_B1) & (position_BT >= first_B1)
    slot_BT = jnp.where(kept, position_BT % num, num)              # slot `num` does not exist: dropped
    row_B1 = jnp.arange(slot_BT.shape[0], dtype=jnp.int32)[:, None]
    return LayerCache(cache.k_BKHS.at[row_B1, :, :, slot_BT].set(k_BTKH, mode="drop"),
                      cache.v_BKSV.at[row_B1, :, slot_BT].set(v_BTKV, mode="drop"))


def write_run(cache: LayerCache, k_bTkH: jax.Array, v_bTkV: jax.Array, start_b: jax.Array, end_b: jax.Array
              ) -> LayerCache:
    """As `write` of the positions 0 .. S-1 alone, on one device: of each row one run of slots is read, changed and
    written. A TPU does this in place; for a scatter along K's slots it copies all of K."""
    T, S = k_bTkH.shape[1], cache.num_slots
    size = min(T, S)
    filled = ((0, 0), (size, size), (0, 0), (0, 0))
    k, v = jnp.pad(k_bTkH, filled).transpose(0, 2, 3, 1), jnp.pad(v_bTkV, filled).transpose(0, 2, 1, 3)

    def one(row: jax.Array, cache: LayerCache) -> LayerCache:
        start, zero = start_b[row], jnp.int32(0)
        begin = jnp.clip(start, 0, S - size)
        position_s = begin + jnp.arange(size, dtype=jnp.int32)
        is_new_s = (position_s >= start) & (position_s < jnp.minimum(end_b[row], start + T))

        def change(x: jax.Array, new: jax.Array, dim: int) -> jax.Array:
            at, place = ([row, zero, zero, zero] for _ in range(2))
            at[dim], place[dim] = begin, jnp.clip(size - (start - begin), 0, size + T)
            shape = [size if d == dim else 1 if d == 0 else x.shape[d] for d in range(4)]
            old, tokens = jax.lax.dynamic_slice(x, at, shape), jax.lax.dynamic_slice(new, place, shape)
            mask = is_new_s.reshape([-1 if d == dim else 1 for d in range(4)])
            return jax.lax.dynamic_update_slice(x, jnp.where(mask, tokens, old), at)
        return LayerCache(change(cache.k_BKHS, k, 3), change(cache.v_BKSV, v, 2))
    return jax.lax.fori_loop(0, k_bTkH.shape[0], one, cache)


def write_ring(cache: LayerCache, k_bTkH: jax.Array, v_bTkV: jax.Array, start_b: jax.Array, end_b: jax.Array
               ) -> LayerCache:
    """As `write`, on one device: every slot takes its token or stays. For a ring, which is short."""
    token_bS = slot_positions(end_b, cache.num_slots) - start_b[:, None]
    is_new_bS = (token_bS >= 0) & (token_bS < k_bTkH.shape[1])
    k, v = (jnp.take_along_axis(x, jnp.clip(token_bS, 0, x.shape[1] - 1)[:, :, None, None], axis=1)
            for x in (k_bTkH, v_bTkV))
    return LayerCache(jnp.where(is_new_bS[:, None, None, :], k.transpose(0, 2, 3, 1), cache.k_BKHS),
                      jnp.where(is_new_bS[:, None, :, None], v.transpose(0, 2, 1, 3), cache.v_BKSV))


def with_previous(cache: LayerCache, k_BTKH: jax.Array, v_BTKV: jax.Array, start_B: jax.Array, num: int
                  ) -> tuple[jax.Array, jax.Array]:
    """Keys [B, K, H, num + T] and values [B, K, num + T, V] at positions start_B - num ..; arbitrary at negative ones.
    """
    keys, values = k_BTKH.transpose(0, 2, 3, 1), v_BTKV.transpose(0, 2, 1, 3)
    if num == 0:
        return keys, values
    position = start_B[:, None] - num + jnp.arange(num, dtype=jnp.int32)[None, :]
    slot = position % cache.num_slots
    return (jnp.concatenate([jnp.take_along_axis(cache.k_BKHS, slot[:, None, None, :], axis=3), keys], 3),
            jnp.concatenate([jnp.take_along_axis(cache.v_BKSV, slot[:, None, :, None], axis=2), values], 2))
