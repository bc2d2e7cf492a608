"""Gradients of the experts' work: those of every expert computed for every token, whatever the imbalance."""
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_modules import randomise, tiny

from jaxllm.axes import make_mesh
from jaxllm.experts import (
    experts_at_once,
    experts_by_block,
    experts_by_ragged_dot,
    gradients_by_block,
    gradients_through,
)
from jaxllm.moe import MoE, route


def dense(module: MoE, x_BTD: jax.Array) -> jax.Array:
    """Plain JAX, its own gradient: all experts for all tokens, weighed by what was chosen."""
    scores = jax.nn.sigmoid(jnp.einsum("btd,de->bte", x_BTD, module.router_DE[...], precision="highest"))
    expert, weight = route(scores, module.bias_E[...], module.config)
    weight_BTE = (jax.nn.one_hot(expert, scores.shape[-1]) * weight[..., None]).sum(-2)
    hidden = (jax.nn.silu(jnp.einsum("btd,edi->btei", x_BTD, module.gate_EDI[...], precision="highest"))
              * jnp.einsum("btd,edi->btei", x_BTD, module.up_EDI[...], precision="highest"))
    every = jnp.einsum("btei,eid->bted", hidden, module.down_EID[...], precision="highest")
    return (every * weight_BTE[..., None]).sum(-2)


def gradients(mesh: str | None, bias: np.ndarray | None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(ours on this mesh, the dense one's without a mesh) of all parameters and of the input."""
    config, rng = tiny(), np.random.default_rng(0)
    x_BTD, weigh = rng.standard_normal((2, 8, 25, 32), np.float32)
    with jax.set_mesh(make_mesh(mesh)):
        module = randomise(jax.eval_shape(lambda: MoE(config, jnp.dtype("float32"), rngs=nnx.Rngs(0))),
                           jax.sharding.get_mesh())
        if bias is not None:
            module.bias_E = nnx.Param(jax.device_put(bias, NamedSharding(jax.sharding.get_mesh(), P(None))))
        split = (jax.device_put(x, P("data", None, None)) for x in (x_BTD, weigh))
        ours = gradient(lambda module, x: module(x)[0])(module, *split)
    return [[np.asarray(g) for g in jax.tree.leaves(found)] for found in (
        ours, gradient(dense)(jax.tree.map(np.asarray, module), x_BTD, weigh))]


def gradient(forward: Callable) -> Callable:
    return jax.jit(jax.grad(lambda module, x, weigh: (forward(module, x) * weigh).sum(), argnums=(0, 1)))


FORCED = np.array([9, 8, 0, 0, 0, 0, 0, 0], np.float32)      # all tokens to the same two experts


@pytest.mark.parametrize("mesh", [None, "data=8", "data=2,expert=2,tensor=2", "expert=4,tensor=2"])
@pytest.mark.parametrize("bias", [None, FORCED], ids=["free", "forced"])
def test_gradients_are_those_of_all_experts_for_all_tokens(mesh, bias):
    """Every parameter's and the input's; a row that was dropped would be missing from them. float32 sums of up to 200
    rows: 2e-5 of the largest."""
    ours, expected = gradients(mesh, bias)
    for found, wanted in zip(ours, expected, strict=True):
        assert np.abs(found - wanted).max() <= 2e-5 * max(np.abs(wanted).max(), 1e-3)
    assert any(np.abs(wanted).max() > 0.1 for wanted in expected)


@pytest.mark.parametrize("compute", [experts_by_ragged_dot, experts_at_once])
def test_other_ways_to_the_same_sum(compute):
    """Values and gradients of the block loop; rows of other devices' experts (id e) add nothing. 2e-6 of the largest:
    float32 sums of up to 100 products."""
    rng, M, A, e = np.random.default_rng(1), 70, 3, 8
    x_MD, weigh_MD = rng.standard_normal((2, M, 32), np.float32)
    local_MA = np.stack([rng.permutation(e + 1)[:A] for _ in range(M)]).astype(np.int32)
    experts = [rng.standard_normal(shape, np.float32) for shape in ((e, 32, 20), (e, 32, 20), (e, 20, 32))]
    weight_MA = rng.random((M, A), np.float32)
    inputs, experts, weigh_MD = jax.tree.map(jnp.asarray, ((x_MD, local_MA, weight_MA), experts, weigh_MD))
    expected = experts_by_block(*inputs, *experts), gradients_by_block(*inputs, experts, weigh_MD)
    found = compute(*inputs, *experts), gradients_through(compute)(*inputs, experts, weigh_MD)
    for ours, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, other, rtol=0, atol=2e-6 * np.abs(other).max())


def test_other_platforms_have_gradients_too():
    """Lowered, not run: by grouped products, and of many tokens by all experts at once on a GPU."""
    config = tiny()
    with jax.set_mesh(make_mesh()):
        module = jax.jit(lambda: MoE(config, jnp.dtype("float32"), rngs=nnx.Rngs(0)))()
        texts = {}
        for T in (8, 40):
            traced = jax.jit(jax.grad(lambda module, x: module(x)[0].sum())).trace(module, jax.device_put(
                jnp.ones((2, T, 32)), P("data", None, None)))
            texts |= {(platform, T): traced.lower(lowering_platforms=(platform,)).as_text()
                      for platform in ("cpu", "cuda", "tpu")}
    assert {case: text.count("ragged_dot") >= 6 for case, text in texts.items()} == {
        case: case == ("cuda", 8) for case in texts}
    assert {case: text.count("grouped_outer") >= 3 for case, text in texts.items()} == {
        case: case[0] == "tpu" for case in texts}
    assert "ragged_dot" not in "".join(text for case, text in texts.items() if case != ("cuda", 8))
