"""The same program is lowered for CPU, GPU and TPU, each with its own way to compute experts. Nothing is executed."""
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxllm
from jaxllm.axes import spec
from jaxllm.generate.load import abstract_model
from jaxllm.generate.step import _prefill

NANO = Path(__file__).parent.parent / "configs" / "mimo-nano"


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_prefill_lowers(platform):
    config, mesh = jaxllm.Config.from_hub(NANO), jaxllm.make_mesh("data=2,expert=2,tensor=2")
    model = abstract_model(config, mesh, jnp.dtype("bfloat16"))

    def tokens(shape, *names):
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=jax.NamedSharding(mesh, spec(*names)))

    with jax.set_mesh(mesh):
        cache = jaxllm.init_cache(config, mesh, 4, 32, dtype=jnp.bfloat16)
        traced = _prefill.trace(model, cache, tokens((4, 8), "batch", None), tokens((4,), "batch"))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    num_moe = sum(layer.is_moe for layer in config.layers)
    found = [text.count(name) for name in ("stablehlo.while", "ragged_dot", "grouped_matmul")]
    assert [count >= 3 * num_moe for count in found[1:]] == [platform == "cuda", platform == "tpu"], found
    assert found[0] == (num_moe if platform == "cpu" else 0)
