"""Codes and scales on the host, against numbers computed one by one."""
import math

import ml_dtypes
import numpy as np
import pytest

from jaxllm.codec import DTYPES, kind_of, packed_dim, unpack

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)      # OCP Microscaling Formats 1.0, section 5.3.3


def one(kind: str, codes: np.ndarray, scale: np.ndarray, dim: int, place: tuple[int, ...]) -> np.float32:
    """The value at `place`, from the definitions."""
    at = tuple(n // 2 if axis == dim and kind != "fp8" else n for axis, n in enumerate(place))
    shape = [2 * n if axis == dim and kind != "fp8" else n for axis, n in enumerate(codes.shape)]
    factor = scale[tuple(n * parts // size for n, parts, size in zip(place, scale.shape, shape, strict=True))]
    if kind == "fp8":
        bits = int(codes[at].view(np.uint8))
        exponent, mantissa = bits >> 3 & 15, bits & 7
        size = (mantissa / 8 + 1) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
        return np.float32(-size if bits & 0x80 else size) * np.float32(factor)
    nibble = int(codes[at]) >> (4 if place[dim] % 2 else 0) & 15
    if kind == "int4":
        return np.float32(nibble - 16 if nibble > 7 else nibble) * np.float32(factor)
    return np.float32(math.ldexp(-E2M1[nibble - 8] if nibble > 7 else E2M1[nibble], int(factor) - 127))


def random_packed(kind: str, shape: tuple[int, ...], scale_shape: tuple[int, ...], dim: int, seed: int = 0
                  ) -> tuple[np.ndarray, np.ndarray]:
    """Codes that take every value and scales that vary, for a weight of `shape`."""
    rng = np.random.default_rng(seed)
    if kind == "fp8":
        numbers = np.array([n for n in range(256) if n & 0x7F != 0x7F], np.uint8).view(ml_dtypes.float8_e4m3fn)
        return rng.choice(numbers, shape), rng.uniform(1e-3, 2, scale_shape).astype(np.float32)
    halved = tuple(size // 2 if axis == dim else size for axis, size in enumerate(shape))
    codes = rng.integers(0, 256, halved, dtype=np.uint8)
    if kind == "mxfp4":
        return codes, rng.integers(100, 140, scale_shape, dtype=np.uint8)
    return codes, rng.uniform(1e-3, 2, scale_shape).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape, scale_shape, dim", [
    ((64, 6), (2, 6), 0), ((12, 3, 24), (3, 3, 8), 0), ((2, 64, 5), (2, 2, 5), 1), ((4, 16, 6), (2, 1, 6), 1),
    ((40, 10), (5, 2), 0),
])
def test_every_value(kind, shape, scale_shape, dim):
    codes, scale = random_packed(kind, shape, scale_shape, dim)
    values = unpack(codes, scale, dim)
    assert kind_of(codes.dtype, scale.dtype) == kind and values.dtype == np.float32 and values.shape == shape
    expected = np.array([one(kind, codes, scale, dim, place) for place in np.ndindex(shape)]).reshape(shape)
    assert values.tobytes() == expected.tobytes()


def test_every_exponent_of_mxfp4():
    """From 2^-127, below the normal numbers of float32, to 2^127, above which 4 and 6 overflow."""
    codes = np.tile(np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], np.uint8)[:, None], (1, 255))
    scale = np.arange(255, dtype=np.uint8)[None, :]
    with np.errstate(over="ignore"):
        values = unpack(codes, scale, 0)
    signed = np.array([*E2M1, *(-size for size in E2M1)], np.float64)
    with np.errstate(over="ignore"):
        expected = np.ldexp(signed[:, None], np.arange(255)[None, :] - 127).astype(np.float32)
    assert values.tobytes() == expected.tobytes()


def test_a_scale_that_does_not_divide():
    codes, _ = random_packed("mxfp4", (64, 6), (2, 6), 0)
    with pytest.raises(ValueError, match=r"scale \[3, 6\] does not divide values \[64, 6\] along dim 0"):
        unpack(codes, np.full((3, 6), 127, np.uint8), 0)


def test_the_packed_dim_is_the_innermost_that_is_summed_over():
    dims = {"q_DNH": 0, "k_DKH": 0, "v_DKV": 0, "o_NVD": 1, "gate_DF": 0, "down_FD": 0, "gate_EDI": 1, "down_EID": 1,
            "head_DW": 0, "join_CD": 0}
    for name, dim in dims.items():
        for part in ("", ".codes", ".scale"):
            assert packed_dim(f"layers.1.x.{name}{part}") == dim, name
