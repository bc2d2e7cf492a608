"""Packed weights on the device: the numbers of the host's reading, on any mesh, never all at once."""
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Var
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_codec import random_packed

from jaxllm import experts_in_turns, linear
from jaxllm.axes import make_mesh
from jaxllm.codec import DTYPES, unpack
from jaxllm.experts import experts_by_block, gradients_by_block
from jaxllm.linear import einsum, matmul, matmul_in_parts
from jaxllm.moe import PLACES, apply_on_device
from jaxllm.quant import Adapted, Packed, decode, take

SHAPES = [((64, 6), (2, 6), 0), ((12, 4, 24), (3, 4, 8), 0), ((2, 64, 8), (2, 2, 8), 1), ((4, 16, 6), (2, 1, 6), 1)]


def packed(kind: str, shape: tuple[int, ...], scale_shape: tuple[int, ...], dim: int, seed: int = 0
           ) -> tuple[Packed, np.ndarray]:
    """A packed weight and its values by the host's reading."""
    codes, scale = random_packed(kind, shape, scale_shape, dim, seed)
    return Packed(jnp.asarray(codes), jnp.asarray(scale), dim), unpack(codes, scale, dim)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape, scale_shape, dim", SHAPES)
def test_decoded_bit_for_bit(kind, shape, scale_shape, dim):
    weight, values = packed(kind, shape, scale_shape, dim)
    assert weight.kind == kind and weight.shape == shape and weight[...] is weight
    found = jax.jit(decode, static_argnums=1)(weight, jnp.float32)
    assert found.shape == shape and np.asarray(found).tobytes() == values.tobytes()
    rounded = jax.jit(decode, static_argnums=1)(weight, jnp.bfloat16)
    assert np.asarray(rounded).tobytes() == values.astype(jnp.bfloat16).tobytes()      # rounded once


