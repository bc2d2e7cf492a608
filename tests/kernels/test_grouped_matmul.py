"""The grouped product of packed experts, interpreted on a CPU: one product of decoded numbers an expert, in numpy."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_codec import random_packed

from jaxllm.axes import make_mesh
from jaxllm.codec import DTYPES, unpack
from jaxllm.kernels import grouped_matmul as module
from jaxllm.kernels.decode_tile import factors, multiply, num_parts, stored_factors, values
from jaxllm.kernels.grouped_matmul import grouped_matmul
from jaxllm.kernels.split_columns import join_columns, split_columns
from jaxllm.kernels.visits import lay_out
from jaxllm.moe import vary
from jaxllm.quant import Packed, decode

KINDS = [*DTYPES, "plain"]
GROUPS = {"fp8": (32, 32), "mxfp4": (32, 1), "int4": (32, 1)}     # rows, columns to a scale


def weight(kind: str, e: int, D: int, I: int, group: tuple[int, int] | None = None, seed: int = 0):
    """(w, its values float32 [e, D, I])"""
    if kind == "plain":
        w = jnp.asarray(np.random.default_rng(seed).standard_normal((e, D, I), np.float32), jnp.bfloat16)
        return w, np.asarray(w, np.float32)
    rows, columns = group or GROUPS[kind]
    codes, scale = random_packed(kind, (e, D, I), (e, D // rows, I // columns), 1, seed)
    return Packed(jnp.asarray(codes), jnp.asarray(scale), 1), unpack(codes, scale, 1)


def oracle(x_RD: np.ndarray, w_eDI: np.ndarray, count: list[int]) -> np.ndarray:
    """In float64: the rows of each expert times its weight."""
    y, end = np.zeros((len(x_RD), w_eDI.shape[2])), 0
    for w, rows in zip(w_eDI, count, strict=True):
        y[end:end + rows] = x_RD[end:end + rows].astype(np.float64) @ w.astype(np.float64)
        end += rows
    return y


@functools.partial(jax.jit, static_argnums=(4, 5))
def product_and_gradient(x, w, count, dy, tiles=None, interpret=True):
    y, pull = jax.vjp(lambda x: grouped_matmul(x, w, count, interpret, *(() if tiles is None else (tiles,))), x)
    return y, pull(dy)[0]


def compare(kind, R, D, I, count, dtype=jnp.float32, tiles=None, group=None):  # noqa: E741
    """Product and gradient of x, against the oracle's."""
    w, values = weight(kind, len(count), D, I, group)
    if dtype == jnp.bfloat16:
        values = values.astype(dtype).astype(np.float32)      # decoded into x's dtype, rounded once
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in ((R, D), (R, I)))
    x = x.at[sum(count):].set(jnp.nan)                        # rows past the last expert's, which nothing may touch
    y, dx = product_and_gradient(x, w, jnp.asarray(count, jnp.int32), dy.astype(jnp.float32), tiles)
    assert y.shape == (R, I) and y.dtype == jnp.float32 and dx.shape == x.shape and dx.dtype == dtype
    expected = oracle(np.asarray(x, np.float32), values, count)
    d_expected = oracle(np.asarray(dy, np.float32), values.transpose(0, 2, 1), count)
    # Both sum the same products of the same numbers, ours in float32: D or I terms, each sum off by 2^-24 of the sum of
    # magnitudes a term, in practice of its root. 3e-6 of the largest is 50 times 2^-24.
    assert np.abs(y - expected).max() <= 3e-6 * max(np.abs(expected).max(), 1e-30)
    # the gradient is then rounded to x's dtype: bfloat16 has 8 bits, so by up to 2^-9 of each
    rounding = 2.0**-8 if dtype == jnp.bfloat16 else 0.0
    error = np.abs(np.asarray(dx, np.float64) - d_expected)
    assert (error <= rounding * np.abs(d_expected) + 3e-6 * max(np.abs(d_expected).max(), 1e-30)).all()
    assert not y[sum(count):].any() and not dx[sum(count):].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients(kind, dtype):
    """One tile of all dims; experts without rows, and rows of no expert."""
    compare(kind, 37, 64, 96, [5, 0, 17, 0, 1, 9], dtype)


lay_out_jitted = jax.jit(lay_out, static_argnums=(1, 2))
# tiles of 16 rows, 256 of D, 128 of I; the gradient's have 128 of D where a kind allows it
SMALL = (16, 256, 128)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_that_do_not_divide(kind):
    """Rows, columns and sums that end within a tile; experts that begin and end within one or have several."""
    group = {"fp8": (16, 32), "mxfp4": (32, 1), "int4": (32, 1)}.get(kind)
    compare(kind, 55, 608, 160, [3, 40, 0, 8], jnp.float32, SMALL, group)


