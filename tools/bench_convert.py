"""Converting, checking and loading a checkpoint in a released layout, against copying its files; as a table.

    python tools/bench_convert.py [CONFIG] [--kind fp8|mxfp4|bfloat16] [--layers N] [--folder DIR]

By default V2.6-Flash with MXFP4 experts, real sizes, cut to 4 layers and MTP: 14 GB, and three times that on the disk.
Each step runs in a process of its own, whose peak resident memory (VmHWM, interpreter and imports included) is read at
its end, on files that are not in the page cache. Copying counts until the disk has the bytes, as converting does;
it is measured before and after, and the ratio is to the faster. Loading keeps the model in that same memory, so what
counts there is the peak divided by the model's size.
"""
import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from make_release import write_release

ROOT = Path(__file__).parent.parent
CONVERT = "from jaxllm.checkpoint import convert; convert('hub', 'out', progress=False)"
VERIFY = "from jaxllm.checkpoint import verify; verify('out', progress=False)"
LOAD = '''
import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxllm.checkpoint import load_arrays, open_source
from jaxllm.checkpoint.blocks import letters_of
mesh, source = jax.make_mesh((1, {expert}, {tensor}), ("data", "expert", "tensor")), open_source("out")
axes = {{"E": "expert"}} | dict.fromkeys("NWFI", "tensor")      # as a model has them
def spec(path, shape):
    names = [axes.get(letter) for letter in letters_of(path)]
    return PartitionSpec(*[name if name and size % mesh.shape[name] == 0 else None
                           for name, size in zip(names, shape, strict=True)])
jax.block_until_ready(load_arrays(source, {{
    path: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(path, shape)))
    for path, (shape, dtype) in source.params.items()}}))
'''
REPORT = "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"


def measure(code: str, folder: Path) -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak MB) of a fresh interpreter that runs `code` in `folder`, with no file in memory."""
    forget(folder)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
                        "PYTHONPATH": str(ROOT)}
    start, cpu = time.monotonic(), cpu_seconds()
    done = subprocess.run([sys.executable, "-c", code + REPORT], cwd=folder, env=env, check=True,
                          stdout=subprocess.PIPE, text=True)
    return time.monotonic() - start, cpu_seconds() - cpu, int(done.stdout.split()[-1]) * 1024 / 1e6


def copy(folder: Path) -> tuple[float, float]:
    """(seconds, CPU seconds) to copy the hub folder and have the copy on the disk."""
    forget(folder)
    start, cpu = time.monotonic(), cpu_seconds()
    subprocess.run(["cp", "-r", "hub", "copy"], cwd=folder, check=True)
    os.sync()
    taken = time.monotonic() - start, cpu_seconds() - cpu
    shutil.rmtree(folder / "copy")
    return taken


def cpu_seconds() -> float:
    """Of all processes that were started here and have ended; what else runs beside them does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def forget(folder: Path) -> None:
    """Have the page cache drop all files below `folder`."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=ROOT / "configs/MiMo-V2.6-Flash")
    parser.add_argument("--kind", default="mxfp4")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        config = json.loads((args.config / "config.json").read_text())
        nbytes = write_release(config, folder / "hub", args.kind, layers=args.layers, mtp=3)
        print(f"{args.config.name}, {args.kind}, {args.layers} layers: {nbytes / 1e9:.2f} GB\n"
              f"{'':28}{'seconds':>9}{'GB/s':>8}{'CPU s':>8}{'peak MB':>9}", flush=True)

        def row(name: str, seconds: float, cpu: float, peak: float | None = None, note: str = "") -> None:
            shown = f"{peak:9.0f}" if peak is not None else " " * 9
            print(f"{name:28}{seconds:9.1f}{nbytes / 1e9 / seconds:8.3f}{cpu:8.1f}{shown}  {note}", flush=True)

        row("cp", *(before := copy(folder)))
        converted = measure(CONVERT, folder)
        row("cp again", *(after := copy(folder)))
        row("convert", *converted, f"{min(before, after)[0] / converted[0]:.2f} of cp")
        row("verify", *measure(VERIFY, folder))
        for expert, tensor in ((8, 1), (2, 4)):
            *taken, peak = measure(LOAD.format(expert=expert, tensor=tensor), folder)
            row(f"load, expert={expert},tensor={tensor}", *taken, peak, f"{peak * 1e6 / nbytes:.2f} of the model")


if __name__ == "__main__":
    main()
