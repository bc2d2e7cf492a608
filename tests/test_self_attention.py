"""Attention of a row to itself against float64 numpy (oracle.py), and its gradients against those of a plain one."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import check, normal, wide

from jaxllm.axes import make_mesh, spec
from jaxllm.self_attention import ROWS, TILE, attend_self

HEADS = ("batch", None, "heads", None)
# Less than a block of queries, a block and a bit, several tiles of keys and none of them whole; long and short windows.
CASES = [(5, None), (5, 3), (150, 20), (ROWS // 2 + 70, None), (TILE + 200, 400), (2 * TILE + 90, None),
         (2 * TILE + 90, 130), (2 * TILE + 90, 1)]


def case(T, dtype="float32", B=2, N=4, K=2, H=12, V=8):
    """q, k, v, sinks; and begins of rows: the first is one document, the others have three of odd lengths."""
    rng = np.random.default_rng(T)
    q, k, v = (normal(rng, B, T, *heads, dtype=dtype, std=std) for *heads, std in ((N, H, 1.5), (K, H, 1), (K, V, 1)))
    cuts = np.sort(rng.integers(0, T, (B, 2)), axis=1)
    place = np.arange(T)[None]
    begin = np.where(place >= cuts[:, 1:], cuts[:, 1:], np.where(place >= cuts[:, :1], cuts[:, :1], 0))
    begin[0] = 0
    return q, k, v, normal(rng, N, std=2.0), begin.astype(np.int32)


def plain(q, k, v, sink, begin, window):
    """All scores at once, to differentiate."""
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, G, 2), jnp.repeat(v, G, 2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") / math.sqrt(q.shape[-1])
    place = np.arange(T)
    seen = (place[None, :] <= place[:, None]) & (place[None, :] > place[:, None] - (window or T))
    seen = (seen[None] & (place[None, None] >= begin[:, :, None]))[:, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    if sink is not None:
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink[None, :, None, None], (*scores.shape[:3], 1))], -1)
    return jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(scores, -1)[..., :T], v, precision="highest")


@pytest.mark.parametrize(("T", "window", "dtype"), [(*c, "float32") for c in CASES] + [(*CASES[-3], "bfloat16")])
def test_output(T, window, dtype):
    q, k, v, sink, begin = case(T, dtype)
    with jax.set_mesh(make_mesh()):
        ours = jax.jit(attend_self, static_argnames="window")(q, k, v, window=window, sink_N=sink, begin_BT=begin)
    place = np.arange(T)
    for row, (rows, start_T) in enumerate(zip(zip(*wide(q, k, v), strict=True), begin, strict=True)):
        for start in np.unique(start_T):       # each document by itself
            at = start_T == start
            expected = oracle.attend(*(x[at] for x in rows), place[at], place[at], window, sink.astype(np.float64))
            check(ours[row][at], expected, dtype)


@pytest.mark.parametrize(("mesh", "has_sink"), [(None, False), ("data=2,expert=2,tensor=2", True)])
@pytest.mark.parametrize(("T", "window"), CASES)
def test_gradients(T, window, mesh, has_sink):
    """Of q, k, v and sinks; float32 sums of other orders over up to T places, of gradients to 30."""
    q, k, v, sink, begin = case(T)
    weight = normal(np.random.default_rng(1), *q.shape[:3], v.shape[-1])

    def loss(attend):
        return jax.jit(jax.value_and_grad(lambda q, k, v, sink: (attend(q, k, v, sink if has_sink else None)
                                                                  * weight).sum(), argnums=(0, 1, 2, 3)))
    expected = loss(lambda q, k, v, sink: plain(q, k, v, sink, begin, window))(q, k, v, sink)
    with jax.set_mesh(make_mesh(mesh)):
        q, k, v, sink, begin, weight = (jax.device_put(x, spec(*names)) for x, names in (
            (q, HEADS), (k, HEADS), (v, HEADS), (sink, ("heads",)), (begin, ("batch", None)), (weight, HEADS)))
        ours = loss(lambda q, k, v, sink: attend_self(q, k, v, window, sink, begin))(q, k, v, sink)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), ours, expected)
    assert not has_sink or np.abs(ours[1][3]).min() > 1e-3


def test_who_sees_nothing():
    """Padding begins behind itself: zeros and no gradient there, not NaN."""
    q, k, v, _, begin = case(40)
    begin[:, 30:] = 40
    with jax.set_mesh(make_mesh()):
        value, pull = jax.vjp(lambda q, k, v: attend_self(q, k, v, None, None, begin), q, k, v)
        gradients = pull(jnp.ones_like(value))
    assert not value[:, 30:].any() and all(np.isfinite(x).all() and not x[:, 30:].any() for x in gradients)


def test_no_matrix_of_all_scores():
    """T x T numbers of one head are nowhere in the program, forward or backward, nor a quarter of them."""
    T = 8 * TILE
    q, k, v, sink, begin = case(T, B=1, N=1, K=1)
    with jax.set_mesh(make_mesh()):
        step = jax.jit(jax.grad(lambda q, k, v, sink: attend_self(q, k, v, None, sink, begin).sum(), argnums=(0, 1, 2)))
        compiled = step.lower(q, k, v, sink).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T * T * 4 // 4
