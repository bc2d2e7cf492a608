"""The loss of packed documents and its gradients against an independent float64 loss and its finite differences.

All at once: sinks, partial rope, value scale, full and sliding layers, routed experts, two MTP blocks, balance loss,
documents shorter and longer than the window, a masked prompt, padding.
"""
import re

import jax
import numpy as np
import pytest
from hub_maker import tiny_config, write_hub
from reference import Reference

from jaxllm.axes import make_mesh
from jaxllm.checkpoint import load_arrays, open_source
from jaxllm.config import Config
from jaxllm.generate.load import abstract_model
from jaxllm.paths import parameter_path, parameters
from jaxllm.train.batch import Batch
from jaxllm.train.loss import loss

NUM_MTP, WEIGHTS = 2, (0.3, 0.5)      # of MTP and balance: the latter large enough to be seen
CONFIG = tiny_config(
    hidden_size=32, num_hidden_layers=3, vocab_size=48, num_attention_heads=4, num_key_value_heads=1, head_dim=12,
    v_head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=12, swa_v_head_dim=8,
    hybrid_layer_pattern=[1, 0, 1], moe_layer_freq=[0, 1, 1], intermediate_size=48, moe_intermediate_size=16,
    add_full_attention_sink_bias=True)
LENGTHS = ((15, 1, 10), (9, 3, 16))      # of the documents of each row; what is left is padding
T, PROMPT = 28, 5                        # tokens of a row, and of the last document's part that is not counted
STEP = 1e-5      # of finite differences: float64 rounds them by 1e-10 here, and cuts off as much
# Share of the gradient of a group of parameters, by the Euclidean norm. Along one direction float32 leaves it up to
# 3e-7; as a whole up to 3e-6 (test_loss_golden.py).
TOLERANCE = 2e-6


def make_batch():
    rng = np.random.default_rng(0)
    batch = Batch(*(np.full((len(LENGTHS), T), fill, dtype)
                    for fill, dtype in ((0, np.int32), (T, np.int32), (0, bool))))
    for row, lengths in enumerate(LENGTHS):
        for begin, length in zip(np.cumsum((0, *lengths[:-1])), lengths, strict=True):
            at = row, slice(begin, begin + length)
            batch.tokens_BT[at], batch.begin_BT[at] = rng.integers(0, CONFIG["vocab_size"], length), begin
            batch.counted_BT[row, begin + 1:begin + length] = True
        batch.counted_BT[row, begin:begin + PROMPT] = False
    return batch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_hub(folder, CONFIG, seed=1, mtp=NUM_MTP)
    tree = abstract_model(Config.from_hub(folder), make_mesh(), jax.numpy.dtype("float32"), NUM_MTP)
    arrays = load_arrays(open_source(folder), parameters(tree))
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[parameter_path(path)], tree)


def gradients(model, remat=False):
    """(loss, its parts, gradients by path) of the batch."""
    with jax.set_mesh(make_mesh()):
        step = jax.jit(jax.value_and_grad(lambda model: loss(model, make_batch(), *WEIGHTS, remat), has_aux=True))
        (value, (metrics, _)), tree = step(model)
    return value, metrics, parameters(tree)


@pytest.fixture(scope="module")
def ours(model):
    return gradients(model)


@pytest.fixture(scope="module")
def exact(model):
    """(the float64 loss as a function of the parameters, the parameters, its value there, the choices there)."""
    function = Reference(model.config, make_batch(), NUM_MTP, *WEIGHTS)
    params = {path: np.asarray(value, np.float64) for path, value in parameters(model).items()}
    return function, params, function(params), function.chosen


def group(path):
    return re.sub(r"\d+\.", "", path)


GROUPS = [
    "embed_WD", "head_DW", "norm.scale_D", "layers.attention_norm.scale_D", "layers.mlp_norm.scale_D",
    *(f"layers.attention.{name}" for name in ("q_DNH", "k_DKH", "v_DKV", "o_NVD", "sink_N")),
    *(f"layers.mlp.{name}" for name in ("gate_DF", "up_DF", "down_FD")),
    *(f"layers.moe.{name}" for name in ("router_DE", "gate_EDI", "up_EDI", "down_EID")),
    *(f"mtp.{name}.scale_D" for name in ("embed_norm", "hidden_norm", "attention_norm", "mlp_norm", "norm")),
    "mtp.join_CD", *(f"mtp.attention.{name}" for name in ("q_DNH", "k_DKH", "v_DKV", "o_NVD", "sink_N")),
    *(f"mtp.mlp.{name}" for name in ("gate_DF", "up_DF", "down_FD"))]


def test_every_parameter_is_in_a_group(model):
    assert {group(path) for path in parameters(model)} == {*GROUPS, "layers.moe.bias_E"}


def test_loss(ours, exact):
    # float32 sums of some ten layers at logits of standard deviation 2, as in test_loss_golden.py
    assert abs(float(ours[0]) - exact[2]) < 5e-6


@pytest.mark.parametrize("name", GROUPS)
def test_gradient(name, ours, exact):
    """Along our gradient, which finds any error in its size, and along a random direction, which finds any other."""
    function, params, _, chosen = exact
    grad = {path: np.asarray(value, np.float64) for path, value in ours[2].items() if group(path) == name}
    rng = np.random.default_rng(len(name))
    length = norm(grad)
    for direction in (grad, {path: rng.standard_normal(value.shape) for path, value in grad.items()}):
        unit = {path: value / norm(direction) for path, value in direction.items()}
        ends = []
        for step in (STEP, -STEP):
            ends.append(function(params | {path: params[path] + step * unit[path] for path in unit}))
            assert all(map(np.array_equal, function.chosen, chosen)), "the step is so long that a token changes experts"
        expected = (ends[0] - ends[1]) / (2 * STEP)
        found = sum((grad[path] * unit[path]).sum() for path in unit)
        assert abs(found - expected) < TOLERANCE * length


def norm(arrays):
    return np.sqrt(sum((value**2).sum() for value in arrays.values()))


def test_biases_have_none(ours):
    """They choose experts, and the balancing rule alone moves them."""
    assert not any(np.asarray(value).any() for path, value in ours[2].items() if path.endswith("bias_E"))


def test_remat_changes_nothing(model, ours):
    """The same sums in another program: float32 may round each of them otherwise."""
    value, _, again = gradients(model, remat=True)
    assert abs(float(value - ours[0])) < 1e-6
    for path, grad in ours[2].items():
        np.testing.assert_allclose(again[path], grad, rtol=0, atol=2e-6 * np.abs(grad).max(initial=1e-30), err_msg=path)
