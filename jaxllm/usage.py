"""How often each expert was chosen over some text: what says which to keep on a device.

A JSON file: the shapes of the model, the tokens that were read, and for each layer with experts a count of each.
"""
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import Config

IDENTITY = ("model_type", "num_hidden_layers", "hidden_size", "n_routed_experts", "num_experts_per_tok")


@dataclasses.dataclass(frozen=True)
class Usage:
    """count[layer] is int64 [E]: of `tokens` tokens, how many chose each expert of that layer; each chooses A."""
    model: dict[str, Any]
    tokens: int
    count: dict[int, np.ndarray]

    def write(self, file: str | os.PathLike[str]) -> None:
        rows = ",\n".join(f'  "{layer}": {json.dumps(count.tolist())}' for layer, count in self.count.items())
        Path(file).write_text(f'{{"model": {json.dumps(self.model)},\n "tokens": {self.tokens},\n "layers": {{\n'
                              f'{rows}}}}}\n')

    def shares(self, top: int) -> dict[int, float]:
        """Layer -> which part of all choices fell on the `top` experts that were chosen most."""
        return {layer: float(np.sort(count)[::-1][:top].sum() / count.sum()) for layer, count in self.count.items()}


def identity(config: Config) -> dict[str, Any]:
    """What a file says of its model. Two models of the same shapes are not told apart."""
    return {name: getattr(config, name) for name in IDENTITY}


def expert_layers(config: Config) -> list[int]:
    return [i for i, layer in enumerate(config.layers) if layer.is_moe]


def read_usage(file: str | os.PathLike[str], config: Config) -> Usage:
    """A file that `jaxllm usage` wrote of this model. Errors: ValueError naming the file and what is wrong; OSError."""
    try:
        found = json.loads(Path(file).read_text())
        usage = Usage(found["model"], found["tokens"], {int(i): np.array(row) for i, row in found["layers"].items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no count of experts as jaxllm usage writes it: "
                         f"{type(error).__name__} {error}") from None
    if usage.model != identity(config):
        raise ValueError(f"{file} was counted with another model, {usage.model}; this one is {identity(config)}: count "
                         "with this one (jaxllm usage)")
    E, A = config.n_routed_experts, config.num_experts_per_tok
    if list(usage.count) != (layers := expert_layers(config)):
        raise ValueError(f"{file} counts layers {list(usage.count)}; the model's experts are in {layers}")
    for layer, count in usage.count.items():
        if (count.shape != (E,) or count.dtype != np.int64 or (count < 0).any() or type(usage.tokens) is not int
                or usage.tokens < 1 or count.sum() != usage.tokens * (A or 0)):
            raise ValueError(f"{file}, layer {layer}: expected counts of {E} experts that sum to tokens * {A}, with "
                             f"tokens = {usage.tokens}; found {count.size} that sum to {count.sum()}")
    return usage
