"""What a compiled program computes, moves and sends in one execution on one device.

XLA's own analysis counts the body of a loop once, and a decoder is a loop over its layers. Here every computation
counts as often as it runs.
"""

import collections
import functools
import math
import re

import numpy as np

from napo_jax.hlo import Program

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_SLICES = ("dynamic-slice", "slice", "gather")
# What moves nothing: names for what is there, and frames around what is counted inside.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("async-start", "async-update", "partition-id", "replica-id", "opt-barrier", "after-all", "add-dependency"),
}
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollectiveDone")


BETWEEN = " between slices"


def collectives(program: Program, slices: int = 1) -> dict[str, tuple[int, float]]:
    """Returns {kind: (how often, bytes that a device sends)}, the most bytes first.

    Bytes are those of a ring: n devices that gather, scatter or exchange B bytes send B (n - 1) / n each, and a
    reduction to all of them is a scatter and a gather. What n devices in each of s slices send one another is sent in
    two rings, one in a slice and one of s devices that hold the n-th part of the bytes; the second is under a key of
    its own, that ends in " between slices". A TPU's program is that of one slice, and tells what others get.
    """
    found = {}
    for kind, _, times, sent in _transfers(program, slices):
        before = found.get(kind, (0, 0.0))
        found[kind] = (before[0] + times, before[1] + times * sent)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def sent_bytes(program: Program, slices: int = 1) -> dict[str, float]:
    """Counts the same bytes, within a slice and between slices; returns {the name that JAX gave them: their share}."""
    found = collections.Counter()
    for _, name, times, sent in _transfers(program, slices):
        found[name] += float(times * sent)
    return dict(found)


def _transfers(program, slices):
    """Yields (kind, name, how often, bytes that a device sends each time)."""
    seen, network = set(), _handed_to_network(program)
    within = 1 if network else slices
    for computation, instruction in _all(program):
        kind, times = instruction.opcode.removesuffix("-start"), program.runs[computation]
        if kind not in _COLLECTIVES:
            continue
        # One that goes on beside other work is written down in each fusion that it spans.
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        if computation in program.fused and channel:
            if channel[1] in seen:
                continue
            seen.add(channel[1])
        inside, between = _sent(kind, instruction, program, within)
        if inside or not between:
            yield kind, instruction.op_name, times, inside
        if between:
            yield kind + BETWEEN, instruction.op_name, times, between
    for kind, name, times, size in network:
        rounds = {"all-reduce": 2 / slices, "all-gather": 1, "collective-permute": 1 / (slices - 1)}
        yield kind + BETWEEN, name, times, size * (slices - 1) * rounds.get(kind, 1 / slices)


def _handed_to_network(program):
    """Returns (kind, name, how often, bytes that a device hands over) of what the hosts send to other slices."""
    return [
        (found[1].lower().replace("_", "-"), instruction.op_name, program.runs[name], instruction.arrays[0].bytes)
        for name, instruction in _all(program)
        if instruction.opcode == "send"
        for found in [re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)]
        if found
    ]


def _sent(kind, instruction, program, slices):
    """Returns the bytes that a device sends within its slice, and to other slices."""
    sizes = [array.bytes for array in instruction.arrays]
    if instruction.opcode == "all-gather-start":  # (operands, results)
        sizes = sizes[len(sizes) // 2 :]
    slice_of = lambda devices: devices * slices // program.devices
    if kind == "collective-permute":  # of a start, (operand, result, ...)
        text = instruction.rest.partition("source_target_pairs={")[2].partition("}}")[0]
        pairs = np.array(re.findall(r"(\d+),(\d+)", text), int).reshape(-1, 2)
        crosses = slices > 1 and (slice_of(pairs[:, 0]) != slice_of(pairs[:, 1])).any()
        return (0, sizes[0]) if crosses else (sizes[0], 0)
    groups = _groups(instruction.rest, program.devices)
    n, s = groups.shape[1], len(set(slice_of(groups[0])))
    size = sum(sizes) * (n if kind == "reduce-scatter" else 1)  # of what is cut or put together
    twice = 2 if kind == "all-reduce" else 1
    if "to-all" in kind:
        return size * (n // s - 1) / n, size * (n - n // s) / n
    return twice * size * (n // s - 1) / (n // s), twice * size * (s - 1) / n


def _groups(attributes, devices):
    """Returns int[G, n], the devices that take part in a collective together."""
    everyone = np.arange(devices)
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        # 'axis', or 'axis':(before)size for a part of it.
        taken = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[2])
        shape, places = [], {}
        for axis, size in sizes.items():
            parts = [(int(before or 1), int(part or size)) for name, before, part in taken if name == axis]
            done = 1
            for before, part in sorted(parts):
                shape += [before // done, part]
                places[axis, before] = len(shape) - 1
                done = before * part
            shape.append(size // done)
        last = [places[axis, int(before or 1)] for axis, before, _ in taken]
        first = [i for i in range(len(shape)) if i not in last]
        n = math.prod(shape[i] for i in last)
        return everyone.reshape(shape).transpose(first + last).reshape(-1, n)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        numbers = lambda text: [int(number) for number in text.split(",")]
        grid = everyone.reshape(numbers(found[3]))
        return (grid.transpose(numbers(found[4])) if found[4] else grid).reshape(int(found[1]), int(found[2]))
    if found := re.search(r"replica_groups=\{(\{[\d,{} ]+\})\}", attributes):
        return np.array([group.split(",") for group in re.findall(r"\{([\d,]+)\}", found[1])], int)
    return everyone[None]


def matrix_flops(program: Program, kernels: dict[str, float] | None = None) -> dict[str, float]:
    """Counts the multiply-adds of matrix products, times two; returns {the name that JAX gave a product: its share}.

    Args:
      program: the program.
      kernels: {name: operations in one run} of the Pallas kernels, whose products are not to be seen.
    """
    found = collections.Counter()
    for computation, instruction in _all(program):
        if instruction.opcode in ("dot", "convolution"):
            count = _dot if instruction.opcode == "dot" else _convolution
            left, right = (program.computations[computation][name].arrays[0].sizes for name in instruction.operands[:2])
            found[instruction.op_name] += 2.0 * program.runs[computation] * count(instruction, left, right)
        elif 'custom_call_target="tpu_custom_call"' in instruction.rest:
            for name, operations in (kernels or {}).items():
                if name in instruction.op_name:
                    found[instruction.op_name] += program.runs[computation] * operations
    return dict(found)


def _all(program):
    """Yields (name of its computation, instruction) of all that runs."""
    for name, computation in program.computations.items():
        if program.runs[name]:
            for instruction in computation.values():
                yield name, instruction


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


def hbm_bytes(program: Program) -> dict[str, float]:
    """Counts the bytes that are read from the main memory and written to it; returns {name: its share}.

    They are what goes into each piece of work and out of it; of an array that it takes a slice of, the slice. What is
    done in one piece has the name of its last operation, and what the compiler made up has none.
    """
    found = collections.Counter()
    for name, instruction in _all(program):
        if name not in program.fused:
            moved = _moved(program, program.computations[name], instruction)
            found[instruction.op_name] += float(program.runs[name] * moved)
    return dict(found)


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
