"""What a run trains, what it leaves alone, and where on the mesh it lies."""
import dataclasses
import zlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxllm.checkpoint.load import load_arrays
from jaxllm.checkpoint.projections import targets
from jaxllm.checkpoint.source import Source
from jaxllm.config import Config
from jaxllm.gathered import gathered, stored
from jaxllm.generate.load import Params, abstract_model, as_stored, flat, join
from jaxllm.lora import abstract_adapters, adapt, init_adapters
from jaxllm.model import Transformer
from jaxllm.paths import parameter_path, parameters
from jaxllm.quant import Packed
from jaxllm.train.heads import kept_once, repeated
from jaxllm.train.optimizer import make_optimizer
from jaxllm.train.run import Run

Arrays = dict[str, jax.Array]
BIAS, ROUTER = ".moe.bias_E", ".moe.router_DE"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes. Parameters by path."""
    step: jax.Array           # int32, steps done
    trained: Arrays           # by gradient
    biases: Arrays            # of routers, by the balancing rule
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a mesh. `computed`: the module tree, abstract, as the model computes; `held`: path -> abstract leaf as
    it is stored, packed or not; `trained`: the paths that have gradients; `adapters`: those of LoRA, path -> leaf to
    compute with."""
    run: Run
    config: Config
    mesh: Mesh
    computed: Transformer
    held: dict[str, Any]
    trained: frozenset[str]
    adapters: Mapping[str, jax.ShapeDtypeStruct]

    @property
    def biases(self) -> list[str]:
        """Those that are balanced: of the routers that are trained."""
        return [path for path in self.held if path.endswith(BIAS) and path.replace(BIAS, ROUTER) in self.trained]

    @property
    def frozen(self) -> list[str]:
        return [path for path in self.held if path not in self.trained and path not in self.biases]

    def abstract(self) -> TrainState:
        """The state as shapes, dtypes and shardings."""
        with jax.set_mesh(self.mesh):
            state = jax.eval_shape(self._state, {path: self.held[path] for path in [*self.trained, *self.biases]})
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(self.mesh, getattr(x.sharding, "spec", PartitionSpec()))), state)

    def begin(self, source: Source | None) -> tuple[TrainState, dict[str, Any]]:
        """(the state before the first step, path -> frozen parameter), of the source; what it lacks is drawn anew."""
        found = {} if source is None else load_arrays(source, {
            path: leaf for path, leaf in flat(self.held).items() if path in source.params})
        drawn = self._draw(sorted(set(flat(self.held)) - found.keys()))
        values = join(self.held, found | drawn)
        with jax.set_mesh(self.mesh):
            state = jax.jit(self._state, donate_argnums=0)(
                {path: values[path] for path in [*self.trained, *self.biases]})
        return state, {path: values[path] for path in self.frozen}

    def model(self, trained: Mapping[str, Any], biases: Mapping[str, Any], frozen: Mapping[str, Any]) -> Transformer:
        """The module tree to compute with, in which what is stored otherwise is gathered as it is used."""
        values = {**trained, **biases, **frozen}

        def leaf(path: tuple, computed: jax.ShapeDtypeStruct) -> Any:
            value = values[parameter_path(path)]
            if parameter_path(path) in trained:
                value = value.astype(computed.dtype)      # of a float32 master
            return gathered(value if isinstance(value, Packed) else repeated(value, computed), computed.sharding.spec)
        model = jax.tree_util.tree_map_with_path(leaf, self.computed)
        if not self.run.lora:
            return model
        adapters = {path: gathered(repeated(trained[path], leaf), leaf.sharding.spec)
                    for path, leaf in self.adapters.items()}
        return adapt(model, adapters, self.run.lora["lora_alpha"] / self.run.lora["r"])

    def _state(self, values: Arrays) -> TrainState:
        trained = {path: values[path] for path in sorted(self.trained)}
        return TrainState(jnp.int32(0), trained, {path: values[path] for path in self.biases},
                          make_optimizer(self.run).init(trained))

    def _draw(self, paths: list[str]) -> Arrays:
        """Norms of ones, biases and sinks of zeros, normal matrices, and adapters as PEFT draws them: the same numbers
        on every mesh."""
        leaves = {path: flat(self.held)[path] for path in paths}
        key, std = jax.random.key(self.run.seed), self.run.initializer_range

        def draw() -> Arrays:
            return init_adapters({path: leaf for path, leaf in leaves.items() if path in self.adapters}, key) | {
                path: _drawn(path, leaf, jax.random.fold_in(key, zlib.crc32(path.encode())), std)
                for path, leaf in leaves.items() if path not in self.adapters}
        with jax.set_mesh(self.mesh):
            return jax.jit(draw)()


def _drawn(path: str, leaf: jax.ShapeDtypeStruct, key: jax.Array, std: float) -> jax.Array:
    assert isinstance(leaf.sharding, NamedSharding)
    if leaf.ndim == 1:
        return jnp.full(leaf.shape, 1 if path.endswith("scale_D") else 0, leaf.dtype, out_sharding=leaf.sharding.spec)
    return (std * jax.random.normal(key, leaf.shape, out_sharding=leaf.sharding.spec)).astype(leaf.dtype)


def make_plan(run: Run, config: Config, mesh: Mesh, params: Params, num_mtp: int) -> Plan:
    """`params`: leaf -> shape, dtype of what the run starts from. ValueError if it would train what it cannot: packed
    parameters, adapters of what has none."""
    return Plan(run, config, mesh, *lay_out(run, config, mesh, params, num_mtp))


def lay_out(run: Run, config: Config, mesh: Mesh | AbstractMesh, params: Params, num_mtp: int
            ) -> tuple[Transformer, dict[str, Any], frozenset[str], Mapping[str, jax.ShapeDtypeStruct]]:
    """`computed`, `held`, `trained` and `adapters` of a Plan."""
    computed = abstract_model(config, mesh, jnp.dtype(run.dtype), num_mtp)
    once, adapters, kept_adapters = kept_once(computed, config, num_mtp), {}, {}
    if run.lora:
        ranks = dict.fromkeys(targets(config, run.lora["target_modules"]), run.lora["r"])
        adapters, kept_adapters = (abstract_adapters(model, ranks, jnp.dtype("float32")) for model in (computed, once))
    paths = [path for path in parameters(computed) if not path.endswith(BIAS)]
    chosen = adapters or [path for path in paths if any(fnmatchcase(path, pattern) for pattern in run.train)]
    trained = frozenset(chosen)
    if not trained:
        raise ValueError(f"train = {list(run.train)} names no parameter; there are {', '.join(paths[:5])}, ...")
    packed = sorted(path for path in trained if f"{path}.codes" in params)
    if packed:
        raise ValueError(f"{packed[0]} and {len(packed) - 1} others are packed and cannot be trained as they are: "
                         "leave them out of `train`, or convert with --weights bfloat16")
    master = jnp.dtype("float32") if run.master else jnp.dtype(run.dtype)

    def held(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
        if path in trained:
            return stored(leaf.update(dtype=np.promote_types(leaf.dtype, master)))
        if f"{path}.codes" in params:      # packed heads lie repeated, as where the model is only used
            leaf = parameters(computed)[path]
        return as_stored(path, stored(leaf), params)
    leaves = {path: held(path, leaf) for path, leaf in (parameters(once) | kept_adapters).items()}
    return computed, leaves, trained, adapters
