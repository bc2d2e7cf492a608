"""Speed of a training step on the embedded model's shape, beside PyTorch and beside experts computed for all tokens.

    python tools/bench_train.py [--model configs/mimo-nano] [--rounds 3] [--python OTHER_VENV/bin/python]

float32, one device with the machine's cores, the same rows of random tokens, 4096 a step in rows of several lengths:
forward, backward, clipping and AdamW, in tokens/s; no MTP and no balance loss, which the others do not have. Programs:

jaxllm        the step of `jaxllm train`
dense         the same, but every expert computes every token, and those not chosen have weight zero
transformers  MiMoV2FlashForCausalLM and torch.optim.AdamW, where they are installed; tools/oracles.py

Machines drift, so the programs take turns, each in a process of its own, and each table has medians over the rounds.
What XLA compiles after the first step is counted; it should be nothing.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

NANO = Path(__file__).parent.parent / "configs" / "mimo-nano"
PROGRAMS = ("jaxllm", "dense", "transformers")
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
Row = dict[str, Any]


def tokens_of(folder: Path, B: int, T: int) -> np.ndarray:
    num_vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(0).integers(0, num_vocab, (B, T), dtype=np.int32)


def rate(step: Callable[[], float], num_tokens: int, steps: int) -> Row:
    """Tokens/s by the median of `steps` steps, after one more, and the last loss, which shows that the task is one."""
    step()
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - begin)
    return {"tokens_s": num_tokens / median(seconds), "loss": loss}


def time_jax(folder: Path, B: int, T: int, steps: int, is_dense: bool) -> Row:
    import jax

    from jaxllm import moe

    if is_dense:
        moe.apply_experts = every_expert
    step = our_step(folder, B, T, steps)
    step()
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    row = rate(step, B * T, steps)
    return row | {"version": f"jax {jax.__version__}", "compiled_later": sum("backend_compile" in x for x in compiled)}


def our_step(folder: Path, B: int, T: int, steps: int) -> Callable[[], float]:
    """A call of it trains once more on the same rows and returns the loss before that."""
    import jax

    from jaxllm.axes import make_mesh, spec
    from jaxllm.checkpoint import open_source
    from jaxllm.config import Config
    from jaxllm.train.batch import Batch
    from jaxllm.train.run import Run
    from jaxllm.train.state import make_plan
    from jaxllm.train.step import make_step

    run = Run(output="unused", model=str(folder), data={"unused": 1.0}, context=T, batch=B, steps=steps + 2,
              learning_rate=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], epsilon=EPSILON, weight_decay=WEIGHT_DECAY,
              clip=CLIP, balance_weight=0.0, bias_update=0.0)
    mesh, source, tokens_BT = make_mesh(), open_source(folder), tokens_of(folder, B, T)
    plan = make_plan(run, Config.from_hub(folder), mesh, source.params if source else {}, num_mtp=0)
    arrays = tokens_BT, np.zeros_like(tokens_BT), np.broadcast_to(np.arange(T) > 0, (B, T))
    with jax.set_mesh(mesh):
        state, frozen = plan.begin(source)
        batch = Batch(*(jax.device_put(x, spec("batch", None)) for x in arrays))
    train = make_step(plan)

    def step() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = train(state, frozen, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])
    return step


def every_expert(x_MD: Any, local_MA: Any, weight_MA: Any, experts: Any) -> Any:
    """What jaxllm.experts.apply_experts computes, plainly: all experts for all tokens, in three large products."""
    import jax
    import jax.numpy as jnp

    gate_EDI, up_EDI, down_EID = experts
    id_E = jnp.arange(gate_EDI.shape[0], dtype=jnp.int32)
    weight_ME = jnp.where(local_MA[..., None] == id_E[None, None, :], weight_MA[..., None], 0.0).sum(1)
    hidden_MEI = jax.nn.silu(jnp.einsum("md,edi->mei", x_MD, gate_EDI)) * jnp.einsum("md,edi->mei", x_MD, up_EDI)
    return jnp.einsum("mei,eid->md", hidden_MEI * weight_ME[..., None], down_EID)


def time_transformers(folder: Path, B: int, T: int, steps: int) -> Row:
    try:
        import torch
        from oracles import Transformers
        oracle = Transformers(folder, experts="grouped_mm")
    except ImportError as error:
        return {"absent": str(error)}
    model = oracle.model.train().requires_grad_(True)
    # Matrices decay, norms and sinks do not, as in ours.
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == decays], "weight_decay": decay}
              for decays, decay in ((True, WEIGHT_DECAY), (False, 0.0))]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)
    tokens_BT = torch.from_numpy(tokens_of(folder, B, T)).long()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits_MW = model(tokens_BT).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits_MW, tokens_BT[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    step()
    return rate(step, B * T, steps) | {"version": oracle.version}


def time_program(program: str, args: argparse.Namespace) -> Row:
    (T,) = args.tokens
    shape = args.model, args.step_tokens // T, T, args.steps
    return time_transformers(*shape) if program == "transformers" else time_jax(*shape, is_dense=program == "dense")


def measure(program: str, T: int, args: argparse.Namespace) -> Row:
    """The row of a program, timed by a process of its own."""
    python = args.python if program == "transformers" else sys.executable
    command = [python, __file__, "--program", program, "--model", args.model, "--tokens", T,
               "--step-tokens", args.step_tokens, "--steps", args.steps]
    run = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    if run.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed")
    return json.loads(run.stdout.splitlines()[-1])


def table(rows: dict[str, list[Row]]) -> str:
    """Medians by program, and the median over the rounds of how many times as fast jaxllm is."""
    lines = [f"{'':40}{'tokens/s':>12}{'jaxllm is':>14}{'loss':>10}{'compiled later':>18}"]
    for program, own in rows.items():
        ratio = median(a["tokens_s"] / b["tokens_s"] for a, b in zip(rows["jaxllm"], own, strict=True))
        cells = f"{median(row['tokens_s'] for row in own):12,.0f}{ratio:13.2f}x{own[-1]['loss']:10.4f}"
        lines.append(f"{program + ' ' + own[0]['version']:40}{cells}{own[-1].get('compiled_later', '-'):>18}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=NANO, help="hub folder with one model.safetensors")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048], help="lengths of rows")
    parser.add_argument("--step-tokens", type=int, default=4096, help="of all rows of a step together")
    parser.add_argument("--steps", type=int, default=5, help="that are timed, in each turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each program")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment transformers is in")
    parser.add_argument("--program", choices=PROGRAMS, help="time this one alone, in this process; one JSON line")
    args = parser.parse_args()
    if args.program:
        print(json.dumps(time_program(args.program, args)))
        return
    for T in args.tokens:
        rows = rounds(T, args)
        shape = f"{args.step_tokens // T} rows of {T} tokens"
        print(f"\n{args.model}, float32, {shape}, {os.cpu_count()} cores\n\n{table(rows)}", flush=True)


def rounds(T: int, args: argparse.Namespace) -> dict[str, list[Row]]:
    """Of each program that is installed, a row for each round."""
    rows: dict[str, list[Row]] = {program: [] for program in PROGRAMS}
    for _ in range(args.rounds):
        for program in list(rows):
            row = measure(program, T, args)
            if "absent" in row:
                print(f"{program} is not installed here: {row['absent']}")
                del rows[program]
            else:
                rows[program].append(row)
    return rows


if __name__ == "__main__":
    main()
