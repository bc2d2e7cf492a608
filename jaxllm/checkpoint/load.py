"""Opening a checkpoint of either kind, and bringing its parameters onto devices.

Each process reads the slices of its own devices. `jax.make_array_from_callback` would do, but it wants the slices of
all local devices before it hands over the first, and asks again for each device that holds the same one. Here a slice
is read once, placed on its devices and dropped.
"""
import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxllm.checkpoint.blocks import Index, aligned_empty, bounds, cut_shape, relative
from jaxllm.checkpoint.errors import CheckpointError, listed
from jaxllm.checkpoint.hub import INDEX, SINGLE
from jaxllm.checkpoint.hubsource import FLOATS, HubSource
from jaxllm.checkpoint.incomplete import is_incomplete
from jaxllm.checkpoint.source import Source, Tally, read_blocks
from jaxllm.checkpoint.store import StoreSource, is_store
from jaxllm.checkpoint.trained import TrainedSource, is_run, read_settings

KV = re.compile(r"attention\.(k_DKH|v_DKV)(\.codes|\.scale)?$")      # may be wanted with each head repeated along K
K_DIM = 1
Bounds = tuple[tuple[int, int], ...]


def open_source(folder: str | os.PathLike[str], reading: str | None = None) -> Source:
    """The parameters of a hub folder, of one that `convert` wrote, or of a training run. Errors: CheckpointError,
    ConfigError.

    `reading`: how attention rows lie in a hub folder whose shapes leave that open (readings.py).
    """
    refuse_incomplete(folder)
    if is_store(folder):
        return StoreSource(folder)
    folder = Path(folder)
    if is_run(folder):
        start = read_settings(folder).get("model")
        return TrainedSource(folder, open_source(start, reading) if start else None)
    if folder.is_dir() and (any(folder.glob("*.safetensors")) or (folder / INDEX).exists()):
        return HubSource(folder, reading)
    raise CheckpointError(f"{folder} holds no model: expected a hub folder ({SINGLE}, or {INDEX} and its shards) or "
                          "one that jaxllm convert wrote")


def refuse_incomplete(folder: str | os.PathLike[str]) -> None:
    """CheckpointError if `folder` is one that a conversion or an export, running or interrupted, has not made whole."""
    if is_incomplete(folder):
        raise CheckpointError(f"{folder} is a conversion or an export that is not finished: if none is running, run "
                              "jaxllm convert again with --resume, or jaxllm export again")


def load_arrays(source: Source, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The parameters that `targets` names, in the shape, dtype and sharding that each target states.

    Plain parameters are cast, on the host. Where the K dim of a k_DKH or v_DKV target is a multiple of the stored one,
    each kv head is repeated; where a dim of a scale is, each scale is, for finer blocks. A target of one dim more has
    dim 1 cut in two, of which the first may be split. Host memory: one device's slice of one parameter, beside what a
    target wants there. NaN or Inf: one warning for each parameter.
    Errors: CheckpointError for paths or shapes that do not match; MTP blocks that no target names are left.
    """
    missing = sorted(targets.keys() - source.params.keys())
    extra = sorted(path for path in source.params.keys() - targets.keys() if not path.startswith("mtp."))
    if missing or extra:
        raise CheckpointError(f"{source.folder}: its parameters are not those of the model; missing {listed(missing)}; "
                              f"not wanted {listed(extra)}; is the config.json the checkpoint's own, and the copy "
                              "whole?")
    return {path: _load(source, path, target) for path, target in targets.items()}


def _load(source: Source, path: str, target: jax.ShapeDtypeStruct) -> jax.Array:
    final, target = target, _as_stored(target, len(source.params[path][0]))
    repeats = _repeats(source, path, target)
    dtype, tally = np.dtype(target.dtype), Tally()
    arrays = []
    for stored, wanted in _slices(target, repeats).items():
        index = tuple(slice(*cut) for cut in stored)
        values = _read(source, path, index, dtype, tally)
        for device, cut in wanted:
            part = _repeat(values, stored, cut, repeats).reshape(final.sharding.shard_shape(final.shape))
            place = SingleDeviceSharding(device, memory_kind=final.sharding.memory_kind)
            arrays.append(jax.device_put(part, place))
    tally.warn(source, path)
    return jax.make_array_from_single_device_arrays(final.shape, final.sharding, arrays)


def _as_stored(target: jax.ShapeDtypeStruct, ndim: int) -> jax.ShapeDtypeStruct:
    """The target with dims 1 and 2 as one, if it has one dim more than what is stored."""
    if target.ndim != ndim + 1 or not isinstance(target.sharding, NamedSharding):
        return target
    axes = [*target.sharding.spec, *[None] * (target.ndim - len(target.sharding.spec))]
    assert axes[2] is None, target.sharding
    first, rows, group, *rest = target.shape
    return target.update(shape=(first, rows * group, *rest),
                         sharding=target.sharding.update(spec=PartitionSpec(*axes[:2], *axes[3:])))


def _repeats(source: Source, path: str, target: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """How often each element is wanted along each dim: kv heads, and the scales of blocks. Errors: CheckpointError."""
    shape, dtype = source.params[path]
    if target.sharding is None or np.dtype(target.dtype) != dtype and not {np.dtype(target.dtype), dtype} <= FLOATS:
        raise ValueError(f"{path}: wanted as {target.dtype} with sharding {target.sharding}, and stored as {dtype}; "
                         "expected float32, bfloat16 or float16, or for codes and scales what is stored, and a "
                         "sharding")
    repeats = tuple(wanted // held for wanted, held in zip(target.shape, shape, strict=True)) \
        if len(shape) == len(target.shape) else ()
    may_repeat = [path.endswith(".scale") or dim == K_DIM and KV.search(path) for dim in range(len(shape))]
    if not repeats or any(held * n != wanted or n > 1 and not may for held, n, wanted, may in
                          zip(shape, repeats, target.shape, may_repeat, strict=True)):
        raise CheckpointError(f"{source.folder}: {path} has shape {list(shape)}, but the model wants "
                              f"{list(target.shape)}; is the config.json the checkpoint's own?")
    return repeats


def _slices(target: jax.ShapeDtypeStruct, repeats: tuple[int, ...]
            ) -> dict[Bounds, list[tuple[jax.Device, Bounds]]]:
    """Stored slice -> the local devices that need it, each with its slice of the target."""
    groups: dict[Bounds, list[tuple[jax.Device, Bounds]]] = {}
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        cut = bounds(index, target.shape)
        stored = tuple((start // n, -(-stop // n)) for (start, stop), n in zip(cut, repeats, strict=True))
        groups.setdefault(stored, []).append((device, cut))
    return groups


def _read(source: Source, path: str, index: Index, dtype: np.dtype, tally: Tally) -> np.ndarray:
    """params[path][index] as `dtype`, filled block by block so that nothing else of its size is ever held."""
    shape = source.params[path][0]
    out = aligned_empty(cut_shape(index, shape), dtype)
    for block, values in read_blocks(source, path, index, dtype, tally):
        out[relative(block, index, shape)] = values
    return out


def _repeat(values: np.ndarray, stored: Bounds, cut: Bounds, repeats: tuple[int, ...]) -> np.ndarray:
    """The target's slice `cut`, out of the stored slice that covers it."""
    for dim, n in enumerate(repeats):
        if n > 1:
            start, stop = (edge - stored[dim][0] * n for edge in cut[dim])
            values = np.repeat(values, n, axis=dim)[(slice(None),) * dim + (slice(start, stop),)]
    return values
