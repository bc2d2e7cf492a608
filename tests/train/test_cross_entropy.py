"""The head's products by pieces: the same sums whatever a piece is, and pieces that fit the platform."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.axes import make_mesh
from jaxllm.train import cross_entropy
from jaxllm.train.cross_entropy import sum_of_nats

B, T, D, W = 4, 12, 8, 64


def arrays(mesh):
    rng = np.random.default_rng(0)
    x, head = rng.standard_normal((B, T, D), np.float32), rng.standard_normal((D, W), np.float32)
    target, counted = rng.integers(0, W, (B, T), np.int32), rng.random((B, T)) < 0.8
    specs = (("data", None, None), (None, ("expert", "tensor")), ("data", None), ("data", None))
    return [jax.device_put(array, jax.NamedSharding(mesh, jax.P(*spec)))
            for array, spec in zip((x, head, target, counted), specs, strict=True)]


def plain(x, head, target, counted):
    found = jnp.take_along_axis(jax.nn.log_softmax(jnp.einsum("btd,dw->btw", x, head, precision="highest")),
                                target[..., None], -1)[..., 0]
    return -jnp.where(counted, found, 0.0).sum()


@pytest.mark.parametrize("mesh", ["", "data=2,expert=2,tensor=2"])
@pytest.mark.parametrize("piece", [1, B * W * 3, 2**21])
def test_any_piece(mesh, piece, monkeypatch):
    """One place, three places, all: value and gradients of the plain loss. float32 sums of 64 terms: 1e-5."""
    monkeypatch.setattr(cross_entropy, "PIECE", piece)
    jax.clear_caches()
    with jax.set_mesh(make_mesh(mesh)):
        found = jax.jit(jax.value_and_grad(sum_of_nats, (0, 1)))(*arrays(jax.sharding.get_mesh()))
    expected = jax.value_and_grad(plain, (0, 1))(*map(np.asarray, arrays(make_mesh())))
    for ours, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


def test_pieces_by_platform():
    """A CPU's logits stay in its cache; a TPU reads the head as seldom as memory allows, and its pieces do not shrink
    with the mesh."""
    rows, places, width = 4, 4096, 2**17
    with jax.set_mesh(make_mesh("data=2,expert=4")):
        mesh = jax.sharding.get_mesh()
        args = [jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
                for shape, dtype, spec in (((rows, places, D), jnp.bfloat16, ("data", None, None)),
                                           ((D, width), jnp.bfloat16, (None, ("expert", "tensor"))),
                                           ((rows, places), jnp.int32, ("data", None)),
                                           ((rows, places), jnp.bool, ("data", None)))]
        traced = jax.jit(jax.grad(sum_of_nats)).trace(*args)
        texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu")}
    assert f"tensor<{rows}x4x{width}xf32>" in texts["cpu"]                 # 2^21 numbers
    assert f"tensor<{rows}x1024x{width}xf32>" in texts["tpu"]              # 2048 places of a device's two rows