def test_every_code_and_every_exponent():
    """All e4m3 codes, subnormal ones too; all e8m0 exponents whose numbers are normal in float32, since XLA's CPU
    backend takes others for zero."""
    codes = np.array([n for n in range(256) if n & 0x7F != 0x7F], np.uint8).view(jnp.float8_e4m3fn)[:, None]
    weight = Packed(jnp.asarray(codes), jnp.ones((1, 1), jnp.float32), 0)
    assert np.asarray(decode(weight, jnp.float32)).tobytes() == codes.astype(np.float32).tobytes()
    nibbles = np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], np.uint8)[:, None].repeat(251, 1)
    scale = np.arange(2, 253, dtype=np.uint8)[None, :]
    found = decode(Packed(jnp.asarray(nibbles), jnp.asarray(scale), 0), jnp.float32)
    assert np.asarray(found).tobytes() == unpack(nibbles, scale, 0).tobytes()


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape, scale_shape, dim, spec", [
    ((64, 8, 24), (2, 8, 8), 0, P(None, "tensor", None)), ((8, 64, 6), (8, 2, 6), 1, P("tensor", None, None)),
    ((64, 16), (8, 16), 0, P("tensor", None)), ((64, 16), (2, 16), 0, P(None, ("expert", "tensor"))),
])
def test_sharded_as_a_plain_weight(kind, shape, scale_shape, dim, spec):
    mesh = make_mesh("data=2,expert=2,tensor=2")
    weight, values = packed(kind, shape, scale_shape, dim)
    weight = jax.device_put(weight, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        found = jax.jit(decode, static_argnums=1)(weight, jnp.float32)
    assert found.sharding.spec == spec and np.asarray(found).tobytes() == values.tobytes()


@pytest.mark.parametrize("kind", DTYPES)
def test_products(kind):
    """One einsum for all forms, the same numbers as with the decoded array."""
    weight, values = packed(kind, (64, 4, 24), (2, 4, 8), 0)
    x = np.random.default_rng(1).standard_normal((2, 3, 64), np.float32)
    assert np.array_equal(einsum("btd,dnh->btnh", x, weight), einsum("btd,dnh->btnh", x, jnp.asarray(values)))
    weight, values = packed(kind, (64, 12), (2, 12), 0)
    assert np.array_equal(matmul_in_parts(jnp.asarray(x), weight), matmul_in_parts(jnp.asarray(x), jnp.asarray(values)))


@pytest.mark.parametrize("kind", DTYPES)
def test_large_weights_are_decoded_in_pieces(kind, monkeypatch):
    weight, values = packed(kind, (256, 64), (8, 64), 0)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 256), np.float32))
    for tile, pieces in ((256 * 64, 1), (64 * 64, 4), (33 * 64, 8), (1, 8)):
        monkeypatch.setattr(linear, "TILE", tile)
        text = jax.jit(lambda x, w: matmul(x, w)).lower(x, weight).compile().as_text()
        largest = max(int(a) * int(b) for a, b in re.findall(r"f32\[(\d+),(\d+)\]", text))
        assert largest == max(256 * 64 // pieces, 3 * 256)
        # another order of sums of 256 terms of size 10: each rounds by 2^-24 of a sum of up to a few hundred
        np.testing.assert_allclose(matmul(x, weight), np.asarray(x) @ values, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("kind", DTYPES)
def test_gradient_to_the_input(kind):
    weight, values = packed(kind, (64, 12), (2, 12), 0)
    x = jnp.ones((2, 64), jnp.float32)
    found = jax.grad(lambda x: einsum("md,di->mi", x, weight).sum())(x)
    np.testing.assert_allclose(found, np.ones((2, 12), np.float32) @ values.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", DTYPES)
def test_experts_one_at_a_time(kind):
    """The numbers of the decoded experts, and no array of more than one decoded expert in the program."""
    E, D, I, M, A = 8, 64, 32, 5, 3      # noqa: E741
    rng = np.random.default_rng(2)
    (gate, gate_f32), (up, up_f32) = (packed(kind, (E, D, I), (E, 2, I), 1, seed) for seed in (1, 2))
    down, down_f32 = packed(kind, (E, I, D), (E, 1, D), 1, 3)
    x_MD = jnp.asarray(rng.standard_normal((M, D), np.float32))
    chosen = jnp.asarray(np.stack([rng.permutation(E)[:A] for _ in range(M)]).astype(np.int32))
    weight = jnp.asarray(rng.uniform(0.1, 1, (M, A)).astype(np.float32))
    found = experts_by_block(x_MD, chosen, weight, gate, up, down)
    expected = experts_by_block(x_MD, chosen, weight, *map(jnp.asarray, (gate_f32, up_f32, down_f32)))
    assert np.array_equal(found, expected)
    assert np.array_equal(decode(take(gate, jnp.int32(3)), jnp.float32), gate_f32[3])
    text = jax.jit(experts_by_block).lower(x_MD, chosen, weight, gate, up, down).compile().as_text()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", text)]
    assert max(sizes) <= D * I


@pytest.mark.parametrize("turn", [4096, 8])
@pytest.mark.parametrize("kind", [*DTYPES, "adapted", "mixed"])
def test_experts_in_turns(kind, turn, monkeypatch):
    """Values and gradients, in one turn and in several, of which an expert's rows may need two; a chosen id E is of
    another device. float32 sums of up to 64 products in another order, of values up to 2000: 2e-6 of the largest."""
    monkeypatch.setattr(experts_in_turns, "TURN", turn)
    monkeypatch.setattr(experts_in_turns, "TURN_BACK", turn)
    E, D, I, M, A = 4, 64, 32, 13 if kind != "mixed" else 53, 3      # noqa: E741
    rng = np.random.default_rng(4)
    shapes, codes = ((E, D, I), (E, D, I), (E, I, D)), "mxfp4" if kind in ("adapted", "mixed") else kind
    weights = [packed(codes, shape, (E, shape[1] // 32, shape[2]), 1, seed)[0] for seed, shape in enumerate(shapes)]
    if kind != codes:      # with an adapter; and one that is trained itself
        a, b = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((E, D, 2), (E, 2, I)))
        weights[:2] = Adapted(weights[0], a, b, 0.5), weights[1] if kind == "adapted" else b[:, :1] * a[:, :, :1]
    x_MD, d_out = (jnp.asarray(rng.standard_normal((M, D), np.float32)) for _ in range(2))
    chosen = jnp.asarray(np.stack([rng.permutation(E + 1)[:A] for _ in range(M)]).astype(np.int32))
    weight = jnp.asarray(rng.uniform(0.1, 1, (M, A)).astype(np.float32))
    found = (experts_in_turns.experts_in_turns(x_MD, chosen, weight, *weights, interpret=True),
             experts_in_turns.gradients_in_turns(x_MD, chosen, weight, tuple(weights), d_out, interpret=True))
    expected = (experts_by_block(x_MD, chosen, weight, *weights),
                gradients_by_block(x_MD, chosen, weight, tuple(weights), d_out))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == other.dtype and np.abs(other).max() > 0
        np.testing.assert_allclose(ours, other, rtol=0, atol=2e-6 * np.abs(other).max())


def test_sums_of_gradients_begin_when_they_are_needed(monkeypatch):
    """Zeros that come from nowhere XLA makes for all layers before the first: they come out of a barrier."""
    monkeypatch.setattr(experts_in_turns, "TURN_BACK", 8)
    e, D, I, M, A = 2, 16, 8, 32, 2      # noqa: E741
    experts = tuple(jnp.ones(shape) for shape in ((e, D, I), (e, D, I), (e, I, D)))
    program = jax.make_jaxpr(partial(experts_in_turns.gradients_in_turns, interpret=True))(
        jnp.ones((M, D)), jnp.zeros((M, A), jnp.int32), jnp.ones((M, A)), experts, jnp.ones((M, D)))
    made = {x: equation for equation in program.eqns for x in equation.outvars}
    loop = next(equation for equation in program.eqns if equation.primitive.name == "while")
    zeros = [made[x] for x in loop.invars if isinstance(x, Var) and x in made
             and made[x].primitive.name == "broadcast_in_dim"]
    assert len(zeros) == 2 + len(experts)
    assert all(made[zero.invars[0]].primitive.name == "optimization_barrier" for zero in zeros)


@pytest.mark.parametrize("kind", DTYPES)
def test_a_gpu_decodes_one_expert_at_a_time_too(kind):
    E, D, I, M, A = 8, 64, 32, 5, 3      # noqa: E741
    mesh = make_mesh()
    gate, up = (packed(kind, (E, D, I), (E, 2, I), 1)[0] for _ in range(2))
    down = packed(kind, (E, I, D), (E, 1, D), 1)[0]
    x, chosen, weight = jnp.ones((1, M, D)), jnp.zeros((1, M, A), jnp.int32), jnp.ones((1, M, A))
    with jax.set_mesh(mesh):
        mapped = jax.jit(lambda *args: jax.shard_map(partial(apply_on_device, P(), PLACES), in_specs=P(),
                                                      out_specs=P("data"))(*args))
        text = mapped.trace(x, chosen, weight, gate, up, down).lower(lowering_platforms=("cuda",)).as_text()
    assert "ragged_dot" not in text and not re.search(rf"tensor<{E}x({D}x{I}|{I}x{D})xf32>", text)
