"""Each piece of the model but attention, and whole layers, against float64 numpy (oracle.py).

In float32 and in bfloat16: there the oracle gets the rounded inputs and weights, so what is left is the rounding on the
way. Modules on one device and on eight.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from oracle import DTYPES, TOLERANCE, check, normal, wide

from jaxllm.axes import make_mesh, spec
from jaxllm.config import Config, LayerSpec
from jaxllm.experts import block_rows, experts_by_block, experts_by_ragged_dot
from jaxllm.mlp import MLP
from jaxllm.model import Layer, stored_layers
from jaxllm.moe import MoE, route
from jaxllm.norm import RMSNorm
from jaxllm.rope import apply_rope, rope_angles

# One device; every axis split; more tensor than kv heads, so that those are repeated.
PLACES = [("float32", None), ("float32", "data=2,expert=2,tensor=2"), ("float32", "expert=2,tensor=4"),
          ("bfloat16", None), ("bfloat16", "data=2,expert=2,tensor=2")]


def tiny(**changes) -> Config:
    """Two kinds of layer: full attention with a dense MLP, sliding with sinks and experts."""
    return dataclasses.replace(Config.from_dict({
        "model_type": "mimo_v2_flash", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "vocab_size": 64, "max_position_embeddings": 64, "layernorm_epsilon": 1e-5, "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1], "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24, "v_head_dim": 16,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 12, "swa_v_head_dim": 20,
        "partial_rotary_factor": 0.334, "rope_theta": 5e6, "swa_rope_theta": 1e4, "sliding_window": 7,
        "add_swa_attention_sink_bias": True, "attention_value_scale": 0.707, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 16}), **changes)


def randomise(module, mesh: Mesh):
    """The module with weights that make every piece count: matrices of gain 1, scores that peak, scales away from 1."""
    rng = np.random.default_rng(0)
    inputs = {"o_NVD": (0, 1), "gate_EDI": (1,), "up_EDI": (1,), "down_EID": (1,)}

    def draw(path, leaf):
        name = next(key.name for key in reversed(path) if getattr(key, "name", "value") != "value")
        std, mean = {"scale_D": (0.2, 1.0), "sink_N": (1.0, 1.0), "bias_E": (0.2, 0.0)}.get(
            name, (np.prod([leaf.shape[dim] for dim in inputs.get(name, (0,))]) ** -0.5, 0.0))
        value = (mean + std * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
        return jax.device_put(value, NamedSharding(mesh, leaf.sharding.spec))

    return jax.tree_util.tree_map_with_path(draw, module)


def run(make, x_BTD: np.ndarray, *args):
    """A module with random weights, on the mesh in context, and its output for x and more arguments."""
    module = randomise(jax.eval_shape(make), jax.sharding.get_mesh())
    x_BTD = jax.device_put(x_BTD, spec("batch", None, None))
    return module, jax.jit(lambda module, x_BTD, *args: module(x_BTD, *args))(module, x_BTD, *args)


# --- norm, rope, dense MLP

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e-3, 300.0])       # 1e-3: where epsilon counts
def test_rms_norm(dtype, size):
    x_BTD = normal(np.random.default_rng(0), 2, 5, 48, dtype=dtype, std=size)
    with jax.set_mesh(make_mesh()):
        module, ours = run(lambda: RMSNorm(48, 1e-5, jnp.dtype(dtype), rngs=nnx.Rngs(0)), x_BTD)
    check(ours, oracle.rms_norm(*wide(x_BTD, module.scale_D[...]), 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [2, 8, 24])
@pytest.mark.parametrize("theta", [1e4, 5e6])
def test_rope(dtype, rotary_dim, theta):
    x_BTNH = normal(np.random.default_rng(0), 2, 4, 3, 24, dtype=dtype)
    position_BT = np.array([[0, 1, 2, 30], [7, 8, 99, 11]], np.int32)
    ours = apply_rope(jnp.asarray(x_BTNH), *rope_angles(jnp.asarray(position_BT), rotary_dim, theta))
    rows = [oracle.rope(x, p, rotary_dim, theta) for x, p in zip(*wide(x_BTNH, position_BT), strict=True)]
    # Angles to 99 in float32 err by 99 * 2^-23 (see below), more than the products do.
    np.testing.assert_allclose(np.asarray(ours, np.float64), rows, rtol=0,
                               atol=99 * 2**-23 * 5 if dtype == "float32" else TOLERANCE[dtype] * 4)
    np.testing.assert_array_equal(ours[..., rotary_dim:], x_BTNH[..., rotary_dim:])


@pytest.mark.parametrize("theta", [1e4, 5e6, 1e7])
def test_rope_angles_at_long_context(theta):
    """An angle is a float32 product of position and float32 frequency: two roundings of 2^-24, as shares of the angle.

    At position 1e6 that is 0.1 for the fastest pairs, in every implementation with float32 angles; a float32 power in
    place of the exact one would take several times as much.
    """
    position_BT = np.array([[0, 1, 1000, 99_999, 262_143], [524_288, 777_777, 999_999, 1_000_000, 1_048_575]], np.int32)
    frequency_r = theta ** (-np.arange(0, 64, 2) / 64)
    exact, rounded = position_BT[..., None] * frequency_r, (
        position_BT[..., None].astype(np.float32) * frequency_r.astype(np.float32)).astype(np.float64)
    for ours, turn in zip(rope_angles(jnp.asarray(position_BT), 64, theta), (np.cos, np.sin), strict=True):
        assert ours.dtype == jnp.float32
        assert np.all(np.abs(np.asarray(ours) - turn(exact)) <= exact * 2**-23 + 2**-23)
        np.testing.assert_allclose(ours, turn(rounded), rtol=0, atol=2**-23)       # one rounding


@pytest.mark.parametrize(("dtype", "mesh"), PLACES)
def test_dense_mlp(dtype, mesh):
    x_BTD = normal(np.random.default_rng(0), 2, 5, 32, dtype=dtype)
    with jax.set_mesh(make_mesh(mesh)):
        module, ours = run(lambda: MLP(32, 48, jnp.dtype(dtype), rngs=nnx.Rngs(0)), x_BTD)
    x, *matrices = wide(x_BTD, module.gate_DF[...], module.up_DF[...], module.down_FD[...])
    check(ours, oracle.swiglu(x, *matrices), dtype)

def weights(config: Config, **changes) -> tuple[np.ndarray, np.ndarray]:
    """Experts and weights by `route` as a dense [T, E], and the oracle's, of 50 random tokens."""
    config = dataclasses.replace(config, **changes)
    rng = np.random.default_rng(0)
    x_TD, router_DE = normal(rng, 50, 32), normal(rng, 32, config.n_routed_experts, std=32**-0.5)
    bias_E = normal(rng, config.n_routed_experts, std=0.5)         # large beside scores in (0, 1): changes most choices
    expected = oracle.route(*wide(x_TD, router_DE, bias_E), config.num_experts_per_tok,
                            normalise=config.norm_topk_prob, scale=config.routed_scaling_factor,
                            num_groups=config.n_group, kept_groups=config.topk_group)
    scores = (1 / (1 + np.exp(-(wide(x_TD)[0] @ router_DE)))).astype(np.float32)
    expert_BTA, weight_BTA = route(jnp.asarray(scores)[None], jnp.asarray(bias_E), config)
    assert expert_BTA.dtype == jnp.int32 and weight_BTA.dtype == jnp.float32
    ours = np.zeros_like(expected)
    np.put_along_axis(ours, np.asarray(expert_BTA[0]), np.asarray(weight_BTA[0], np.float64), axis=-1)
    assert ((ours > 0).sum(-1) == config.num_experts_per_tok).all()        # no expert twice
    return ours, expected


