"""A step compiled for devices that need not be there, and where its memory goes, whether or not there is enough of it.

What takes how much is not in any interface of JAX, and of a program that does not fit nothing is left at all. But XLA
writes down what it did, if it is told where: the program, where each of its arrays lies, and which are alive together.
"""

import dataclasses
import re
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax

from napo_jax.hlo import Program, read_shape


class Buffer(NamedTuple):
    """Memory that holds an array at the moment when most is in use."""

    bytes: int
    shape: str  # f32[32,256,11008]
    what: str  # the names under which JAX asked for it


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is known of a compiled step, per device."""

    program: Program
    seconds: float
    total_bytes: int  # arguments, results that take no argument's place, temporaries and code
    buffers: tuple[Buffer, ...]  # the largest first, without arguments


def compile_step(lowered, **options) -> Compiled:
    """Compiles and reads what the compiler wrote down; a program that needs more memory than there is counts too.

    Args:
      lowered: `jax.stages.Lowered`.
      options: further compiler options.
    """
    with tempfile.TemporaryDirectory() as folder:
        start, code = time.perf_counter(), 0
        try:
            done = lowered.compile(compiler_options={"xla_dump_to": folder, **options})
            code = done.memory_analysis().generated_code_size_in_bytes
        except jax.errors.JaxRuntimeError as error:
            refused = "RESOURCE_EXHAUSTED" in str(error) and "HBM" in str(error)
            if not refused or not any(Path(folder).glob("*-memory-usage-report.txt")):
                raise
        seconds = time.perf_counter() - start
        read = lambda name: _largest(Path(folder), f"*after_optimizations{name}.txt").read_text()
        program = Program(read(""))
        total = re.search(r"^Total bytes: (\d+)", read("-memory-usage-report"), re.MULTILINE)
        buffers = _alive_at_peak(program, read("-buffer-assignment"), read("-live-range"))
        return Compiled(program, seconds, int(total[1]) + code, buffers)


def _largest(folder, pattern):
    """Returns the largest file of a pattern: small programs may have been compiled on the way."""
    return max(folder.glob(pattern), key=lambda file: file.stat().st_size)


_VALUE = re.compile(r" value: <\d+ (\S+)(?: \(phi\))? @(\d+)> \(size=(\d+),offset=(\d+)\): (\S+)")


def _alive_at_peak(program, assignment, live_range):
    """Returns the buffers in the main memory that hold something at the peak, and no argument."""
    place, values, allocation = {}, {}, None  # {value: (allocation, offset)}, {place: values}
    for line in assignment.splitlines():
        if found := re.match(r"allocation (\d+): size \d+, (.*)", line):
            allocation = None if found[2].startswith("parameter") else int(found[1])
        elif allocation is not None and (found := _VALUE.match(line)) and found[2] == "0":
            name = found[1].removesuffix("{}")
            place[name] = where = (allocation, int(found[4]))
            values.setdefault(where, []).append((name, int(found[3]), found[5]))
    peak = live_range.partition("(peak):\n")[2].partition("Stack trace breakdown")[0]
    alive = {}
    for name in re.findall(r"^    (\S+): \d+ bytes", peak, re.MULTILINE):
        name = name.removesuffix("{}")
        if name in place:
            alive.setdefault(place[name], name)
    names = {i.name: i.op_name for computation in program.computations.values() for i in computation.values()}
    buffers = []
    for where, alive_name in alive.items():
        size, shape = next((size, shape) for name, size, shape in values[where] if name == alive_name)
        # What a loop hands on has no name of its own; what is written to the same place has.
        candidates = [alive_name, *(name for name, other, _ in values[where] if other == size)]
        what = next(filter(None, (names.get(name.partition("{")[0]) for name in candidates)), "")
        for array in read_shape(shape)[:1]:
            buffers.append(Buffer(size, f"{array.dtype}[{','.join(map(str, array.sizes))}]", what))
    return tuple(sorted(buffers, reverse=True))
