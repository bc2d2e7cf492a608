"""Every program that docs/tpu.md has a row of, compiled for slices that are not here, each beside its plan: two tables.

    python tools/compile_all.py [--only TEXT] [--out build/aot]

First the released models whole, minutes each; then the first four layers of them in more combinations of slice,
weights, batch and context. One `jaxllm compile` after the other; what is in the folder already is not compiled again.
--only: those whose name, as in MiMo-V2.6-Pro.mxfp4.v6e-8x8.decode, has TEXT in it. Needs libtpu: `make aot` puts it in
place. The compiler's numbers of all that is in the folder go into compiled.json there, of which tests/tpu has a copy.
"""
import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from jaxllm.axes import make_abstract_mesh
from jaxllm.config import Config
from jaxllm.tpu.chips import slice_of
from jaxllm.tpu.held import Held
from jaxllm.tpu.plan import Plan, plan
from jaxllm.tpu.program import params_of
from jaxllm.tpu.steps import work_of

ROOT = Path(__file__).parent.parent
PRO, FLASH = "MiMo-V2.6-Pro", "MiMo-V2-Flash"      # V2.5-Pro's programs are those of V2.6-Pro, V2.5's and V2.6-Flash's
SLICES = ("v6e:8x8", "tpu7x:2x4x2")                # those of V2-Flash up to constants: tests/tpu/test_same_programs.py
SMALL = ("v6e:4x4", "v5p:2x2x4")                   # that hold the smaller models too
LIBTPU = str(Path(sys.prefix, "libtpu"))           # where the Makefile has it
LAYERS = 4                                         # full attention and dense MLP, then sliding and experts
MIB = 2**20
COMBINATIONS = """
Pro   mxfp4 v6e:8x8     decode    8    4096
Pro   mxfp4 v6e:8x8     decode  512    8192
Pro   mxfp4 v6e:8x8     decode    1 1048576
Pro   fp8   v6e:16x16   decode  256    8192
Pro   int4  v6e:4x8     decode   32   16384
Pro   mxfp4 v5e:8x16    decode   64    4096
Pro   mxfp4 v5p:2x2x4   decode   16  131072
Pro   fp8   tpu7x:2x2x4 decode  128    8192
Pro   fp8   tpu7x:2x4x2 decode    4 1048576
Pro   fp8   v5p:2x2x4   decode   24   20000
Pro   fp8   v6e:8x16    decode  200   16384
Pro   mxfp4 tpu7x:4x4x1 decode   96   50000
Flash fp8   v5e:4x8     decode   32    4096
Flash mxfp4 v5e:4x4     decode   64    8192
Flash int4  v6e:2x4     decode    8   32768
Flash fp8   v6e:4x4     decode  256    4096
Flash mxfp4 v6e:4x4     decode    3    8192
Flash fp8   v6e:8x8     decode    1  262144
Flash fp8   v5p:2x2x2   decode  100    4096
Flash mxfp4 v5p:2x2x1   decode   16   65536
Flash fp8   tpu7x:2x2x1 decode   64   16384
Flash mxfp4 v6e:2x4     decode   12  100000
Flash fp8   v6e:4x8     decode    7    5000
Pro   mxfp4 v6e:8x8     prefill   4    8192
Flash fp8   v6e:4x4     prefill   2   32768
Flash mxfp4 v5e:4x4     prefill   1   16384
Pro   mxfp4 v6e:4x8     prefill   3   12288
Flash int4  v5p:2x2x2   prefill   2    8192
Pro   mxfp4 v6e:8x8     verify   32   16384
Flash fp8   v6e:4x4     verify   32   16384
Flash mxfp4 v6e:4x4     verify    5    9000
"""


