"""The product's own training step, compiled for a slice that is not here, beside what was planned for it."""
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from test_compile import first_layers

from jaxllm.axes import make_abstract_mesh
from jaxllm.checkpoint.stated import stated_params
from jaxllm.config import Config
from jaxllm.kernels.trained_matmul import trained_matmul
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


@pytest.mark.parametrize("on", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(("R", "D", "I", "e"), [(4096, 6144, 512, 384), (4096, 6144, 16, 384), (100, 300, 200, 5)],
                         ids=str)
def test_products_of_trained_experts(libtpu, on, R, D, I, e):      # noqa: E741
    """No more memory than one gradient of w takes, however narrow w is, and as many multiplications as there are."""
    place = SingleDeviceSharding(devices_of(slice_of(on))[0])
    x, w, dy, count = (jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in (
        ((R, D), jnp.bfloat16), ((e, D, I), jnp.bfloat16), ((R, I), jnp.float32), ((e,), jnp.int32)))

    def gradients(x, w, dy, count):
        return jax.vjp(lambda x, w: trained_matmul(x, w, count), x, w)[1](dy)
    compiled = jax.jit(gradients).lower(x, w, dy, count).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * e * D * I * 4 + 2**23
    assert compiled.cost_analysis()["flops"] <= 1.1 * (3 * 2 * R * D * I) + 20 * (e * D * I + e * e)
