"""What a run tells: metrics.jsonl, a line for each logged step; curves.png; and a bar on a terminal."""
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from tqdm import tqdm

METRICS, CURVES = "metrics.jsonl", "curves.png"


class Report:
    """The lines of the steps up to `step`, where the run goes on, and those to come. Only the first process writes.

    Errors: ValueError naming the file that cannot be written.
    """

    def __init__(self, folder: Path, step: int, steps: int, progress: bool):
        self.file, self.curves = folder / METRICS, folder / CURVES
        self.is_first = jax.process_index() == 0
        self.lines = [line for line in read_metrics(self.file) if line["step"] <= step]
        if self.is_first:      # a step that is done again must not have two lines
            _replace(self.file, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self._seconds = self.lines[-1]["seconds"] if self.lines else 0.0
        self._step, self._begin = step, time.monotonic()
        self._bar = tqdm(total=steps, initial=step, unit="step", smoothing=0.1,
                         disable=None if progress and self.is_first else True)      # None: shown on a terminal

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
        with suppress(ValueError) if error else nullcontext():      # of two errors the first says what is wrong
            self.draw()

    def advance(self) -> None:
        """One more step is on its way."""
        self._bar.update()

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """A line: the metrics, the `tokens` of all steps so far, how fast they were since the last line, and seconds of
        training, those before a resume with them."""
        taken = time.monotonic() - self._begin
        rate = tokens / step * (step - self._step) / taken
        line = {"step": step, **{name: value if math.isfinite(value) else None for name, value in metrics.items()},
                "tokens": tokens, "tokens_per_second": round(rate, 1), "seconds": round(self._seconds + taken, 3)}
        self._seconds += taken
        self._step, self._begin = step, time.monotonic()
        self._bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {rate:,.0f} tokens/s")
        self.lines.append(line)

    def add_heldout(self, bits_per_byte: Mapping[str, float]) -> None:
        """Of the step that was logged last."""
        self.lines[-1]["heldout"] = dict(bits_per_byte)
        self._begin = time.monotonic()      # an evaluation is no training

    def write(self) -> None:
        """Write the line of the last step."""
        if self.is_first:
            with _naming(self.file), open(self.file, "a") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")

    def say(self, text: str) -> None:
        """Print a line, above the bar."""
        if self.is_first:
            tqdm.write(text)

    def draw(self) -> None:
        if self.is_first and self.lines:
            with _naming(self.curves):
                draw_curves(self.lines, self.curves)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, of which a killed run may have left the last one unfinished."""
    lines = []
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def draw_curves(lines: list[dict[str, Any]], file: Path) -> None:
    """Loss, bits per byte of held-out text, and learning rate by step, one below the other, as PNG."""
    from matplotlib.figure import Figure  # here, because it takes a second

    heldout = [line for line in lines if "heldout" in line]
    names = ["loss", *(name for name in lines[-1] if name.startswith("mtp_"))]
    panels: list[tuple[str, dict[str, tuple[list[int], list[float]]]]] = [
        ("loss, nats a token", {name: _curve(lines, name) for name in names}),
        ("learning rate", {"": _curve(lines, "learning_rate")})]
    if heldout:
        panels.insert(1, ("held-out bits per byte", {
            name: ([line["step"] for line in heldout], [line["heldout"][name] for line in heldout])
            for name in heldout[-1]["heldout"]}))
    figure = Figure(figsize=(8, 3 * len(panels)), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(len(panels), sharex=True), panels, strict=True):
        for name, curve in curves.items():
            axes.plot(*curve, label=name, linewidth=1, marker="." if len(curve[0]) < 50 else None)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
    axes.set_xlabel("step")
    part = file.with_suffix(".part.png")
    figure.savefig(part)
    os.replace(part, file)


def _curve(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values, without those that were not finite."""
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _replace(file: Path, content: bytes) -> None:
    part = file.with_name(file.name + ".part")
    with _naming(file):
        part.write_bytes(content)
        os.replace(part, file)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """What the system says of a full disk, with the file that it was for."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{file} cannot be written ({error.strerror}): free space, and go on with --resume") from error
