"""Make tests/golden/peft: adapters that PEFT wrote, and logits of a small model with them and with ours, by PEFT.

    python tools/make_peft_golden.py      # in the environment that tests/golden/README.md describes

transformers has V2-Flash's experts in two parameters a layer, so adapters of them are saved joined. The base is made
again by tests/hub_maker.py, our adapter by tests/checkpoint/adapters.py, and only its checksum is kept.
"""
import json
import sys
import tempfile
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from jaxllm.checkpoint import open_source
from jaxllm.checkpoint.peft import TENSORS, save_adapter
from jaxllm.config import Config

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "peft"
PACKAGES = ("torch", "transformers", "peft", "numpy")

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "checkpoint")]
from adapters import BASE, OURS, random_adapter, write_base  # noqa: E402  (needs the path above)

SEED, NUM_TOKENS = 1, 30
CASES: dict[str, dict[str, Any]] = {
    "modules": dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"], r=4,
                    lora_alpha=6, use_rslora=True, rank_pattern={"o_proj": 2},
                    alpha_pattern={"layers.1.self_attn.q_proj": 3}),
    "experts": dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"], r=2,
                    lora_alpha=1, rank_pattern={"gate_up_proj": 3}, alpha_pattern={"gate_up_proj": 2}),
    "gate_up": dict(target_modules="all-linear", target_parameters=["mlp.experts.gate_up_proj"], r=2, lora_alpha=3),
}


def open_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                experts_implementation="eager").eval()


def logits(model: Any, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(tokens_BT).long()).logits.numpy()


def main() -> None:
    tokens_BT = np.random.default_rng(SEED).integers(0, 96, (1, NUM_TOKENS), dtype=np.int32)
    found: dict[str, Any] = {"tokens_BT": tokens_BT}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch, BASE)
        write_base(base)
        found["base"] = logits(open_base(base), tokens_BT)
        for name, settings in CASES.items():
            torch.manual_seed(SEED)
            model = get_peft_model(open_base(base), LoraConfig(
                task_type="CAUSAL_LM", init_lora_weights=False, **settings))
            found[name] = logits(model, tokens_BT)
            model.save_pretrained(GOLDEN / name)
            (GOLDEN / name / "README.md").unlink()      # an empty model card
            config = GOLDEN / name / "adapter_config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": BASE}, indent=1))
        ours = Path(scratch, "ours")
        source, settings = open_source(base), Config.from_hub(base)
        save_adapter(ours, random_adapter(source, settings, **OURS), settings, source)
        found["ours"] = logits(PeftModel.from_pretrained(open_base(base), ours), tokens_BT)
        found["ours_sha256"] = sha256((ours / TENSORS).read_bytes()).hexdigest()
    versions = json.dumps({package: version(package) for package in PACKAGES})
    np.savez_compressed(GOLDEN / "logits.npz", versions=versions, **found)
    print({name: float(np.abs(found[name] - found["base"]).max()) for name in [*CASES, "ours"]})


if __name__ == "__main__":
    main()
