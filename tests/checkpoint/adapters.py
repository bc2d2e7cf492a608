"""A small model and random adapters for it."""
from pathlib import Path

import numpy as np
from hub_files import SMALL
from hub_maker import tiny_config, write_hub

from jaxllm.checkpoint import Source
from jaxllm.checkpoint.decoded import Decoded
from jaxllm.checkpoint.peft import Adapter
from jaxllm.checkpoint.projections import LORA_A, LORA_B, split_dims, targets
from jaxllm.config import Config

BASE = "base"      # the folder's name, which PEFT's files state
OURS = {"target_modules": "all-linear", "r": 3, "scale": 1.5}


def write_base(folder: Path, **options) -> None:
    """In the form that transformers knows too: one key more in the window."""
    write_hub(folder, tiny_config(**SMALL, sliding_window_counts_query=False), **options)


def random_adapter(source: Source, config: Config, target_modules="all-linear", r: int = 3, scale: float = 1.5,
                   seed: int = 0) -> Adapter:
    """Of normal numbers, as large as the weights."""
    arrays, rng = {}, np.random.default_rng(seed)
    params = Decoded(source, np.dtype(np.float32)).params
    for path in targets(config, target_modules):
        stack, ins, outs = split_dims(path, params[path][0])
        arrays[path + LORA_A] = rng.standard_normal((*stack, *ins, r), np.float32) * np.prod(ins) ** -0.5
        arrays[path + LORA_B] = rng.standard_normal((*stack, r, *outs), np.float32) / r
    return Adapter({path: np.asarray(array, np.float32) for path, array in arrays.items()}, scale)
