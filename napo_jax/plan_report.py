"""What a plan says: whether a step fits its devices, how long it takes at best, and what to change."""

import dataclasses
import itertools
import math
import re
from typing import NamedTuple

from napo_jax.chips import Topology
from napo_jax.compiled import Buffer
from napo_jax.costs import BETWEEN
from napo_jax.data.buckets import Bucket


class State(NamedTuple):
    """What lies on a device from step to step, in bytes."""

    parameters: int
    optimizer: int
    frozen: int
    reference: int


class Part(NamedTuple):
    """What a part of a step takes of one device."""

    flops: float = 0.0  # of matrix products, what is computed again included
    moved: float = 0.0  # bytes read from the main memory and written to it
    sent: float = 0.0  # bytes to other devices


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step on a topology; bytes and operations are those of one device, where nothing else is said."""

    topology: Topology
    mesh: dict[str, int]
    bucket: Bucket
    groups: int
    accumulate: int
    notes: tuple[str, ...]
    state: State
    peak_bytes: int  # most that is in use at a time, the state included
    buffers: tuple[Buffer, ...]  # the largest at that time beside the state
    flops_per_step: float  # that a step needs, on all devices
    parts: dict[str, Part]
    collectives: dict[str, tuple[int, float]]  # {kind: (how often, bytes that a device sends)}
    compile_seconds: float
    advice: tuple[str, ...] = ()  # where it does not fit, or has room

    @property
    def fits(self) -> bool:
        """Whether there is memory for it."""
        return self.peak_bytes <= self.topology.chip.hbm_bytes

    @property
    def flops_done(self) -> float:
        """Operations of matrix products on one device, what is computed again included."""
        return sum(part.flops for part in self.parts.values())

    @property
    def hbm_traffic(self) -> float:
        """Bytes read and written."""
        return sum(part.moved for part in self.parts.values())

    @property
    def seconds(self) -> dict[str, float]:
        """The time that each part of a device takes for its share of a step, if nothing holds it up."""
        chip = self.topology.chip
        seconds = {
            "matrix products": self.flops_done / chip.peak_flops,
            "memory": self.hbm_traffic / chip.hbm_bandwidth,
            "links": self._sent(between=False) / self.topology.link_bandwidth,
        }
        if self.topology.slices > 1:
            seconds["network"] = self._sent(between=True) / chip.network_bandwidth
        return seconds

    def _sent(self, between):
        """Counts the bytes that a device sends to other slices, or within its own."""
        return sum(sent for kind, (_, sent) in self.collectives.items() if kind.endswith(BETWEEN) == between)

    @property
    def bound(self) -> str:
        """The part that takes longest: no step is faster, and it is as fast if the others work beside it."""
        return max(self.seconds, key=self.seconds.get)

    @property
    def mfu(self) -> float:
        """The most of the devices' peak that the needed arithmetic can be."""
        peak = self.topology.devices * self.topology.chip.peak_flops
        return self.flops_per_step / peak / self.seconds[self.bound]

    def as_json(self) -> dict:
        """Returns the plan as plain values; bytes are those of one device."""
        return {
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "devices": self.topology.devices,
            "estimate": self.topology.estimate,
            "mesh": self.mesh,
            "bucket": dataclasses.asdict(self.bucket),
            "groups": self.groups,
            "accumulate": self.accumulate,
            "fits": self.fits,
            "hbm_bytes": self.topology.chip.hbm_bytes,
            "peak_bytes": self.peak_bytes,
            "state_bytes": sum(self.state),
            "state": self.state._asdict(),
            "largest_buffers": [buffer._asdict() for buffer in self.buffers],
            "flops_per_step": self.flops_per_step,
            "flops_done_per_device": self.flops_done,
            "hbm_traffic_bytes": self.hbm_traffic,
            "parts": {name: part._asdict() for name, part in self.parts.items()},
            "collectives": {kind: {"count": count, "bytes": sent} for kind, (count, sent) in self.collectives.items()},
            "seconds": self.seconds,
            "step_seconds": self.seconds[self.bound],
            "bound": self.bound,
            "mfu_at_most": self.mfu,
            "compile_seconds": self.compile_seconds,
            "advice": list(self.advice),
            "notes": list(self.notes),
        }

    def lines(self, parts=False):
        """Yields the plan for a person to read, the parts of the step if they are wanted too."""
        chip, devices = self.topology.chip, self.topology.devices
        if self.topology.estimate:
            yield "ESTIMATE: by a compiler for CPUs, which computes bfloat16 in float32 and fuses less. Memory, traffic"
            yield "and what is sent come out larger than they are; the state and the arithmetic are right."
        verdict = "fits" if self.fits else "DOES NOT FIT"
        memory = f"{_size(self.peak_bytes)} of {_size(chip.hbm_bytes)}"
        yield f"{self.topology}: {verdict}, {memory} on each of {devices} devices"
        for note in self.notes:
            yield f"  note      {note}"
        at_a_time = self.groups // (self.mesh["data"] * self.mesh["fsdp"] * self.accumulate)
        parts = "at once" if self.accumulate == 1 else f"in {self.accumulate} micro-batches"
        pictures = f", {self.bucket.pictures} pictures each" if self.bucket.pictures > 1 else ""
        yield f"  batch     {self.groups} groups {parts}, {at_a_time} at a time on a device; {self.bucket}{pictures}"
        yield f"  mesh      {', '.join(f'{axis} {size}' for axis, size in self.mesh.items())}"
        parts = ", ".join(f"{name} {_size(size)}" for name, size in self.state._asdict().items() if size)
        yield f"  state     {_size(sum(self.state))}: {parts}"
        yield f"  beside it {_size(self.peak_bytes - sum(self.state))} at the peak, of which the largest are"
        for buffer in self.buffers:
            yield f"            {_size(buffer.bytes):>9} {buffer.shape}: {in_words(buffer.what)}"
        yield (
            f"  compute   {self.flops_done / 1e12:.1f} TFLOP, of which {self.flops_per_step / devices / 1e12:.1f} are "
            f"needed; {_size(self.hbm_traffic)} read and written"
        )
        if parts:
            yield f"  where     {'TFLOP':>8} {'moved':>12} {'sent':>12}"
            for name, part in self.parts.items():
                yield f"            {part.flops / 1e12:8.2f} {_size(part.moved):>12} {_size(part.sent):>12}  {name}"
        for kind, (count, sent) in self.collectives.items():
            yield f"  sends     {_size(sent):>10} by {kind}, {count} times"
        times = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in self.seconds.items())
        yield f"  a step    {self.seconds[self.bound]:.3f} s or more, bound by {self.bound}: {times}"
        yield f"            so that MFU is {self.mfu:.0%} or less"
        yield f"  compiled  in {self.compile_seconds:.0f} s"
        for line in self.advice:
            yield f"  change    {line}"


