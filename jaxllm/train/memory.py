"""What a step takes of each device, as one line for people."""
import math
from collections.abc import Mapping
from typing import Any

import jax

from jaxllm.train.state import TrainState

UNITS = ("B", "kB", "MB", "GB", "TB")


def describe_memory(state: TrainState, frozen: Mapping[str, Any], step: jax.stages.Compiled) -> str:
    """Parameters trained, and bytes of the largest share that a device has of them, of what is frozen, of the
    optimizer's state, and of what the compiled step needs beside these (activations and gradients)."""
    num = sum(math.prod(x.shape) for x in state.trained.values())
    parts = {"frozen": frozen, "router biases": state.biases, "optimizer": state.opt_state}
    found = [f"trained {num:,} parameters, {show(device_bytes(state.trained))}",
             *(f"{name} {show(device_bytes(part))}" for name, part in parts.items()),
             f"activations {show(activation_bytes(step))}"]
    return f"each device: {', '.join(found)}"


def device_bytes(tree: Any) -> int:
    """Of the arrays of a tree, real or abstract, on each device of their shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def activation_bytes(step: jax.stages.Compiled) -> int:
    """What XLA allots to the values between the arguments and the results of a step."""
    found = step.memory_analysis()
    return found.temp_size_in_bytes if found else 0


def show(nbytes: float) -> str:
    unit = min(len(UNITS) - 1, int(math.log10(max(1, nbytes)) / 3))
    return f"{nbytes / 1000**unit:.3g} {UNITS[unit]}"
