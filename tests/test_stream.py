"""Whole models whose tokens lie apart over the mesh between the layers' products: logits are those of one device.

Small models send too little for that; here no stream is too small.
"""
import jax
import numpy as np
import pytest
from hub_maker import write_hub
from make_release import write_release
from release_cases import CASES
from test_mesh import TINY, TOLERANCE

import jaxllm
from jaxllm import axes

MESHES = ("expert=8", "data=2,expert=2,tensor=2")
SHAPES = {(8, 5): ("stream_batch", None), (2, 16): ("batch", "stream_seq"), (2, 5): ("batch", None)}


@pytest.fixture(scope="module", autouse=True)
def least():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(axes, "LEAST_STREAM", 0)
        jax.clear_caches()      # of programs made with another
        yield


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    write_hub(folder := tmp_path_factory.mktemp("hub"), TINY)
    return folder


@pytest.fixture(scope="module")
def one_device(hub):
    return jaxllm.load(hub)


@pytest.fixture(scope="module", params=MESHES)
def model(request, hub):
    return jaxllm.load(hub, request.param)


def tokens(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(1).integers(0, TINY["vocab_size"], shape, np.int32)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits(model, one_device, shape):
    """Rows apart, a row's tokens apart, and neither."""
    assert axes.stream(*shape, 256, model.mesh) == SHAPES[shape]
    np.testing.assert_allclose(model.logits(tokens(shape)), one_device.logits(tokens(shape)), rtol=0, atol=TOLERANCE)


def test_decode(model, one_device):
    """A prompt's tokens apart, then rows."""
    found = []
    for each in (model, one_device):
        cache = jaxllm.init_cache(each.config, each.mesh, 8, 32, dtype=each.dtype)
        logits, cache = jaxllm.prefill(each.transformer, cache, tokens((8, 16)), np.arange(8, 16))
        found.append([np.asarray(x) for x in (logits, jaxllm.decode(each.transformer, cache, np.arange(8))[0])])
    for ours, expected in zip(*found, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


def test_packed_experts(tmp_path):
    """MXFP4, another order of float32 sums of logits up to 8: 5e-5, as for the same rows not apart."""
    config, options = CASES["v26_pro"]
    write_release(config, tmp_path, **options)
    models = [jaxllm.load(tmp_path, mesh) for mesh in (None, MESHES[1])]
    one, many = (model.logits(tokens((8, 3))) for model in models)
    np.testing.assert_allclose(many, one, rtol=0, atol=5e-5)


def test_what_is_too_small():
    """Bytes of one place along `data`; and nothing is apart on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(axes, "LEAST_STREAM", 1024)
        for mesh, num, names in (("expert=8", 8, "stream_batch"), ("expert=4", 4, "batch"), (None, 64, "batch"),
                                 ("data=2,expert=4", 8, "batch"), ("data=2,expert=4", 16, "stream_batch"),
                                 ("data=8", 64, "batch")):
            assert axes.stream(num, 1, 128, jaxllm.make_abstract_mesh(mesh)) == (names, None), (mesh, num)
