"""Released models that differ only in numbers inside a program: what is compiled of one holds for the others."""
import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from test_compile import first_layers

from jaxllm.axes import make_mesh
from jaxllm.checkpoint.stated import stated_params
from jaxllm.config import Config
from jaxllm.generate.step import init_cache, prefill
from jaxllm.tpu.program import abstract_weights

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def lowered(name: str, weights: str, tokens: int) -> str:
    """The decode or prefill step of the first two layers as the compiler gets it, without its float constants."""
    config = Config.from_dict(first_layers(CONFIGS / name, 2), name)
    mesh, dtype = make_mesh("expert=4,tensor=2"), jnp.dtype(config.dtype)
    with jax.set_mesh(mesh):
        model, _ = abstract_weights(config, mesh, stated_params(config, weights), dtype)
        cache = jax.eval_shape(lambda: init_cache(config, mesh.abstract_mesh, 8, 1024, 1, dtype))
        ids = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8, tokens), (8,))]
        text = jax.jit(prefill).lower(model, cache, *ids).as_text()
    return re.sub(r"dense<[^>]*> : tensor<[0-9x]*f(32|64)>", "", text)


@pytest.mark.parametrize(("weights", "tokens"), [("mxfp4", 64), ("fp8", 1)])
@pytest.mark.parametrize(("one", "others"), [("MiMo-V2.6-Pro", ["MiMo-V2.5-Pro"]),
                                             ("MiMo-V2-Flash", ["MiMo-V2.5", "MiMo-V2.6-Flash"])])
def test_the_same_program(one, others, weights, tokens):
    kinds = {other: Config.from_hub(CONFIGS / other).layers for other in (one, *others)}
    bare = {name: [dataclasses.replace(layer, rope_theta=0.0) for layer in layers] for name, layers in kinds.items()}
    assert all(bare[other] == bare[one] for other in others)      # of every layer, not only the two
    expected = lowered(one, weights, tokens)
    assert len(expected) > 10000 and all(lowered(other, weights, tokens) == expected for other in others)
