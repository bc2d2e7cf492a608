"""Gradients of adapters on weights that stay packed, FP8 and MXFP4: as on decoded ones, and by the chain rule.

MiMo-V2.6 in small with adapters on every projection but the router's. The gradients of plain weights, which the chain
rule starts from, are held against finite differences in test_gradients.py.
"""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from make_release import write_release
from release_cases import CASES

import jaxllm
from jaxllm.paths import parameter_path, parameters
from jaxllm.quant import Adapted, Packed, decode
from jaxllm.train.batch import Batch
from jaxllm.train.loss import loss

RANK, SCALE, T = 3, 2.0, 20
# Names of projections -> (dims that come before all others, in-dims)
PROJECTIONS = {"q_DNH": (0, 1), "k_DKH": (0, 1), "v_DKV": (0, 1), "o_NVD": (0, 2), "gate_DF": (0, 1), "up_DF": (0, 1),
               "down_FD": (0, 1), "gate_EDI": (1, 1), "up_EDI": (1, 1), "down_EID": (1, 1)}


def leaves(model):
    """Path -> weight, packed or not."""
    return {parameter_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(
        model, is_leaf=lambda x: isinstance(x, Packed))}


def replaced(model, change):
    """The model with change(path, weight) in the place of each weight."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: change(parameter_path(path), leaf), model,
                                            is_leaf=lambda x: isinstance(x, Packed))


def make_adapter(path, leaf, rng):
    """(a, b) of normal numbers, split over the mesh as the weight."""
    stack, ins = PROJECTIONS[path.split(".")[-1]]
    shape, spec = leaf.shape, jax.tree.leaves(leaf)[0].sharding.spec
    spec, mid = (*spec, *(None,) * (len(shape) - len(spec))), stack + ins
    a = rng.standard_normal((*shape[:mid], RANK), np.float32) / np.sqrt(np.prod(shape[stack:mid]))
    b = rng.standard_normal((*shape[:stack], RANK, *shape[mid:]), np.float32) / 8
    return tuple(jax.device_put(x.astype(np.float32), P(*axes)) for x, axes in (
        (a, (*spec[:mid], None)), (b, (*spec[:stack], None, *spec[mid:]))))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    config, options = CASES["v26_flash"]
    write_release(config, folder := tmp_path_factory.mktemp("release"), **options)
    return jaxllm.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def adapters(packed):
    rng = np.random.default_rng(0)
    with jax.set_mesh(packed.mesh):
        return {path: make_adapter(path, leaf, rng) for path, leaf in leaves(packed.transformer).items()
                if path.split(".")[-1] in PROJECTIONS}


@pytest.fixture(scope="module")
def batch(packed):
    tokens_BT = np.random.default_rng(1).integers(0, packed.config.vocab_size, (2, T), dtype=np.int32)
    return Batch(tokens_BT, np.where(np.arange(T) < 8, 0, 8) + 0 * tokens_BT, (np.arange(T) % 8 > 0) & (tokens_BT >= 0))


def loss_of(batch, model):
    return loss(model, batch, balance_weight=0.5)[0]


def gradients(model, adapters, batch):
    """(loss, path -> gradients of a and b), of the adapters on this model."""
    @jax.jit
    def step(adapters, model):
        return jax.value_and_grad(lambda adapters: loss_of(batch, replaced(
            model, lambda path, leaf: Adapted(leaf, *adapters[path], SCALE) if path in adapters else leaf)))(adapters)
    return step(adapters, model)


@pytest.fixture(scope="module")
def on_packed(packed, adapters, batch):
    with jax.set_mesh(packed.mesh):
        return gradients(packed.transformer, adapters, batch)


@pytest.fixture(scope="module")
def decoded(packed):
    with jax.set_mesh(packed.mesh):
        return jax.jit(lambda model: replaced(model, lambda _, leaf: decode(leaf, jnp.dtype("float32"))))(
            packed.transformer)


def share(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_every_kind_of_weight_has_adapters(packed, adapters):
    weights = leaves(packed.transformer)
    assert {weights[path].kind if isinstance(weights[path], Packed) else "plain" for path in adapters} == {
        "fp8", "mxfp4", "plain"}
    assert len(adapters) == 3 * 4 + 3 * 3      # attention; dense, experts, experts


def test_packed_base_gives_what_the_decoded_one_gives(packed, decoded, adapters, batch, on_packed):
    """The same products of the same numbers, in other programs: float32 sums may be rounded otherwise."""
    with jax.set_mesh(packed.mesh):
        value, expected = gradients(decoded, adapters, batch)
    assert abs(float(value - on_packed[0])) < 1e-6
    for path, pair in expected.items():
        for found, wanted in zip(on_packed[1][path], pair, strict=True):
            assert share(found, wanted) < 2e-6, path


def test_chain_rule(packed, decoded, adapters, batch, on_packed):
    """Of W = base + scale * a @ b with gradient G, a has scale * G @ b.T and b has scale * a.T @ G."""
    def merged(path, leaf):
        if path not in adapters:
            return leaf
        a, b = (np.asarray(x, np.float64) for x in adapters[path])
        stack, _ = PROJECTIONS[path.split(".")[-1]]
        change = np.tensordot(a, b, 1) if not stack else np.stack(list(map(np.dot, a, b)))
        return jax.device_put((np.asarray(leaf, np.float64) + SCALE * change).astype(np.float32), leaf.sharding)

    with jax.set_mesh(packed.mesh):
        value, tree = jax.jit(jax.value_and_grad(partial(loss_of, batch)))(replaced(decoded, merged))
    assert abs(float(value - on_packed[0])) < 2e-5      # sums in another order, as test_gradients.py allows in part
    whole = parameters(tree)
    for path, (a, b) in adapters.items():
        stack, ins = PROJECTIONS[path.split(".")[-1]]
        E = whole[path].shape[0] if stack else 1
        a, b, g = (np.asarray(x, np.float64) for x in (a, b, whole[path]))
        a_EIr, b_ErO = a.reshape(E, -1, RANK), b.reshape(E, RANK, -1)
        g_EIO = g.reshape(E, a_EIr.shape[1], b_ErO.shape[2])
        for found, wanted in zip(on_packed[1][path], (np.einsum("eio,ero->eir", g_EIO, b_ErO),
                                                      np.einsum("eir,eio->ero", a_EIr, g_EIO)), strict=True):
            assert share(found, SCALE * wanted.reshape(found.shape)) < 2e-5, path
