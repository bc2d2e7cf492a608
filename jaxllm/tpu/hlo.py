"""A compiled program as text, read into instructions: what each computes, of what, in which memory, and how often.

XLA's HLO has a text form that names every buffer's shape and memory space. A loop's body is counted as often as its
condition's constant says; a conditional counts all its branches, as if each were taken once.
"""
import dataclasses
import math
import re
from collections.abc import Iterator

BITS = {"token": 0, "opaque": 0, "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4, "s8": 8, "u8": 8,
        "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64,
        "c64": 64}
ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
HEAD = re.compile(r"^\s*(ENTRY )?%?([^ ]+) \(.*\{\s*$")
LINE = re.compile(r"^\s+(ROOT )?%([^ ]+) = ")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
SPACE = re.compile(r"S\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Buffer:
    dtype: str
    shape: tuple[int, ...]
    space: int                  # 0: HBM

    @property
    def nbytes(self) -> int:
        bits = BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else None)
        if bits is None:
            raise ValueError(f"the compiled program has a buffer of {self.dtype}, whose size is not known here")
        return math.prod(self.shape) * bits // 8

    @property
    def hbm_bytes(self) -> int:
        return 0 if self.space else self.nbytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    outputs: tuple[Buffer, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> list[str]:
        branches = BRANCHES.search(self.attributes)
        names = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
        return CALLED.findall(self.attributes) + names

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.outputs)

    @property
    def hbm_bytes(self) -> int:
        return sum(buffer.hbm_bytes for buffer in self.outputs)


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str

    def root(self, computation: str) -> Instruction:
        return next(x for x in reversed(self.computations[computation].values()) if x.is_root)

    def executed(self, name: str | None = None, times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, how often it runs), of all that is not inside a fusion or a reduction."""
        name = name or self.entry
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                body, condition = self.loop(instruction)
                yield from self.executed(body, times * self.trips(condition))
            elif instruction.opcode in ("conditional", "call", "call-start", "async-start"):
                for called in instruction.called:
                    yield from self.executed(called, times)
            else:
                yield name, instruction, times

    def trips(self, condition: str) -> int:
        """The bound that a loop's condition compares with; 1 where that is data."""
        constants = [int(found[1]) for x in self._inside(condition) if x.opcode == "constant" and
                     (found := re.match(r"\(?(-?\d+)\)?", x.operands[0] if x.operands else ""))]
        return max([1, *constants])

    def loop(self, instruction: Instruction) -> tuple[str, str]:
        """The body and the condition of a `while`."""
        found = {key: re.search(rf"{key}=%([\w.\-]+)", instruction.attributes) for key in ("body", "condition")}
        assert found["body"] and found["condition"], instruction
        return found["body"][1], found["condition"][1]

    def _inside(self, name: str) -> Iterator[Instruction]:
        for instruction in self.computations[name].values():
            yield instruction
            for called in instruction.called:
                yield from self._inside(called)


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in instructions(text):
        if current is None:
            if line.endswith("{") and (head := HEAD.match(line)):
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := LINE.match(line):
            instruction = _instruction(found[2], line[found.end():], bool(found[1]))
            current[instruction.name] = instruction
    assert entry, "no ENTRY computation"
    return Module(computations, entry)


def instructions(text: str) -> Iterator[str]:
    """The text's lines, each with those after it that go on with it: a kernel may bring metadata of several."""
    held = ""
    for line in text.splitlines():
        if not line.startswith(('"', "}}")):
            yield held
            held = ""
        held += line
    yield held


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opcode, rest = rest.split("(", 1)
    close = _closing("(" + rest) - 1
    inside, attributes = rest[:close - 1], rest[close:]
    operands = (inside,) if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, opcode, tuple(map(_buffer, ARRAY.finditer(shape))), operands, attributes, is_root)


def _buffer(found: re.Match) -> Buffer:
    space = SPACE.search(found[3] or "")
    return Buffer(found[1], tuple(map(int, filter(None, found[2].split(",")))), int(space[1]) if space else 0)


def _closing(text: str) -> int:
    """The place after the bracket that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"unbalanced: {text[:80]}")
