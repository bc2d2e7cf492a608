"""Plans with experts in host memory: how many stay on a device, what a step brings over, and how fast it then could be.

A layer with experts waits for the device that has most to fetch. Let f_e be the share of tokens that choose expert e
(from a usage file, or A / E for all), and n the tokens of a place along `data`. If tokens choose independently of each
other, e is needed with q_e = 1 - (1 - f_e)^n. The number that a place along `experts` fetches is then a sum of
independent yes-or-no draws, one for each of its experts in host memory, whose distribution is their convolution; of the
places' numbers the expected maximum is sum over k >= 0 of 1 - prod over places of P(number <= k). On one place that is
the sum of q_e. Tokens of one text choose alike, so real steps need fewer.
"""
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh

from jaxllm.config import Config
from jaxllm.offloaded import choose
from jaxllm.tpu.chips import Slice
from jaxllm.tpu.held import Held, unread_experts
from jaxllm.tpu.plan import Plan, meshes, plan
from jaxllm.tpu.steps import Work
from jaxllm.train.memory import show
from jaxllm.usage import Usage

HOST_RESERVE = 0.1      # of what experts take of host memory, for all else there
SIZES = {"GB": 10**9, "TB": 10**12, "GiB": 2**30, "TiB": 2**40}


@dataclasses.dataclass(frozen=True)
class OffloadPlan(Plan):
    """Of `held`, experts are those that stay on the device and room for those that come. Bytes are of a device."""
    resident: int            # experts of a layer that stay, of each device
    experts: int             # that a device has of a layer
    expert: int              # bytes of one, on one device
    host: int                # bytes in host memory, of what is this device's
    fetched: float           # experts that a step is expected to bring to the device that has most, all layers together
    usage: bool              # whether that is by a usage file

    @property
    def over_bus(self) -> int:
        """Bytes of a step from host memory to a device, and where there is no other way, what others send."""
        return int(self.fetched * self.expert) + (self.sent if self.on.chip.fabric == "host" else 0)

    @property
    def seconds(self) -> dict[str, float]:
        assert self.on.chip.host_bus is not None
        bus = self.on.chip.host_bus.value / self.on.chip.devices.value
        others = {name: value for name, value in super().seconds.items()
                  if name != "between chips" or self.on.chip.fabric != "host"}
        return others | {"host bus": self.over_bus / bus}

    def to_dict(self) -> dict[str, Any]:
        names = ("resident", "experts", "expert", "host", "fetched", "over_bus", "usage")
        return super().to_dict() | {name: getattr(self, name) for name in names} | {
            "host_in_all": self.host * self.on.num_devices, "tokens_s_in_turn": self.tokens_s_in_turn}

    @property
    def tokens_s_in_turn(self) -> float:
        """If nothing overlapped."""
        return self.work.num_tokens / sum(self.seconds.values())

    def describe(self) -> str:
        assert self.on.chip.host_bus is not None
        bus, num = self.on.chip.host_bus.value, self.on.num_devices
        rows = [f"{'experts':14}{self.resident} of a device's {self.experts} of each layer stay, "
                f"{show(self.host)} of each device's are in host memory, {show(self.host * num)} in all",
                f"{'fetched':14}{self.fetched:.1f} experts a step, {show(self.fetched * self.expert)}, expected of the "
                f"device that has most, {'as in the usage file' if self.usage else 'if all are chosen alike'}; all "
                f"buses at full rate ask {show(bus * self.on.num_chips)}/s of host memory",
                f"{'in turn':14}{self.tokens_s_in_turn:,.3g} tokens/s if nothing overlapped"]
        return "\n".join([super().describe(), *rows])


def parse_size(text: str) -> int:
    """Bytes of "1TB", "512GB", "1.5TiB"; ValueError for anything else."""
    units = {unit.lower(): size for unit, size in SIZES.items()}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(" + "|".join(units) + ")", text.strip().lower(), re.ASCII)
    if not match or not float(match[1]):
        raise ValueError(f"--host {text}: expected a size as in 1TB or 512GB ({', '.join(SIZES)})")
    return int(float(match[1]) * units[match[2]])


