"""The product's own steps, compiled ahead of time for TPU devices that are not here.

libtpu holds the compiler, and takes a topology's name in the place of devices. Weights, cache and tokens are shapes
with shardings; nothing is read or allocated. The step that is lowered is the one that `generate` calls.
"""
import dataclasses
import importlib.util
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.axes import make_mesh, parse_mesh, spec
from jaxllm.checkpoint.stated import stated_params
from jaxllm.config import Config
from jaxllm.gathered import gathered
from jaxllm.generate.load import Params, abstract_model, stored_leaves
from jaxllm.generate.step import init_cache, prefill
from jaxllm.info import held_source
from jaxllm.model import Transformer
from jaxllm.paths import parameter_path
from jaxllm.tpu.chips import Slice
from jaxllm.tpu.steps import Work

ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1",      # else it asks the network what machine this is
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v6e-4",      # or complains that nobody told it
}
LIBTPU = "pip install 'jaxllm[tpu]'"


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step, and what it was compiled from."""
    OWNERS: ClassVar = ("weights", "cache", "activations", "activations")      # whose bytes its arguments are
    compiled: jax.stages.Compiled
    config: Config
    mesh: Mesh
    work: Work
    weights: dict[str, Any]      # path -> abstract leaf as it is stored, packed or not
    cache: Any
    seconds: float               # to lower and to compile


def devices_of(on: Slice) -> Sequence[jax.Device]:
    """The devices of a TPU slice, to compile for. ValueError for GPUs, without libtpu, or if it knows no such slice.

    Other programs may hold libtpu meanwhile: it is not asked for a device.
    """
    topology = on.name.replace("tpu7x", "TPU7x")
    if on.chip.platform != "tpu":
        raise ValueError(f"--on {topology}: only TPU slices can be compiled for without the chip")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"to compile for {topology}, XLA's TPU compiler is needed, which is in libtpu and runs on any "
                         f"Linux machine: {LIBTPU}")
    jax.config.update("jax_platforms", "cpu")
    os.environ |= ENVIRONMENT
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as error:      # the runtime's own kinds
        raise ValueError(f"libtpu {_version()} cannot compile for {topology}: {error}") from error


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version
    try:
        return version("libtpu")
    except PackageNotFoundError:
        return "of unknown version"


def params_of(folder: str, config: Config, weights: str | None) -> Params:
    """Leaf -> (shape, dtype) as the folder holds them, or if it holds none as its config states, or as `convert` would
    write them with `--weights`."""
    source = None if weights else held_source(Path(folder))
    return source.params if source else stated_params(config, weights)


def abstract_weights(config: Config, mesh: Mesh, params: Params, dtype: jnp.dtype, resident: int | None = None
                     ) -> tuple[Transformer, dict[str, Any]]:
    """The module tree to compute with, and path -> leaf as `load` stores it, on a mesh whose devices are not here."""
    model = abstract_model(config, mesh, dtype)
    held = stored_leaves(model, params, resident=resident)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: gathered(held[parameter_path(path)], leaf.sharding.spec), model), held


def compile_step(config: Config, devices: Sequence[jax.Device], mesh: str | Mapping[str, int] | None, work: Work,
                 params: Params | None = None, resident: int | None = None) -> Program:
    """A step compiled for these devices.

    params: leaf -> (shape, dtype) as a Source has them; by default what the config states.
    resident: of a device's experts of each layer, the others are in host memory; by default all.
    Errors: ValueError for what does not fit the mesh, and if the compiler finds too little HBM.
    """
    place, dtype = mesh_over(devices, mesh), jnp.dtype(config.dtype)
    model, held = abstract_weights(config, place, stated_params(config) if params is None else params, dtype,
                                   resident)
    cache = _on(place, jax.eval_shape(lambda: init_cache(config, place.abstract_mesh, work.batch, work.context,
                                                         work.in_flight, dtype)))
    begin = time.perf_counter()
    with jax.set_mesh(place):
        tokens_BT, length_B = (_int32(place, (work.batch, work.tokens), "batch", None),
                               _int32(place, (work.batch,), "batch"))
        compiled = compiled_of(jax.jit(prefill, donate_argnums=1).lower(model, cache, tokens_BT, length_B))
    return Program(compiled, config, place, work, held, cache, time.perf_counter() - begin)


def compiled_of(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """ValueError if the compiler finds too little HBM."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0]
        if not said.startswith("RESOURCE_EXHAUSTED: "):
            raise
        raise ValueError(f"does not fit: {said.removeprefix('RESOURCE_EXHAUSTED: ')} Take a larger slice, another "
                         f"mesh, fewer rows or less context; `jaxllm plan` tells what fits") from error


def owners_of(compiled: jax.stages.Compiled, by_argument: Sequence[str]) -> list[str]:
    """The class of each parameter of the program, from those of its function's arguments; an unused leaf is none."""
    used = jax.tree_util.tree_flatten_with_path(compiled.input_shardings[0])[0]
    return [by_argument[path[0].idx] for path, _ in used]


def mesh_over(devices: Sequence[jax.Device], mesh: str | Mapping[str, int] | None) -> Mesh:
    """ValueError unless it takes all devices."""
    if (num := math.prod(parse_mesh(mesh).values())) < len(devices):
        raise ValueError(f"the mesh has {num} devices, but the slice has {len(devices)}: all must take part")
    return make_mesh(mesh, devices)


def _int32(mesh: Mesh, shape: tuple[int, ...], *names: str | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec(*names)))


def _on(mesh: Mesh, tree: Any) -> Any:
    """Shapes of an abstract mesh as those of one with devices."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(
        mesh, getattr(x.sharding, "spec", PartitionSpec()))), tree)
