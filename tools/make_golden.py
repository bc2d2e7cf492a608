"""Make tests/golden/*.npz: logits of small random models and of mimo-nano, from implementations that are not ours.

    python tools/make_golden.py [NAME ...]         # in the environment that tests/golden/README.md describes

Weights are not stored: tests/hub_maker.py makes them again from the seed, and a digest of them tells a changed
generator from a wrong model. The logits are transformers'; beside them stands how far mlx-lm and llama.cpp, reading the
same folder, are from them. `selection_gap` is the smallest distance, over every routing decision, between the last
expert (or group) chosen and the first left out: where it is far above float32 noise, another choice is a mistake.
"""
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from llamacpp import LlamaCpp
from oracles import Mlx, Transformers
from sentencepiece import SentencePieceProcessor

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
NANO = ROOT / "configs" / "mimo-nano"
COMMAND = "python tools/make_golden.py"

sys.path.insert(0, str(ROOT / "tests"))
from hub_maker import tiny_config, weights_digest, write_hub  # noqa: E402  (needs the path above)

BATCH = 2
OTHER_WINDOW = {"sliding_window_counts_query": False}
LARGER = dict(
    hidden_size=192, num_hidden_layers=8, vocab_size=256, num_attention_heads=12, num_key_value_heads=2, head_dim=48,
    v_head_dim=32, swa_num_attention_heads=12, swa_num_key_value_heads=4, swa_head_dim=48, swa_v_head_dim=32,
    hybrid_layer_pattern=[0, 1, 1, 1, 1, 0, 1, 0], moe_layer_freq=[0] + 7 * [1], intermediate_size=384,
    moe_intermediate_size=64, n_routed_experts=32, num_experts_per_tok=4, sliding_window=16, sliding_window_size=16)
PRO = dict(
    num_key_value_heads=4, swa_num_key_value_heads=4, attention_value_scale=0.612,
    layernorm_epsilon=1e-2,    # large enough to be seen
    rope_theta=10000000,       # rope_parameters must win over the flat keys
    rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 20000000, "rope_type": "default", "type": "default"})
GROUPS = dict(n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4)
MIXED_HEADS = dict(swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_head_dim=36, swa_v_head_dim=20)
DENSE = dict(partial_rotary_factor=1.0, attention_value_scale=None, moe_layer_freq=6 * [0])

# name -> (changes to hub_maker.tiny_config, seed, tokens). Lengths are 5 to 6 windows of 8 (16 for `larger`).
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "flash": ({}, 1, 45),
    "flash_other_window": (OTHER_WINDOW, 1, 45),
    "larger": (LARGER, 2, 90),
    "window_of_one": ({"sliding_window": 1, "sliding_window_size": 1}, 3, 12),
    "tied": ({"tie_word_embeddings": True}, 4, 45),
    "all_full": ({"hybrid_layer_pattern": 6 * [0]}, 5, 45),
    "no_sinks": ({"add_swa_attention_sink_bias": False}, 6, 45),
    "full_sinks": ({"add_full_attention_sink_bias": True}, 15, 45),
    "groups": (GROUPS, 8, 45),
    "one_group": (GROUPS | {"topk_group": 1}, 9, 45),
    "scaled": ({"routed_scaling_factor": 2.5}, 14, 45),
    "plain_weights": ({"norm_topk_prob": False, "routed_scaling_factor": 0.7}, 10, 45),
    "pro": (PRO, 11, 45),
    "mixed_heads": (MIXED_HEADS, 12, 45),
    "dense": (DENSE, 13, 45),
}
OTHERS: dict[str, Callable[..., Any]] = {"mlx-lm": Mlx, "llama.cpp": LlamaCpp}
# Both look for the first sliding layer; llama.cpp's mimo2 wants an output matrix, and one set of head sizes.
CANNOT = {"all_full": ("mlx-lm", "llama.cpp"), "tied": ("llama.cpp",), "mixed_heads": ("llama.cpp",)}
TEXTS = json.loads((GOLDEN / "texts.json").read_text())
TEXT_TOKENS, TOP, FULL_POSITIONS = 320, 16, (0, 128, 319)
NUM_NEW = 64


def gap(scores: np.ndarray, num_chosen: int) -> float:
    """Smallest distance between the num_chosen-th largest score of a row and the next; infinite when all are chosen."""
    ranked = -np.sort(-scores, axis=-1)
    return float(np.min(ranked[:, num_chosen - 1] - ranked[:, num_chosen])) if num_chosen < scores.shape[-1] else np.inf


