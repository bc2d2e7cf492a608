"""Make tests/golden/export/*.npz: logits of exported releases, as transformers, llama.cpp and mlx-lm load them.

    python tools/make_export_golden.py [CASE ...]      # in the environment that tests/golden/README.md describes

A small release in packed weights is converted and exported with split projections, decoded to float32, which is exact,
and to bfloat16. transformers knows V2-Flash alone and reads its folders with from_pretrained, nothing told: its window
counts the query on top of the hub's number, so the config of the case says that too. For the others the expected values
are llama.cpp's. The weights are not stored: the test makes and exports them again.
"""
import hashlib
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from make_release import write_release

from jaxllm.checkpoint import convert
from jaxllm.checkpoint.export import export

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "export"
COMMAND = "python tools/make_export_golden.py"
PACKAGES = ("torch", "transformers", "llama-cpp-python", "mlx-lm", "mlx", "numpy")

sys.path.insert(0, str(ROOT / "tests"))
from release_cases import FUSED, small_config  # noqa: E402  (needs the path above)
from release_reader import read_tensors  # noqa: E402

SEED, NUM_TOKENS = 1, 45      # five windows
# The layers that transformers assumes of every V2-Flash: the first dense and full, then every sixth full.
SIX_LAYERS = dict(vocab_size=96, num_hidden_layers=6, hybrid_layer_pattern=[0, 1, 1, 1, 1, 0],
                  moe_layer_freq=[0, 1, 1, 1, 1, 1])
# name -> (config, keyword arguments of write_release, whose logits are expected)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "v2_flash": (small_config(**SIX_LAYERS, sliding_window_counts_query=False), {"kind": "fp8", "mtp": 1},
                 "transformers"),
    "v25": (small_config(**SIX_LAYERS, **FUSED), {"kind": "fp8"}, "llama.cpp"),
    "v26_flash": (small_config(**SIX_LAYERS, **FUSED, moe_router_dtype="bfloat16"), {"kind": "mxfp4"}, "llama.cpp"),
}


def digest(folder: Path) -> str:
    """Of names and bytes of every tensor in the folder, in name order."""
    whole = hashlib.sha256()
    for name, value in sorted(read_tensors(folder).items()):
        whole.update(name.encode() + value.tobytes())
    return whole.hexdigest()


def read_with_transformers(folder: Path, tokens_BT: np.ndarray) -> np.ndarray:
    """Logits, computed in float32 whatever the weights are stored as. Errors: AssertionError for tensors not taken."""
    import torch
    from transformers import AutoModelForCausalLM
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True)
    assert not any(report.values()), report
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(tokens_BT).long()).logits.numpy()


def read_with_others(folder: Path, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
    from llamacpp import LlamaCpp
    from oracles import Mlx
    peers = {"llama.cpp": LlamaCpp, "mlx-lm": Mlx}
    if not (folder / "model.safetensors").is_file():      # MTP blocks in a second one
        del peers["mlx-lm"]
    return {name: peer(folder).logits(tokens_BT) for name, peer in peers.items()}


def make(name: str) -> None:
    config, options, expected = CASES[name]
    tokens_BT = np.random.default_rng(SEED).integers(0, config["vocab_size"], (1, NUM_TOKENS), dtype=np.int32)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_release(config, folder / "hub", seed=SEED, **options)
        convert(folder / "hub", folder / "converted", progress=False)
        for weights in ("float32", "bfloat16"):
            export(folder / "converted", folder / weights, weights=weights, layout="split", progress=False)
            logits = read_with_others(folder / weights, tokens_BT)
            if expected == "transformers":
                logits[expected] = read_with_transformers(folder / weights, tokens_BT)
            found |= {f"{weights}_sha256": digest(folder / weights), f"{weights}_logits_BTW": logits[expected],
                      f"{weights}_differences": json.dumps({peer: float(np.abs(values - logits[expected]).max())
                                                            for peer, values in logits.items()})}
        source = digest(folder / "hub")
    GOLDEN.mkdir(exist_ok=True)
    versions = json.dumps({package: version(package) for package in PACKAGES})
    np.savez_compressed(GOLDEN / f"{name}.npz", command=COMMAND, versions=versions, expected=expected,
                        config=json.dumps(config), options=json.dumps(options), seed=SEED, tokens_BT=tokens_BT,
                        weights_sha256=source, **found)
    print(name, {key: str(found[key]) for key in found if key.endswith("differences")})


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        make(name)
