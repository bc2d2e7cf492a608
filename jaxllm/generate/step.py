"""The jitted functions: make a cache, prefill it, decode with it, generate on the device.

All are pure: model and state in, state out. The state is donated: its arrays must not be used again after the call.
They run on the mesh that the model lies on.
"""
import contextlib
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jaxllm.axes import spec
from jaxllm.cache import Cache, empty_layer
from jaxllm.config import Config, LayerSpec
from jaxllm.gathered import anew
from jaxllm.generate.sample import Kind, Sampling, sample
from jaxllm.model import Transformer, stored_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A batch in the middle of generation."""
    cache: Cache
    token_B: jax.Array      # int32, sampled and not yet in the cache
    out_BT: jax.Array       # int32, the new tokens so far, from the left
    count_B: jax.Array      # int32, how many
    done_B: jax.Array       # bool: has met a stop id or its limit, or the host has said so
    limit_B: jax.Array      # int32, new tokens wanted


def init_cache(config: Config, mesh: Mesh | AbstractMesh, batch: int, max_len: int, in_flight: int = 1,
               dtype: jnp.dtype = jnp.bfloat16) -> Cache:
    """An empty cache for rows of up to `max_len` tokens, split over `mesh`.

    Full layers have max_len slots, sliding ones window + in_flight - 1: `in_flight` is the most tokens that a decode
    step adds to a row (prefill may add more, it reads its own tokens). Bytes: `jaxllm.cache.cache_bytes`. `dtype` is
    the model's. ValueError if the batch cannot be split over mesh axis `data`. On an abstract mesh, under
    `jax.eval_shape`: shapes and shardings.
    """
    if batch % mesh.shape["data"]:
        raise ValueError(f"batch = {batch} cannot be split over mesh axis data = {mesh.shape['data']}: "
                         f"pad it to a multiple")
    with jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh):
        return _init_cache(tuple(stored_layers(config, mesh)), batch, max_len, in_flight, jnp.dtype(dtype))


def prefill(model: Transformer, cache: Cache, tokens_BT: ArrayLike, length_B: ArrayLike | None = None
            ) -> tuple[jax.Array, Cache]:
    """Adds tokens to a cache: float32 logits [B, W] after each row's last one, and the new cache.

    tokens_BT is int32 [B, T]; the first length_B (int32 [B], default T) of each row count, the rest is padding. Rows of
    any lengths may be mixed, and a prompt may come in chunks of any size, with the same result. A row without tokens
    (length 0) stays as it is, its logits mean nothing. A row that outgrows the slots (max_len, if some layer is full)
    gets NaN.
    """
    length_B = np.full(np.shape(tokens_BT)[:1], np.shape(tokens_BT)[1]) if length_B is None else length_B
    with on_mesh(model):
        return _prefill(model, cache, place(model, tokens_BT, "batch", None), place(model, length_B, "batch"))


def decode(model: Transformer, cache: Cache, token_B: ArrayLike) -> tuple[jax.Array, Cache]:
    """One step: float32 logits [B, W] after token_B (int32 [B]), and the new cache. As `prefill` with T = 1."""
    return prefill(model, cache, np.asarray(token_B)[:, None] if not isinstance(token_B, jax.Array)
                   else token_B[:, None])


def start(model: Transformer, cache: Cache, logits_BW: jax.Array, sampling: Sampling, stop_ids: jax.Array,
          limit_B: jax.Array, capacity: int, kind: Kind) -> State:
    """The state whose first tokens are sampled from the prompt's logits; up to `capacity` tokens have room."""
    with on_mesh(model):
        return _start(cache, logits_BW, sampling, stop_ids, limit_B, capacity, kind)


def advance(model: Transformer, state: State, sampling: Sampling, stop_ids: jax.Array, steps: int, kind: Kind) -> State:
    """The state after up to `steps` more tokens a row, in one loop on the device that ends early when all are done."""
    with on_mesh(model):
        return _advance(model, state, sampling, stop_ids, np.int32(steps), kind)


def mesh_of(model: Transformer) -> Mesh:
    """The mesh that the model's parameters lie on."""
    sharding = jax.tree.leaves(model)[0].sharding
    assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
    return sharding.mesh


def on_mesh(model: Transformer) -> contextlib.AbstractContextManager:
    """The mesh of the model's parameters as the mesh in context; inside another jit it must already be."""
    traced = isinstance(jax.tree.leaves(model)[0], jax.core.Tracer)
    return contextlib.nullcontext() if traced else jax.set_mesh(mesh_of(model))