_SAFE = 0.9  # of what is left: a compiler places arrays with gaps
_NOISE = {"while", "body", "closed_call", "checkpoint", "rematted_computation", "jvp()", ""}


def in_words(op_name: str) -> str:
    """Says which part of a step an array belongs to.

    Examples:
      >>> in_words("jit(train_step)/transpose(jvp(Network.packed))/language/language/while/body/mlp/up/dot_general")
      'language/mlp/up/dot_general, backward'
      >>> in_words("")
      'made by the compiler'
    """
    if not op_name:
        return "made by the compiler"
    backward = "transpose(" in op_name or "rematted_computation" in op_name
    words = []
    for word in op_name.split("/")[1:]:
        bare = re.sub(r"(?:transpose|jvp|jit)\(|\)", "", word)
        # A method of the whole network is a frame around its parts.
        if not ({word, bare} & _NOISE or bare.startswith("Network.")) and words[-1:] != [bare]:
            words.append(bare)
    return f"{'/'.join(words)}, {'backward' if backward else 'forward'}"


# Names of modules and scopes of the model that tell parts of a step apart; what goes on in them has names of its own.
_PARTS = {"vision", "projector", "language", "language.embed", "layers", "attention_norm", "attention", "mlp_norm"}
_PARTS |= {"mlp", "norm", "logps", "token_kl", "reward"}


def part_of(op_name: str) -> str:
    """Says which part of a step an operation belongs to, and not what it does there.

    Examples:
      >>> part_of("jit(train_step)/transpose(jvp(Network.packed))/language/language/while/body/mlp/up/dot_general")
      'language/mlp, backward'
      >>> part_of("jit(train_step)/add")
      'optimizer, loss and what has no name'
    """
    if not op_name:
        return "made by the compiler"
    words, _, direction = in_words(op_name).rpartition(", ")
    part = "/".join(itertools.takewhile(_PARTS.__contains__, words.split("/")))
    return f"{part}, {direction}" if part else "optimizer, loss and what has no name"


