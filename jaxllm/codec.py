"""Packed weights on the host, in numpy: what codes and scales mean.

A packed parameter is two arrays in the dims of the plain one. `codes` has a number for each element, `scale` a factor
for each block of them: along every dim a scale covers logical size / scale size consecutive elements, so the shapes say
how large the blocks are. The kinds, told by the dtypes of the two:

    fp8     codes float8_e4m3fn, scale float32 (the hub's weight_scale_inv, which multiplies)
    mxfp4   codes uint8, two e2m1 numbers a byte; scale uint8, the exponent b of e8m0: 2^(b - 127)   (OCP MX 1.0)
    int4    codes uint8, two two's complement numbers a byte; scale bfloat16

Two codes a byte means: along the packed dim, the low nibble is the even element, the high one the odd.
"""
import ml_dtypes
import numpy as np

KINDS = {(np.dtype(codes), np.dtype(scale)): kind for kind, codes, scale in (
    ("fp8", ml_dtypes.float8_e4m3fn, np.float32), ("mxfp4", np.uint8, np.uint8),
    ("int4", np.uint8, ml_dtypes.bfloat16))}
DTYPES = {kind: dtypes for dtypes, kind in KINDS.items()}      # kind -> (codes, scale)
PARTS = ("codes", "scale")                                     # the leaves of a packed parameter, after its path
E2M1 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6], np.float32)
INT4 = np.array([*range(8), *range(-8, 0)], np.float32)


def kind_of(codes_dtype: np.dtype, scale_dtype: np.dtype) -> str:
    """The kind with these dtypes; KeyError if there is none."""
    return KINDS[np.dtype(codes_dtype), np.dtype(scale_dtype)]


def packed_dim(path: str) -> int:
    """The dim along which 4-bit codes of this parameter are paired and grouped: the innermost of its in-dims."""
    letters = path.removesuffix(".codes").removesuffix(".scale").rsplit("_", 1)[-1]
    return 1 if len(letters) == 3 and letters[0] != "D" else 0      # gate_EDI, o_NVD; q_DNH, down_FD


def unpack(codes: np.ndarray, scale: np.ndarray, dim: int) -> np.ndarray:
    """The float32 values; 4-bit codes are paired along `dim`."""
    kind = kind_of(codes.dtype, scale.dtype)
    values = codes.astype(np.float32) if kind == "fp8" else _pairs(E2M1 if kind == "mxfp4" else INT4, codes, dim)
    factors = np.ldexp(np.float32(1), scale.astype(np.int32) - 127) if kind == "mxfp4" else scale.astype(np.float32)
    for axis, (size, parts) in enumerate(zip(values.shape, scale.shape, strict=True)):
        if size % parts:
            raise ValueError(f"scale {list(scale.shape)} does not divide values {list(values.shape)} along dim {axis}")
        factors = np.repeat(factors, size // parts, axis) if size != parts else factors
    values *= factors
    return values


def _pairs(table: np.ndarray, codes: np.ndarray, dim: int) -> np.ndarray:
    """What the two nibbles of each byte stand for, in their places along `dim`."""
    both = np.stack([table[codes & 15], table[codes >> 4]], axis=dim + 1)
    return both.reshape(*codes.shape[:dim], 2 * codes.shape[dim], *codes.shape[dim + 1:])
