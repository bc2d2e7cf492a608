"""The product's own training step, compiled ahead of time for TPU devices that are not here.

State, frozen parameters and batch are shapes with shardings, those of the plan that a run would make (train/state.py).
"""
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxllm.axes import spec
from jaxllm.paths import parameters
from jaxllm.tpu.held import Held
from jaxllm.tpu.program import compiled_of, mesh_over
from jaxllm.tpu.steps import Training
from jaxllm.tpu.train_held import Trained
from jaxllm.tpu.train_work import moved_bytes
from jaxllm.train.batch import Batch
from jaxllm.train.state import make_plan
from jaxllm.train.step import make_step


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """A compiled training step, and what it was compiled from."""
    OWNERS: ClassVar = ("weights", "weights", "activations")      # whose bytes its arguments are
    compiled: jax.stages.Compiled
    mesh: Mesh
    work: Training
    arguments: dict[str, Any]    # path -> abstract leaf
    held: dict[str, int]         # bytes of a device's arguments, by kind
    least: dict[str, int]        # bytes that it cannot do without moving
    seconds: float               # to lower and to compile

    def replicated(self, least: int) -> dict[str, int]:
        """Argument of which a device has at least so many bytes, and others have the same -> on how many it is."""
        return {path: copies for path, leaf in self.arguments.items()
                if math.prod(shard := leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize >= least
                and (copies := self.mesh.size * math.prod(shard) // math.prod(leaf.shape)) > 1}


def compile_train(held: Held, devices: Sequence[jax.Device], mesh: str | Mapping[str, int] | None, work: Training
                  ) -> TrainProgram:
    """A training step of this model compiled for these devices.

    Errors: ValueError for what does not fit the mesh, and if the compiler finds too little HBM.
    """
    place, trained = mesh_over(devices, mesh), Trained(held, work)
    plan = make_plan(trained.run, held.config, place, held.all_params if work.rank else {}, 0)
    token: Any = jax.ShapeDtypeStruct((work.batch, work.context), jnp.int32,
                                      sharding=NamedSharding(place, spec("batch", None)))
    arguments = {"state": plan.abstract(), "frozen": {path: plan.held[path] for path in plan.frozen},
                 "batch": Batch(token, token, token.update(dtype=jnp.bool))}
    begin = time.perf_counter()
    with jax.set_mesh(place):
        compiled = compiled_of(make_step(plan).lower(*arguments.values()))
    return TrainProgram(compiled, place, work, parameters(arguments), trained.state(place.abstract_mesh),
                        moved_bytes(trained, place.abstract_mesh), time.perf_counter() - begin)
