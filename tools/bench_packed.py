"""What packed weights cost in time: the embedded model in each form, and one MoE layer of MiMo-V2.6-Flash.

    python tools/bench_packed.py [--model configs/mimo-nano] [--rounds 5] [--layer]

First the model as float32, and converted with --weights fp8, mxfp4 and int4 (experts alone, as the releases do, and all
matrices), computing in float32: the forms take turns in one process, and the table has the medians and the ratios to
float32. Then (--layer: only that; 4 GB of memory) 256
experts of 4096 x 2048 in MXFP4: the time of 8 tokens that choose 8 experts each, of one such token, and of 8 tokens
that choose all 256; who reads only what was chosen is faster by the experts that were not.
"""
import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from bench import NANO, run_once
from peers import BATCHES, NEW_TOKENS, PREFILL_TOKENS, PROMPT_TOKENS

import jaxllm
from jaxllm.experts import experts_by_block
from jaxllm.quant import Packed

FORMS = {"float32": {"weights": "float32"}} | {f"{kind} {classes}": {"weights": kind, "classes": [classes]}
                           for classes in ("experts", "all") for kind in ("fp8", "mxfp4", "int4")}
E, D, I, A, M = 256, 4096, 2048, 8, 8      # noqa: E741


def time_forms(folder: Path, rounds: int) -> None:
    models = {}
    with tempfile.TemporaryDirectory() as temporary:
        for form, options in FORMS.items():
            jaxllm.convert(folder, Path(temporary, form), **options, progress=False)
            models[form] = jaxllm.load(Path(temporary, form), dtype="float32")
    columns: dict[str, Callable[[jaxllm.Model], float]] = {
        f"batch {B}, tokens/s": lambda model, B=B: B * (NEW_TOKENS - 1) / run_once(
            model, B, PROMPT_TOKENS, NEW_TOKENS)[1] for B in BATCHES}
    columns[f"prefill of {PREFILL_TOKENS}, tokens/s"] = lambda model: PREFILL_TOKENS / run_once(
        model, 1, PREFILL_TOKENS, 1)[0]
    print(f"{'':14}" + "".join(f"{column:>30}" for column in columns) + f"{'bytes of weights':>20}")
    speeds = {form: {column: [] for column in columns} for form in FORMS}
    for turn in range(rounds + 1):
        for form, model in models.items():
            for column, run in columns.items():
                speed = run(model)
                if turn:      # the first compiles
                    speeds[form][column].append(speed)
    for form, model in models.items():
        cells = []
        for column in columns:
            own, base = speeds[form][column], speeds["float32"][column]
            ratio = median(slow / fast for slow, fast in zip(base, own, strict=True))
            cells.append(f"{median(own):,.0f} ({ratio:.2f}x the time)")
        nbytes = sum(array.nbytes for array in jax.tree.leaves(model.transformer))
        print(f"{form:14}" + "".join(f"{cell:>30}" for cell in cells) + f"{nbytes:20,}")


def random_stack(rng: np.random.Generator, width: int, out: int) -> Packed:
    codes = np.empty((E, width // 2, out), np.uint8)
    pool = rng.integers(0, 256, 2 * width * out, dtype=np.uint8)
    for expert in codes:      # every expert other bytes, without drawing 3 GB
        start = rng.integers(width * out)
        expert[...] = pool[start:start + expert.size].reshape(expert.shape)
    return Packed(jnp.asarray(codes), jnp.asarray(rng.integers(116, 120, (E, width // 32, out), dtype=np.uint8)), 1)


def time_layer(rounds: int) -> None:
    rng = np.random.default_rng(0)
    weights = random_stack(rng, D, I), random_stack(rng, D, I), random_stack(rng, I, D)
    chosen = np.stack([rng.permutation(E)[:A] for _ in range(M)]).astype(np.int32)
    cases = {f"{M} tokens, {A} of {E} experts each": chosen, f"1 token, {A} experts": chosen[:1],
             f"{M} tokens, all {E} experts": np.tile(np.arange(E, dtype=np.int32), (M, 1))}
    run = jax.jit(experts_by_block)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, experts in cases.items():
            x = jnp.asarray(rng.standard_normal((len(experts), D), np.float32))
            begin = time.perf_counter()
            run(x, experts, np.full(experts.shape, 1 / A, np.float32), *weights).block_until_ready()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    print(f"\none MoE layer of {E} experts, {D} x {I}, MXFP4")
    for name, experts in cases.items():
        share = median(a / b for a, b in zip(seconds[name], seconds[f"{M} tokens, all {E} experts"], strict=True))
        print(f"{name:36}{len(np.unique(experts)):5} different  {median(seconds[name]) * 1e3:8.0f} ms  "
              f"{share:.3f} of reading all")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=NANO, help="an unquantised hub folder")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each form")
    parser.add_argument("--layer", action="store_true", help="only the MoE layer")
    args = parser.parse_args()
    if not args.layer:
        time_forms(args.model, args.rounds)
    time_layer(args.rounds)


if __name__ == "__main__":
    main()
