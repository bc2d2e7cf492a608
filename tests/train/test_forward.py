"""Packed documents: each is as if it were alone, in the main model and in MTP blocks, and so are its gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hub_maker import tiny_config

from jaxllm import attention
from jaxllm.axes import make_mesh, spec
from jaxllm.config import Config
from jaxllm.gathered import gathered
from jaxllm.model import Transformer
from jaxllm.train.batch import Batch
from jaxllm.train.forward import hidden_states, mtp_states
from jaxllm.train.loss import count_targets, loss

LENGTHS = (5, 1, 130, 33)      # with windows of 7 and blocks of 128: inside one, and over a border
T = 192


@pytest.fixture(scope="module")
def model() -> Transformer:
    config, mesh = Config.from_dict(tiny_config(
        num_hidden_layers=2, hybrid_layer_pattern=[0, 1], moe_layer_freq=[0, 1],
        sliding_window=7, sliding_window_size=7), "tiny"), make_mesh()
    with jax.set_mesh(mesh):
        return jax.jit(lambda: Transformer(config, mesh, jnp.dtype("float32"), rngs=nnx.Rngs(0), num_mtp=2))()


def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 96, length).astype(np.int32) for length in LENGTHS]


def batch_of(rows: list[list[np.ndarray]], T: int = T) -> Batch:
    """Rows of documents one after the other, the rest padding."""
    tokens, begin = np.zeros((len(rows), T), np.int32), np.full((len(rows), T), T, np.int32)
    for row, texts in enumerate(rows):
        at = 0
        for text in texts:
            tokens[row, at:at + len(text)], begin[row, at:at + len(text)] = text, at
            at += len(text)
    place = np.arange(T)[None, :]
    return Batch(*(jax.device_put(x, spec("batch", None)) for x in (tokens, begin, begin < place)))


@jax.jit
def states(model: Transformer, batch: Batch) -> list[jax.Array]:
    x_BTD, _ = hidden_states(model, batch, False)
    return [model.logits(x_BTD), *map(model.head, mtp_states(model, batch, x_BTD, False))]


@pytest.mark.parametrize("key_block", [1024, 96])      # 96: three visits, the last moved back
def test_each_document_is_as_if_alone(model, monkeypatch, key_block):
    """Block k says nothing of the last 1 + k tokens of a document: it has not read the token they need."""
    monkeypatch.setattr(attention, "KEY_BLOCK", key_block)
    jax.clear_caches()
    with jax.set_mesh(make_mesh()):
        packed = states(model, batch_of([documents()]))
        at = 0
        for text in documents():
            alone = states(model, batch_of([[text]]))
            for k, (ours, wanted) in enumerate(zip(packed, alone, strict=True)):
                upto = max(0, len(text) - k)
                np.testing.assert_allclose(ours[0, at:at + upto], wanted[0, :upto], rtol=0, atol=2e-5)     # float32
            at += len(text)
    jax.clear_caches()


@pytest.mark.parametrize("remat", [False, True])
def test_losses_and_gradients_add_up(model, remat):
    """The loss of a packed row is the mean of its documents' losses by predictions; padding adds nothing."""
    def value(model: Transformer, batch: Batch, totals: jax.Array | None = None) -> jax.Array:
        return loss(model, batch, 0.3, 0.0, remat, totals)[0]

    grad = jax.jit(jax.value_and_grad(value))
    counts = [np.array([sum(max(0, n - 1 - k) for n in LENGTHS) for k in range(3)] + [1], np.float32)]
    with jax.set_mesh(make_mesh()):
        whole = grad(model, batch_of([documents()]))
        parts = [grad(model, batch_of([[text]]), jnp.asarray(counts[0])) for text in documents()]
    summed = jax.tree.map(lambda *x: sum(x), *parts)
    for ours, wanted in zip(jax.tree.leaves(whole), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * max(1.0, float(np.abs(wanted).max())))


def test_what_counts():
    """First tokens and padding are not targets, nor what lies in another document or beyond the row."""
    with jax.set_mesh(make_mesh()):
        counts = count_targets(batch_of([documents(), [np.arange(T, dtype=np.int32) % 96]]), 2)
    assert counts.tolist() == [sum(max(0, n - 1 - k) for n in (*LENGTHS, T)) for k in range(3)] + [2]


def test_a_layer_is_gathered_when_it_is_its_turn(model):
    """In a program of 48 layers XLA else gathers all before the first: what is gathered waits for the layer's input."""
    with jax.set_mesh(make_mesh()):
        apart = jax.tree.map(lambda x: gathered(jax.device_put(x, spec("batch")), x.sharding.spec) if x.ndim > 1 else x,
                             model)
        program = jax.make_jaxpr(lambda *inputs: hidden_states(*inputs, False)[0])(apart, batch_of([documents()]))
    waits = [equation for equation in program.eqns if equation.primitive.name == "optimization_barrier"]
    assert len(waits) == len(model.layers)
    split = {x for equation in program.eqns if equation.primitive.name == "reshard" for x in equation.invars}
    assert all(set(wait.outvars[:-1]) <= split for wait in waits)      # and the last is the input
