"""Grouped products with plain weights and all their gradients, interpreted on a CPU, beside one product an expert."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels.grouped_outer import grouped_outer
from jaxllm.kernels.trained_matmul import trained_matmul


def inputs(R, D, I, count, dtype):      # noqa: E741
    """x, w, dy and which rows are each expert's; NaN in rows of none, which nothing may touch."""
    rng = np.random.default_rng(0)
    x, w, dy = (jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
                for shape in ((R, D), (len(count), D, I), (R, I)))
    used = sum(count)
    return x.at[used:].set(jnp.nan), w, dy.at[used:].set(jnp.nan), np.split(np.arange(used), np.cumsum(count)[:-1])


def outer(x, dy, rows):
    return np.stack([np.asarray(x, np.float64)[here].T @ np.asarray(dy, np.float64)[here] for here in rows])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("D", "I"), [(96, 160), (200, 16), (16, 130)], ids=str)
def test_products_and_gradients(D, I, dtype):      # noqa: E741
    """Experts without rows, rows without experts, a narrow weight on either side. float32 sums of up to 200 products:
    3e-6 of the largest; what is rounded to bfloat16 is off by up to 2^-9 of itself."""
    count = [5, 0, 17, 0, 1, 9]
    x, w, dy, rows = inputs(37, D, I, count, dtype)
    dy = dy.astype(jnp.float32)
    y, pull = jax.vjp(lambda x, w: trained_matmul(x, w, jnp.asarray(count, jnp.int32), True), x, w)
    dx, dw = pull(dy)
    expected = np.zeros((37, I)), np.zeros((37, D)), outer(x, dy.astype(dtype), rows)
    for i, here in enumerate(rows):
        wide = np.asarray(w[i], np.float64)
        expected[0][here] = np.asarray(x, np.float64)[here] @ wide
        expected[1][here] = np.asarray(dy.astype(dtype), np.float64)[here] @ wide.T
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, dtype, dtype)
    for found, wanted in zip((y, dx, dw), expected, strict=True):
        rounding = 2.0**-8 if dtype == jnp.bfloat16 else 0.0
        error = np.abs(np.asarray(found, np.float64) - wanted)
        assert (error <= rounding * np.abs(wanted) + 3e-6 * np.abs(wanted).max()).all()


@pytest.mark.parametrize("count", [[70, 0, 0], [0, 0, 70], [0, 33, 0], [0, 0, 0], [16, 16, 16], [1, 1, 1], [70]],
                         ids=str)
@pytest.mark.parametrize("tiles", [(16, 128, 128), (64, 2048, 1024)], ids=["small", "large"])
def test_any_imbalance(count, tiles):
    """Tiles that rows, D and I end within, or one of all; float32 sums of up to 70 products."""
    x, _, dy, rows = inputs(70, 300, 160, count, jnp.float32)
    found = jax.jit(functools.partial(grouped_outer, interpret=True, tiles=tiles))(x, dy, jnp.asarray(count, jnp.int32))
    expected = outer(x, dy, rows)
    assert np.abs(found - expected).max() <= 3e-6 * max(np.abs(expected).max(), 1e-30)
