"""Tokens that go to their experts and back: what is exchanged, and that the sums are those of one device."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_experts import FORCED, dense, gradient
from test_modules import randomise, tiny

import jaxllm.dispatch
from jaxllm.axes import make_mesh, spec
from jaxllm.dispatch import PLACES, exchange, expected_places, slices, turn_rows
from jaxllm.moe import MoE

D = 3


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes):
    """As `jax.lax.ragged_all_to_all` is documented, of all devices at once; each argument has their dim in front."""
    n, result = len(operand), output.copy()
    np.testing.assert_array_equal(send_sizes, recv_sizes.T)
    for p in range(n):
        for q in range(n):
            num, begin, to = send_sizes[p, q], input_offsets[p, q], output_offsets[p, q]
            assert 0 <= begin <= begin + num <= operand.shape[1] and 0 <= to <= to + num <= output.shape[1]
            result[q, to:to + num] = operand[p, begin:begin + num]
    return result


@pytest.mark.parametrize("rows", [7, 16])
@pytest.mark.parametrize("kind", ["free", "one gets all", "one sends all", "nothing"])
def test_exchange(kind, rows):
    """In turns there and back: each row arrives once, in the order of the senders, and comes back to where it was."""
    n, most = 4, 4
    count = np.random.default_rng(0).integers(0, most + 1, (n, n), np.int32)
    count *= {"free": 1, "one gets all": np.arange(n) == 2, "one sends all": (np.arange(n) == 1)[:, None],
              "nothing": 0}[kind]
    sent = np.zeros((n, n * most, D), np.float32)
    for p in range(n):
        sent[p, :count[p].sum()] = 1 + 100 * p + np.arange(count[p].sum())[:, None] + np.arange(D) / 10
    back, arrived = np.zeros_like(sent), [[] for _ in range(n)]
    with jax.set_mesh(make_mesh("data=2,expert=2,tensor=2")):
        for turn in range(-(-count.sum(0).max() // rows)):
            to = jax.tree.map(np.asarray, slices(jnp.asarray(count), turn, rows))
            there = to.sender_pq, to.num_pq, to.receiver_pq, to.num_pq.T
            got = check_exchange(sent, np.zeros((n, rows, D), np.float32), *there, most)
            for q in range(n):
                arrived[q].append(got[q, :to.num_pq[:, q].sum()])
            back = check_exchange(got, back, to.receiver_pq.T, to.num_pq.T, to.sender_pq.T, to.num_pq, most)
    np.testing.assert_array_equal(back, sent)
    for q in range(n):
        begin = np.cumsum(count, axis=1) - count
        expected = [sent[p, begin[p, q]:begin[p, q] + count[p, q]] for p in range(n)]
        np.testing.assert_array_equal(np.concatenate([np.zeros((0, D)), *arrived[q]]), np.concatenate(expected))


def check_exchange(*arrays):
    """What the devices of the mesh make of it, along `data` the same: as documented."""
    *arrays, most = arrays

    def local(*arrays):
        return exchange(*(x[0] for x in arrays), most)[None]
    split = [jax.device_put(x, P(PLACES, *[None] * (x.ndim - 1))) for x in arrays]
    found = np.asarray(jax.jit(jax.shard_map(local, out_specs=P(PLACES, None, None)))(*split))
    np.testing.assert_array_equal(found, ragged_all_to_all(*arrays))
    return found


def on_mesh(mesh: str, names: tuple, config, bias, apply):
    """apply(module, x, weights of the output) on a mesh whose stream is split so, and for the dense sum without one."""
    rng = np.random.default_rng(0)
    x_BTD, weigh = rng.standard_normal((2, 8, 16, 32), np.float32)
    with jax.set_mesh(make_mesh(mesh)):
        place = jax.sharding.get_mesh()
        module = randomise(jax.eval_shape(lambda: MoE(config, jnp.dtype("float32"), rngs=nnx.Rngs(0))), place)
        if bias is not None:
            module.bias_E = nnx.Param(jax.device_put(bias, NamedSharding(place, P(None))))
        ours = apply(lambda module, x: module(x)[0])(module, *(
            jax.device_put(x, spec(*names, None)) for x in (x_BTD, weigh)))
    return ours, apply(dense)(jax.tree.map(np.asarray, module), x_BTD, weigh)


def check_close(ours, expected):
    """float32 sums of up to 128 rows: 2e-5 of the largest."""
    for found, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=0,
                                   atol=2e-5 * max(np.abs(wanted).max(), 1e-3))


BATCH, TOKENS = ("stream_batch", None), ("batch", "stream_seq")


@pytest.mark.parametrize(("mesh", "names"), [("expert=8", BATCH), ("data=2,expert=2,tensor=2", TOKENS),
                                             ("expert=2,tensor=4", BATCH)])
@pytest.mark.parametrize("bias", [None, FORCED], ids=["free", "forced"])
@pytest.mark.parametrize("least", [4, 1024], ids=["turns", "at once"])
def test_sums_are_those_of_one_device(mesh, names, bias, least, monkeypatch):
    """Also where all tokens go to the same experts, on one place or two, and where a place takes them in turns."""
    monkeypatch.setattr(jaxllm.dispatch, "LEAST_TURN", least)
    monkeypatch.setattr(jaxllm.dispatch, "expected_places", lambda *_: 0.0)
    check_close(*on_mesh(mesh, names, tiny(), bias, lambda forward: jax.jit(lambda *args: forward(*args[:2]))))


@pytest.mark.parametrize("bias", [None, FORCED], ids=["free", "forced"])
def test_gradients(bias):
    check_close(*on_mesh("data=2,expert=2,tensor=2", BATCH, tiny(), bias, gradient))


@pytest.mark.parametrize("apply", [gradient, lambda forward: jax.jit(lambda *args: forward(*args[:2]))])
def test_experts_that_are_cut(apply):
    """Six experts are not whole on eight devices: tokens that lie apart are gathered, and sums are scattered."""
    check_close(*on_mesh("expert=2,tensor=4", TOKENS, tiny(n_routed_experts=6), None, apply))


def test_what_a_tpu_sends():
    """Lowered, not run: rows by two ragged exchanges, and of all tokens only what they chose is gathered."""
    with jax.set_mesh(make_mesh("expert=4,tensor=2")):
        module = jax.jit(lambda: MoE(tiny(), jnp.dtype("float32"), rngs=nnx.Rngs(0)))()
        traced = jax.jit(lambda module, x: module(x)[0]).trace(module, jax.device_put(
            jnp.ones((8, 1, 32)), spec(*BATCH, None)))
        texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu")}
    assert [texts[platform].count("@ragged_all_to_all") for platform in ("cpu", "tpu")] == [0, 2]
    gathered = [line for line in texts["tpu"].splitlines() if "stablehlo.all_gather" in line]
    assert len(gathered) == 2 and all("-> tensor<8x3x" in line for line in gathered)


@pytest.mark.parametrize(("E", "A", "n"), [(384, 8, 64), (256, 8, 8), (16, 4, 16), (8, 8, 2)])
def test_expected_places(E, A, n):
    """4000 drawn choices: their mean is within 2%."""
    rng = np.random.default_rng(0)
    places = np.argsort(rng.random((4000, E)), 1)[:, :A] // (E // n)
    assert expected_places(E, A, n) == pytest.approx(np.mean([len(set(row)) for row in places]), rel=0.02)


def test_rows_of_a_turn():
    """Few tokens: as many as could come. Many: twice what should, in whole hundreds."""
    rows = partial(turn_rows, num_experts=384, chosen=8, places=64)
    assert [rows(64), rows(1024), rows(4096)] == [64, 1024, 1024]
    assert rows(2**20) == pytest.approx(2 * 2**20 / 64 * expected_places(384, 8, 64), abs=128)
    assert turn_rows(2**20, 8, 8, 2) == 2**20
