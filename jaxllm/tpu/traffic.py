"""What a compiled program moves: bytes between HBM and the cores by class, and between chips by collective.

Counted is each read of a buffer that lies in HBM and each write of one, with loops multiplied out. A fusion that takes
a slice of an operand reads the slice; one that updates a slice in place writes the slice; a Pallas kernel moves what
its own cost estimate says. Whose bytes they are is known by following a buffer back to the program's parameter.
"""
import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

from jaxllm.tpu.hlo import Instruction, Module

FREE = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
                  "replica-id", "optimization-barrier", "copy-done", "call-done", "slice-done", "async-done",
                  "async-update", "all-gather-done", "all-reduce-done", "collective-permute-done", "send-done",
                  "recv-done", "get-dimension-size", "domain"})
MOVES = frozenset({"bitcast", "copy", "convert", "reshape", "transpose"})
THROUGH = MOVES | {"get-tuple-element", "tuple", "copy-start", "copy-done", "slice", "slice-start", "slice-done",
                   "dynamic-slice", "async-done", "optimization-barrier"}
GATHERS = frozenset({"all-gather", "all-gather-start", "all-gather-done"})
SLICES = frozenset({"dynamic-slice", "gather", "slice"})
UPDATES = frozenset({"dynamic-update-slice", "scatter"})
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
CLASSES = ("weights", "cache", "activations", "copies")


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    count: int       # a step
    nbytes: int      # that a device sends in all of them, as a ring does it


@dataclasses.dataclass(frozen=True)
class Large:
    """A buffer that a program makes in HBM."""
    name: str
    opcode: str
    nbytes: int
    op_name: str
    owner: str       # weights, cache or activations: whose bytes it is a copy of, or has in it


