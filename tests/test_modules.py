"""Each piece of the model against float64 numpy (oracle.py), in float32 and in bfloat16, on one device and on eight.

In bfloat16 the oracle gets the rounded inputs and weights, so what is left is the rounding on the way.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

from jaxllm.attention import KEY_BLOCK, QUERY_BLOCK, attend, attend_cached, attend_sliding
from jaxllm.axes import make_mesh, spec
from jaxllm.cache import empty_layer
from jaxllm.config import Config, LayerSpec
from jaxllm.mlp import MLP
from jaxllm.model import Layer, stored_layers
from jaxllm.moe import MoE, block_rows, experts_by_block, experts_by_ragged_dot, route
from jaxllm.norm import RMSNorm
from jaxllm.rope import apply_rope, rope_angles

# Largest error as a share of the largest value. float32 rounds by 2^-24 = 6e-8, and sums of some hundred terms, exp and
# the maxima that move during softmax take up to 20 times that. bfloat16 rounds by 2^-9; at most 4 roundings follow each
# other in one piece (rotated q and k, softmax weights or hidden values, output), and they do not all add up.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-7}
DTYPES = list(TOLERANCE)
MESHES = [None, "data=2,expert=2,tensor=2", "data=1,expert=2,tensor=4"]


@pytest.fixture(autouse=True)
def one_device():
    """The mesh in context: attention names shardings, so it needs one."""
    with jax.set_mesh(make_mesh()):
        yield


def check(ours: jax.Array, expected: np.ndarray, dtype: str) -> None:
    assert ours.dtype == dtype and ours.shape == expected.shape
    limit = TOLERANCE[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=0, atol=limit)


def normal(rng: np.random.Generator, *shape: int, dtype: str = "float32", std: float = 1.0) -> np.ndarray:
    """Normal numbers as `dtype` holds them, in a numpy array of that dtype."""
    return (std * rng.standard_normal(shape)).astype(jnp.dtype(dtype))


def wide(*arrays: np.ndarray | None) -> list:
    return [None if x is None else np.asarray(x, np.float64) for x in arrays]


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


def randomise(module, seed: int = 0):
    """The module with weights that make every piece count: matrices of gain 1, scores that peak, scales away from 1."""
    rng = np.random.default_rng(seed)
    inputs = {"o_NVD": (0, 1), "gate_EDI": (1,), "up_EDI": (1,), "down_EID": (1,)}

    def draw(path, leaf):
        name = next(key.name for key in reversed(path) if getattr(key, "name", "value") != "value")
        std, mean = {"scale_D": (0.2, 1.0), "sink_N": (1.0, 1.0), "bias_E": (0.2, 0.0)}.get(
            name, (np.prod([leaf.shape[dim] for dim in inputs.get(name, (0,))]) ** -0.5, 0.0))
        return jax.device_put(jnp.asarray(mean + std * rng.standard_normal(leaf.shape), leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, module)


# --- norm, rope, dense MLP

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e-3, 300.0])       # 1e-3: where epsilon counts
def test_rms_norm(dtype, size):
    rng = np.random.default_rng(0)
    module = randomise(RMSNorm(48, 1e-5, jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    x_BTD = normal(rng, 2, 5, 48, dtype=dtype, std=size)
    x, scale = wide(x_BTD, module.scale_D[...])
    check(module(jnp.asarray(x_BTD)), oracle.rms_norm(x, scale, 1e-5), dtype)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mesh", MESHES)
def test_dense_mlp(dtype, mesh):
    with jax.set_mesh(make_mesh(mesh)):
        module = randomise(jax.jit(lambda: MLP(32, 48, jnp.dtype(dtype), rngs=nnx.Rngs(0)))())
        x_BTD = normal(np.random.default_rng(0), 2, 5, 32, dtype=dtype)
        ours = jax.jit(lambda m, x: m(x))(module, jnp.asarray(x_BTD, out_sharding=spec("batch", None, None)))
    x, *matrices = wide(x_BTD, module.gate_DF[...], module.up_DF[...], module.down_FD[...])
    check(ours, oracle.swiglu(x, *matrices), dtype)


# --- attention

def attention_case(rng, dtype, B, T, S, N, K, H, V, has_sinks, position_std=1.5):
    """Random q [B, T, N, H], k [B, S, K, H], v [B, S, K, V] and sinks [N], in numpy."""
    q, k = normal(rng, B, T, N, H, dtype=dtype, std=position_std), normal(rng, B, S, K, H, dtype=dtype)
    return q, k, normal(rng, B, S, K, V, dtype=dtype), normal(rng, N, std=2.0) if has_sinks else None


def attend_rows(q, k, v, q_pos_BT, k_pos_BS, window, sink_N):
    """The oracle, row by row."""
    rows = zip(*wide(q, k, v), q_pos_BT, k_pos_BS, strict=True)
    sink = None if sink_N is None else sink_N.astype(np.float64)
    return np.stack([oracle.attend(*row, window, sink) for row in rows])


def head_first(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x).transpose(0, 2, 1, 3)


JITTED = jax.jit(attend, static_argnames="window")
# Numbers of keys: a few; one block of them less one, exactly, and one more; not a multiple; several whole blocks.
KEYS = [1, 40, KEY_BLOCK - 1, KEY_BLOCK, KEY_BLOCK + 1, KEY_BLOCK * 5 // 2 + 3, 3 * KEY_BLOCK]


@pytest.mark.parametrize("num_keys", KEYS)
@pytest.mark.parametrize(("window", "has_sinks"), [(None, False), (None, True), (9, True), (KEY_BLOCK + 50, False)])
def test_attend(num_keys, window, has_sinks):
    """The T newest of S tokens; four query heads a kv head, H and V unequal."""
    T = min(num_keys, 6)
    q, k, v, sink = attention_case(np.random.default_rng(num_keys), "float32", 2, T, num_keys, 8, 2, 24, 16, has_sinks)
    k_pos = np.tile(np.arange(num_keys, dtype=np.int32), (2, 1))
    q_pos = k_pos[:, num_keys - T:]
    ours = JITTED(q, head_first(k), head_first(v), q_pos, k_pos, window=window, sink_N=sink)
    check(ours, attend_rows(q, k, v, q_pos, k_pos, window, sink), "float32")


@pytest.mark.parametrize("num_keys", [40, KEY_BLOCK * 5 // 2 + 3])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("N", "K", "H", "V"), [(4, 4, 8, 20), (6, 1, 16, 4)])
def test_attend_in_bfloat16(num_keys, window, N, K, H, V):
    q, k, v, sink = attention_case(np.random.default_rng(0), "bfloat16", 2, 5, num_keys, N, K, H, V, window)
    k_pos = np.tile(np.arange(num_keys, dtype=np.int32), (2, 1))
    ours = JITTED(q, head_first(k), head_first(v), k_pos[:, -5:], k_pos, window=window, sink_N=sink)
    check(ours, attend_rows(q, k, v, k_pos[:, -5:], k_pos, window, sink), "bfloat16")


@pytest.mark.parametrize("num_keys", [40, 2 * KEY_BLOCK + 100])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_attend_to_rows_of_different_lengths(num_keys, has_sinks):
    """Empty slots hold huge numbers, a row may be empty altogether, and a ring's keys stand in no order."""
    q, k, v, sink = attention_case(np.random.default_rng(0), "float32", 4, 3, num_keys, 4, 2, 8, 12, has_sinks)
    length = np.array([0, 2, 17, num_keys])
    k_pos = np.where(np.arange(num_keys)[None] < length[:, None], np.arange(num_keys), -1).astype(np.int32)
    q_pos = (length[:, None] + np.arange(-3, 0)).astype(np.int32)         # of the short rows some are before 0: padding
    k, v = (np.where((k_pos < 0)[..., None, None], np.float32(1e4), x) for x in (k, v))
    turned = [np.roll(x, 5, axis=1) for x in (k, v, k_pos)] if num_keys <= KEY_BLOCK else [k, v, k_pos]
    ours = JITTED(q, *map(head_first, turned[:2]), q_pos, turned[2], window=None, sink_N=sink)
    expected = attend_rows(q, k, v, q_pos, k_pos, None, sink)
    check(ours, expected, "float32")
    assert not ours[0].any() and not expected[0].any()        # who sees nothing gets zeros, not NaN


