"""A plan or a report as one picture: what a device holds beside what it has, what a step moves, how long it takes."""
import os
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxllm.tpu.plan import Plan
from jaxllm.tpu.report import Report
from jaxllm.tpu.train_plan import TrainPlan

GB = 1e9


def draw(found: Plan | TrainPlan | Report, file: str | os.PathLike[str]) -> None:
    """One PNG: memory by kind, bytes by class for a report, and milliseconds at the chip's full rates."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    memory, *middle, times = figure.subplots(1, 3 if isinstance(found, Report) else 2)
    peak, usable = (found.memory["peak"], found.memory["usable"]) if isinstance(found, Report) else (
        found.peak, int(found.on.chip.usable_hbm.value))
    held = {kind: nbytes for kind, nbytes in found.held.items() if nbytes}
    _stack(memory, {"a device": held | {"temporaries": max(0, peak - sum(held.values()))}})
    memory.axhline(usable / GB, color="black", linestyle="--", label="usable HBM")
    memory.set(title=f"memory of a device: {peak / GB:.1f} of {usable / GB:.1f} GB", ylabel="GB")
    if isinstance(found, Report):
        _stack(middle[0], {"moved": found.moved, "least": found.least})
        middle[0].set(title=f"bytes of a step, {found.ratio:.2f} of the least", ylabel="GB a device")
    for axes in (memory, *middle):
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    bars = times.barh(list(found.seconds), [1000 * value for value in found.seconds.values()], color="tab:gray")
    times.bar_label(bars, fmt="%.2f", padding=3)
    times.margins(x=0.15)
    times.set(title="at the rates of the data sheet", xlabel="ms a step")
    mesh = ", ".join(f"{axis}={size}" for axis, size in found.mesh.items())
    figure.suptitle(f"{found.work.step} of {found.model} on {found.on.name} ({mesh}): {found.work}")
    figure.savefig(Path(file), format="png", dpi=110)


def _stack(axes: Axes, bars: Mapping[str, Mapping[str, int]]) -> None:
    bottom = dict.fromkeys(bars, 0.0)
    for kind in dict.fromkeys(kind for bar in bars.values() for kind in bar):
        heights = [bar.get(kind, 0) / GB for bar in bars.values()]
        axes.bar(list(bars), heights, bottom=list(bottom.values()), label=kind, width=0.6)
        bottom = {name: bottom[name] + height for name, height in zip(bars, heights, strict=True)}
