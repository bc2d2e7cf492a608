"""From a folder to a `Model`: the module tree built abstractly, each parameter read into its place on the mesh."""
import os
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jaxllm.axes import make_mesh
from jaxllm.checkpoint import Source, load_arrays, open_source
from jaxllm.config import Config
from jaxllm.generate.compile_cache import use_compile_cache
from jaxllm.generate.engine import Model
from jaxllm.generate.text import Tokenizer, load_stop_ids
from jaxllm.model import Transformer

DTYPES = ("float32", "bfloat16", "float16")


def load(path: str | os.PathLike[str], mesh: str | dict[str, int] | Mesh | None = None, dtype: str | None = None
         ) -> Model:
    """The model of a hub folder, or of one that `jaxllm convert` wrote, on a mesh; each device reads its own slices.

    mesh: "data=2,expert=2,tensor=2", a mapping, a mesh of `make_mesh`, or None for one device.
    dtype: what it computes in; by default float32 on CPU, the config's dtype elsewhere. Experts stay in the dtype of
    their files where that is narrower, and are widened, exactly, as they are used.
    Errors: ValueError (ConfigError, CheckpointError) naming the file, the key, the tensor or the axis.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: expected a hub folder, or one that jaxllm convert wrote")
    config = Config.from_hub(folder)
    mesh = mesh if isinstance(mesh, Mesh) else make_mesh(mesh)
    if dtype is None:
        dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else config.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}: a model computes in one of {', '.join(DTYPES)}")
    use_compile_cache()
    abstract = abstract_model(config, mesh, jnp.dtype(dtype))
    source = open_source(folder)
    arrays = load_arrays(source, {path: kept_narrow(path, leaf, source) for path, leaf in parameters(abstract).items()})
    transformer = jax.tree_util.tree_map_with_path(lambda path, _: arrays[parameter_path(path)], abstract)
    return Model(transformer, mesh, Tokenizer.from_dir(folder, config.vocab_size),
                 load_stop_ids(folder, config.eos_token_ids))


def kept_narrow(path: str, leaf: jax.ShapeDtypeStruct, source: Source) -> jax.ShapeDtypeStruct:
    """The leaf to load: expert stacks as stored if the model's dtype can hold every such value, others as they are.

    Experts are most of a model and are read one at a time, so half the bytes is up to half the time of a decode step.
    """
    if not path.endswith((".gate_EDI", ".up_EDI", ".down_EID")) or path not in source.params:
        return leaf
    stored = source.params[path][1]
    return leaf.update(dtype=stored) if np.can_cast(stored, leaf.dtype) else leaf


def abstract_model(config: Config, mesh: Mesh | AbstractMesh, dtype: jnp.dtype) -> Transformer:
    """The module tree with a ShapeDtypeStruct for each parameter, its sharding on `mesh` in it; allocates nothing."""
    def make() -> Transformer:
        # one key for all, since none is drawn from: nnx.Rngs counts its keys, and tracing the count takes time that is
        # quadratic in the number of parameters (70 layers: 25 s instead of 0.5)
        key = jax.random.key(0)
        return Transformer(config, mesh, dtype, rngs=cast(nnx.Rngs, SimpleNamespace(params=lambda: key)))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh):
        tree = jax.eval_shape(make)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)), tree)


def parameters(model: Transformer) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted path -> leaf of a module tree, abstract or real."""
    return {parameter_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


def parameter_path(path: tuple) -> str:
    """The dotted path of a leaf, "layers.3.moe.gate_EDI", from its key path in the tree."""
    names = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", "")))) for key in path]
    return ".".join(name for name in names if name not in ("", "value"))
