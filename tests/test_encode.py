"""Packing matrices: every code and scale against ml_dtypes and a few lines of numpy, and what the feedback is worth."""
import ml_dtypes
import numpy as np
import pytest

from jaxllm.codec import E2M1, kind_of, unpack
from jaxllm.encode import GROUPS, choose_scale, factors, feedback, fp8_codes, fp8_scale, nearest, pack

KINDS = [(kind, group) for kind, groups in GROUPS.items() for group in groups]
HALF_STEP = {"mxfp4": 1.0, "int4": 0.5 * (1 + 2**-7)}      # in units of the scale; bfloat16 rounds int4's scales


def matrix(seed: int, rows: int = 256, columns: int = 24, dtype: type = np.float32) -> np.ndarray:
    """Columns of sizes from 1e-6 to 1e6."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, columns)) * 10 ** rng.uniform(-6, 6, columns)).astype(dtype).astype(np.float32)


def nibbles(codes: np.ndarray) -> np.ndarray:
    return np.stack([codes & 15, codes >> 4], 1).reshape(-1, codes.shape[1])


def test_e2m1_is_that_of_ml_dtypes():
    """On a grid with every midpoint, and what saturates. ml_dtypes keeps the sign of zero too."""
    x = np.arange(-9, 9, 1 / 64, np.float32)
    expected = x.astype(ml_dtypes.float4_e2m1fn)
    assert np.array_equal(nearest(x, "mxfp4"), expected.view(np.uint8))
    assert np.array_equal(E2M1[nearest(x, "mxfp4")], expected.astype(np.float32))


def test_int4_rounds_half_to_even_and_has_no_minus_8():
    x = np.array([-9, -7.4, -0.5, 0.5, 1.5, 2.5, 6.9, 8], np.float32)
    assert nearest(x, "int4").tolist() == [9, 9, 0, 0, 2, 2, 7, 7]


def test_fp8_is_that_of_ml_dtypes():
    w = matrix(0)
    scale = fp8_scale(np.abs(w).max(0))
    codes = fp8_codes(w, scale[None, :])
    by_row = fp8_codes(w.T.copy(), scale[:, None])
    assert np.array_equal(by_row.view(np.uint8), codes.view(np.uint8).T)
    assert np.array_equal(scale, np.abs(w).max(0) / np.float32(448))
    assert codes.view(np.uint8).tolist() == (w / scale[None, :]).astype(ml_dtypes.float8_e4m3fn).view(np.uint8).tolist()
    assert (np.abs(codes.astype(np.float32)).max(0) == 448).all()      # the largest uses the whole range


def test_mxfp4_against_numpy():
    w = matrix(1)
    codes, scale = pack(w, "mxfp4", 32)
    for group in range(8):
        for column in range(24):
            x = w[group * 32:(group + 1) * 32, column].astype(np.float64)
            exponent = np.floor(np.log2(np.abs(x).max())) - 2
            exponent += np.abs(x).max() / 2**exponent > 7
            assert scale[group, column] == exponent + 127
            expected = (x / 2**exponent).astype(np.float32).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
            assert np.array_equal(nibbles(codes)[group * 32:(group + 1) * 32, column], expected)


@pytest.mark.parametrize("group", GROUPS["int4"])
def test_int4_against_numpy(group):
    w = matrix(2)
    codes, scale = pack(w, "int4", group)
    x = w.reshape(-1, group, 24)
    expected = (np.abs(x).max(1) / np.float32(7)).astype(ml_dtypes.bfloat16)
    assert np.array_equal(scale, expected)
    values = np.clip(np.rint(x / expected.astype(np.float32)[:, None]), -7, 7).reshape(w.shape).astype(np.int8)
    assert np.array_equal(nibbles(codes), values.view(np.uint8) & 15)


@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_decoded_values_are_near(kind, group):
    """No value is further away than half the widest step: between 4 and 6, or the 7 that becomes 6, for e2m1."""
    w = matrix(3)
    codes, scale = pack(w, kind, group)
    assert kind_of(codes.dtype, scale.dtype) == kind
    assert codes.shape == (128, 24) and scale.shape == (256 // group, 24)
    error = np.abs(unpack(codes, scale, 0) - w).reshape(-1, group, 24)
    assert (error <= HALF_STEP[kind] * factors(scale)[:, None]).all()


@pytest.mark.parametrize(("kind", "group"), KINDS)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1.2e-38, 3.4e38])
def test_zero_tiny_and_huge(kind, group, value):
    """Scales stay finite, positive and normal numbers, and what is decoded is finite and near."""
    w = np.full((256, 2), value, np.float32)
    codes, scale = pack(w, kind, group)
    factor = factors(scale)
    assert (factor >= 2.0**-126).all() and np.isfinite(factor).all()
    decoded = unpack(codes, scale, 0)
    assert np.isfinite(decoded).all() and (np.abs(decoded - w) <= max(HALF_STEP[kind] * factor[0, 0], value / 4)).all()
    if value == 0:
        assert not decoded.any()


@pytest.mark.parametrize("value", [0.0, 1e-45, 1.2e-38, 3.4e38])
def test_fp8_zero_tiny_and_huge(value):
    scale = fp8_scale(np.array([value], np.float32))
    decoded = fp8_codes(np.array([[value]], np.float32), scale[None, :]).astype(np.float32) * scale[None, :]
    assert (scale >= 2.0**-126).all() and np.isfinite(scale).all()
    assert abs(decoded[0, 0] - np.float32(value)) <= max(value * 2**-4, 2.0**-126)


def test_a_group_that_would_lose_its_largest_gets_a_larger_scale():
    """7.5 would be cut to 6; with the scale 2 it becomes 8, and 7 itself lies between."""
    largest = np.array([4, 6, 7, 7.01, 7.99, 8], np.float32)
    assert factors(choose_scale(largest, "mxfp4")).tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_tiles_change_nothing(kind, group, monkeypatch):
    w = matrix(4)
    whole = pack(w, kind, group)
    monkeypatch.setattr("jaxllm.encode.TILE", 1)
    for one, two in zip(whole, pack(w, kind, group), strict=True):
        assert one.tobytes() == two.tobytes()


def correlated(rng: np.random.Generator, rows: int = 256) -> np.ndarray:
    """Inputs [2000, rows] that depend on each other, as those of a model do."""
    return rng.standard_normal((2000, 32)) @ rng.standard_normal((32, rows)) + rng.standard_normal((2000, rows))


@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_feedback_lowers_the_error_of_outputs(kind, group):
    """A third or less of the squared error of the products, for the same bits; and the caller keeps his matrix."""
    rng = np.random.default_rng(5)
    x, w = correlated(rng), rng.standard_normal((256, 24)).astype(np.float32)
    before = w.copy()

    def error(packed: tuple[np.ndarray, np.ndarray]) -> float:
        return float(((x @ (unpack(*packed, 0) - w)) ** 2).sum())

    with_feedback = error(pack(w, kind, group, feedback(x.T @ x)))
    assert with_feedback < error(pack(w, kind, group)) / 3
    assert np.array_equal(w, before)


@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_feedback_against_numpy(kind, group):
    """Row by row, as the algorithm is told, with the inverse downdated in float64 instead of factored.

    In float32 a number may fall on the other side of a midpoint; that it did shows in what the rows after it become, so
    the oracle goes on from the codes that were chosen.
    """
    rng = np.random.default_rng(6)
    x, w = correlated(rng), rng.standard_normal((256, 3)).astype(np.float32)
    gram = x.T @ x
    codes, scale = pack(w, kind, group, feedback(gram))
    inverse, left = np.linalg.inv(gram + 0.01 * np.trace(gram) / 256 * np.eye(256)), w.astype(np.float64)
    values, factor, same = unpack(codes, scale, 0), np.repeat(factors(scale), group, 0), 0
    for i in range(256):
        if i % group == 0:      # a group's scale is that of what its rows are by then
            assert np.allclose(factors(choose_scale(np.abs(left[i:i + group]).max(0), kind)), factor[i], rtol=2**-7)
        same += (nearest(left[i] / factor[i], kind) == nibbles(codes)[i]).sum()
        left[i:] -= inverse[i:, i:i + 1] / inverse[i, i] * (left[i] - values[i])
        inverse -= inverse[:, i:i + 1] * inverse[i:i + 1] / inverse[i, i]
    assert same > 0.995 * w.size


def test_no_inputs_no_feedback():
    """A gram of zeros, of experts that no token of the calibration came to."""
    assert np.array_equal(feedback(np.zeros((8, 8), np.float32)), np.eye(8, dtype=np.float32))