def test_full_attention_reads_no_blocks_past_the_queries():
    """Of three blocks only the first can be seen; the others hold NaN, which any arithmetic on them would spread."""
    S = 3 * KEY_BLOCK
    q, k, v, _ = attention_case(np.random.default_rng(0), "float32", 2, 4, S, 4, 2, 8, 8, False)
    k[:, KEY_BLOCK:], v[:, KEY_BLOCK:] = np.nan, np.nan
    k_pos = np.tile(np.arange(S, dtype=np.int32), (2, 1))
    q_pos = np.array([[0, 1, 2, 3], [7, 8, 9, KEY_BLOCK - 1]], np.int32)
    ours = JITTED(q, head_first(k), head_first(v), q_pos, k_pos, window=None, sink_N=None)
    seen = slice(KEY_BLOCK)
    check(ours, attend_rows(q, k[:, seen], v[:, seen], q_pos, k_pos[:, seen], None, None), "float32")


def sliding_lengths(window):
    block = max(window, QUERY_BLOCK)
    return [block // 2, block, 2 * block + 3]


@pytest.mark.parametrize(("window", "num"), [(w, T) for w in (1, 7, 128, 200) for T in sliding_lengths(w)])
def test_attend_sliding(window, num):
    """Below, at and above one block of queries; one row starts at 0, so that the keys before it do not exist."""
    S = window - 1 + num
    q, k, v, sink = attention_case(np.random.default_rng(num), "float32", 2, num, S, 4, 2, 8, 12, window != 7)
    start = np.array([0, 1000], np.int32)
    q_pos = start[:, None] + np.arange(num, dtype=np.int32)
    k_pos = start[:, None] + np.arange(-(window - 1), num, dtype=np.int32)
    k[0, :window - 1], v[0, :window - 1] = 1e4, 1e4
    run = jax.jit(attend_sliding, static_argnames="window")
    ours = run(q, head_first(k), head_first(v), start, window=window, sink_N=sink)
    check(ours, attend_rows(q, k, v, q_pos, k_pos, window, sink), "float32")


@pytest.mark.parametrize(("window", "in_flight", "dtype"), [
    (None, 1, "float32"), (7, 1, "float32"), (7, 4, "float32"), (40, 1, "float32"), (7, 4, "bfloat16")])
def test_attend_cached(window, in_flight, dtype):
    """Four rows come in chunks of 1, 4 and 12, right-padded, some with nothing in them; window 40 is never filled."""
    layer = LayerSpec(4, 2, 8, 12, 8, 1e4, window, True, False)
    counts = {12: [[1, 0, 8, 3], [12, 1, 0, 5]], 4: [[4, 3, 0, 4], [1, 1, 1, 0], [2, 4, 3, 4]], 1: [[1, 1, 0, 1]] * 3}
    q, k, v, sink = attention_case(np.random.default_rng(0), dtype, 4, 36, 36, 4, 2, 8, 12, True)
    cache = empty_layer(layer, 4, 32, in_flight, jnp.dtype(dtype))
    run = jax.jit(attend_cached, static_argnames="window")
    start_B, k_pos = np.zeros(4, np.int32), np.tile(np.arange(36, dtype=np.int32), (4, 1))
    for T, count_B in [(T, np.array(row, np.int32)) for T, rows in counts.items() for row in rows]:
        q_pos = start_B[:, None] + np.arange(T, dtype=np.int32)
        at = np.arange(4)[:, None], q_pos
        out, cache = run(q[at], k[at], v[at], start_B, start_B + count_B, cache, window=window, sink_N=sink)
        real = np.arange(T) < count_B[:, None]
        check(np.asarray(out)[real], attend_rows(q[at], k, v, q_pos, k_pos, window, sink)[real], dtype)
        start_B = start_B + count_B


# --- experts

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
    {}, {"norm_topk_prob": False}, {"routed_scaling_factor": 2.5}, {"num_experts_per_tok": 1},
    {"norm_topk_prob": False, "routed_scaling_factor": 2.5}, {"num_experts_per_tok": 8}, {"n_group": 4, "topk_group": 2}, {"n_group": 2},
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


def check_experts(dtype: str, num_tokens: int, num_chosen: int, e: int) -> None:
    """Both ways against numpy and so against each other; foreign rows are exactly zero."""
    rng, D, I = np.random.default_rng(0), 8, 12
    matrices = [normal(rng, e, *shape, dtype=dtype, std=8**-0.5) for shape in ((D, I), (D, I), (I, D))]
    x_MD = normal(rng, num_tokens, D, dtype=dtype)
    ways = [jax.jit(jax.shard_map(way, out_specs=spec(None, None))) for way in (experts_by_block, experts_by_ragged_dot)]
    for name, counts in row_counts(num_tokens * num_chosen, e).items():
        local_R = rng.permutation(np.repeat(np.arange(e + 1, dtype=np.int32), counts))
        every_eMD = np.stack([oracle.swiglu(x, *m) for x, *m in [wide(x_MD, *m) for m in zip(*matrices, strict=True)]])
        every_eMD = np.concatenate([every_eMD, np.zeros((1, num_tokens, D))])
        expected_RD = every_eMD[local_R, np.arange(len(local_R)) // num_chosen]
        for way in ways:
            out_RD = way(x_MD, local_R, *matrices)
            assert out_RD.dtype == jnp.float32, name
            # The output is the sum itself, in float32; in bfloat16 the hidden values were rounded.
            limit = TOLERANCE[dtype] * np.abs(every_eMD).max()
            np.testing.assert_allclose(out_RD, expected_RD, rtol=0, atol=limit, err_msg=name)
            assert not out_RD[local_R == e].any(), name


@pytest.mark.parametrize("num_rows", block_edges(4))
def test_experts(num_rows):
    check_experts("float32", num_rows, 1, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "num_chosen", "num_experts"), [(1, 3, 16), (2, 8, 8), (97, 2, 1), (50, 3, 16)])
def test_experts_of_several_choices(dtype, num_tokens, num_chosen, num_experts):
    check_experts(dtype, num_tokens, num_chosen, num_experts)