def by_part(flops, moved, sent) -> dict[str, Part]:
    """Adds up what operations take, {op_name: amount} each, by the part of a step; what moves most comes first."""
    found = {}
    for field, amounts in zip(Part._fields, (flops, moved, sent), strict=True):
        for op_name, amount in amounts.items():
            part = found.get(name := part_of(op_name), Part())
            found[name] = part._replace(**{field: getattr(part, field) + amount})
    return dict(sorted(((n, part) for n, part in found.items() if any(part)), key=lambda item: -item[1].moved))


def advice(config, model, trained, plan: Plan):
    """Yields what to change where a step does not fit, the cheapest first.

    Args:
      config: the `Config`.
      model: the `Llava`.
      trained: {path: shape with its sharding}.
      plan: the `Plan` so far.
    """
    mesh, dtype = plan.mesh, model.config.dtype
    own = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in trained.values())
    over, state = plan.peak_bytes - plan.topology.chip.hbm_bytes, sum(plan.state)
    yield f"{_size(over)} too much:"
    if mesh["data"] > 1:
        yield (
            f"--mesh.data 1 --mesh.fsdp {mesh['data'] * mesh['fsdp']}: cut the state among all devices, saves "
            f"{_size(state - state // mesh['data'])}"
        )
    rows = plan.groups // (mesh["data"] * mesh["fsdp"] * plan.accumulate)
    if rows > 1:
        inputs = model.config.text.layers * plan.bucket.tokens * model.config.text.width * dtype.itemsize
        costs = (
            f", takes {_size(4 * own)} for sums of gradients and a forward pass more" if plan.accumulate == 1 else ""
        )
        yield (
            f"--train.accumulate {plan.accumulate * rows}: one group at a time on a device, saves at least "
            f"{_size((rows - 1) * inputs)}{costs}"
        )
    if config.model.remat != "full":
        yield "--model.remat full: of a layer only its input is stored, and the rest computed again"
    if plan.state.reference:
        yield f"--train.reference cache: saves {_size(plan.state.reference)}"
    if config.optimizer.moment_dtype == "float32":
        yield f"--optimizer.moment-dtype bfloat16: saves {_size(2 * own)}"
    if config.optimizer.second_moment == "full":
        yield f"--optimizer.second-moment factored: saves {_size(4 * own)}, all but rows and columns"
    if config.optimizer.param_dtype == "float32" and dtype.itemsize == 2:
        yield f"--optimizer.param-dtype bfloat16: saves {_size(2 * own)}, and loses small steps in rounding"
    left = plan.topology.chip.hbm_bytes - (plan.peak_bytes - state)
    if left > 0:
        more = math.ceil(state * mesh["fsdp"] * mesh["tensor"] / left)
        yield f"a larger topology: about {more * mesh['data']} devices"
    else:
        yield "a larger topology, with fewer groups on each device"


def room(config, model, plan: Plan):
    """Yields what to change where memory is left over: to store what is computed again.

    Args:
      config: the `Config`.
      model: the `Llava`.
      plan: the `Plan` so far.
    """
    text, mesh = model.config.text, plan.mesh
    tokens = plan.groups // (mesh["data"] * mesh["fsdp"] * plan.accumulate) * plan.bucket.tokens * text.layers
    features = {
        "dots": text.head_width * 2 * (text.heads + text.kv_heads) + 2 * text.mlp_width,
        "mlp": 2 * text.mlp_width,
        "full": 0,
    }
    stored = features.get(config.model.remat)
    left = plan.topology.chip.hbm_bytes - plan.peak_bytes
    for remat, more in features.items() if stored is not None else ():
        takes = tokens * (more - stored) * model.config.dtype.itemsize // mesh["tensor"]
        if 0 < takes < _SAFE * left:
            less = 2 * tokens * plan.accumulate * text.width * (more - stored) / mesh["tensor"]
            yield (
                f"--model.remat {remat}: there is room for about {_size(takes)} more, and each device computes "
                f"{less / 1e12:.1f} TFLOP less"
            )
            return


def _size(count):
    return f"{count / 2**30:.2f} GiB" if count >= 0.1 * 2**30 else f"{count / 2**20:.1f} MiB"
