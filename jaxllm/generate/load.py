"""From a folder to a `Model`: the module tree built abstractly, each parameter read into its place on the mesh."""
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jaxllm.axes import make_mesh
from jaxllm.checkpoint import load_arrays, open_source
from jaxllm.checkpoint.files import Files
from jaxllm.checkpoint.load import refuse_incomplete
from jaxllm.checkpoint.peft_load import adapter_of
from jaxllm.checkpoint.shards import COPIED
from jaxllm.checkpoint.source import Source
from jaxllm.codec import PARTS, kind_of, packed_dim
from jaxllm.config import Config
from jaxllm.gathered import gathered, stored
from jaxllm.generate.compile_cache import use_compile_cache
from jaxllm.generate.engine import Model
from jaxllm.generate.offload import Split, is_experts, offloaded_leaves
from jaxllm.generate.text import Tokenizer, load_stop_ids
from jaxllm.lora import adapt, place
from jaxllm.model import Transformer
from jaxllm.offloaded import check_host_memory
from jaxllm.paths import parameter_path, parameters
from jaxllm.quant import Packed
from jaxllm.usage import Usage, read_usage

DTYPES = ("float32", "bfloat16", "float16")
Params = Mapping[str, tuple[tuple[int, ...], np.dtype]]      # leaf -> (shape, dtype), as a Source has them


def load(path: str | os.PathLike[str], mesh: str | dict[str, int] | Mesh | None = None, dtype: str | None = None,
         reading: str | None = None, replicate: bool = False, adapter: str | os.PathLike[str] | None = None,
         resident_experts: int | None = None, usage: str | os.PathLike[str] | None = None) -> Model:
    """The model of a hub folder, or of one that `jaxllm convert` wrote, on a mesh; each device reads its own slices.

    path: a folder, or of a converted one also the address in a bucket, gs://bucket/folder.
    mesh: "data=2,expert=2,tensor=2", a mapping, a mesh of `make_mesh`, or None for one device.
    dtype: what it computes in; by default float32 on CPU, the config's dtype elsewhere. Packed weights stay packed and
    are decoded as they are used; experts stay in the dtype of their files where that is narrower.
    reading: how the rows of quantised attention lie in a hub folder whose shapes leave that open; an error says when.
    replicate: each place along `data` holds all the weights, instead of its part, which is gathered in every step:
    several times as fast to decode, for as many times the bytes.
    adapter: a folder of PEFT's files for this model (LoRA). What a LoRA run trained is with its output folder.
    resident_experts: how many of its experts of each layer a device holds; the others lie in host memory (pinned_host),
    and those that a step chooses are brought over in it. They lie whole at each place along `data`. Default: all.
    usage: a file that `jaxllm usage` wrote of this model: those that were chosen most are resident. Default: the first.
    Errors: ValueError (ConfigError, CheckpointError) naming the file, the key, the tensor or the axis.
    """
    refuse_incomplete(path)      # before it is found to have no config.json yet
    with small_files(path) as folder:
        config = Config.from_hub(folder)
        tokenizer, stop_ids = Tokenizer.from_dir(folder, config.vocab_size), load_stop_ids(folder, config.eos_token_ids)
    mesh = mesh if isinstance(mesh, Mesh) else make_mesh(mesh)
    if dtype is None:
        dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else config.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}: a model computes in one of {', '.join(DTYPES)}")
    if usage is not None and resident_experts is None:
        raise ValueError(f"usage = {usage} says which experts are resident: give resident_experts, how many")
    counted = read_usage(usage, config) if usage is not None else None
    if resident_experts is not None:
        check_host_memory(mesh)
    use_compile_cache()
    source = open_source(path, reading)
    transformer = load_transformer(source, config, mesh, jnp.dtype(dtype), replicate=replicate,
                                   resident=resident_experts, usage=counted)
    if found := adapter_of(source, config, adapter, reading):
        stacks = sorted(path for path in found.arrays if is_experts(path.rpartition(".")[0]))
        if stacks and resident_experts is not None:
            raise ValueError(f"resident_experts: experts with an adapter ({stacks[0]}) cannot lie in host memory; "
                             "merge it first, jaxllm export --merge-lora")
        adapters = place(found.arrays, abstract_model(config, mesh, jnp.dtype(dtype)))
        transformer = adapt(transformer, adapters, found.scale)
    return Model(transformer, mesh, tokenizer, stop_ids)


