"""Speed of jaxllm on the embedded model, with each peer that is installed beside it in the same run.

    python tools/bench.py [--model configs/mimo-nano] [--rounds 3] [--python OTHER_VENV/bin/python]

float32, greedy, one device with the machine's cores: tokens/s of all rows together at batch 1, 8 and 32 (63 steps after
the first of 64 new tokens, prompts of 32), and the seconds from a prompt of 512 tokens to its first new token. Machines
drift, so the programs take turns, each in a process of its own, and the table has medians over the rounds.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from peers import BATCHES, NEW_TOKENS, PEERS, PREFILL_TOKENS, PROMPT_TOKENS, measure, median_of

import jaxllm
from jaxllm.generate.sample import Sampling
from jaxllm.generate.step import advance, fetch, init_cache, place, prefill, start

COLUMNS = [*(f"decode_tok_s_b{B}" for B in BATCHES), "prefill512_s"]
NANO = Path(__file__).parent.parent / "configs" / "mimo-nano"


def run_once(model: jaxllm.Model, B: int, num_tokens: int, num_new: int) -> tuple[float, float]:
    """Seconds until the first token of B random prompts is on the host, and from then until all num_new are."""
    net = model.transformer
    prompts_BT = np.random.default_rng(B).integers(0, model.config.vocab_size, (B, num_tokens))
    sampling = Sampling(*(place(net, np.zeros(B, dtype), "batch")
                          for dtype in (np.float32, np.int32, np.float32, np.uint32)))
    stop_ids, limit_B = place(net, np.array([-1]), None), place(net, np.full(B, num_new), "batch")
    cache = jax.block_until_ready(init_cache(model.config, model.mesh, B, num_tokens + num_new, dtype=model.dtype))
    begin = time.perf_counter()
    logits_BW, cache = prefill(net, cache, prompts_BT)
    state = start(net, cache, logits_BW, sampling, stop_ids, limit_B, num_new, "greedy")
    fetch(net, state.token_B)
    middle = time.perf_counter()
    fetch(net, advance(net, state, sampling, stop_ids, num_new, "greedy").out_BT)
    return middle - begin, time.perf_counter() - middle


def time_ours(folder: Path) -> dict[str, Any]:
    """The row of jaxllm, as `peers.time_peer` makes the others."""
    model = jaxllm.load(folder, dtype="float32")
    row: dict[str, Any] = {"peer": "jaxllm", "version": f"jax {jax.__version__}"}
    for B in BATCHES:
        decode_s = median_of(lambda B=B: run_once(model, B, PROMPT_TOKENS, NEW_TOKENS)[1])
        row[f"decode_tok_s_b{B}"] = round(B * (NEW_TOKENS - 1) / decode_s, 1)
    row["prefill512_s"] = round(median_of(lambda: run_once(model, 1, PREFILL_TOKENS, 1)[0]), 4)
    return row


def measure_ours(folder: Path) -> dict[str, Any]:
    run = subprocess.run([sys.executable, __file__, "--ours", "--model", folder], stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """Medians by peer, and in brackets how many times as fast as that peer jaxllm is: the median of the rounds."""
    names = list(dict.fromkeys(row["peer"] for row in rows))
    ours = [row for row in rows if row["peer"] == "jaxllm"]
    lines = [f"{'':24}" + "".join(f"{column.replace('decode_tok_s_b', 'tok/s, batch '):>22}" for column in COLUMNS)]
    for name in names:
        own = [row for row in rows if row["peer"] == name]
        cells = []
        for column in COLUMNS:
            ratios = [a[column] / b[column] for a, b in zip(ours, own, strict=True)]
            ratio = median(1 / x if column.endswith("_s") else x for x in ratios)
            value = median(row[column] for row in own)
            cells.append(f"{value:,.4g}" + ("" if name == "jaxllm" else f" ({ratio:.2f}x)"))
        lines.append(f"{name + ' ' + own[0]['version']:24}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=NANO, help="hub folder with one model.safetensors")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each program")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment the peers are in")
    parser.add_argument("--ours", action="store_true", help="time jaxllm alone, in this process; one JSON line")
    args = parser.parse_args()
    if args.ours:
        print(json.dumps(time_ours(args.model)))
        return
    rows, present = [], list(PEERS)
    for number in range(args.rounds):
        rows.append(measure_ours(args.model))
        for peer in list(present):
            row = measure((peer,), str(args.model), args.python)[0]
            if "absent" in row:
                print(f"{peer} is not installed here: {row['absent']}")
                present.remove(peer)
            else:
                rows.append(row)
        print(f"round {number + 1} of {args.rounds} done", flush=True)
    ours = [row for row in rows if row["peer"] == "jaxllm"]
    growth = median(row["decode_tok_s_b32"] / row["decode_tok_s_b8"] for row in ours)
    print(f"\n{args.model}, float32, greedy, {os.cpu_count()} cores; in brackets: jaxllm's speed over the peer's\n")
    print(table(rows))
    print(f"\njaxllm, batch 32 over batch 8: {growth:.2f}x")


if __name__ == "__main__":
    main()