@pytest.mark.parametrize("changes", [
    {}, {"norm_topk_prob": False}, {"routed_scaling_factor": 2.5},
    {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    {"num_experts_per_tok": 1}, {"num_experts_per_tok": 8}, {"n_group": 4, "topk_group": 2}, {"n_group": 2},
    {"n_group": 4, "topk_group": 4}], ids=str)
def test_route(changes):
    ours, expected = weights(tiny(), **changes)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=0)      # a few float32 roundings of 6e-8


def test_the_bias_chooses_and_does_not_weigh():
    """A bias that outweighs every score: the same two experts for all tokens, weighed by their scores alone."""
    scores_BTE = jnp.asarray(np.random.default_rng(0).uniform(0.01, 0.99, (1, 20, 8)), jnp.float32)
    expert_BTA, weight_BTA = route(scores_BTE, jnp.array([0, 5, 0, 0, 0, 0, 9, 0], jnp.float32),
                                   tiny(num_experts_per_tok=2, norm_topk_prob=False))
    assert (np.sort(expert_BTA, axis=-1) == [1, 6]).all()
    np.testing.assert_array_equal(weight_BTA, np.take_along_axis(np.asarray(scores_BTE), np.asarray(expert_BTA), -1))


def row_counts(num_rows: int, num_experts: int) -> dict[str, np.ndarray]:
    """Rows of each expert, and last of foreign experts, in the distributions that are hard for a sort into blocks."""
    rng, e = np.random.default_rng(num_rows), num_experts
    over = np.full(e, min(block_rows(num_rows, e) + 1, max(1, num_rows // e)))         # one row more than a block holds
    unequal = np.arange(e + 1) * (np.arange(e + 1) >= e // 2)
    over = over * (over.cumsum() <= num_rows)
    return {
        "balanced": np.bincount(np.arange(num_rows) % e, minlength=e + 1),
        "one takes all": np.eye(e + 1, dtype=int)[e // 2] * num_rows,
        "one over a block": np.append(over, num_rows - over.sum()),
        "half unchosen, some foreign": rng.multinomial(num_rows, unequal / unequal.sum()),
        "all foreign": np.eye(e + 1, dtype=int)[e] * num_rows,
    }


def block_edges(num_experts: int) -> list[int]:
    """Numbers of rows up to 600 at which `block_rows` takes another size, and the one before each."""
    edges = [R for R in range(2, 601) if block_rows(R, num_experts) != block_rows(R - 1, num_experts)]
    return sorted({1, 600, *edges, *(R - 1 for R in edges)})


@jax.jit
def both_ways(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In a shard_map, as in the model: `ragged_dot` has no sharding rule of its own."""
    return jax.shard_map(lambda *args: (experts_by_block(*args), experts_by_ragged_dot(*args)),
                         out_specs=spec(None, None))(*args)


def check_experts(dtype: str, stored: str, num_tokens: int, num_chosen: int, e: int) -> None:
    """Both ways against numpy, and so against each other; tokens with foreign experts alone get exactly zero."""
    rng, D, I = np.random.default_rng(0), 8, 12
    matrices = [normal(rng, e, *shape, dtype=stored, std=8**-0.5) for shape in ((D, I), (D, I), (I, D))]
    x_MD, weight_MA = normal(rng, num_tokens, D, dtype=dtype), normal(rng, num_tokens, num_chosen)
    every_eMD = np.stack([oracle.swiglu(*wide(x_MD, *of_one)) for of_one in zip(*matrices, strict=True)])
    every_eMD = np.concatenate([every_eMD, np.zeros((1, num_tokens, D))])
    for name, counts in row_counts(num_tokens * num_chosen, e).items():
        local_R = rng.permutation(np.repeat(np.arange(e + 1, dtype=np.int32), counts))
        local_MA = local_R.reshape(num_tokens, num_chosen)
        chosen_MAD = every_eMD[local_MA, np.arange(num_tokens)[:, None]]
        expected_MD = (weight_MA[..., None] * chosen_MAD).sum(1)
        with jax.set_mesh(make_mesh()):
            ways = both_ways(x_MD, local_MA, weight_MA, *matrices)
        for out_MD in ways:
            assert out_MD.dtype == jnp.float32, name
            # The sum itself is float32; in bfloat16 the hidden values were rounded.
            limit = TOLERANCE[dtype] * max(1, np.abs(expected_MD).max())
            np.testing.assert_allclose(out_MD, expected_MD, rtol=0, atol=limit, err_msg=name)
            assert not np.asarray(out_MD)[(local_MA == e).all(-1)].any(), name


@pytest.mark.parametrize("num_rows", block_edges(4))
def test_experts(num_rows):
    check_experts("float32", "float32", num_rows, 1, 4)


@pytest.mark.parametrize(("dtype", "stored"), [(t, t) for t in DTYPES] + [("float32", "bfloat16")])
@pytest.mark.parametrize(("num_tokens", "num_chosen", "num_experts"), [(1, 3, 16), (2, 8, 8), (97, 2, 1), (50, 3, 16)])
def test_experts_of_several_choices(dtype, stored, num_tokens, num_chosen, num_experts):
    """Weights stored in bfloat16 are widened exactly: with float32 tokens they are held to float32's tolerance."""
    check_experts(dtype, stored, num_tokens, num_chosen, num_experts)


@pytest.mark.parametrize(("dtype", "mesh"), PLACES)
def test_moe(dtype, mesh):
    """The router reads the same bfloat16 input as the oracle, in float32, so both choose the same experts."""
    config, x_BTD = tiny(), normal(np.random.default_rng(0), 2, 25, 32, dtype=dtype)
    with jax.set_mesh(make_mesh(mesh)):
        module, (ours, _) = run(lambda: MoE(config, jnp.dtype(dtype), rngs=nnx.Rngs(0)), x_BTD)
    check(ours, np.stack([moe_by_numpy(module, config, x) for x in wide(*x_BTD)]), dtype)


def moe_by_numpy(module: MoE, config: Config, x_TD: np.ndarray) -> np.ndarray:
    router_DE, bias_E = wide(module.router_DE[...], module.bias_E[...])
    return oracle.experts(x_TD, oracle.route(x_TD, router_DE, bias_E, config.num_experts_per_tok),
                          *wide(module.gate_EDI[...], module.up_EDI[...], module.down_EID[...]))


# --- layers

def layer_by_numpy(module: Layer, layer: LayerSpec, config: Config, x_TD: np.ndarray) -> np.ndarray:
    at, epsilon, position_T = module.attention, config.layernorm_epsilon, np.arange(len(x_TD))
    scale_D, q_DNH, k_DKH, v_DKV, o_NVD = wide(module.attention_norm.scale_D[...], at.q_DNH[...], at.k_DKH[...],
                                               at.v_DKV[...], at.o_NVD[...])
    h_TD = oracle.rms_norm(x_TD, scale_D, epsilon)
    q, k = (oracle.rope(np.einsum("td,dnh->tnh", h_TD, w), position_T, layer.rotary_dim, layer.rope_theta)
            for w in (q_DNH, k_DKH))
    v = np.einsum("td,dkv->tkv", h_TD, v_DKV) * config.attention_value_scale
    sink_N = wide(at.sink_N[...])[0] if layer.has_sinks else None
    x_TD = x_TD + np.einsum("tnv,nvd->td", oracle.attend(q, k, v, position_T, position_T, layer.window, sink_N), o_NVD)
    h_TD = oracle.rms_norm(x_TD, *wide(module.mlp_norm.scale_D[...]), epsilon)
    if layer.is_moe:
        return x_TD + moe_by_numpy(module.moe, config, h_TD)
    return x_TD + oracle.swiglu(h_TD, *wide(module.mlp.gate_DF[...], module.mlp.up_DF[...], module.mlp.down_FD[...]))


@pytest.mark.parametrize(("dtype", "mesh", "i"), [
    (*place, i) for place in PLACES for i in (0, 1) if place[0] == "float32" or i == 0])
def test_layer(dtype, mesh, i):
    """20 tokens, three windows. No experts in bfloat16: a norm that rounds may choose others than one that does not."""
    config, x_BTD = tiny(), normal(np.random.default_rng(0), 2, 20, 32, dtype=dtype)
    with jax.set_mesh(make_mesh(mesh)):
        layer = stored_layers(config, make_mesh(mesh))[i]
        position_BT = jax.device_put(np.tile(np.arange(20, dtype=np.int32), (2, 1)), spec("batch", None))
        zero_B, rope = position_BT[:, 0], rope_angles(position_BT, layer.rotary_dim, layer.rope_theta)
        module, (ours, cache, _) = run(lambda: Layer(config, layer, jnp.dtype(dtype), rngs=nnx.Rngs(0)), x_BTD, rope,
                                    zero_B, zero_B + 20, None)
    assert cache is None
    check(ours, np.stack([layer_by_numpy(module, layer, config, x) for x in wide(*x_BTD)]), dtype)
