"""The same batch on every mesh: loss, gradients, balancing; and where parameters and optimizer lie."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_maker import tiny_config
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.axes import make_mesh, spec
from jaxllm.config import Config
from jaxllm.train.batch import Batch
from jaxllm.train.run import Run
from jaxllm.train.state import Plan, make_plan
from jaxllm.train.step import gradients_of, make_step

RUN = Run(output="out", config={}, tokenizer="tokenizer", data={"text.jsonl": 1.0}, steps=10, mtp_weight=0.3,
          balance_weight=0.01, bias_update=0.01, learning_rate=1e-2, initializer_range=0.1)
SMALL = {"num_hidden_layers": 2, "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1]}
CONFIG = Config.from_dict(tiny_config(**SMALL), "tiny")


def plan_on(mesh: str | None, **changes) -> Plan:
    return make_plan(dataclasses.replace(RUN, mesh=mesh or "", **changes), CONFIG, make_mesh(mesh), {}, num_mtp=1)


def batch_on(plan: Plan) -> Batch:
    """8 rows of two documents and some padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (8, 40)).astype(np.int32)
    begin = np.where(np.arange(40) < 15, 0, np.where(np.arange(40) < 35, 15, 40)) * np.ones((8, 1), int)
    counted = (begin < np.arange(40)) & (rng.random((8, 40)) < 0.9)
    return Batch(*(jax.device_put(x, NamedSharding(plan.mesh, spec("batch", None)))
                   for x in (tokens, begin.astype(np.int32), counted)))


def measured(mesh: str | None, **changes) -> tuple[dict[str, np.ndarray], dict[str, float], dict[str, np.ndarray]]:
    plan = plan_on(mesh, **changes)
    state, frozen = plan.begin(None)
    with jax.set_mesh(plan.mesh):
        found = jax.jit(lambda state, batch: gradients_of(plan, state, frozen, batch))(state, batch_on(plan))
    return tuple({path: np.asarray(x) for path, x in part.items()} for part in found)


@pytest.fixture(scope="module")
def expected():
    return measured(None)


@pytest.mark.parametrize(("mesh", "changes"), [
    ("data=8", {}), ("data=2,expert=2,tensor=2", {}), ("expert=4,tensor=2", {"remat": True}),
    ("data=2,expert=2,tensor=2", {"accumulate": 4}), (None, {"accumulate": 2}), ("tensor=8", {}),
    ("data=2,tensor=4", {"remat": True})], ids=str)
def test_the_same_on_every_mesh(expected, mesh, changes):
    """Also in parts, with layers computed again, and where tensor parallelism repeats kv heads. The bound that is asked
    of a mesh, 1e-5."""
    found = measured(mesh, **changes)
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.keys() == wanted.keys()
        for name in ours:
            assert np.abs(ours[name] - wanted[name]).max() <= 1e-5, name
    assert max(np.abs(gradient).max() for gradient in expected[0].values()) > 0.05
    assert expected[2]["layers.1"].sum() == 8 * 35 * CONFIG.num_experts_per_tok      # nothing dropped, no padding


def test_where_things_lie():
    """Matrices are split over data too, whatever else splits them, and the optimizer's moments as their parameters."""
    plan = plan_on("data=2,expert=2,tensor=2")
    state, _ = plan.begin(None)
    specs = {path: array.sharding.spec for path, array in state.trained.items()}
    assert all("data" in str(found) for path, found in specs.items() if state.trained[path].ndim > 1)
    assert specs["layers.1.moe.gate_EDI"] == P(("tensor", "expert"), "data", None)
    assert specs["embed_WD"] == P(("expert", "tensor"), "data") and specs["norm.scale_D"] == P(None)
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    for moments in (adam.mu, adam.nu):
        assert {path: array.sharding for path, array in moments.items()} == {
            path: array.sharding for path, array in state.trained.items()}
    abstract = plan.abstract()
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    assert [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("mesh", [None, "data=2,expert=2,tensor=2"])
def test_steps(mesh):
    """The loss of a batch that is seen again falls, nothing is compiled twice, biases move by the update, and a
    gradient that is no number leaves the state as it was."""
    plan = plan_on(mesh)
    state, frozen = plan.begin(None)
    step, batch, losses = make_step(plan), batch_on(plan), []
    bias = np.asarray(state.biases["layers.1.moe.bias_E"])
    with jax.set_mesh(plan.mesh):
        for _ in range(8):
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
        assert losses[-1] < losses[0] - 0.5 and step._cache_size() == 1
        moved = np.abs(np.asarray(state.biases["layers.1.moe.bias_E"]) - bias) / RUN.bias_update
        assert 0 < moved.max() <= 8.001 and np.allclose(moved, np.round(moved), atol=1e-3)
        state = dataclasses.replace(state, trained=state.trained | {
            "norm.scale_D": state.trained["norm.scale_D"].at[0].set(jnp.nan)})
        kept = {path: np.asarray(x) for path, x in state.trained.items()}
        state, metrics = step(state, frozen, batch)
        assert metrics["skipped"] == 1 and state.step == 9
        assert all(np.array_equal(np.asarray(x), kept[path], equal_nan=True) for path, x in state.trained.items())


@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2", "data=2,tensor=4"])
def test_the_numbers_do_not_depend_on_where_they_are_drawn(mesh):
    """Of what is trained and of what is not; and a kv head is one, however often the mesh has it."""
    def drawn(mesh: str | None) -> dict[str, jax.Array]:
        state, frozen = plan_on(mesh, train=("layers.0.*",)).begin(None)
        return state.trained | frozen
    alone, spread = drawn(None), drawn(mesh)
    assert spread["layers.0.attention.k_DKH"].shape[1] == CONFIG.layers[0].num_kv_heads
    for path, array in alone.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(spread[path]), err_msg=path)


def test_only_what_is_named_is_trained():
    plan = plan_on(None, train=("mtp.*",))
    state, frozen = plan.begin(None)
    assert all(path.startswith("mtp.0.") for path in state.trained) and "embed_WD" in frozen
    before = {path: np.asarray(x) for path, x in frozen.items()}
    with jax.set_mesh(plan.mesh):
        state, metrics = make_step(plan)(state, frozen, batch_on(plan))
    assert metrics["grad_norm"] > 0 and all(np.array_equal(np.asarray(x), before[path]) for path, x in frozen.items())


@pytest.mark.parametrize(("mesh", "changes", "message"), [
    (None, {"train": ("nothing.*",)}, r"train = \['nothing.\*'\] names no parameter; there are embed_WD,"),
])
def test_what_cannot_be_trained(mesh, changes, message):
    with pytest.raises(ValueError, match=message):
        plan_on(mesh, **changes)
