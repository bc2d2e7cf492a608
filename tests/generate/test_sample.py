"""Sampling against a numpy reference: by chi-square where it is random, exactly where it is not.

All seeds are fixed, so every test gives the same result each time. A right sampler, had its seeds been drawn, would
miss one bound of P_BOUND in ten thousand; some forty are checked here.
"""
import jax
import numpy as np
import pytest
import scipy.stats

import jaxllm
from jaxllm.axes import spec
from jaxllm.generate.sample import Sampling, sample

P_BOUND = 1e-4
N, W = 20_000, 16                              # draws in one batch, vocabulary
DRAWN = jax.jit(sample, static_argnames="kind")
LOGITS_W = np.random.default_rng(5).normal(0, 1.5, W).astype(np.float32)
MESHES = {"one": None, "eight": "data=2,expert=2,tensor=2"}
HIGHEST_SEED = 2**32 - 1


def draw(logits_BW, temperature=1.0, top_k=0, top_p=1.0, seed=0, position=0, kind="truncated", mesh=None):
    """Tokens [B]; settings are numbers or [B]; on a mesh the logits lie as the head leaves them."""
    mesh, B = jaxllm.make_mesh(mesh), len(logits_BW)

    def column(value, dtype):
        return jax.device_put(np.broadcast_to(np.asarray(value, dtype), (B,)), jax.NamedSharding(mesh, spec("batch")))
    logits_BW = jax.device_put(np.asarray(logits_BW, np.float32), jax.NamedSharding(mesh, spec("batch", "vocab")))
    sampling = Sampling(column(temperature, np.float32), column(top_k, np.int32), column(top_p, np.float32),
                        column(seed, np.uint32))
    with jax.set_mesh(mesh):
        return np.asarray(DRAWN(logits_BW, sampling, column(position, np.int32), kind))


def draw_many(logits_W, **settings):
    """N draws: of N seeds at one place, or of what the settings say."""
    return draw(np.tile(logits_W, (N, 1)), **({"seed": np.arange(N), "position": 7} | settings))


