"""A run from its settings to its last checkpoint: what it starts from, its steps, and what happens between them.

Every step is a function of the state, the place in the data and the settings, and all three are in a checkpoint. So a
run that was killed and resumed has the same numbers as one that was not.
"""
import dataclasses
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from jaxllm.axes import make_mesh, spec
from jaxllm.evaluate import evaluate
from jaxllm.generate.compile_cache import use_compile_cache
from jaxllm.generate.engine import Model
from jaxllm.generate.text import Tokenizer
from jaxllm.train.batch import Batch
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.data import Rows, batches
from jaxllm.train.memory import describe_memory
from jaxllm.train.output import open_origin, output_of, write_settings
from jaxllm.train.report import Report
from jaxllm.train.run import Run
from jaxllm.train.state import Plan, TrainState, make_plan
from jaxllm.train.step import make_step


@dataclasses.dataclass(frozen=True)
class Trained:
    """Where a run has come to."""
    folder: Path
    step: int
    is_finished: bool      # or stopped by SIGTERM


def train(run: Run, resume: bool = False, progress: bool = True) -> Trained:
    """Train until run.steps are done, or SIGTERM comes; the state is then in the last checkpoint of run.output.

    resume: go on from the last checkpoint in run.output, which must hold no run otherwise.
    Errors: ValueError (CheckpointError, ConfigError) that says what is wrong with a file or a setting, or at which step
    loss or gradient were no number.
    """
    use_compile_cache()
    with ExitStack() as stack:
        origin, mesh = open_origin(run), make_mesh(run.mesh)
        plan = make_plan(run, origin.config, mesh, origin.source.params if origin.source else {}, origin.num_mtp)
        process, processes = part_of_batch(mesh)
        rows = batches(run.data, origin.tokenizer, context=run.context, batch=run.batch, seed=run.seed,
                       format=run.format, on_broken=run.on_broken, process=process, processes=processes)
        folder = stack.enter_context(output_of(run, resume))
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", run.keep, origin.identity))
        stack.enter_context(jax.set_mesh(mesh))
        state, frozen = plan.begin(origin.source)
        begin = 0
        if resume and (restored := checkpoints.restore_latest(plan.abstract(), print)):
            begin, state = restored.step, restored.state
            rows.restore(restored.data)
        write_settings(folder, run, origin)
        report = stack.enter_context(Report(folder, begin, run.steps, progress))
        for record in rows.skipped if progress else ():
            report.say(f"left out: {record}")
        is_stopped = stack.enter_context(stopping())
        last = begin if begin >= run.steps else _loop(plan, state, frozen, begin, rows, checkpoints, report,
                                                      origin.tokenizer, is_stopped)
        checkpoints.wait()
        return Trained(folder, last, last >= run.steps)


def _loop(plan: Plan, state: TrainState, frozen: dict[str, Any], begin: int, rows: Rows, checkpoints: Checkpoints,
          report: Report, tokenizer: Tokenizer, is_stopped: Callable[[int], bool]) -> int:
    """The last step, with its checkpoint on the way to the disk."""
    run, batch = plan.run, on_mesh(next(rows), plan.mesh)
    step = make_step(plan).lower(state, frozen, batch).compile()
    report.say(describe_memory(state, frozen, step))
    for number in range(begin + 1, run.steps + 1):
        state, metrics = step(state, frozen, batch)
        place = rows.state()
        batch = on_mesh(next(rows), plan.mesh)      # while the devices are at work
        report.advance()
        if run.on_nonfinite == "stop" and float(metrics["skipped"]):
            raise ValueError(f"step {number}: the loss is {float(metrics['loss'])}, the gradient's norm "
                             f"{float(metrics['grad_norm'])}; the run stops, its last good checkpoint is step "
                             f"{max(checkpoints.steps, default=0)}: lower learning_rate, look at the data, or leave "
                             "such steps out by on_nonfinite = 'skip'")
        stop, is_last = is_stopped(number), number == run.steps
        has_heldout = bool(run.heldout) and (is_last or bool(run.heldout_every) and number % run.heldout_every == 0)
        if number % run.log_every == 0 or is_last or stop or has_heldout:
            report.log(number, number * run.batch * run.context, {k: float(value) for k, value in metrics.items()})
            if has_heldout:
                report.add_heldout(heldout(plan, state, frozen, tokenizer))
            report.write()
        if number % run.save_every == 0 or is_last or stop:
            checkpoints.save(number, state, place)
            report.draw()
        if stop and not is_last:
            report.say(f"stopped after step {number} of {run.steps}; go on with: jaxllm train {run.output} --resume")
            break
    return number


def heldout(plan: Plan, state: TrainState, frozen: dict[str, Any], tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte of each held-out file."""
    model = Model(plan.model(state.trained, state.biases, frozen), plan.mesh, tokenizer, ())
    found = evaluate([("model", model)], list(plan.run.heldout.values())).scores["model"]
    return {name: found[file].measures["bits_per_byte"] for name, file in plan.run.heldout.items()}


def part_of_batch(mesh: Mesh) -> tuple[int, int]:
    """(n, number): this process has the n-th of so many equal parts of the rows; where `data` does not tell processes
    apart, they have the same rows."""
    ours = sorted({int(index[0]) for index, device in np.ndenumerate(mesh.devices)
                   if device.process_index == jax.process_index()})
    if ours != list(range(ours[0], ours[-1] + 1)) or ours[0] % len(ours) or mesh.shape["data"] % len(ours):
        raise ValueError(f"the places of this process on mesh axis data are {ours}: expected neighbours, equally many "
                         "on each process")
    return ours[0] // len(ours), mesh.shape["data"] // len(ours)


def on_mesh(batch: Batch, mesh: Mesh) -> Batch:
    """The whole batch, of which each process brings its part."""
    _, parts = part_of_batch(mesh)
    sharding = NamedSharding(mesh, spec("batch", None))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, (len(x) * parts, *x.shape[1:])),
                        batch)


@contextmanager
def stopping() -> Iterator[Callable[[int], bool]]:
    """Whether to stop after a step: SIGTERM has come, to any process of a job."""
    if jax.process_count() > 1:      # jax.distributed has the signal, and lets all stop at the same step
        yield multihost_utils.reached_preemption_sync_point
        return
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