def offload_plans(held: Held, on: Slice, work: Work, host: int, mesh: AbstractMesh | None = None,
                  usage: Usage | None = None) -> list[OffloadPlan]:
    """One for every mesh of the slice, or for `mesh`, with as many experts on the devices as fit; the best first.

    host: bytes of memory of all hosts of the slice together, of which a tenth is left to other things.
    Errors: ValueError for a model without experts, a chip whose bus nobody states, and what does not fit: by how much.
    """
    if held.config.n_routed_experts is None or not any(layer.is_moe for layer in held.config.layers):
        raise ValueError(f"{held.name} has no experts to keep in host memory: plan without --host")
    if on.chip.host_bus is None:
        raise ValueError(f"{on.name}: the rate between host and {on.chip.name} is not known "
                         f"({on.chip.lacks['host_bus']}), so there is no plan with experts in host memory")
    found = [offload_plan(held, on, mesh, work, most_resident(held, on, mesh, work), usage)
             for mesh in ([mesh] if mesh else meshes(held, on.num_devices, work.batch))]
    if not found:
        raise ValueError(f"{held.name}: no mesh over the {on.num_devices} devices of {on.name} splits the model and "
                         f"{work.batch} rows evenly")
    fitting = [x for x in found if x.fits]
    if not fitting:
        best, usable = min(found, key=lambda x: x.peak), int(on.chip.usable_hbm.value)
        raise ValueError(f"{held.name} with {work.batch} rows of {work.context} does not fit {on.name} with all "
                         f"experts in host memory: a device would hold {show(best.peak)} of {show(usable)}, "
                         f"{show(best.peak - usable)} too much")
    room = host / (1 + HOST_RESERVE)
    if not (possible := [x for x in fitting if x.host * on.num_devices <= room]):
        least = min(x.host for x in fitting) * on.num_devices
        raise ValueError(f"{held.name} on {on.name}: experts that do not fit the devices need {show(least)} of host "
                         f"memory, and {show(host)} less a tenth for all else are {show(room)}: "
                         f"{show(least - room)} too little")
    return sorted(possible, key=lambda x: sum(x.seconds.values()))


def most_resident(held: Held, on: Slice, mesh: AbstractMesh, work: Work) -> int:
    """How many experts of each layer fit a device beside all else."""
    stacks, base = held.experts(mesh), plan(held, on, mesh, work)
    room = (on.chip.usable_hbm.value - base.made) / (1 + base.reserve) - sum(base.held.values()) + base.held["experts"]
    if room >= stacks.each * stacks.layers * stacks.expert:
        return stacks.each
    return max(0, math.floor((room - stacks.moving) / (stacks.layers * stacks.expert)))


def offload_plan(held: Held, on: Slice, mesh: AbstractMesh, work: Work, resident: int, usage: Usage | None = None
                 ) -> OffloadPlan:
    """With so many experts of each layer on a device, and all others of its in host memory."""
    base, stacks, data = plan(held, on, mesh, work), held.experts(mesh), mesh.shape["data"]
    needed, fetched = expected(held.config, stacks.parts, resident, work.num_tokens // data, data, usage)
    read = base.held["experts"] * (1 - unread_experts(held.config, work.num_tokens))
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(Plan)} | {
        "held": base.held | {"experts": resident * stacks.layers * stacks.expert
                             + (stacks.moving if resident < stacks.each else 0)},
        # what is fetched is written, and read
        "needed": base.needed + int((needed + fetched) * stacks.expert - read),
        "sent": base.sent - (data - 1) * base.held["experts"]}            # they lie whole along data
    return OffloadPlan(**fields, resident=resident, experts=stacks.each, expert=stacks.expert,
                       host=(stacks.each - resident) * stacks.layers * stacks.expert, fetched=fetched,
                       usage=usage is not None)


def expected(config: Config, parts: int, resident: int, tokens: int, copies: int, usage: Usage | None
             ) -> tuple[float, float]:
    """Experts that a step of `tokens` tokens needs of a device (the mean), and that it fetches (of the device that has
    most, in each layer), all layers together. `copies`: places along `data`, each with tokens of its own."""
    total = np.zeros(2)
    for count_E, times in shares(config, usage):
        need_E = 1 - (1 - np.minimum(count_E, 1.0)) ** tokens
        _, others = choose(count_E, parts, resident)
        total += times * np.array([need_E.sum() / parts, largest(need_E[others].reshape(parts, -1), copies)])
    return float(total[0]), float(total[1])


def shares(config: Config, usage: Usage | None) -> Iterator[tuple[np.ndarray, int]]:
    """(the share of tokens that choose each expert, in how many layers it is so)."""
    if usage is None:
        E, A = config.n_routed_experts or 1, config.num_experts_per_tok or 0
        yield np.full(E, A / E), sum(layer.is_moe for layer in config.layers)
        return
    for count_E in usage.count.values():
        yield count_E / usage.tokens, 1


def largest(need_PE: np.ndarray, copies: int) -> float:
    """The expected maximum, over places and `copies` of each, of how many of a place's experts are needed."""
    below = np.ones(need_PE.shape[1] + 1)
    for need_E in need_PE:
        number = np.ones(1)
        for need in need_E:
            number = np.convolve(number, (1 - need, need))
        below *= np.cumsum(number) ** copies
    return float((1 - np.minimum(below, 1.0)).sum())