def reference(logits_W, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities [W], float64."""
    scaled = logits_W.astype(np.float64) / temperature
    ranked = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))[:top_k or None]
    weights = np.exp(scaled[ranked] - scaled.max())
    num = 1 + int(np.sum(np.cumsum(weights / weights.sum())[:-1] < top_p)) if top_p < 1 else len(ranked)
    out = np.zeros(len(scaled))
    out[ranked[:num]] = weights[:num] / weights[:num].sum()
    return out


def p_value(tokens, probability_W):
    """Of Pearson's chi-square test; 0 if a token was drawn that cannot be."""
    counts, expected = np.bincount(tokens, minlength=len(probability_W)), len(tokens) * probability_W
    if counts[expected == 0].any():
        return 0.0
    rare = (expected < 5) & (expected > 0)                     # chi-square wants 5 expected; the rarer ones together
    often = expected >= 5
    counts, expected = (np.append(x[often], [x[rare].sum()] if rare.any() else []) for x in (counts, expected))
    return scipy.stats.chisquare(counts, expected).pvalue if len(counts) > 1 else 1.0


SETTINGS = [{}, {"temperature": 0.5}, {"temperature": 3.0}, {"temperature": 1e6}, {"top_k": 1}, {"top_k": 3},
            {"top_k": W}, {"top_k": 1000}, {"top_p": 0.3}, {"top_p": 0.8}, {"top_p": 0.999}, {"top_p": 1e-6},
            {"top_k": 8, "top_p": 0.7}, {"top_k": 2, "top_p": 0.99}, {"temperature": 0.7, "top_k": 10, "top_p": 0.9},
            {"temperature": 2.0, "top_p": 0.6}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_distribution(settings, over):
    place = {} if over == "seeds" else {"seed": 3, "position": np.arange(N)}
    assert p_value(draw_many(LOGITS_W, **settings, **place), reference(LOGITS_W, **settings)) > P_BOUND


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_distribution_where_no_row_truncates(settings):
    tokens = draw_many(LOGITS_W, **settings, kind="sampled")
    assert p_value(tokens, reference(LOGITS_W, **settings)) > P_BOUND
    np.testing.assert_array_equal(tokens, draw_many(LOGITS_W, **settings, kind="truncated"))


def test_distribution_over_seeds_far_apart():
    seeds = np.linspace(0, HIGHEST_SEED, N).astype(np.uint32)
    assert p_value(draw_many(LOGITS_W, seed=seeds), reference(LOGITS_W)) > P_BOUND


@pytest.mark.parametrize("wrong", [{"temperature": 1.1}, {"top_k": 14}, {"top_p": 0.99}], ids=str)
def test_chi_square_can_fail(wrong):
    """N draws tell a temperature 10% off, and a rare token or two that are missing or too many."""
    assert p_value(draw_many(LOGITS_W), reference(LOGITS_W, **wrong)) < 1e-6
    assert p_value(draw_many(LOGITS_W, **wrong), reference(LOGITS_W)) < 1e-6


def test_top_p_is_of_what_top_k_left():
    """Four of ten equals are left, each a quarter: half of that is two. Of the whole it would be five, or all four."""
    assert set(draw_many(np.repeat(np.float32([1, -100]), [10, 6]), top_k=4, top_p=0.5)) == {0, 1}


@pytest.mark.parametrize("top_p, kept", [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)])
def test_fewest_that_reach_top_p(top_p, kept):
    """Four equals with a quarter each, exactly, so that a sum can be exactly top_p; the lower id ranks first."""
    logits_W = np.full(W, -1000, np.float32)
    logits_W[[3, 5, 8, 13]] = 2.0
    tokens = draw_many(logits_W, top_p=top_p)
    assert set(tokens) == set([3, 5, 8, 13][:kept])
    assert p_value(tokens, reference(logits_W, top_p=top_p)) > P_BOUND


def test_lower_ids_rank_first_among_equals():
    logits_W = np.float32([0, 2, 1, 2, 1, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    tokens = draw_many(logits_W, top_k=5)
    assert set(tokens) == {1, 3, 6, 2, 4}
    assert p_value(tokens, reference(logits_W, top_k=5)) > P_BOUND


def test_top_k_and_top_p_leave_the_order_of_ids_alone():
    """The same weights under other names: the same draws would not follow, the same shares must."""
    order = np.random.default_rng(1).permutation(W)
    tokens = draw_many(LOGITS_W[order], top_k=9, top_p=0.9)
    assert p_value(order[tokens], reference(LOGITS_W, top_k=9, top_p=0.9)) > P_BOUND


# The last is half the smallest normal float32: dividing by it gives infinities, or zero over zero.
@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1e-10, 1e-30, 1.2e-38, 5e-39])
@pytest.mark.parametrize("kind", ["sampled", "truncated"])
def test_tiny_temperature_is_greedy(temperature, kind):
    assert set(draw_many(LOGITS_W, temperature=temperature, kind=kind)) == {LOGITS_W.argmax()}


def test_smallest_settings_of_all():
    """Below what float32 can hold, which is then zero: greedy, and the likeliest token alone."""
    assert set(draw_many(LOGITS_W, temperature=1e-50)) == {LOGITS_W.argmax()}
    assert set(draw_many(LOGITS_W, top_p=1e-50)) == {LOGITS_W.argmax()}


def test_huge_temperature_is_uniform():
    highest = float(np.finfo(np.float32).max)
    assert p_value(draw_many(LOGITS_W, temperature=highest), np.full(W, 1 / W)) > P_BOUND
    # not the highest: of logits that far below the smallest float32, no order is left
    assert p_value(draw_many(LOGITS_W, temperature=1e30, top_k=4), reference(LOGITS_W, 1e30, 4)) > P_BOUND


def test_huge_logits():
    logits_W = np.float32([3e38, -3e38, 2e38, *[0] * (W - 3)])
    assert set(draw_many(logits_W)) == set(draw_many(logits_W, top_p=0.9)) == {0}


def test_greedy_takes_the_first_of_equals():
    logits_W = np.float32([0, 2, 1, 2, 1, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    for kind in ("greedy", "sampled", "truncated"):
        assert set(draw_many(logits_W, temperature=0.0, kind=kind)) == {1}


@pytest.mark.parametrize("seed_step, position_step", [(1, 0), (0, 1), (1, 1), (1, -1), (2**16, 0), (0, 2**16)])
def test_neighbours_are_independent(seed_step, position_step):
    """Draws of neighbouring seeds and places: every pair of tokens as often as chance says."""
    logits_4 = np.float32([1.0, 0.5, 0.0, 0.0])
    seed, position = np.arange(N, dtype=np.uint32) * 3, 100 + np.arange(N) % 500
    first = draw_many(logits_4, seed=seed, position=position)
    second = draw_many(logits_4, seed=seed + np.uint32(seed_step), position=position + position_step)
    probability_4 = reference(logits_4)
    assert p_value(first * 4 + second, np.outer(probability_4, probability_4).ravel()) > P_BOUND


def test_tokens_of_one_place_have_their_own_noise():
    """Which of the first half wins says nothing about which of the second half would have."""
    low_W, high_W = np.repeat(np.float32([0, -1000]), W // 2), np.repeat(np.float32([-1000, 0]), W // 2)
    first, second = draw_many(low_W), draw_many(high_W) - W // 2
    assert p_value(first * 8 + second, np.full(64, 1 / 64)) > P_BOUND


def test_seed_and_place_decide():
    one = draw_many(LOGITS_W)
    np.testing.assert_array_equal(one, draw_many(LOGITS_W))
    for other in (draw_many(LOGITS_W, position=8), draw_many(LOGITS_W, seed=np.arange(N) + N)):
        # two independent draws are equal as often as the sum of squares says; five standard deviations
        share = np.sum(reference(LOGITS_W)**2)
        assert abs(np.mean(one == other) - share) < 5 * np.sqrt(share * (1 - share) / N)


@pytest.fixture(scope="module")
def batch():
    """64 rows of every kind, and what each gets alone, by its own kind."""
    rng, B = np.random.default_rng(2), 64
    rows = {"temperature": np.tile([0.0, 1.0, 0.7, 1.5], B // 4), "top_k": np.tile([0, 0, 5, 0, 0, 0, 0, 40], B // 8),
            "top_p": np.tile([1.0, 1.0, 1.0, 0.8], B // 4), "seed": rng.integers(0, 2**32, B),
            "position": rng.integers(0, 5000, B)}
    logits_BW = rng.normal(0, 2, (B, 96)).astype(np.float32)

    def kind(i):
        plain = rows["top_k"][i] == 0 and rows["top_p"][i] == 1
        return "greedy" if rows["temperature"][i] == 0 else "sampled" if plain else "truncated"
    kinds = [kind(i) for i in range(B)]
    assert {*kinds} == {"greedy", "sampled", "truncated"}
    alone = [draw(logits_BW[i:i + 1], **{name: x[i] for name, x in rows.items()}, kind=kinds[i])[0] for i in range(B)]
    drawn = np.array(kinds) != "greedy"
    assert np.mean(np.array(alone)[drawn] == logits_BW.argmax(-1)[drawn]) < 0.6      # chance has its say
    return logits_BW, rows, np.array(alone)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_a_row_gets_the_same_in_any_batch_on_any_mesh(batch, mesh):
    logits_BW, rows, alone = batch
    orders = [np.arange(64), np.arange(64)[::-1], np.random.default_rng(3).permutation(64)]
    for order in orders:
        tokens = draw(logits_BW[order], **{name: x[order] for name, x in rows.items()}, mesh=mesh)
        np.testing.assert_array_equal(tokens, alone[order])


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("kind", ["greedy", "sampled", "truncated"])
def test_tokens_are_int32_and_lie_along_the_batch(kind, mesh):
    mesh = jaxllm.make_mesh(mesh)
    with jax.set_mesh(mesh):
        rows = [jax.device_put(np.zeros(4, dtype), jax.NamedSharding(mesh, spec("batch")))
                for dtype in (np.float32, np.int32, np.float32, np.uint32, np.int32)]
        logits_BW = jax.device_put(np.zeros((4, 96), np.float32), jax.NamedSharding(mesh, spec("batch", "vocab")))
        out = jax.eval_shape(DRAWN, logits_BW, Sampling(*rows[:4]), rows[4], kind)
    assert out.shape == (4,) and out.dtype == np.int32 and out.sharding.spec == spec("batch")
