"""Whether a training step fits a slice, on which mesh, what bounds it there, and how long a whole run takes.

The days of a run are those of its model FLOPs, which are without what rematerialisation makes again, at UTILISATION of
the chips' rate; and those of the step's own bounds (plan.py), where these are slower.
"""
import dataclasses
import functools
import math
from typing import Any

from jax.sharding import AbstractMesh

from jaxllm.tpu.chips import Slice, gpu_slice
from jaxllm.tpu.held import Held
from jaxllm.tpu.plan import meshes
from jaxllm.tpu.rates import is_near, near_rate, rates_of
from jaxllm.tpu.steps import Training
from jaxllm.tpu.train_held import Trained
from jaxllm.tpu.train_work import FLOAT32, flops_of_token, kept_bytes, most_bytes, moved_bytes, sent_bytes
from jaxllm.train.memory import show

UTILISATION = 0.4      # of the chips' bfloat16 rate, by model FLOPs: what large runs are published with, MoE ones less
DAY = 86400.0


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """A training step on one mesh. Bytes are of a device."""
    model: str
    on: Slice
    mesh: dict[str, int]
    work: Training
    state: dict[str, int]           # the step's arguments, by kind
    gradients: int
    kept: dict[str, int]            # for the backward pass, "rematerialised" (as the step does) and "all"
    made: dict[str, int]            # beside the state: at the head, at the layer that takes most, at the update
    moved: dict[str, int]           # between HBM and the core, at least
    sent: dict[str, int]            # over `data`, and over the other axes
    flops: dict[str, float]         # of a token, on all devices

    @property
    def held(self) -> dict[str, int]:
        """What there is before the first gradient."""
        return self.state | {"activations": self.kept["rematerialised"]}

    @property
    def peak(self) -> int:
        return sum(self.state.values()) + max(self.made.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.on.chip.usable_hbm.value

    @property
    def model_flops(self) -> float:
        """Of a token, without what is made again."""
        return self.flops["forward"] + self.flops["gradients"]

    @property
    def seconds(self) -> dict[str, float]:
        """By what a step needs of a device, each at its full rate."""
        rates = rates_of(self.on)
        near = near_rate(self.on) if is_near(self.on, self.mesh) else rates["between chips"]
        flops = sum(self.flops.values()) * self.work.num_tokens / self.on.num_devices
        return {"HBM": sum(self.moved.values()) / rates["HBM"], "arithmetic": flops / rates["arithmetic"],
                "between chips": sum(nbytes / rate for nbytes, rate in (
                    (self.sent["data"], rates["between chips"]), (self.sent["model"], near)) if nbytes)}

    @property
    def step_seconds(self) -> float:
        """At UTILISATION, or at the bounds."""
        return max(self.model_seconds / UTILISATION, *self.seconds.values())

    @property
    def model_seconds(self) -> float:
        rate = rates_of(self.on)["arithmetic"] * self.on.num_devices
        return self.model_flops * self.work.num_tokens / rate

    @property
    def utilisation(self) -> float:
        return self.model_seconds / self.step_seconds

    @property
    def days(self) -> dict[str, float]:
        """Of the whole run, if it is said what it reads: at UTILISATION, and with a step that is as long as its bounds
        make it."""
        if self.work.run_tokens is None:
            return {}
        steps = self.work.run_tokens / self.work.num_tokens
        return {"asked": steps * self.model_seconds / UTILISATION / DAY, "bounded": steps * self.step_seconds / DAY}

    def to_dict(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "work"}
        return fields | dataclasses.asdict(self.work) | {
            "on": self.on.name, "peak": self.peak, "usable": self.on.chip.usable_hbm.value,
            "fits": self.fits, "model_flops_of_a_token": self.model_flops, "seconds": self.seconds,
            "step_seconds": self.step_seconds, "utilisation": self.utilisation, "days": self.days}

    def row(self) -> str:
        axes = " ".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1) or "one device"
        days = f"{self.days['bounded']:10.1f} days" if self.days else ""
        return (f"{self.on.name:14}{self.on.num_chips:5}  {axes:28}{show(self.peak):>9} of "
                f"{show(self.on.chip.usable_hbm.value):9}{1000 * self.step_seconds:10.2f} ms"
                f"{self.work.num_tokens / self.step_seconds:14,.0f} tokens/s  at {self.utilisation:.0%}{days}")

    def describe(self) -> str:
        state = ", ".join(f"{kind} {show(nbytes)}" for kind, nbytes in self.state.items() if nbytes)
        seconds = ", ".join(f"{name} {value:.3g} s" for name, value in self.seconds.items())
        flops = ", ".join(f"{name} {value:.3g}" for name, value in self.flops.items())
        rows = [
            ("state", state),
            ("made", f"gradients {show(self.gradients)}; activations {show(self.kept['rematerialised'])}, without "
                     f"rematerialisation {show(self.kept['all'])}"),
            ("peak", f"{show(self.peak)} of {show(self.on.chip.usable_hbm.value)} a device: beside the state "
                     + ", ".join(f"{show(nbytes)} at the {time}" for time, nbytes in self.made.items())),
            ("FLOP a token", f"{self.model_flops:.4g} ({flops})"),
            ("sent", f"{show(self.sent['data'])} over data, {show(self.sent['model'])} over expert and tensor"),
            ("at full rate", seconds),
            ("a step", f"{self.step_seconds:.3g} s, {self.utilisation:.0%} of the chips' rate by model FLOPs")]
        if self.days:
            rows.append(("the run", f"{self.work.run_tokens:.4g} tokens at {UTILISATION:.0%} of the chips' rate: "
                                    f"{self.days['asked']:.3g} days; by the step's bounds at least "
                                    f"{self.days['bounded']:.3g}"))
        return "\n".join(f"{name:14}{text}" for name, text in rows)


def plans(held: Held, on: Slice, work: Training) -> list[TrainPlan]:
    """One for every mesh of the slice that the model can be split over; first those that fit, and of these the one that
    would be fastest if nothing overlapped. Of the hosts of GPUs that no mesh over all of them fits, a power of two."""
    found = on_all_of(held, on, work)
    if on.is_networked and not any(x.fits for x in found):
        found += on_all_of(held, gpu_slice(on.chip.name, 2**int(math.log2(on.num_chips))), work)
    return sorted(found, key=lambda x: (not x.fits, sum(x.seconds.values()) if x.fits else x.peak))


def on_all_of(held: Held, on: Slice, work: Training) -> list[TrainPlan]:
    return [plan(held, on, mesh, work) for mesh in meshes(trained_of(held, work), on.num_devices, work.batch)]


def plan(held: Held, on: Slice, mesh: AbstractMesh, work: Training) -> TrainPlan:
    trained = trained_of(held, work)
    kept = {"rematerialised": kept_bytes(trained, mesh), "all": kept_bytes(trained, mesh, remat=False)}
    return TrainPlan(held.name, on, dict(mesh.shape), work, trained.state(mesh), FLOAT32 * trained.num_trained(mesh),
                     kept, most_bytes(trained, mesh), moved_bytes(trained, mesh), sent_bytes(trained, mesh),
                     flops_of_token(trained))


@functools.cache
def trained_of(held: Held, work: Training) -> Trained:
    return Trained(held, work)
