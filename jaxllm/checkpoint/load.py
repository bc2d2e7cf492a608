"""Opening a checkpoint of either kind, and bringing its parameters onto devices.

Each process reads the slices of its own devices. `jax.make_array_from_callback` would do, but it wants the slices of
all local devices before it hands over the first, and asks again for each device that holds the same one. Here a slice
is read once, placed on its devices and dropped.
"""
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from jaxllm.checkpoint.atomic import MARKER, SUFFIX, work_folder
from jaxllm.checkpoint.blocks import EXPONENT, Index, aligned_empty, bounds, cut_shape, relative
from jaxllm.checkpoint.errors import CheckpointError, listed
from jaxllm.checkpoint.hub import INDEX, SINGLE
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.checkpoint.source import Source, Tally, read_blocks
from jaxllm.checkpoint.store import PARAMS, StoreSource

KV = ("attention.k_DKH", "attention.v_DKV")      # may be wanted with each head repeated along K
K_DIM = 1
Bounds = tuple[tuple[int, int], ...]


def open_source(folder: str | os.PathLike[str]) -> Source:
    """The parameters of a hub folder, or of one that `convert` wrote. Errors: CheckpointError, ConfigError."""
    folder = Path(folder)
    unfinished = work_folder(folder.resolve())
    if (folder / MARKER).exists():
        raise CheckpointError(f"{folder} is a conversion that is not finished: run jaxllm convert again into "
                              f"{str(folder).removesuffix(SUFFIX)}")
    if (folder / PARAMS).is_dir():
        return StoreSource(folder)
    if folder.is_dir() and (any(folder.glob("*.safetensors")) or (folder / INDEX).exists()):
        return HubSource(folder)
    if unfinished.exists():
        raise CheckpointError(f"{folder} is not there: its conversion is running or was interrupted, and is in "
                              f"{unfinished}; if interrupted, run jaxllm convert again")
    raise CheckpointError(f"{folder} holds no model: expected a hub folder ({SINGLE}, or {INDEX} and its shards) or "
                          "one that jaxllm convert wrote")


def load_arrays(source: Source, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The parameters that `targets` names, in the shape, dtype and sharding that each target states.

    Cast on the host. Where the K dim of a k_DKH or v_DKV target is a multiple of the stored one, each kv head is
    repeated. Host memory: one device's slice of one parameter. NaN or Inf: one warning for each parameter.
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
    repeats = _repeats(source, path, target)
    dtype, tally = np.dtype(target.dtype), Tally()
    arrays = []
    for stored, wanted in _slices(target, repeats).items():
        index = tuple(slice(*cut) for cut in stored)
        values = _read(source, path, index, dtype, tally)
        for device, cut in wanted:
            arrays.append(jax.device_put(_repeat_heads(values, stored, cut, repeats), device))
    tally.warn(source, path)
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, arrays)


def _repeats(source: Source, path: str, target: jax.ShapeDtypeStruct) -> int:
    """How often each stored kv head is wanted; 1 for what is no kv head. Errors: CheckpointError."""
    shape = source.params[path][0]
    if np.dtype(target.dtype) not in EXPONENT or target.sharding is None:
        raise ValueError(f"{path}: wanted as {target.dtype} with sharding {target.sharding}; expected float32, "
                         "bfloat16 or float16, and a sharding")
    if path.endswith(KV):
        repeats = target.shape[K_DIM] // shape[K_DIM]
        if target.shape == (shape[0], shape[K_DIM] * repeats, shape[2]) and repeats:
            return repeats
    elif target.shape == shape:
        return 1
    raise CheckpointError(f"{source.folder}: {path} has shape {list(shape)}, but the model wants {list(target.shape)}; "
                          "is the config.json the checkpoint's own?")


def _slices(target: jax.ShapeDtypeStruct, repeats: int) -> dict[Bounds, list[tuple[jax.Device, Bounds]]]:
    """Stored slice -> the local devices that need it, each with its slice of the target."""
    groups: dict[Bounds, list[tuple[jax.Device, Bounds]]] = {}
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        cut = stored = bounds(index, target.shape)
        if repeats > 1:
            start, stop = cut[K_DIM]
            stored = (*cut[:K_DIM], (start // repeats, -(-stop // repeats)), *cut[K_DIM + 1:])
        groups.setdefault(stored, []).append((device, cut))
    return groups


def _read(source: Source, path: str, index: Index, dtype: np.dtype, tally: Tally) -> np.ndarray:
    """params[path][index] as `dtype`, filled block by block so that nothing else of its size is ever held."""
    shape = source.params[path][0]
    out = aligned_empty(cut_shape(index, shape), dtype)
    for block, values in read_blocks(source, path, index, dtype, tally):
        out[relative(block, index, shape)] = values
    return out


def _repeat_heads(values: np.ndarray, stored: Bounds, cut: Bounds, repeats: int) -> np.ndarray:
    """The target's slice `cut`, out of the stored slice that covers it."""
    if repeats == 1:
        return values
    start, stop = (edge - stored[K_DIM][0] * repeats for edge in cut[K_DIM])
    return np.repeat(values, repeats, axis=K_DIM)[:, start:stop]