@pytest.mark.parametrize("count", [[70, 0, 0], [0, 0, 70], [0, 33, 0], [0, 0, 0], [16, 16, 16], [1, 1, 1], [70]],
                         ids=str)
def test_any_imbalance(count):
    compare("mxfp4", 70, 64, 32, count, jnp.float32, SMALL)


def test_scales_for_blocks_of_128():
    """As the hub has them, and groups of 128 of int4; several tiles of columns."""
    compare("fp8", 20, 256, 256, [12, 0, 8], jnp.bfloat16, SMALL, (128, 128))
    compare("int4", 20, 256, 256, [12, 0, 8], jnp.bfloat16, SMALL, (128, 1))


def test_decoded_in_pieces(monkeypatch):
    monkeypatch.setattr(module, "PIECE_D", 256)
    compare("mxfp4", 20, 512, 32, [12, 8], jnp.bfloat16, (16, 512, 128))


@pytest.mark.parametrize("seed", range(20))
def test_visits(seed):
    """Every row of an expert is in one visit of its, tiles are in order and all there, and no visit is missing room."""
    rng = np.random.default_rng(seed)
    e, rows, R = 1 + seed % 2 * 4, 4, 37 - seed % 2      # two compiled programs
    count = rng.multinomial(rng.integers(0, R + 1), rng.dirichlet(np.full(e, 0.5))).astype(np.int32)
    visits = jax.tree.map(np.asarray, lay_out_jitted(jnp.asarray(count), R, rows))
    found, tiles = [], visits.tile_v[:visits.num].tolist()
    for tile, expert, begin, end in zip(tiles, visits.expert_v, visits.begin_v, visits.end_v, strict=False):
        assert 0 <= begin <= end <= rows
        assert end == begin or count[expert] > 0                           # nobody's weights are asked for
        found += [(tile * rows + row, expert) for row in range(begin, end)]
    assert found == list(enumerate(np.repeat(np.arange(e), count)))
    assert tiles == sorted(tiles) and set(tiles) == set(range(-(-R // rows)))
    assert visits.tiles_used == max(1, -(-count.sum() // rows))


def test_an_expert_without_rows_is_not_read():
    """Codes that are NaN and scales that are infinite would be seen, also of an idle visit after the last rows."""
    w, values = weight("fp8", 4, 64, 32)
    codes = w.codes.at[jnp.array([0, 2])].set(jnp.nan)
    scale = w.scale.at[jnp.array([0, 2])].set(jnp.inf)
    x = np.random.default_rng(1).standard_normal((50, 64), np.float32)
    y, _ = product_and_gradient(jnp.asarray(x), Packed(codes, scale, 1), jnp.array([0, 5, 0, 9], jnp.int32),
                                jnp.ones((50, 32), jnp.float32), SMALL)
    expected = oracle(x, values, [0, 5, 0, 9])
    assert np.abs(y - expected).max() <= 3e-6 * np.abs(expected).max()      # as in `compare`


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("D", [512, 96])
def test_columns_apart_and_together(D, dtype):
    """Exactly, whatever the size of the numbers."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((40, D), np.float32) * 2.0**rng.integers(-60, 60, (40, D)), dtype)
    apart = split_columns(x, jnp.int32(40), True)
    assert np.array_equal(apart, np.stack([x[:, 0::2], x[:, 1::2]]))
    assert np.array_equal(join_columns(*apart), x)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_tile_is_decoded_bit_for_bit(kind, dtype):
    """Every code with scales of many sizes, as jaxllm.quant decodes them; the sign of a zero too."""
    codes = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 128))
    if kind == "fp8":
        codes = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)      # NaN is no number
    scale = {"fp8": np.random.default_rng(0).uniform(1e-4, 1, (2, 128)).astype(np.float32),
             "mxfp4": np.random.default_rng(0).integers(14, 241, (16, 128)).astype(np.uint8),
             "int4": jnp.asarray(np.random.default_rng(0).uniform(1e-4, 1, (16, 128)), jnp.bfloat16)}[kind]
    packed = Packed(jnp.asarray(codes).view(DTYPES[kind][0]), jnp.asarray(scale), 0)

    def kernel(codes_ref, scale_ref, out_ref):
        stored = stored_factors(factors(scale_ref[...], kind), kind, dtype)
        for part, array in enumerate(values(codes_ref[...], kind)):
            out_ref[part] = multiply(array, stored, dtype)

    out = jax.ShapeDtypeStruct((num_parts(kind), 256, 128), dtype)
    found = pl.pallas_call(kernel, out_shape=out, interpret=True)(packed.codes, packed.scale)
    expected = np.asarray(decode(packed, dtype))
    found = np.asarray(found).transpose(1, 0, 2).reshape(expected.shape)
    assert found.tobytes() == expected.tobytes()


def test_inside_shard_map():
    """Each device its experts. JAX does not interpret a kernel where it checks what varies over the mesh; for a TPU it
    compiles one there."""
    w, values = weight("mxfp4", 4, 64, 32)
    x = np.random.default_rng(1).standard_normal((12, 64), np.float32)
    count = np.array([[3, 2], [0, 6]], np.int32)

    def local(x_RD, w, count_1e):
        return jax.lax.psum(grouped_matmul(x_RD, w, count_1e[0], True), "tensor")[None]

    with jax.set_mesh(make_mesh("data=1,expert=2,tensor=1")):
        w, count_De = jax.device_put((w, count), NamedSharding(jax.sharding.get_mesh(), P("expert")))
        y = jax.jit(jax.shard_map(local, out_specs=P("expert", "data"), check_vma=False))(jnp.asarray(x), w, count_De)
    for device, found in enumerate(np.asarray(y)):
        expected = oracle(x, values[2 * device:][:2], count[device].tolist())
        assert np.abs(found - expected).max() <= 3e-6 * np.abs(expected).max()      # as in `compare`


@pytest.mark.parametrize("kind, dtype", [*((kind, jnp.bfloat16) for kind in KINDS), ("fp8", jnp.float32)])
def test_lowered_for_a_tpu(kind, dtype):
    """Into the kernels that a TPU's compiler is given, inside a shard_map that checks what varies; nothing runs. No
    decoded expert is in the program."""
    e, D, I, R = 4, 1024, 512, 64      # noqa: E741
    w = jax.tree.map(jax.typeof, weight(kind, e, D, I)[0])
    mesh = make_mesh("data=2,expert=2,tensor=2")

    def local(x, w, count, dy):
        inputs = jax.tree.map(vary, (x, w, count, dy))
        return jax.tree.map(lambda y: jax.lax.psum(y, ("expert", "tensor")),
                            product_and_gradient(*inputs, None, False))

    with jax.set_mesh(mesh):
        inputs = (jax.ShapeDtypeStruct((R, D), dtype), w, jax.ShapeDtypeStruct((e,), jnp.int32),
                  jax.ShapeDtypeStruct((R, I), jnp.float32))
        mapped = jax.jit(jax.shard_map(local, in_specs=P(), out_specs=P("data")))
        text = mapped.trace(*inputs).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2 + (num_parts(None if kind == "plain" else kind) == 2)
    if kind != "plain":
        assert not re.search(rf"tensor<({e}x)?{D}x{I}x(bf16|f32)>|tensor<{e}x2x{D // 2}x{I}x(bf16|f32)>", text)


@pytest.mark.parametrize("x, count, w, message", [
    ((4, 64), jnp.zeros(2, jnp.int32), "plain", "count"),
    ((4, 32), jnp.zeros(3, jnp.int32), "plain", "R, D"),
    ((4, 64), jnp.zeros(3, jnp.float32), "plain", "int32"),
    ((4, 64), jnp.zeros(3, jnp.int32), "f32", "bfloat16"),
    ((4, 64), jnp.zeros(3, jnp.int32), "dim", "dim 1"),
])
def test_errors(x, count, w, message):
    w = {"plain": jnp.ones((3, 64, 8), jnp.bfloat16), "f32": jnp.ones((3, 64, 8), jnp.float32),
         "dim": Packed(jnp.ones((3, 64, 4), jnp.uint8), jnp.ones((3, 64, 1), jnp.uint8), 2)}[w]
    with pytest.raises(ValueError, match=message):
        grouped_matmul(jnp.ones(x), w, count)


def test_tiles_of_released_shapes():
    """Large tiles that divide, so that nothing is masked."""
    assert [module.choose_tile(D, 2048, 256) for D in (6144, 4096, 2880, 200, 4160)] == [2048, 2048, 2048, 200, 2048]
    assert [module.choose_tile(D, 1024, 1024) for D in (6144, 2048, 512, 1536)] == [1024, 1024, 512, 1024]
