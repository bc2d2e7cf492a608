"""Published decode runs of the family beside the bound that the planner gives for the same chips, rows and context.

    python tools/published_runs.py

Prints the table of docs/tpu.md. A run's rows all decode at once here, with a context of the prompt and half of the
answer, its mean while it decodes; the published rate has prefill in its time as well, which the bound has not.
"""
from dataclasses import dataclass
from pathlib import Path

from jaxllm.checkpoint.stated import stated_params
from jaxllm.config import Config
from jaxllm.tpu.chips import slice_of
from jaxllm.tpu.held import Held
from jaxllm.tpu.plan import plans
from jaxllm.tpu.steps import work_of

CONFIGS = Path(__file__).parent.parent / "configs"
COOKBOOK = "sglang-jax cookbook"


@dataclass(frozen=True)
class Run:
    model: str
    on: str
    prompt: int
    answer: int
    rows: int
    tokens_s: float      # of all rows together
    source: str


RUNS = (
    Run("MiMo-V2-Flash", "tpu7x:2x2x1", 16384, 1024, 64, 480.0, f"{COOKBOOK}, MiMo-V2-Flash.md"),
    Run("MiMo-V2-Flash", "v6e:4x4", 1024, 1024, 16, 1034.0, f"{COOKBOOK}, MiMo-V2-Flash.md"),
    Run("MiMo-V2.5-Pro", "tpu7x:2x2x4", 1024, 1024, 128, 3517.0, f"{COOKBOOK}, MiMo-V2.5-Pro.md"),
    Run("MiMo-V2.5-Pro", "v6e:8x8", 1000, 1000, 16, 470.0, f"{COOKBOOK}, MiMo-V2.5-Pro.md"),
    Run("MiMo-V2-Flash", "h100:8", 3700, 300, 64, 732.0, "vLLM eager, fork for Neuron"),
)


def row(run: Run) -> str:
    config = Config.from_hub(CONFIGS / run.model)
    on, context = slice_of(run.on), run.prompt + run.answer // 2
    best = plans(Held(run.model, config, stated_params(config)), on, work_of(config, "decode", run.rows, context))[0]
    assert best.fits, best
    mesh = " ".join(f"{axis}={size}" for axis, size in best.mesh.items() if size > 1)
    return (f"| {run.model} FP8 | {on.num_chips} {on.chip.name} | {run.rows} | {context} | {run.tokens_s:,.0f} "
            f"({run.source}) | {mesh} | {1000 * best.step_seconds:.2f} ms | {best.tokens_s:,.0f}, {best.limit} | "
            f"{run.tokens_s / best.tokens_s:.2f} |")


def main() -> None:
    print("| model | chips | rows | context | published tokens/s | mesh | a step at 100% of the roofline | tokens/s, "
          "limit | published over it |\n|---|---|---|---|---|---|---|---|---|")
    for run in RUNS:
        print(row(run))


if __name__ == "__main__":
    main()
