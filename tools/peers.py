"""Time other implementations of MiMo-V2 on one hub folder, as `make bench` times ours beside them.

    python tools/peers.py [PEER ...] --model configs/mimo-nano [--python OTHER_VENV/bin/python]

One JSON object a line: peer, version, decode_tok_s_b1, _b8, _b32 (all rows together: 63 steps after the first token of
64, from prompts of 32) and prefill512_s (one prompt of 512 until its first token is known); or peer and `absent`, the
reason. Greedy, float32 weights and cache, 2 threads, median of repetitions after a warm-up. Peers: transformers, mlx,
llamacpp, and llamacpp-flash, llama.cpp at its fastest, where attention is no longer float32. tests/golden/README.md
says how to make the environment.
"""
import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

PROMPT_TOKENS, NEW_TOKENS, PREFILL_TOKENS = 32, 64, 512
BATCHES = (1, 8, 32)
MIN_REPEATS, MAX_REPEATS, BUDGET_S = 3, 7, 10.0


def load_peer(peer: str, model: str) -> Any:
    """The peer with `model` loaded; ImportError when its package is absent."""
    import oracles  # in here: whoever only calls `measure` needs none of it

    if peer.startswith("llamacpp"):
        from llamacpp import LlamaCpp
        return LlamaCpp(model, flash=peer == "llamacpp-flash")
    if peer == "mlx":
        return oracles.Mlx(model)
    # The fastest of transformers' ways to run experts here: at batch 8 850 tokens/s where eager does 700.
    return oracles.Transformers(model, experts="grouped_mm")


PEERS = ("transformers", "mlx", "llamacpp", "llamacpp-flash")


def median_of(seconds: Callable[[], float]) -> float:
    """Median of several calls after one that is thrown away; fewer calls where they are slow."""
    seconds()
    start, times = time.perf_counter(), list[float]()
    while len(times) < MIN_REPEATS or (len(times) < MAX_REPEATS and time.perf_counter() - start < BUDGET_S):
        times.append(seconds())
    return median(times)


def time_peer(peer: str, model: str) -> dict[str, Any]:
    try:
        oracle = load_peer(peer, model)
    except ImportError as error:
        return {"peer": peer, "absent": str(error)}
    num_vocab = json.loads((Path(model) / "config.json").read_text())["vocab_size"]

    def run(B: int, num_tokens: int, num_new: int) -> Any:
        prompts_BT = np.random.default_rng(B).integers(0, num_vocab, (B, num_tokens), dtype=np.int32)
        return oracle.greedy(prompts_BT, num_new)

    def decode(B: int) -> float:
        return run(B, PROMPT_TOKENS, NEW_TOKENS).decode_s

    row: dict[str, Any] = {"peer": peer, "version": oracle.version}
    for B in BATCHES:
        decode_s = median_of(partial(decode, B))
        row[f"decode_tok_s_b{B}"] = round(B * (NEW_TOKENS - 1) / decode_s, 1)
    row["prefill512_s"] = round(median_of(lambda: run(1, PREFILL_TOKENS, 1).prefill_s), 4)
    return row


def measure(peers: tuple[str, ...], model: str, python: str) -> list[dict[str, Any]]:
    """The rows of `peers`, each timed by a process of its own under another environment's `python`."""
    rows = []
    for peer in peers:
        command = [python, __file__, peer, "--model", model]
        run = subprocess.run(command, capture_output=True, text=True)
        lines = run.stdout.strip().splitlines()
        if run.returncode != 0 or not lines:
            raise ValueError(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
        rows.append(json.loads(lines[-1]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peers", nargs="*", metavar="peer", help=f"of {', '.join(PEERS)}; all, when none is named")
    parser.add_argument("--model", required=True, help="hub folder with one model.safetensors")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment the peers are in")
    args = parser.parse_args()
    peers = tuple(args.peers) or PEERS
    if unknown := set(peers) - set(PEERS):
        parser.error(f"{', '.join(sorted(unknown))}: not a peer; there are {', '.join(PEERS)}")
    if not (Path(args.model) / "config.json").is_file():
        parser.error(f"--model {args.model}: no config.json there")
    if args.python == sys.executable and len(peers) == 1:
        print(json.dumps(time_peer(peers[0], args.model)))
    else:
        for peer in peers:
            print(json.dumps(measure((peer,), args.model, args.python)[0]), flush=True)


if __name__ == "__main__":
    main()
