"""Which experts stay on the devices of a model and which go to host memory, and reading each to its place."""
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxllm.checkpoint.selected import Selected
from jaxllm.checkpoint.source import Source
from jaxllm.codec import PARTS
from jaxllm.offloaded import Offloaded, choose, num_parts, offload, places
from jaxllm.usage import Usage

EXPERTS = (".gate_EDI", ".up_EDI", ".down_EID")



def is_experts(path: str) -> bool:
    """Whether a parameter is a stack of experts."""
    return path.endswith(EXPERTS)


def offloaded_leaves(held: Mapping[str, Any], resident: int) -> dict[str, Any]:
    """The abstract leaves (path -> as stored), those of experts with `resident` of each device's on the device.

    ValueError if the model has no experts, or a device not so many.
    """
    if not any(map(is_experts, held)):
        raise ValueError(f"resident_experts = {resident}: this model has no experts")
    return {path: offload(leaf, resident) if is_experts(path) else leaf for path, leaf in held.items()}


class Split:
    """The parts of offloaded leaves as parameters of their own, and the reverse."""

    def __init__(self, held: Mapping[str, Any], usage: Usage | None):
        """held: path -> abstract leaf. Without a usage the first of each device's experts are the resident ones."""
        self.offloaded = {path: leaf for path, leaf in held.items() if isinstance(leaf, Offloaded)}
        self.held = {path: leaf for path, leaf in held.items() if path not in self.offloaded}
        self.rows: dict[str, dict[str, np.ndarray]] = {}      # path -> name of a part -> experts
        for path, leaf in self.offloaded.items():
            num, parts = leaf.place_E.shape[0], num_parts(leaf.place_E)
            count_E = usage.count[int(path.split(".")[1])] if usage else np.zeros(num, np.int64)
            self.rows[path] = dict(zip(("resident", "host"), choose(count_E, parts, leaf.num_resident // parts),
                                       strict=True))
            self.held |= {part_path(path, name): part for name in self.rows[path]
                          if (part := getattr(leaf, name)) is not None}

    def source(self, source: Source) -> Source:
        """With the parts' parameters in the place of the whole ones'."""
        selected: dict[str, tuple[str, np.ndarray]] = {}
        for path, rows in self.rows.items():
            for name in ("", *(f".{part}" for part in PARTS)):
                if path + name in source.params:
                    selected |= {part_path(path, part) + name: (path + name, experts)
                                 for part, experts in rows.items() if len(experts)}
        return Selected(source, selected)

    def join(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Path -> leaf, from the values of `held`."""
        return {path: value for path, value in values.items()} | {
            path: Offloaded(values.get(part_path(path, "resident")), values[part_path(path, "host")],
                            self._places(path, leaf)) for path, leaf in self.offloaded.items()}

    def _places(self, path: str, leaf: Offloaded) -> jax.Array:
        rows = self.rows[path]
        place_E = places(rows["resident"], rows["host"], num_parts(leaf.place_E))
        return jax.make_array_from_callback(place_E.shape, leaf.place_E.sharding, place_E.__getitem__)


def part_path(path: str, part: str) -> str:
    """layers.3.moe.host.gate_EDI of layers.3.moe.gate_EDI: with the dims' letters at the end, as of any parameter."""
    before, _, name = path.rpartition(".")
    return f"{before}.{part}.{name}"
