"""What a device of a slice can do in a second at the rates of its data sheet."""
from collections.abc import Mapping

from jaxllm.tpu.chips import MAX_GPUS, NETWORKS, Slice


def rates_of(on: Slice) -> dict[str, float]:
    """By what a step needs of a device: bytes/s of its HBM, FLOP/s in bfloat16, and bytes/s that it sends, of several
    hosts over their network."""
    chip, devices = on.chip, on.chip.devices.value
    sent = near_rate(on)
    if on.is_networked:
        sent = NETWORKS[chip.name].value
    return {"HBM": chip.bandwidth.value / devices, "arithmetic": chip.bf16_flops.value / devices,
            "between chips": sent}


def near_rate(on: Slice) -> float:
    """bytes/s that a device sends to those of its own slice or host."""
    chip = on.chip
    sent = chip.ici.value / 2 if chip.ici else chip.host_bus.value if chip.host_bus else 0.0
    return sent / chip.devices.value


def is_near(on: Slice, mesh: Mapping[str, int]) -> bool:
    """Whether those that share a model, all but `data`, are of one host: neighbours in the mesh's order."""
    return not on.is_networked or MAX_GPUS % (mesh["expert"] * mesh["tensor"]) == 0
