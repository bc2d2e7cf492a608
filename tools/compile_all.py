"""Every full-size program that docs/tpu.md has a row of, compiled for slices that are not here; the table of them all.

    python tools/compile_all.py [--only TEXT] [--out build/aot]

One `jaxllm compile` after the other, minutes each; what is in the folder already is not compiled again. --only: those
whose name, as in MiMo-V2.6-Pro.mxfp4.v6e-8x8.decode, has TEXT in it. Needs libtpu: `make aot` puts it in place.
"""
import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRO, FLASH = ("MiMo-V2.5-Pro", "MiMo-V2.6-Pro"), ("MiMo-V2-Flash", "MiMo-V2.5", "MiMo-V2.6-Flash")
SLICES = ("v6e:8x8", "tpu7x:2x4x2")
SMALL = ("v6e:4x4", "v5p:2x2x4")                   # that hold the smaller models too
STEPS = {"decode": ["--batch", "64"], "prefill": ["--batch", "1", "--tokens", "4096"]}
MIB = 2**20


def programs() -> Iterator[tuple[str, list[str]]]:
    """(name, arguments of `jaxllm compile`)"""
    for model in PRO + FLASH:
        for weights in ("mxfp4", "fp8"):
            for on in SLICES + (SMALL if model in FLASH else ()):
                for step, shape in STEPS.items():
                    yield (f"{model}.{weights}.{on.replace(':', '-')}.{step}",
                           [str(ROOT / "configs" / model), "--on", on, "--weights", weights, "--step", step,
                            "--context", "32768", *shape])


def row(name: str, file: Path) -> str:
    if not file.exists():
        return f"| {name} | does not compile: {file.with_suffix('.txt').read_text().splitlines()[-1][:150]} |"
    found = json.loads(file.read_text())
    memory, mesh = found["memory"], " ".join(f"{axis}={size}" for axis, size in found["mesh"].items() if size > 1)
    sizes = [memory[kind] / MIB for kind in ("arguments", "temporaries", "peak")]
    moved = sum(found["moved"].values()) / MIB
    sent = ", ".join(f"{x['count']} {x['kind']} {x['nbytes'] / MIB:.1f}" for x in found["collectives"])
    return (f"| {name} | {mesh} | {found['compile_seconds']:.0f} | " + " | ".join(f"{size:,.0f}" for size in sizes)
            + f" | {moved:,.0f} | {found['ratio']:.2f} | {sent} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="programs with this in their name")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "aot")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"PYTHONPATH": str(Path(sys.prefix, "libtpu"))}
    rows = []
    for name, arguments in programs():
        if args.only not in name:
            continue
        file = args.out / f"{name}.json"
        if not file.exists():
            done = subprocess.run([sys.executable, "-m", "jaxllm", "compile", *arguments, "--json", file, "--png",
                                   file.with_suffix(".png")], env=env, capture_output=True, text=True)
            file.with_suffix(".txt").write_text(done.stdout + done.stderr)
        rows.append(row(name, file))
        print(rows[-1], flush=True)
    print("\n| program | mesh | compiled in s | arguments MiB | temporaries | peak | moved | of the least | sent |\n"
          "|---|---|---|---|---|---|---|---|---|\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
