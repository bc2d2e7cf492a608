"""Whether a model fits a slice, how it is best split there, and how fast it could be at the rates of the data sheet.

A step cannot be faster than the slowest of what it needs of a device: to read the weights that it uses and the cache
once, to multiply, and to send what the mesh makes it send. These are bounds, at 100% of published rates and for experts
that are chosen alike; no program reaches them. Bytes held are exact (held.py); those sent are counted as compiled
programs send them (sent.py).
"""
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from jax.sharding import AbstractMesh

from jaxllm.axes import MESH_AXES, make_abstract_mesh
from jaxllm.config import Config
from jaxllm.model import check_mesh
from jaxllm.tpu.chips import Slice
from jaxllm.tpu.held import Held, unread_experts, unread_rows
from jaxllm.tpu.rates import rates_of
from jaxllm.tpu.sent import sent_bytes
from jaxllm.tpu.steps import Work
from jaxllm.train.memory import show

# Beside what is held, as of the programs that were compiled for TPUs (docs/tpu.md): bytes of one and of what it always
# takes; and so many times the residual stream of the rows at one place along `data`. None was compiled for a GPU.
PROGRAM, STREAMS = 70 * 10**6, 3.5
GPU_RESERVE = 0.05      # of what is held


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step on one mesh. Bytes are of a device."""
    model: str
    on: Slice
    mesh: dict[str, int]
    work: Work
    held: dict[str, int]
    made: int                        # beside it
    needed: int                      # of what is held, that a step reads
    sent: int
    flops: float

    @property
    def reserve(self) -> float:
        return GPU_RESERVE if self.on.chip.platform == "gpu" else 0.0

    @property
    def peak(self) -> int:
        return int((1 + self.reserve) * sum(self.held.values())) + self.made

    @property
    def fits(self) -> bool:
        return self.peak <= self.on.chip.usable_hbm.value

    @property
    def seconds(self) -> dict[str, float]:
        """By what a step needs of a device, each at its full rate."""
        rates = rates_of(self.on)
        return {"HBM": self.needed / rates["HBM"], "arithmetic": self.flops / rates["arithmetic"],
                "between chips": self.sent / rates["between chips"] if self.sent else 0.0}

    @property
    def step_seconds(self) -> float:
        return max(self.seconds.values())

    @property
    def limit(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def tokens_s(self) -> float:
        return self.work.num_tokens / self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("mesh", "held", "made", "needed", "sent", "flops")}
        return {"model": self.model, "on": self.on.name, **dataclasses.asdict(self.work), **fields, "peak": self.peak,
                "usable": self.on.chip.usable_hbm.value, "fits": self.fits, "seconds": self.seconds,
                "step_seconds": self.step_seconds, "tokens_s": self.tokens_s, "limit": self.limit}

    def row(self) -> str:
        axes = " ".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1) or "one device"
        usable = show(self.on.chip.usable_hbm.value)
        return (f"{self.on.name:14}{self.on.num_chips:5}  {axes:28}{show(self.peak):>9} of {usable:9}"
                f"{1000 * self.step_seconds:10.2f} ms{self.tokens_s:12,.0f} tokens/s  {self.limit}")

    def describe(self) -> str:
        held = ", ".join(f"{kind} {show(nbytes)}" for kind, nbytes in self.held.items() if nbytes)
        seconds = ", ".join(f"{name} {1000 * value:.3g} ms" for name, value in self.seconds.items())
        return "\n".join([
            f"{'held':14}{held}; with all that is made meanwhile {show(self.peak)} of "
            f"{show(self.on.chip.usable_hbm.value)} a device",
            f"{'a step':14}reads {show(self.needed)}, sends {show(self.sent)}, {self.flops:.3g} FLOP a device",
            f"{'at full rate':14}{seconds}: {self.limit} is what limits it"])


def plans(held: Held, on: Slice, work: Work) -> list[Plan]:
    """One for every mesh of the slice that the model can be split over; first those that fit, and of these the one that
    would be fastest if nothing overlapped, since the bounds alone are often the same."""
    found = [plan(held, on, mesh, work) for mesh in meshes(held, on.num_devices, work.batch)]
    return sorted(found, key=lambda x: (not x.fits, sum(x.seconds.values()) if x.fits else x.peak))


class Model(Protocol):
    """What knows whether a mesh can split it."""
    config: Config
    weights: Callable[[AbstractMesh], Any]


def meshes(held: Model, num: int, batch: int) -> Iterator[AbstractMesh]:
    for data in (n for n in range(1, num + 1) if num % n == 0 and batch % n == 0):
        for expert in (n for n in range(1, num // data + 1) if num // data % n == 0):
            mesh = make_abstract_mesh(dict(zip(MESH_AXES, (data, expert, num // data // expert), strict=True)))
            try:
                check_mesh(held.config, mesh)
                held.weights(mesh)
            except ValueError:      # not over this one
                continue
            yield mesh


def plan(held: Held, on: Slice, mesh: AbstractMesh, work: Work) -> Plan:
    config, weights = held.config, held.weights(mesh)
    cache = held.cache(mesh, work)
    table = config.vocab_size * config.hidden_size * held.dtype.itemsize // on.num_devices
    stream = work.num_tokens // mesh.shape["data"] * config.hidden_size * held.dtype.itemsize
    unused = weights["experts"] * unread_experts(config, work.num_tokens) + table * unread_rows(config, work.num_tokens)
    needed = sum(weights.values()) - int(unused) + cache
    return Plan(held.name, on, dict(mesh.shape), work, weights | {"cache": cache},
                PROGRAM + int(STREAMS * stream), needed, sent_bytes(held, on, mesh, work),
                flops(held, work) / on.num_devices)


def flops(held: Held, work: Work) -> float:
    """Of all devices: two for each parameter that a token uses, and attention to the whole context or window."""
    whole = work.context
    seen = sum(count * layer.num_heads * (layer.head_dim + layer.v_head_dim) * min(layer.window or whole, whole)
               for layer, count in held.count.items())
    return 2.0 * work.num_tokens * (held.config.count_parameters().active + seen)


def smallest(plans_on: Callable[[Slice], Sequence[Any]], slices: Iterable[Slice]) -> list[Any]:
    """Of any step the best plan of each of these slices that it fits, fewest chips first, of these the fastest."""
    best = [found[0] for on in slices if (found := plans_on(on))]
    return sorted((x for x in best if x.fits), key=lambda x: (x.on.num_chips, x.step_seconds))