def load_transformer(source: Source, config: Config, mesh: Mesh, dtype: jnp.dtype, *, num_mtp: int = 0,
                     replicate: bool = False, resident: int | None = None, usage: Usage | None = None) -> Transformer:
    """The module tree with the parameters of the source in it, and of its MTP blocks the first `num_mtp`.

    `resident`: of a device's experts of each layer, the others are in host memory; those that `usage` has least of.
    """
    model = abstract_model(config, mesh, dtype, num_mtp)
    split = Split(stored_leaves(model, source.params, replicate, resident), usage)
    values = split.join(join(split.held, load_arrays(split.source(source), flat(split.held))))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: gathered(values[parameter_path(path)], leaf.sharding.spec), model)


def stored_leaves(model: Transformer, params: Params, replicate: bool = False, resident: int | None = None
                  ) -> dict[str, Any]:
    """Path -> leaf of an abstract model as it is stored; for arguments see `load_transformer`."""
    held = {path: as_stored(path, leaf if replicate or resident is not None and is_experts(path) else stored(leaf),
                            params) for path, leaf in parameters(model).items()}
    return held if resident is None else offloaded_leaves(held, resident)


@contextmanager
def small_files(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder on this machine with the config and tokenizer files of `path`: itself, or a copy out of a bucket."""
    files = Files(path)
    if files.local:
        if not files.local.is_dir():
            raise ValueError(f"{path} is not a folder: expected a hub folder, or one that jaxllm convert wrote")
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as temporary:
        for name in COPIED:
            if (content := files.read(name)) is not None:
                Path(temporary, name).write_bytes(content)
        if not Path(temporary, "config.json").exists():
            raise ValueError(f"{path} has no config.json: expected the address of a folder that jaxllm convert wrote")
        yield Path(temporary)


def as_stored(path: str, leaf: jax.ShapeDtypeStruct, params: Params) -> jax.ShapeDtypeStruct | Packed:
    """The form in which to load a parameter: packed if `params` (leaf -> shape, dtype) has it so, whatever the dtype.

    Expert stacks keep their stored dtype if the model's can hold every such value, all others are cast. Experts are
    most of a model and are read one at a time, so half the bytes is up to half the time of a decode step.
    """
    if f"{path}.codes" in params:
        return packed_as_stored(path, leaf, params)
    if not is_experts(path) or path not in params:
        return leaf
    dtype = params[path][1]
    return leaf.update(dtype=dtype) if np.can_cast(dtype, leaf.dtype) else leaf


def packed_as_stored(path: str, leaf: jax.ShapeDtypeStruct, params: Params) -> Packed:
    """Codes and scale as stored, split over the mesh as the plain leaf: where a split cuts through a scale's block, all
    its blocks are made finer. ValueError if a split cuts through the two codes of a byte."""
    (codes_shape, codes_dtype), (scale_shape, scale_dtype) = (params[f"{path}.{part}"] for part in PARTS)
    pair = 1 if kind_of(codes_dtype, scale_dtype) == "fp8" else 2
    dim, codes, scale = packed_dim(path), list(leaf.shape), list(leaf.shape)
    for axis, (size, part) in enumerate(zip(leaf.shape, leaf.sharding.shard_shape(leaf.shape), strict=True)):
        width = pair if axis == dim else 1
        if part % width:
            raise ValueError(f"{path}: a mesh that splits dim {axis} of {list(leaf.shape)} into pieces of {part} cuts "
                             "through 4-bit codes, two of which share a byte; choose one that leaves even pieces")
        codes[axis] = size // width
        scale[axis] = size // math.gcd(codes_shape[axis] * width // scale_shape[axis], part)
    return Packed(leaf.update(shape=tuple(codes), dtype=codes_dtype),
                  leaf.update(shape=tuple(scale), dtype=scale_dtype), dim)


def flat(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> leaf, where a packed one is its two, as a `Source` has them."""
    found: dict[str, Any] = {}
    for path, leaf in leaves.items():
        parts = {f"{path}.{part}": getattr(leaf, part) for part in PARTS} if isinstance(leaf, Packed) else {path: leaf}
        found |= parts
    return found


def join(leaves: Mapping[str, Any], arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The reverse of `flat`, with arrays."""
    return {path: Packed(arrays[f"{path}.codes"], arrays[f"{path}.scale"], leaf.dim) if isinstance(leaf, Packed)
            else arrays[path] for path, leaf in leaves.items()}


def abstract_model(config: Config, mesh: Mesh | AbstractMesh, dtype: jnp.dtype, num_mtp: int = 0) -> Transformer:
    """The module tree with a ShapeDtypeStruct for each parameter, its sharding on `mesh` in it; allocates nothing."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh):
        tree = jax.eval_shape(lambda: Transformer(config, mesh, dtype, rngs=None, num_mtp=num_mtp))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)), tree)
