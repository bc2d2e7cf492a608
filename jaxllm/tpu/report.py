"""What a compiled step takes and moves, beside the least that it could: numbers for people, for JSON and for a picture.

The least: each weight byte that is needed once (of the embedding the rows of the tokens; of the experts no more than
the routed rows can choose) and each cache byte once.
"""
import dataclasses
import re
from typing import Any

from jaxllm.axes import degree
from jaxllm.dispatch import expected_places
from jaxllm.info import KINDS, kind_of
from jaxllm.offloaded import on_device
from jaxllm.tpu.chips import Slice
from jaxllm.tpu.held import unread_rows
from jaxllm.tpu.hlo import parse
from jaxllm.tpu.program import Program, owners_of
from jaxllm.tpu.rates import rates_of
from jaxllm.tpu.steps import Training, Work
from jaxllm.tpu.traffic import Collective, Large, Traffic
from jaxllm.tpu.train_program import TrainProgram
from jaxllm.train.memory import device_bytes, show

LARGE = 64 * 2**20      # bytes; a temporary of that size is named


@dataclasses.dataclass(frozen=True)
class Report:
    """All of one device of the slice, in bytes unless a name says otherwise."""
    model: str
    on: Slice
    mesh: dict[str, int]
    work: Work | Training
    compile_seconds: float
    held: dict[str, int]              # arguments by kind: of parameters, and the cache
    memory: dict[str, int]            # as the compiler counts: arguments, temporaries, aliased, host, peak; usable
    moved: dict[str, int]             # in a step, by class
    least: dict[str, int]
    collectives: list[Collective]
    large: list[Large]
    replicated: dict[str, int]        # large arguments that are on several devices -> on how many

    @property
    def ratio(self) -> float:
        """Bytes moved over the least possible."""
        return sum(self.moved.values()) / sum(self.least.values())

    @property
    def fits(self) -> bool:
        return self.memory["peak"] <= self.memory["usable"]

    @property
    def seconds(self) -> dict[str, float]:
        """Of a step, by what it needs of a device, each at its full rate."""
        rates = rates_of(self.on)
        return {"HBM, as compiled": sum(self.moved.values()) / rates["HBM"],
                "HBM, the least": sum(self.least.values()) / rates["HBM"],
                "between chips": sum(x.nbytes for x in self.collectives) / rates["between chips"]}

    def to_dict(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "work"}
        lists = {name: [dataclasses.asdict(x) for x in fields[name]] for name in ("collectives", "large")}
        return fields | dataclasses.asdict(self.work) | lists | {
            "on": self.on.name, "ratio": self.ratio, "fits": self.fits, "seconds": self.seconds}

    def describe(self) -> str:
        axes = ", ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        rows = [
            ("program", f"{self.work.step} of {self.model}, {self.work}, on {self.on.name} as {axes}; compiled "
                        f"in {self.compile_seconds:.0f} s"),
            ("memory", f"peak {show(self.memory['peak'])} of {show(self.memory['usable'])} a device: arguments "
                       f"{show(self.memory['arguments'])}, temporaries {show(self.memory['temporaries'])}"
                       + (f"; in host memory {show(self.memory['host'])}" if self.memory["host"] else "")),
            ("held", ", ".join(f"{kind} {show(nbytes)}" for kind, nbytes in self.held.items() if nbytes)),
            ("moved", f"{show(sum(self.moved.values()))} a step, {self.ratio:.2f} of the least: "
                      + ", ".join(f"{kind} {show(nbytes)}" for kind, nbytes in self.moved.items())),
            ("least", ", ".join(f"{kind} {show(nbytes)}" for kind, nbytes in self.least.items())),
            ("collectives", ", ".join(f"{x.count} {x.kind} {show(x.nbytes)}" for x in self.collectives) or "none"),
            *(("replicated", f"{path} on {copies} devices each") for path, copies in self.replicated.items()),
            *(("large", text) for text in described(self.large))]
        return "\n".join(f"{name:14}{text}" for name, text in rows)


def described(large: list[Large]) -> list[str]:
    """A line for each buffer, and one for all of the same kind and size that layers make alike."""
    alike: dict[Large, list[Large]] = {}
    for x in large:
        where = re.sub(r"layer_\d+", "layer_*", x.op_name)
        alike.setdefault(dataclasses.replace(x, name="", op_name=where), []).append(x)
    return [f"{x.opcode} {x.name}: {show(x.nbytes)} of {x.owner} ({x.op_name})" if not others else
            f"{x.opcode} {x.name} and {len(others)} more, each: {show(x.nbytes)} of {x.owner} ({kind.op_name})"
            for kind, (x, *others) in alike.items()]


def report_of(program: Program | TrainProgram, model: str, on: Slice, large: int = LARGE) -> Report:
    """`large`: bytes of a buffer from which on it is named."""
    memory, text = program.compiled.memory_analysis(), program.compiled.as_text()
    assert memory is not None and text is not None      # of what XLA's TPU compiler made there always are
    host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    share = 1.0 if isinstance(program, TrainProgram) else ragged_share(program)
    traffic = Traffic(parse(text), owners_of(program.compiled, program.OWNERS), share)
    return Report(
        model, on, dict(program.mesh.shape), program.work, program.seconds, held_bytes(program),
        {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
         "aliased": memory.alias_size_in_bytes, "host": host,
         "peak": memory.peak_memory_in_bytes - host,      # the compiler adds both
         "usable": int(on.chip.usable_hbm.value)},
        traffic.by_class(), least_bytes(program), traffic.collectives(), traffic.large(large),
        program.replicated(large) if isinstance(program, TrainProgram) else {})


def ragged_share(program: Program) -> float:
    """Of the rows that may go between tokens and experts, those that do on average if all choices are equally likely.
    """
    E, A = program.config.n_routed_experts, program.config.num_experts_per_tok
    places = degree(program.mesh, "whole_experts")
    return expected_places(E, A, places) / min(A, places) if E and A and E % places == 0 else 1.0


def held_bytes(program: Program | TrainProgram) -> dict[str, int]:
    """Of each kind of parameter, and of the cache, on a device; what is in host memory is not."""
    if isinstance(program, TrainProgram):
        return program.held
    found = dict.fromkeys([kind for kind, _ in KINDS], 0)
    for path, leaf in program.weights.items():
        found[kind_of(path)] += device_bytes(on_device(leaf))
    return found | {"cache": device_bytes(program.cache)}


def least_bytes(program: Program | TrainProgram) -> dict[str, int]:
    """What a step cannot do without, on a device: bytes of weights and of the cache, or of activations."""
    if isinstance(program, TrainProgram):
        return program.least
    weights = {path: device_bytes(leaf) for path, leaf in program.weights.items()}
    experts = sum(nbytes for path, nbytes in weights.items() if kind_of(path) == "experts")
    config, tokens = program.config, program.work.num_tokens
    chosen = min(1.0, tokens * (config.num_experts_per_tok or 0) / (config.n_routed_experts or 1))      # at most
    unused = experts * (1 - chosen) + weights["embed_WD"] * unread_rows(config, tokens)
    return {"weights": sum(weights.values()) - int(unused), "cache": device_bytes(program.cache)}
