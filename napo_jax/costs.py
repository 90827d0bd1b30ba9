"""What a compiled program computes, moves and sends in one execution on one device.

XLA's own analysis counts the body of a loop once, and a decoder is a loop over its layers. Here every computation
counts as often as it runs.
"""

import functools
import math
import re

from napo_jax.hlo import Program

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_SLICES = ("dynamic-slice", "slice", "gather")
# What moves nothing: names for what is there, and frames around what is counted inside.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("async-start", "async-update", "partition-id", "replica-id", "opt-barrier", "after-all", "add-dependency"),
}
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollectiveDone")


def collectives(program: Program) -> dict[str, tuple[int, float]]:
    """Returns {kind: (how often, bytes that a device sends)}, the most bytes first.

    Bytes are those of a ring: n devices that gather, scatter or exchange B bytes send B (n - 1) / n each, and a
    reduction to all of them is a scatter and a gather.
    """
    found, seen = {}, set()
    for name, computation in program.computations.items():
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in _COLLECTIVES or not program.runs[name]:
                continue
            # One that goes on beside other work is written down in each fusion that it spans.
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            if name in program.fused and channel:
                if channel[1] in seen:
                    continue
                seen.add(channel[1])
            times, sent = found.get(kind, (0, 0.0))
            found[kind] = (
                times + program.runs[name],
                sent + _sent(kind, instruction, program) * program.runs[name],
            )
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _sent(kind, instruction, program):
    sizes = [array.bytes for array in instruction.arrays]
    if instruction.opcode == "all-gather-start":  # (operands, results)
        sizes = sizes[len(sizes) // 2 :]
    if kind == "collective-permute":  # of a start, (operand, result, ...)
        return sizes[0]
    size, n = sum(sizes), _group_size(instruction.rest, program.devices)
    if kind == "reduce-scatter":
        return size * (n - 1)
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group_size(attributes, devices):
    """Returns how many devices take part in a collective together."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # 'axis', or 'axis':(before)size for a part of it
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    return devices


def matrix_flops(program: Program) -> float:
    """Counts the multiply-adds of matrix products, times two; those in Pallas kernels are not to be seen."""
    total = 0.0
    for name, computation in program.computations.items():
        for instruction in computation.values():
            if program.runs[name] and instruction.opcode in ("dot", "convolution"):
                count = _dot if instruction.opcode == "dot" else _convolution
                left, right = (computation[operand].arrays[0].sizes for operand in instruction.operands[:2])
                total += program.runs[name] * count(instruction, left, right)
    return 2 * total


def _dot(instruction, left, right):
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
    return math.prod(instruction.arrays[0].sizes) * math.prod(left[int(axis)] for axis in axes.split(",") if axis)


def _convolution(instruction, left, right):
    """A TPU writes products of matrices this way; axes of a batch become a window that meets one place at a time."""
    out = instruction.arrays[0].sizes
    of_left, of_right, of_out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest).groups()
    found = re.search(r"window=\{([^}]*)\}", instruction.rest)
    window = {key: value.split("x") for key, value in re.findall(r"(\w+)=(\S+)", found[1] if found else "")}
    total = out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
    for axis in filter(str.isdigit, of_out):
        stride, spread, dilation = (
            int(window[name][int(axis)]) if name in window else 1 for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(window["pad"][int(axis)].partition("_")[0]) if "pad" in window else 0
        sizes = left[of_left.index(axis)], out[of_out.index(axis)], right[of_right.index(axis)]
        total *= _pairs(*sizes, stride, spread, dilation, low)
    return total


@functools.cache
def _pairs(size, outputs, window, stride, spread, dilation, low):
    """Counts the pairs of an output and a place of its window that meet an input and no padding."""
    step = math.gcd(stride, spread)
    period, total = spread // step, 0  # of outputs that meet an input and not what spreads inputs apart
    for place in range(window):
        offset = place * dilation - low
        if offset % step == 0:
            first, last = max(0, -(offset // stride)), min(outputs - 1, ((size - 1) * spread - offset) // stride)
            some = -(offset // step) * pow(stride // step, -1, period) % period
            total += max(0, (last - some) // period - (first - 1 - some) // period)
    return total


def kernels(program: Program, name: str) -> int:
    """Counts how often Pallas kernels of a name run."""
    return sum(
        program.runs[computation]
        for computation, instructions in program.computations.items()
        for instruction in instructions.values()
        if 'custom_call_target="tpu_custom_call"' in instruction.rest and name in instruction.op_name
    )


def hbm_bytes(program: Program) -> float:
    """Counts the bytes that are read from the main memory and written to it.

    They are what goes into each piece of work and out of it; of an array that it takes a slice of, the slice.
    """
    return float(
        sum(
            program.runs[name] * sum(_moved(program, computation, i) for i in computation.values())
            for name, computation in program.computations.items()
            if name not in program.fused
        )
    )


def _moved(program, computation, instruction):
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode == "custom-call" and any(name in instruction.rest for name in _FREE_CALLS):
        return 0
    written, read = instruction.arrays, [computation[name].arrays for name in instruction.operands]
    if opcode.removesuffix("-start") in _SLICES:
        result = written[1 if opcode.endswith("-start") else 0]  # of a start, (operand, result, ...)
        return result.bytes * (read[0][0].in_hbm + result.in_hbm)
    if opcode.endswith("-start"):  # its result names its operand too
        return _in_hbm(written)
    if opcode == "dynamic-update-slice":
        return 2 * _in_hbm(read[1])
    if opcode != "fusion":
        return _in_hbm(written) + sum(map(_in_hbm, read))
    inside = program.computations[instruction.called("calls")]
    carried = _carried(inside)
    written = [array for array in written if array[:2] not in carried]
    changed, total = _in_place(inside), _in_hbm(written)
    for parameter, arrays in zip(_parameters(inside), read, strict=True):
        whole = _in_hbm([array for array in arrays if array[:2] not in carried])
        if parameter in changed:  # what is written is the same array
            total += 2 * min(changed[parameter], whole) - whole
        else:
            total += min(whole, _read_of(program, inside, parameter))
    return total


def _in_hbm(arrays):
    return sum(array.bytes for array in arrays if array.in_hbm)


def _carried(inside):
    """Returns (dtype, sizes) of the arrays that a fusion has for a collective that goes on beside it.

    They are counted where it starts.
    """
    calls = [i.rest for i in inside.values() if i.opcode == "custom-call"]
    if any("AsyncCollectiveStart" in call for call in calls):
        return set()
    sent = [i for i in inside.values() if i.opcode in _COLLECTIVES]
    return {array[:2] for i in sent for name in (i.name, *i.operands) for array in inside[name].arrays}


def _read_of(program, computation, name):
    """Counts the bytes of a value that a computation reads: slices of it, or all."""
    total = 0
    for user in computation.values():
        if name not in user.operands:
            continue
        if user.opcode in _SLICES:
            total += sum(array.bytes for array in user.arrays)
        elif user.opcode == "bitcast":
            total += _read_of(program, computation, user.name)
        elif user.opcode == "fusion":
            inside = program.computations[user.called("calls")]
            total += _read_of(program, inside, _parameters(inside)[user.operands.index(name)])
        else:
            return math.inf
    return total


def _parameters(computation):
    """Returns the names of a computation's parameters in their order."""
    found = [i for i in computation.values() if i.opcode == "parameter"]
    return [i.name for i in sorted(found, key=lambda i: int(re.match(r"\d+", i.rest)[0]))]


def _in_place(computation):
    """Returns {parameter: bytes} of those that a fusion changes in a part."""
    found = {}
    for instruction in computation.values():
        if instruction.opcode == "dynamic-update-slice":
            target = computation[instruction.operands[0]]
            while target.opcode == "bitcast":
                target = computation[target.operands[0]]
            if target.opcode == "parameter":
                found[target.name] = sum(array.bytes for array in computation[instruction.operands[1]].arrays)
    return found
