"""The product's own training step, compiled for a slice that is not here, beside what was planned for it."""
from pathlib import Path

import pytest
from test_compile import first_layers

from jaxllm.axes import make_abstract_mesh
from jaxllm.checkpoint.stated import stated_params
from jaxllm.config import Config
from jaxllm.tpu.chips import slice_of
from jaxllm.tpu.held import Held
from jaxllm.tpu.program import devices_of
from jaxllm.tpu.report import report_of
from jaxllm.tpu.steps import training_of
from jaxllm.tpu.train_plan import plan
from jaxllm.tpu.train_program import compile_train

CONFIGS = Path(__file__).parent.parent.parent / "configs"
SOME = 2**20      # bytes: a norm has 8 KiB, the smallest matrix of these layers some MiB


def test_first_layer_of_flash(libtpu):
    """All parameters of the first layer, which is dense and has full attention, and the embedding and the head.
    Arguments, the peak and what is sent are as planned, to 3%, 10% and 10%; no large argument is on two devices."""
    name, mesh = "MiMo-V2-Flash", {"data": 2, "expert": 2, "tensor": 1}
    config = Config.from_dict(first_layers(CONFIGS / name, 1), name)
    held, on, work = Held(name, config, stated_params(config)), slice_of("v5p:2x2x1"), training_of(config, 4, 64)
    planned = plan(held, on, make_abstract_mesh(mesh), work)
    program = compile_train(held, devices_of(on), mesh, work)
    found = report_of(program, name, on, large=SOME)
    assert found.replicated == {} and program.replicated(1)      # as norms are
    assert found.held == planned.state
    assert sum(planned.state.values()) == pytest.approx(found.memory["arguments"], rel=0.03)
    assert planned.peak == pytest.approx(found.memory["peak"], rel=0.1)
    assert sum(planned.sent.values()) == pytest.approx(sum(x.nbytes for x in found.collectives), rel=0.1)
    assert found.memory["aliased"] >= 0.99 * (found.memory["arguments"] - found.held["batch"])      # in place
