"""Exported releases as transformers, llama.cpp and mlx-lm compute them: golden/export, see golden/README.md.

The others read what jaxllm exported, split and decoded; jaxllm reads the same, and the release that it was made from.
"""
import json
from pathlib import Path

import numpy as np
import pytest
from make_export_golden import digest
from make_release import write_release

import jaxllm
from jaxllm.checkpoint import convert
from jaxllm.checkpoint.export import export

GOLDEN = Path(__file__).parent / "golden" / "export"
# float32 sums in another order: the three implementations differ by up to 1.6e-5 from each other, at logits of standard
# deviation 2; as in test_golden.py.
TOLERANCE = 5e-5


@pytest.fixture(scope="module", params=["v2_flash", "v25", "v26_flash"])
def case(request, tmp_path_factory):
    """(golden arrays, folder with the release, its conversion and both exports)."""
    folder = tmp_path_factory.mktemp(request.param)
    with np.load(GOLDEN / f"{request.param}.npz") as found:
        arrays = dict(found)
    write_release(json.loads(str(arrays["config"])), folder / "hub", seed=int(arrays["seed"]),
                  **json.loads(str(arrays["options"])))
    assert digest(folder / "hub") == str(arrays["weights_sha256"]), "make_release.py no longer makes these weights"
    convert(folder / "hub", folder / "converted", progress=False)
    for weights in ("float32", "bfloat16"):
        export(folder / "converted", folder / weights, weights=weights, layout="split", progress=False)
    return arrays, folder


def logits(folder, arrays):
    return np.asarray(jaxllm.load(folder, dtype="float32").logits(arrays["tokens_BT"]))


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_the_export_is_what_the_others_read(case, weights):
    arrays, folder = case
    assert digest(folder / weights) == str(arrays[f"{weights}_sha256"])


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_the_export_computes_what_the_others_compute(case, weights):
    arrays, folder = case
    expected_BTW = arrays[f"{weights}_logits_BTW"]
    assert abs(expected_BTW.std() - 2) < 0.3      # the tolerance means nothing without the scale
    np.testing.assert_allclose(logits(folder / weights, arrays), expected_BTW, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("form", ["hub", "converted"])
def test_packed_weights_compute_what_the_others_compute(case, form):
    """Packed on the device: the decoded float32 weights of the others are exact, so nothing else may differ."""
    arrays, folder = case
    np.testing.assert_allclose(logits(folder / form, arrays), arrays["float32_logits_BTW"], rtol=0, atol=TOLERANCE)


def test_rounding_to_bfloat16_shows(case):
    """What the tolerance is far below: a model of other weights, if only by rounding."""
    arrays, _ = case
    assert np.abs(arrays["bfloat16_logits_BTW"] - arrays["float32_logits_BTW"]).max() > 500 * TOLERANCE