def selection_gap(oracle: Transformers, tokens_BT: np.ndarray) -> float:
    """The smallest gap of any routing decision, groups included, while the model reads `tokens_BT`."""
    gaps = [np.inf]

    def record(gate: Any, _: Any, outputs: Any) -> None:
        scores_ME = (outputs[0].sigmoid() + gate.e_score_correction_bias).numpy()
        scores_MGe = scores_ME.reshape(len(scores_ME), gate.num_group, -1)
        if gate.num_group > 1:
            groups_MG = np.sort(scores_MGe, axis=-1)[..., -2:].sum(-1)
            gaps.append(gap(groups_MG, gate.topk_group))
            kept_MG = np.argsort(np.argsort(-groups_MG)) < gate.topk_group
            scores_MGe = np.where(kept_MG[..., None], scores_MGe, -np.inf)
        gaps.append(gap(scores_MGe.reshape(scores_ME.shape), gate.top_k))

    gates = [layer.mlp.gate for layer in oracle.model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [gate.register_forward_hook(record) for gate in gates]
    oracle.logits(tokens_BT)
    for hook in hooks:
        hook.remove()
    return min(gaps)


def compare(folder: str | Path, name: str, tokens_BT: np.ndarray, logits_BTW: np.ndarray) -> str:
    """JSON of the largest logit difference to transformers of every other implementation that can run the case."""
    able = {peer: build for peer, build in OTHERS.items() if peer not in CANNOT.get(name, ())}
    return json.dumps({peer: float(np.abs(build(folder).logits(tokens_BT) - logits_BTW).max())
                       for peer, build in able.items()})


def save(name: str, **arrays: Any) -> None:
    packages = ("torch", "transformers", "mlx-lm", "mlx", "llama-cpp-python", "numpy", "sentencepiece")
    versions = json.dumps({package: version(package) for package in packages})
    np.savez_compressed(GOLDEN / f"{name}.npz", command=COMMAND, versions=versions, **arrays)
    notes = {key: arrays[key] for key in ("std", "differences", "selection_gap", "smallest_margin") if key in arrays}
    print(name, (GOLDEN / f"{name}.npz").stat().st_size, "bytes", notes)


def make_random(name: str) -> None:
    changes, seed, num_tokens = CASES[name]
    config = tiny_config(**changes)
    tokens_BT = np.random.default_rng(seed).integers(0, config["vocab_size"], (BATCH, num_tokens), dtype=np.int32)
    with tempfile.TemporaryDirectory() as folder:
        write_hub(folder, config, seed)
        oracle = Transformers(folder)
        logits_BTW = oracle.logits(tokens_BT)
        save(name, config=json.dumps(config), seed=seed, weights_sha256=weights_digest(folder), tokens_BT=tokens_BT,
             logits_BTW=logits_BTW, std=logits_BTW.std(), differences=compare(folder, name, tokens_BT, logits_BTW),
             selection_gap=selection_gap(oracle, tokens_BT))


def encode(text: str) -> list[int]:
    return SentencePieceProcessor(str(NANO / "tokenizer.model")).encode(text)


def reduced(logits_BTW: np.ndarray) -> dict[str, np.ndarray]:
    """What is kept of logits too large to store: at every position the TOP largest and the log-sum-exp."""
    top_BTA = np.argsort(-logits_BTW, axis=-1)[..., :TOP]
    largest_BT1 = logits_BTW.max(-1, keepdims=True).astype(np.float64)
    total_BT = np.log(np.exp(logits_BTW - largest_BT1).sum(-1)) + largest_BT1[..., 0]
    return {"top_tokens_BTA": top_BTA.astype(np.uint16), "top_logits_BTA": np.take_along_axis(logits_BTW, top_BTA, -1),
            "logsumexp_BT": total_BT.astype(np.float32)}


@contextmanager
def nano_folder(changes: dict[str, Any]) -> Iterator[str]:
    """mimo-nano without its MTP blocks, and with these changes of its config."""
    config = json.loads((NANO / "config.json").read_text()) | {"num_nextn_predict_layers": 0} | changes
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        (Path(folder) / "model.safetensors").symlink_to(NANO / "model.safetensors")
        yield folder


def make_nano(name: str, changes: dict[str, Any], rows: int, positions: tuple[int, ...]) -> None:
    """Real text in seven languages; whole rows of logits at `positions` only."""
    tokens_BT = np.array([encode(text)[:TEXT_TOKENS] for text in TEXTS["read"][:rows]], np.int32)
    with nano_folder(changes) as folder:
        oracle = Transformers(folder)
        logits_BTW = oracle.logits(tokens_BT)
        save(name, weights_sha256=weights_digest(folder), tokens_BT=tokens_BT, positions_P=np.array(positions, int),
             logits_BPW=logits_BTW[:, list(positions)], std=logits_BTW.std(), **reduced(logits_BTW),
             differences=compare(folder, name, tokens_BT, logits_BTW), selection_gap=selection_gap(oracle, tokens_BT))


def make_nano_greedy() -> None:
    """Continuations of short prompts in seven languages, and of one that is longer than the window."""
    with nano_folder({}) as folder:
        oracle, others = Transformers(folder), {peer: build(folder) for peer, build in OTHERS.items()}
    prompts = [encode(text) for text in TEXTS["write"]]
    written, margins, same = [], [], dict.fromkeys(others, True)
    for prompt in prompts:
        prompt_1T = np.array([prompt], np.int32)
        tokens_1T = oracle.greedy(prompt_1T, NUM_NEW).tokens_BT
        top_2 = np.sort(oracle.logits(np.concatenate([prompt_1T, tokens_1T], 1))[0, len(prompt) - 1 : -1])[:, -2:]
        margins.append(np.min(top_2[:, 1] - top_2[:, 0]))
        written.append(tokens_1T[0].astype(np.int32))
        for peer, other in others.items():
            same[peer] &= bool(np.array_equal(other.greedy(prompt_1T, NUM_NEW).tokens_BT, tokens_1T))
    save("nano_greedy", weights_sha256=weights_digest(NANO), prompts=json.dumps(prompts), tokens_PT=np.array(written),
         smallest_margin=min(margins), differences=json.dumps({f"{peer} writes the same": same[peer] for peer in same}))


MAKERS: dict[str, Callable[[], None]] = {name: partial(make_random, name) for name in CASES} | {
    "nano": partial(make_nano, "nano", {}, 2, FULL_POSITIONS),
    "nano_other_window": partial(make_nano, "nano_other_window", OTHER_WINDOW, 1, ()),
    "nano_greedy": make_nano_greedy}

if __name__ == "__main__":
    for name in sys.argv[1:] or MAKERS:
        if name not in MAKERS:
            raise SystemExit(f"{name}: not a golden array; there are {', '.join(MAKERS)}")
        MAKERS[name]()
