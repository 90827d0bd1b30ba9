"""The text of a compiled program, read: its instructions, and how often each part of it runs.

How often a loop runs is in the program: its counter begins at a constant, grows by one, and is compared with one.
"""

import collections
import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2}
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")


class Array(NamedTuple):
    """An array: its type, its sizes, and whether it lies in the main memory and not in one on the chip."""

    dtype: str
    sizes: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> int:
        """Its size without padding."""
        # The first number in a type's name is its bits: bf16, f32, f8e4m3fn.
        bits = _BITS.get(self.dtype) or int(re.search(r"\d+", self.dtype)[0])
        return math.prod(self.sizes) * bits // 8


def read_shape(text: str) -> list[Array]:
    """Returns the arrays of a shape, of which a tuple has several."""
    return [
        Array(dtype, tuple(int(size) for size in sizes.split(",") if size), not re.search(r"S\([1-9]\)", layout))
        for dtype, sizes, layout in _ARRAY.findall(text)
    ]


class Instruction(NamedTuple):
    """One instruction."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # its attributes; before them, the value of a constant and the number of a parameter

    @property
    def arrays(self) -> list[Array]:
        """What it returns."""
        return read_shape(self.shape)

    @property
    def op_name(self) -> str:
        """The names under which JAX asked for it, joined by slashes; empty if the compiler made it up."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1].replace("\\", "") if found else ""

    def called(self, attribute: str) -> str | None:
        """Returns the computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


class Program:
    """A compiled program of one device.

    Attributes:
      devices: how many devices run it together.
      computations: {name: {name: Instruction}}, each after those that it calls.
      runs: {name: how often a computation runs in one execution}.
      fused: names of computations that are one piece of work.
      unknown_loops: paths of loops that do not say how often they run; they are counted once.
    """

    def __init__(self, text):
        """Reads what `jax.stages.Compiled.as_text` returns."""
        found = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(found[1]) if found else 1
        self.computations, entry = _read_computations(text)
        self.runs, self.fused, self.unknown_loops = collections.Counter({entry: 1}), set(), []
        for name in reversed(self.computations):
            for instruction in self.computations[name].values():
                self._count_called(name, instruction)

    def _count_called(self, name, instruction):
        times = self.runs[name]
        if instruction.opcode == "while":
            trips = self._trips(self.computations[name], instruction)
            if trips is None:
                self.unknown_loops.append(instruction.op_name or instruction.name)
            self.runs[instruction.called("body")] += times * (1 if trips is None else trips)
        elif instruction.opcode == "fusion":
            self.fused.add(instruction.called("calls"))
            self.runs[instruction.called("calls")] += times
        elif instruction.opcode in ("call", "async-start"):
            self.runs[instruction.called("to_apply") or instruction.called("calls")] += times
        elif instruction.opcode == "conditional":
            found = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
            either = [instruction.called(f"{which}_computation") for which in ("true", "false")]
            for branch in re.findall(r"[\w.\-]+", found[1]) if found else either:
                self.runs[branch] += times

    def _trips(self, computation, loop):
        """Returns how often a loop runs, or None."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(found[1])
        condition, body = (self.computations[loop.called(which)] for which in ("condition", "body"))
        compare = list(condition.values())[-1]
        if compare.opcode != "compare" or "direction=LT" not in compare.rest:
            return None
        counter, limit = (condition[operand] for operand in compare.operands)
        if counter.opcode != "get-tuple-element":
            return None
        index = int(re.search(r"index=(\d+)", counter.rest)[1])
        start = _number(computation, _element(computation, loop.operands[0], index))
        growth = _origin(body, _element(body, list(body)[-1], index))
        steps = [_number(body, name) for name in body[growth].operands] if growth in body else []
        steps = [step for step in steps if step is not None]
        limit = _number(condition, limit.name)
        if start is None or limit is None or len(steps) != 1 or body[growth].opcode != "add":
            return None
        return max(0, -(-(limit - start) // steps[0]))


def _element(computation, name, index):
    """Returns the name of what a tuple holds, where it is made here."""
    made = computation[name]
    return made.operands[index] if made.opcode == "tuple" else None


def _origin(computation, name):
    """Returns the name of what a value is a copy of, in another place or of another type."""
    while name in computation and computation[name].opcode in ("copy", "bitcast", "convert"):
        name = computation[name].operands[0]
    return name


def _number(computation, name):
    """Returns the number that a name stands for, or None."""
    if name is None:
        return None
    instruction = computation[_origin(computation, name)]
    found = re.match(r"-?\d+", instruction.rest) if instruction.opcode == "constant" else None
    return int(found[0]) if found else None


def _read_computations(text):
    """Returns {computation: {name: Instruction}} and the name of the entry."""
    computations, entry, current, pending = {}, None, None, None
    for line in text.splitlines():
        if current is None:
            if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                current = computations[found[2]] = {}
                entry = found[2] if found[1] else entry
        elif line == "}" or re.match(r"  (ROOT )?%?[\w.\-]+ = ", line):
            if pending is not None:
                instruction = _read_instruction(pending)
                current[instruction.name] = instruction
            current, pending = (None, None) if line == "}" else (current, line)
        elif pending is not None:  # an attribute of several lines
            pending += line
    return computations, entry


def _read_instruction(line):
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    cut = _closing(rest, 0) if rest[0] == "(" else rest.index(" ")
    shape, rest = rest[:cut], rest[cut:].lstrip()
    opcode = rest.partition("(")[0]
    end = _closing(rest, len(opcode))
    inner, rest = rest[len(opcode) + 1 : end - 1], rest[end:]
    value = inner if opcode in ("constant", "parameter") else ""
    return Instruction(name.lstrip("%"), shape, opcode, tuple(re.findall(r"%([\w.\-]+)", inner)), value + rest)


def _closing(text, start):
    """Returns the place after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.end()
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")
