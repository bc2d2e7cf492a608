"""An exported folder in transformers itself, for whoever has the `oracle` extra; others have the golden files.

transformers is given the folder and nothing else. It knows V2-Flash, with one key more in the window than the hub's.
"""
import numpy as np
import pytest
from make_export_golden import CASES, read_with_transformers
from make_release import write_release

import jaxllm
from jaxllm.checkpoint import convert
from jaxllm.checkpoint.export import export

pytest.importorskip("torch", reason="needs the oracle extra")
pytest.importorskip("transformers", reason="needs the oracle extra")
pytestmark = pytest.mark.filterwarnings("default")      # theirs are not ours to mend


@pytest.mark.parametrize("shard_bytes", [10**6, 10**9])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_transformers_loads_it_and_has_the_same_logits(weights, shard_bytes, tmp_path):
    config, options, _ = CASES["v2_flash"]
    write_release(config, tmp_path / "hub", seed=2, **options)
    convert(tmp_path / "hub", tmp_path / "converted", progress=False)
    export(tmp_path / "converted", tmp_path / weights, weights=weights, layout="split", shard_bytes=shard_bytes,
           progress=False)
    tokens_BT = np.random.default_rng(2).integers(0, config["vocab_size"], (2, 40), dtype=np.int32)
    theirs_BTW = read_with_transformers(tmp_path / weights, tokens_BT)
    ours_BTW = np.asarray(jaxllm.load(tmp_path / weights, dtype="float32").logits(tokens_BT))
    np.testing.assert_allclose(ours_BTW, theirs_BTW, rtol=0, atol=5e-5)      # as in test_export_golden.py
