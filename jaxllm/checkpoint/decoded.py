"""A source whose packed parameters are seen as numbers, decoded as they are read."""
import math

import numpy as np

from jaxllm.checkpoint.blocks import Index, bounds, relative
from jaxllm.checkpoint.kinds import CODES, SCALE
from jaxllm.checkpoint.source import Source
from jaxllm.codec import kind_of, packed_dim, unpack

AS_STORED = ("router_DE", "bias_E")      # small, used in float32; moe_router_dtype says how routers are stored


class Decoded:
    """The parameters of `source` as plain ones of `dtype`, a float; routers and their biases stay as they are stored,
    and sinks are not narrowed.

    A code times its scale is a product in float32, by definition; a shorter `dtype` has the nearest number to it.
    """

    def __init__(self, source: Source, dtype: np.dtype):
        self.folder, self.source, self.dtype = source.folder, source, dtype
        self.params = {}
        for leaf, (shape, stored) in source.params.items():
            path = leaf.removesuffix(CODES)
            if path != leaf:
                shape = self._plain_shape(path)
            if not leaf.endswith(SCALE):
                self.params[path] = shape, (stored if path.endswith(AS_STORED) else
                                            np.promote_types(stored, dtype) if path.endswith("sink_N") else dtype)

    def read(self, path: str, index: Index) -> np.ndarray:
        """params[path][index], not empty."""
        plain = path in self.source.params
        values = self.source.read(path, index) if plain else self._unpack(path, index)
        return values.astype(self.params[path][1], copy=False)

    def describe(self, path: str) -> str:
        return self.source.describe(path if path in self.source.params else path + CODES)

    def _plain_shape(self, path: str) -> tuple[int, ...]:
        """Of a packed parameter."""
        (shape, codes), (_, scale) = self.source.params[path + CODES], self.source.params[path + SCALE]
        pair = 1 if kind_of(codes, scale) == "fp8" else 2
        return tuple(size * (pair if dim == packed_dim(path) else 1) for dim, size in enumerate(shape))

    def _unpack(self, path: str, index: Index) -> np.ndarray:
        """float32 values of a packed parameter, out of the scale blocks that hold the slice."""
        shape, dim = self.params[path][0], packed_dim(path)
        codes_shape, scale_shape = (self.source.params[path + part][0] for part in (CODES, SCALE))
        pair, steps = shape[dim] // codes_shape[dim], [size // n for size, n in zip(shape, scale_shape, strict=True)]
        blocks = tuple(slice(start // step, math.ceil(stop / step))
                       for (start, stop), step in zip(bounds(index, shape), steps, strict=True))
        whole = tuple(slice(cut.start * step, cut.stop * step) for cut, step in zip(blocks, steps, strict=True))
        bytes_ = tuple(slice(cut.start // pair, cut.stop // pair) if n == dim else cut for n, cut in enumerate(whole))
        values = unpack(self.source.read(path + CODES, bytes_), self.source.read(path + SCALE, blocks), dim)
        return values[relative(tuple(slice(*cut) for cut in bounds(index, shape)), whole, shape)]
