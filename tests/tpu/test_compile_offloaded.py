"""Experts in host memory, compiled for a TPU: only those that are chosen come over, and beside other work."""
import re

import pytest
from hub_maker import tiny_config

from jaxllm.checkpoint.stated import stated_params
from jaxllm.config import Config
from jaxllm.offloaded import on_device
from jaxllm.tpu.chips import slice_of
from jaxllm.tpu.program import compile_step, devices_of
from jaxllm.tpu.report import report_of
from jaxllm.tpu.steps import Work
from jaxllm.train.memory import device_bytes


def test_a_layer(libtpu):
    """Host bytes are those of the leaves, none are made, and on the device there are a few experts beside the resident
    ones. The next fetch is begun before the loop over blocks and waited for after it."""
    config = Config.from_dict(tiny_config(
        num_hidden_layers=1, hybrid_layer_pattern=[1], moe_layer_freq=[1], hidden_size=1024, n_routed_experts=48,
        moe_intermediate_size=2048, intermediate_size=2048, quantization_config=None), "tiny")
    on = slice_of("v6e:2x2")
    work = Work("decode", 8, 128, 1)
    program = compile_step(config, devices_of(on), "tensor=4", work, stated_params(config, "mxfp4"), resident=4)
    found = report_of(program, "tiny", on)
    experts = [leaf for path, leaf in program.weights.items() if path.endswith(("EDI", "EID"))]
    host = device_bytes(experts) - device_bytes(on_device(experts))
    assert found.memory["host"] == pytest.approx(host, rel=0.01) and host > 30 * 2**20
    assert found.held["experts"] == device_bytes(on_device(experts)) < host / 10
    assert found.memory["temporaries"] < host / 4 and found.memory["peak"] < host
    parts = re.split(r"\n(?=%|ENTRY)", program.compiled.as_text())
    body = next(part for part in parts if "dynamic-slice-start(" in part)
    order = [found[1] for found in re.finditer(r" (dynamic-slice-start|dynamic-slice-done|while)\(", body)]
    assert order.index("dynamic-slice-start") < order.index("while") < order.index("dynamic-slice-done")