class Traffic:
    """The account of one module. `owners`: the class of each of the program's parameters, in order.

    `ragged`: what part of a ragged exchange's rows is sent, which is data; by default all that there is room for.
    """

    def __init__(self, module: Module, owners: Sequence[str], ragged: float = 1.0):
        self.module, self.owners, self.ragged = module, owners, ragged
        self.owner = cache(self._owner)
        # computation -> where it is called, by what, and the place of its parameter among the caller's operands
        self.callers = {name: (where, caller, place + 1 if caller.opcode == "conditional" else 0)
                        for where, body in module.computations.items() for caller in body.values()
                        if caller.opcode in ("while", "conditional", "call", "call-start")
                        for place, name in enumerate(branches(caller))}

    def by_class(self) -> dict[str, int]:
        """Bytes between HBM and the core, a device and step."""
        total: Counter[str] = Counter(dict.fromkeys(CLASSES, 0))
        for where, instruction, times in self.module.executed():
            for kind, nbytes in self.moved(where, instruction).items():
                total[kind] += nbytes * times
        return dict(total)

    def moved(self, where: str, instruction: Instruction) -> Counter[str]:
        found: Counter[str] = Counter()
        computation = self.module.computations[where]
        if instruction.opcode in FREE:
            return found
        estimate = kernel_bytes(instruction)
        if estimate is not None:      # less what has been brought near by another instruction, and counted there
            near = sum(computation[name].nbytes - computation[name].hbm_bytes for name in instruction.operands)
            return Counter({self._of_kernel(where, instruction): max(0, estimate - near)})
        reads = self._reads(where, instruction)
        written = self._written(instruction)
        if self.is_copy(where, instruction):
            return Counter({"copies": sum(nbytes for _, nbytes in reads) + written})
        for owner, nbytes in reads:
            found[owner] += nbytes
        found["cache" if self._updates(instruction) and "cache" in dict(reads) else "activations"] += written
        return found

    def is_copy(self, where: str, instruction: Instruction) -> bool:
        """Whether it only moves a weight or a cache within HBM, into another layout or type or not."""
        opcode = instruction.opcode.removesuffix("-start")
        if opcode == "fusion":
            body = self.module.computations[instruction.called[0]].values()
            opcode = "copy" if {x.opcode for x in body} <= THROUGH | {"parameter", "constant"} else "fusion"
        return (opcode in ("copy", "transpose", "convert", "reshape") and self._written(instruction) > 0
                and any(self.owner(where, name) != "activations" for name in instruction.operands))

    def large(self, least: int) -> list[Large]:
        """The buffers of at least so many bytes that the program makes in HBM; not what is updated in place."""
        found = {}
        for where, instruction, _ in self.module.executed():
            if instruction.opcode in FREE or self._updates(instruction) or "output_to_operand_aliasing" in \
                    instruction.attributes:
                continue
            if (nbytes := self._written(instruction)) >= least:
                owners = {self.owner(where, name) for name in instruction.operands}
                owner = next((kind for kind in ("cache", "weights") if kind in owners), "activations")
                found[where, instruction.name] = Large(instruction.name, instruction.opcode, nbytes,
                                                       instruction.op_name, owner)
        return sorted(found.values(), key=lambda x: -x.nbytes)

    def collectives(self) -> list[Collective]:
        count: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for where, instruction, times in self.module.executed():
            for kind, nbytes in self._sent(where, instruction):
                count[kind] += times
                total[kind] += times * nbytes
        return [Collective(kind, count[kind], total[kind]) for kind in COLLECTIVES if count[kind]]

    def _sent(self, where: str, instruction: Instruction) -> list[tuple[str, int]]:
        """(kind, bytes) of a collective, or of those inside a fusion: a reduce-scatter may be an all-reduce with the
        slice of it that a device keeps."""
        if instruction.opcode == "fusion":
            name = instruction.called[0]
            inside = [sent for x in self.module.computations[name].values() for sent in self._sent(name, x)]
            is_scatter = name.startswith("all-reduce-scatter")
            return [("reduce-scatter", nbytes // 2) if is_scatter else (kind, nbytes) for kind, nbytes in inside]
        kind = next((kind for kind in COLLECTIVES if instruction.opcode in (kind, f"{kind}-start")), None)
        if kind != "ragged-all-to-all":
            return [(kind, ring_bytes(kind, instruction))] if kind else []
        room = min(self.module.computations[where][instruction.operands[0]].nbytes, instruction.outputs[-1].nbytes)
        size = group_size(instruction)
        return [(kind, int(self.ragged * room * (size - 1) / size))]

    def _reads(self, where: str, instruction: Instruction) -> list[tuple[str, int]]:
        """(class, bytes) of each operand in HBM."""
        computation, found = self.module.computations[where], []
        for place, name in enumerate(instruction.operands):
            if name not in computation:
                continue
            nbytes = computation[name].hbm_bytes
            if nbytes:
                part = self._part(instruction, place)
                found.append((self.owner(where, name), nbytes if part is None else min(part, nbytes)))
        return found

    def _part(self, instruction: Instruction, place: int) -> int | None:
        """Bytes of an operand that are read where that is not all of it."""
        if instruction.opcode == "slice-start":
            return instruction.outputs[1].nbytes
        if instruction.opcode in SLICES and place == 0:
            return instruction.outputs[0].nbytes
        if instruction.opcode in UPDATES and place == 0:
            return 0
        if instruction.opcode != "fusion":
            return None
        body = self.module.computations[instruction.called[0]]
        parameter = next(x.name for x in body.values() if x.opcode == "parameter" and x.operands[0] == str(place))
        return self._part_inside(body, parameter)

    def _part_inside(self, body: dict[str, Instruction], name: str) -> int | None:
        """Of what a fusion does with one of its values: the bytes that its slices and updates take of it."""
        total = 0
        for user in (x for x in body.values() if name in x.operands and x.opcode not in ("parameter", "constant")):
            if user.is_root and user.opcode not in SLICES | UPDATES:
                part = None
            elif user.opcode in MOVES or self._only_moves(user):
                part = self._part_inside(body, user.name)
            elif user.opcode in SLICES and user.operands[0] == name:
                part = user.outputs[0].nbytes
            elif user.opcode in UPDATES and user.operands[0] == name:
                part = 0
            elif user.opcode == "fusion":
                part = self._part(user, user.operands.index(name))
            else:
                part = None
            if part is None:
                return None
            total += part
        return total

    def _written(self, instruction: Instruction) -> int:
        if instruction.opcode.endswith("-start"):      # (destination, source, context), of a slice the other way round
            return instruction.outputs[instruction.opcode == "slice-start"].hbm_bytes
        update = self._updates(instruction)
        return update if update and instruction.hbm_bytes else instruction.hbm_bytes

    def _updates(self, instruction: Instruction) -> int:
        """Bytes of a slice that is written in place; 0 if it is not that."""
        body, root = None, instruction
        while root.opcode in ("fusion", "bitcast", "tuple"):
            if root.opcode == "fusion":
                body = self.module.computations[root.called[0]]
                root = self.module.root(root.called[0])
            elif body is None or not root.operands:
                return 0
            else:
                root = body[root.operands[0]]
        if root.opcode not in UPDATES or body is None and instruction.opcode not in UPDATES:
            return 0
        update = root.operands[1 if root.opcode == "dynamic-update-slice" else -1]
        if body is None or update not in body:
            return 1
        return max(1, sum(buffer.nbytes for buffer in body[update].outputs))

    def _owner(self, where: str, name: str, element: int | None = None) -> str:
        """Whose bytes a value (of a tuple, an element) is: those of the program's parameter that it is, or is a copy, a
        slice, another type or all devices' parts of, through loops, branches and kernels that write in place."""
        instruction = self.module.computations[where].get(name)
        while instruction is not None and (instruction.opcode in THROUGH | GATHERS or self._only_moves(instruction)
                                           or written_in_place(instruction, element) is not None):
            place = 0
            if (operand := written_in_place(instruction, element)) is not None:
                place, element = operand, None
            elif instruction.opcode == "get-tuple-element":
                element = int(re.findall(r"index=(\d+)", instruction.attributes)[0])
            elif instruction.opcode == "tuple" and element is not None:
                place, element = element, None
            if place >= len(instruction.operands):
                return "activations"
            instruction = self.module.computations[where].get(instruction.operands[place])
        if instruction is None:
            return "activations"
        if instruction.opcode == "while":      # what a loop carries was there before it
            return self.owner(where, instruction.operands[0], element)
        if instruction.opcode != "parameter":
            return "activations"
        if where == self.module.entry:
            is_tuple = len(instruction.outputs) > 1      # of all parameters, if they are more than 2,000
            return self.owners[element if is_tuple and element is not None else int(instruction.operands[0])]
        outside, caller, place = self.callers.get(where, (None, None, 0))
        if outside is None or caller is None or place >= len(caller.operands):
            return "activations"
        return self.owner(outside, caller.operands[place], element)

    def _only_moves(self, instruction: Instruction) -> bool:
        if instruction.opcode != "fusion":
            return False
        body = self.module.computations[instruction.called[0]].values()
        return {x.opcode for x in body} <= THROUGH | UPDATES | {"parameter", "constant", "fusion"}

    def _of_kernel(self, where: str, instruction: Instruction) -> str:
        owners = [self.owner(where, name) for name in instruction.operands]
        return next((kind for kind in ("cache", "weights") if kind in owners), "activations")


def branches(caller: Instruction) -> list[str]:
    """The computations that it runs, in the order of a conditional's operands."""
    if caller.opcode != "conditional":
        return caller.called
    named = re.search(r"true_computation=%([\w.\-]+), false_computation=%([\w.\-]+)", caller.attributes)
    return [named[1], named[2]] if named else caller.called


def written_in_place(instruction: Instruction, element: int | None) -> int | None:
    """The place of the operand whose memory a custom call's result (of several, an element) is; None if it is new."""
    if instruction.opcode != "custom-call":
        return None
    output = "" if element is None else str(element)
    found = re.search(r"output_to_operand_aliasing=\{(?:[^=]*, )?\{" + output + r"\}: \((\d+), \{\}\)",
                      instruction.attributes)
    return int(found[1]) if found else None


def kernel_bytes(instruction: Instruction) -> int | None:
    """What a Pallas kernel says that it moves; None for all else."""
    if instruction.opcode != "custom-call" or "tpu_custom_call" not in instruction.attributes:
        return None
    found = re.search(r'"bytes_accessed":"?(\d+)', instruction.attributes)
    return int(found[1]) if found else None


def ring_bytes(kind: str, instruction: Instruction) -> int:
    """That each device sends: of n devices a ring moves (n - 1) / n of the whole, for an all-reduce twice."""
    buffers = instruction.outputs
    if kind == "collective-permute":
        return buffers[0].nbytes
    size = group_size(instruction)
    if instruction.opcode.endswith("-start"):
        buffers = buffers[len(buffers) // 2:] if kind != "all-reduce" else buffers
    whole = sum(buffer.nbytes for buffer in buffers) * (size if kind == "reduce-scatter" else 1)
    return whole * (size - 1) // size * (2 if kind == "all-reduce" else 1)


def group_size(instruction: Instruction) -> int:
    """Devices of a group, of which each form is met: [groups,size]<=..., {{0,1},{2,3}}, mesh['x'=2,...] {'x'}, the last
    also with the order of the mesh's devices before the braces."""
    text = instruction.attributes
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))?\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'?(\w+)'?=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"\w+", found[2]))
    raise ValueError(f"the compiled program's {instruction.opcode} {instruction.name} names its devices in a form that "
                     "is not known here")

