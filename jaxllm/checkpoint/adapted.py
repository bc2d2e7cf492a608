"""A source with an adapter merged into its parameters, as they are read."""
import numpy as np

from jaxllm.checkpoint.blocks import Index
from jaxllm.checkpoint.decoded import Decoded
from jaxllm.checkpoint.errors import CheckpointError, listed
from jaxllm.checkpoint.kinds import CODES, SCALE
from jaxllm.checkpoint.peft import Adapter
from jaxllm.checkpoint.projections import LORA_A, LORA_B, split_dims
from jaxllm.checkpoint.source import Source


class Merged:
    """The parameters of `source`, of which the adapted ones are base + scale * a @ b, added in float32 and rounded once
    to `dtype`, a float; None: to what the base is stored as.

    Errors: CheckpointError for packed parameters that would have to stay packed.
    """

    def __init__(self, source: Source, adapter: Adapter, dtype: np.dtype | None = None):
        self.folder, self.source, self.adapter = source.folder, source, adapter
        self.plain = Decoded(source, np.dtype(np.float32))
        paths = {path.removesuffix(LORA_A) for path in adapter.arrays if path.endswith(LORA_A)}
        packed = sorted(path for path in paths if path + CODES in source.params)
        if packed and dtype is None:
            raise CheckpointError(f"{source.folder}: an adapter cannot be merged into weights that stay packed "
                                  f"({listed(packed)}); export with --weights bfloat16 or float32")
        self.params = {path: held for path, held in source.params.items()
                       if path.removesuffix(CODES).removesuffix(SCALE) not in paths} | {
            path: (self.plain.params[path][0], dtype or source.params[path][1]) for path in sorted(paths)}

    def read(self, path: str, index: Index) -> np.ndarray:
        """params[path][index], not empty."""
        if path + LORA_A not in self.adapter.arrays:
            return self.source.read(path, index)
        (stack, ins, outs), every = split_dims(path, index), slice(None)
        a = self.adapter.arrays[path + LORA_A][*stack, *ins, every].astype(np.float32)
        b = self.adapter.arrays[path + LORA_B][*stack, every, *outs].astype(np.float32)
        base, begin = self.plain.read(path, index), len(stack)
        lead = a.shape[:begin]
        delta = a.reshape(*lead, -1, a.shape[-1]) @ b.reshape(*lead, b.shape[begin], -1)
        merged = base + np.float32(self.adapter.scale) * delta.reshape(base.shape)
        return merged.astype(self.params[path][1], copy=False)

    def describe(self, path: str) -> str:
        return f"{path} with its adapter" if path + LORA_A in self.adapter.arrays else self.source.describe(path)
