"""Make tests/golden/train/*.npz: loss and gradients of small random models, by torch autograd through transformers.

    python tools/make_train_golden.py [NAME ...]       # in the environment that tests/golden/README.md describes

The loss is the mean cross entropy of every next token of two rows. All is computed in float64, and once more in float32
to see how much of a gradient float32 leaves: `differences` has the largest share, over all tensors, that the float32
gradient's distance takes of the tensor's norm. Weights are not stored: tests/hub_maker.py makes them again from the
seed. Gradients are, under the names and in the shapes of the hub's tensors; correction biases choose experts and have
none.
"""
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_golden import GROUPS, selection_gap
from oracles import Transformers
from transformers.models.mimo_v2_flash import modeling_mimo_v2_flash as modeling

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "train"
COMMAND = "python tools/make_train_golden.py"
PACKAGES = ("torch", "transformers", "numpy")

sys.path.insert(0, str(ROOT / "tests"))
from hub_maker import tiny_config, weights_digest, write_hub  # noqa: E402  (needs the path above)

BATCH, NUM_TOKENS = 2, 30      # rows, and tokens of each: nearly four windows of 8
SMALL = dict(
    hidden_size=32, num_hidden_layers=4, vocab_size=48, num_attention_heads=4, num_key_value_heads=1, head_dim=12,
    v_head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=12, swa_v_head_dim=8,
    hybrid_layer_pattern=[0, 1, 0, 1], moe_layer_freq=[0, 1, 1, 1], intermediate_size=48, moe_intermediate_size=16)
PRO = GROUPS | dict(
    num_key_value_heads=2, attention_value_scale=0.612, layernorm_epsilon=1e-2, routed_scaling_factor=2.5,
    moe_intermediate_size=8)
TIED = dict(tie_word_embeddings=True, add_full_attention_sink_bias=True, norm_topk_prob=False)
DENSE = dict(partial_rotary_factor=1.0, attention_value_scale=None, moe_layer_freq=4 * [0],
             add_swa_attention_sink_bias=False, swa_num_attention_heads=2, swa_head_dim=20, swa_v_head_dim=12)
# name -> (changes to hub_maker.tiny_config, seed)
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "flash": (SMALL, 1), "pro": (SMALL | PRO, 2), "tied": (SMALL | TIED, 3), "dense": (SMALL | DENSE, 4)}


class Wide:
    """torch, in which float32 is float64."""
    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def widened(is_wide: bool) -> Iterator[None]:
    """transformers' model code with its casts to float32 made casts to float64: norms, router and rope have them."""
    modeling.torch = Wide() if is_wide else torch
    try:
        yield
    finally:
        modeling.torch = torch


def build(folder: str, is_wide: bool) -> Transformers:
    oracle = Transformers(folder)
    oracle.model.to(torch.float64 if is_wide else torch.float32).requires_grad_(True)
    return oracle


def gradients(folder: str, tokens_BT: np.ndarray, is_wide: bool) -> tuple[float, dict[str, np.ndarray]]:
    """The loss, and its gradient by hub tensor name."""
    with widened(is_wide):
        model = build(folder, is_wide).model
        tokens = torch.from_numpy(tokens_BT).long()
        logits_MW = model(tokens).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits_MW, tokens[:, 1:].flatten())
        loss.backward()
    dtypes = {value.dtype for value in (logits_MW, *(parameter.grad for parameter in model.parameters()))}
    assert dtypes == {torch.float64 if is_wide else torch.float32}, dtypes
    return loss.item(), dict(by_hub_name(model))


def by_hub_name(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Gradients under the names of the hub: the reverse of `Transformers.renamed`."""
    for name, parameter in model.named_parameters():      # a tied head is the embedding, and comes once
        grad = parameter.grad.numpy()
        if name.endswith(".gate_up_proj"):
            for e, rows in enumerate(grad):
                for part, half in zip(("gate_proj", "up_proj"), np.split(rows, 2), strict=True):
                    yield name.replace("gate_up_proj", f"{e}.{part}.weight"), half
        elif name.endswith(".experts.down_proj"):
            for e, rows in enumerate(grad):
                yield name.replace("down_proj", f"{e}.down_proj.weight"), rows
        else:
            yield name.replace("sinks", "attention_sink_bias"), grad


def make(name: str) -> None:
    changes, seed = CASES[name]
    config = tiny_config(**changes)
    tokens_BT = np.random.default_rng(seed).integers(0, config["vocab_size"], (BATCH, NUM_TOKENS), dtype=np.int32)
    with tempfile.TemporaryDirectory() as folder:
        write_hub(folder, config, seed)
        loss, wide = gradients(folder, tokens_BT, is_wide=True)
        loss_32, narrow = gradients(folder, tokens_BT, is_wide=False)
        digest, gap = weights_digest(folder), selection_gap(Transformers(folder), tokens_BT)
    share = max(np.linalg.norm(narrow[key] - wide[key]) / np.linalg.norm(wide[key]) for key in wide if wide[key].any())
    differences = {"loss": abs(loss_32 - loss), "gradient": float(share)}
    file = GOLDEN / f"{name}.npz"
    np.savez_compressed(
        file, command=COMMAND, versions=json.dumps({package: version(package) for package in PACKAGES}),
        config=json.dumps(config), seed=seed, weights_sha256=digest, tokens_BT=tokens_BT, loss=loss,
        differences=json.dumps(differences), selection_gap=gap,
        **{f"gradient {key}": value.astype(np.float32) for key, value in wide.items()})
    print(name, file.stat().st_size, "bytes", loss, differences, "closest choice", gap)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        if name not in CASES:
            raise SystemExit(f"{name}: not a golden array; there are {', '.join(CASES)}")
        make(name)
