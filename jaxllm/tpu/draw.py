"""A report as one picture: what a device holds beside what it has, and what a step moves beside the least."""
import os
from pathlib import Path

from matplotlib.figure import Figure

from jaxllm.tpu.chips import Slice
from jaxllm.tpu.report import Report

GB = 1e9


def draw(report: Report, on: Slice, file: str | os.PathLike[str]) -> None:
    """One PNG: memory by kind, bytes moved by class, and how long each would take at the chip's rates."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    memory, moved, times = figure.subplots(1, 3)
    held = {kind: nbytes for kind, nbytes in report.held.items() if nbytes}
    held["temporaries"] = max(0, report.memory["peak"] - sum(held.values()))
    _stack(memory, {"a device": held})
    memory.axhline(report.memory["usable"] / GB, color="black", linestyle="--", label="usable HBM")
    memory.set(title="memory", ylabel="GB a device")
    _stack(moved, {"moved": report.moved, "least": report.least})
    moved.set(title=f"bytes of a step, {report.ratio:.2f} of the least", ylabel="GB a device")
    seconds = roofline(report, on)
    times.barh(list(seconds), [1000 * value for value in seconds.values()], color="tab:gray")
    times.set(title="at the rates of the data sheet", xlabel="ms a step")
    for axes in (memory, moved):
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    mesh = ", ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    figure.suptitle(f"{report.step} of {report.model} on {report.on} ({mesh}): {report.batch} rows of {report.tokens}, "
                    f"context {report.context:,}")
    figure.savefig(Path(file), format="png", dpi=110)


def roofline(report: Report, on: Slice) -> dict[str, float]:
    """Seconds of a step by each thing that it needs of a chip, at 100% of the rate."""
    devices = on.chip.devices.value
    rate = on.chip.bandwidth.value / devices
    found = {"HBM, as compiled": sum(report.moved.values()) / rate, "HBM, the least": sum(report.least.values()) / rate}
    if on.chip.ici is not None:
        found["between chips"] = sum(x.nbytes for x in report.collectives) / (on.chip.ici.value / 2 / devices)
    return found


def _stack(axes, bars: dict[str, dict[str, int]]) -> None:
    kinds = list(dict.fromkeys(kind for bar in bars.values() for kind in bar))
    bottom = dict.fromkeys(bars, 0.0)
    for kind in kinds:
        heights = [bar.get(kind, 0) / GB for bar in bars.values()]
        axes.bar(list(bars), heights, bottom=list(bottom.values()), label=kind, width=0.6)
        bottom = {name: bottom[name] + height for name, height in zip(bars, heights, strict=True)}