@dataclass(frozen=True)
class Case:
    model: str
    weights: str
    on: str
    step: str = "decode"
    batch: int = 64
    context: int = 32768
    layers: int | None = None      # the first ones; None: all

    @property
    def name(self) -> str:
        sizes = "" if self.layers is None else f".{self.batch}x{self.context}.{self.layers}-layers"
        return f"{self.model}.{self.weights}.{self.on.replace(':', '-')}.{self.step}{sizes}"

    def folder(self, out: Path) -> Path:
        whole = ROOT / "configs" / self.model
        if self.layers is None:
            return whole
        stated = json.loads((whole / "config.json").read_text())
        stated |= {key: stated[key][:self.layers] for key in ("hybrid_layer_pattern", "moe_layer_freq")}
        cut = out / f"{self.model}-{self.layers}-layers"
        cut.mkdir(exist_ok=True)
        (cut / "config.json").write_text(json.dumps(stated | {"num_hidden_layers": self.layers}))
        return cut

    def plan(self, out: Path, mesh: dict[str, int]) -> Plan:
        folder = str(self.folder(out))
        config = Config.from_hub(folder)
        held = Held(self.model, config, params_of(folder, config, self.weights))
        return plan(held, slice_of(self.on), make_abstract_mesh(mesh),
                    work_of(config, self.step, self.batch, self.context))

    def arguments(self, out: Path) -> list[str]:
        return [str(self.folder(out)), "--on", self.on, "--weights", self.weights, "--step", self.step, "--batch",
                str(self.batch), "--context", str(self.context)]


def whole_models() -> Iterator[Case]:
    for model in (PRO, FLASH):
        for weights in ("mxfp4", "fp8"):
            for on in SLICES + (SMALL if model == FLASH else ()):
                yield Case(model, weights, on)
                yield Case(model, weights, on, "prefill", 1)


def first_layers() -> Iterator[Case]:
    for line in COMBINATIONS.strip().splitlines():
        model, weights, on, step, batch, context = line.split()
        yield Case({"Pro": PRO, "Flash": FLASH}[model], weights, on, step, int(batch), int(context), LAYERS)


def ratios(planned: Plan, compiled: dict[str, Any]) -> dict[str, float]:
    """Of the plan's bytes over the compiler's."""
    ours = {"arguments": sum(planned.held.values()), "peak": planned.peak, "sent": planned.sent}
    return {name: nbytes / max(1, compiled[name]) for name, nbytes in ours.items()}


def numbers(found: dict[str, Any]) -> dict[str, Any]:
    """What of a report a plan says too."""
    return {"mesh": found["mesh"], "arguments": found["memory"]["arguments"], "peak": found["memory"]["peak"],
            "sent": sum(x["nbytes"] for x in found["collectives"])}


def row(case: Case, out: Path) -> str:
    file = out / f"{case.name}.json"
    if not file.exists():
        return f"| {case.name} | does not compile: {file.with_suffix('.txt').read_text().splitlines()[-1][:150]} |"
    found = json.loads(file.read_text())
    memory, mesh = found["memory"], " ".join(f"{axis}={size}" for axis, size in found["mesh"].items() if size > 1)
    sizes = [memory[kind] / MIB for kind in ("arguments", "temporaries", "peak")]
    moved = sum(found["moved"].values()) / MIB
    sent = ", ".join(f"{x['count']} {x['kind']} {x['nbytes'] / MIB:.1f}" for x in found["collectives"])
    compared = ratios(case.plan(out, found["mesh"]), numbers(found))
    return (f"| {case.name} | {mesh} | {found['compile_seconds']:.0f} | " + " | ".join(f"{size:,.0f}" for size in sizes)
            + f" | {moved:,.0f} | {found['ratio']:.2f} | {sent} | "
            + " | ".join(f"{ratio:.3f}" for ratio in compared.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="programs with this in their name")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "aot")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"PYTHONPATH": LIBTPU}
    for cases in (whole_models(), first_layers()):
        print("\n| program | mesh | compiled in s | arguments MiB | temporaries | peak | moved | of the least | sent "
              "| plan over compiler: arguments | peak | sent |\n|" + "---|" * 12, flush=True)
        for case in cases:
            if args.only not in case.name:
                continue
            file = args.out / f"{case.name}.json"
            if not file.exists():
                command = [sys.executable, "-m", "jaxllm", "compile", *case.arguments(args.out), "--json", str(file),
                           "--png", str(file.with_suffix(".png"))]
                done = subprocess.run(command, env=env, capture_output=True, text=True)
                file.with_suffix(".txt").write_text(done.stdout + done.stderr)
            print(row(case, args.out), flush=True)
    compiled = {case.name: numbers(json.loads(file.read_text())) for case in (*whole_models(), *first_layers())
                if (file := args.out / f"{case.name}.json").exists()}
    versions = {name: next(iter(distributions(name=name, path=[LIBTPU, *sys.path]))).version
                for name in ("jax", "libtpu")}
    (args.out / "compiled.json").write_text(json.dumps(versions | {"programs": compiled}, indent=1) + "\n")


if __name__ == "__main__":
    main()