def place(model: Transformer, x: ArrayLike, *names: str | None) -> jax.Array:
    """A host array, the same on every process, on the model's mesh; a device array as it is. Integers: 32 bits."""
    if isinstance(x, jax.Array):
        return x
    host = np.asarray(x)
    host = host.astype(np.int32) if host.dtype == np.int64 else host
    sharding = NamedSharding(mesh_of(model), spec(*names))
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _init_cache(layers: tuple[LayerSpec, ...], batch: int, max_len: int, in_flight: int, dtype: jnp.dtype) -> Cache:
    return Cache(tuple(empty_layer(layer, batch, max_len, in_flight, dtype) for layer in layers),
                 jnp.zeros((batch,), jnp.int32, out_sharding=spec("batch")))


def last_logits(model: Transformer, cache: Cache, tokens_BT: jax.Array, length_B: jax.Array) -> tuple[jax.Array, Cache]:
    """Logits [B, W] of the last of length_B tokens of each row, NaN where the cache is overrun, and the new cache."""
    x_BTD, new = model(tokens_BT, cache, length_B)
    assert new is not None
    last_B11 = jnp.maximum(length_B - 1, 0)[:, None, None]
    x_B1D = jnp.take_along_axis(x_BTD, last_B11, axis=1) if tokens_BT.shape[1] > 1 else x_BTD
    logits_BW = model.logits(x_B1D)[:, 0]
    room = min((layer.num_slots for layer, kind in zip(new.layers, model.config.layers, strict=True)
                if kind.window is None or layer.num_slots < kind.window), default=None)     # what would wrap too early
    if room is not None:
        logits_BW = jnp.where((new.length_B <= room)[:, None], logits_BW, jnp.nan)
    return logits_BW, new


@partial(jax.jit, donate_argnames=("cache",))
def _prefill(model: Transformer, cache: Cache, tokens_BT: jax.Array, length_B: jax.Array) -> tuple[jax.Array, Cache]:
    return last_logits(model, cache, jax.reshard(tokens_BT, spec("batch", None)),
                       jax.reshard(length_B, spec("batch")))


@partial(jax.jit, static_argnames=("capacity", "kind"), donate_argnames=("cache",))
def _start(cache: Cache, logits_BW: jax.Array, sampling: Sampling, stop_ids: jax.Array, limit_B: jax.Array,
           capacity: int, kind: Kind) -> State:
    token_B = sample(logits_BW, sampling, cache.length_B, kind)
    out_BT = jnp.zeros((token_B.shape[0], capacity), jnp.int32, out_sharding=spec("batch", None)).at[:, 0].set(token_B)
    count_B = jnp.ones_like(token_B)
    return State(cache, token_B, out_BT, count_B, is_done(token_B, count_B, limit_B, stop_ids), limit_B)


@partial(jax.jit, static_argnames=("kind",), donate_argnames=("state",))
def _advance(model: Transformer, state: State, sampling: Sampling, stop_ids: jax.Array, steps: jax.Array,
             kind: Kind) -> State:
    def unfinished(carry: tuple[jax.Array, State]) -> jax.Array:
        return (carry[0] < steps) & ~jnp.all(carry[1].done_B)

    def step(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        i, old = carry
        weights, old = anew(model, old)
        alive_B = (~old.done_B).astype(jnp.int32)
        logits_BW, cache = last_logits(weights, old.cache, old.token_B[:, None], alive_B)
        token_B = sample(logits_BW, sampling, cache.length_B, kind)
        room_BT = jnp.arange(old.out_BT.shape[1], dtype=jnp.int32)[None, :] == old.count_B[:, None]
        out_BT = jnp.where(room_BT & ~old.done_B[:, None], token_B[:, None], old.out_BT)
        count_B = old.count_B + alive_B
        done_B = old.done_B | is_done(token_B, count_B, old.limit_B, stop_ids)
        return i + 1, State(cache, token_B, out_BT, count_B, done_B, old.limit_B)

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]


def is_done(token_B: jax.Array, count_B: jax.Array, limit_B: jax.Array, stop_ids: jax.Array) -> jax.Array:
    """Whether each row ends with this token: a stop id, or the last one wanted."""
    return jnp.any(token_B[:, None] == stop_ids[None, :], axis=-1) | (count_B >= limit_B)


@jax.jit
def _replicated(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(jax.reshard(x, PartitionSpec()) for x in arrays)


def fetch(model: Transformer, *arrays: jax.Array) -> list[np.ndarray]:
    """Host copies, on every process, of small arrays that lie split over the mesh."""
    with on_mesh(model):
        return [np.asarray(x) for x in _replicated(arrays)]
