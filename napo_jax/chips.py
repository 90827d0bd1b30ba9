"""The chips that a step may be planned for: their memory, speed and links, and the devices of a topology of them."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

_GIB = 2**30


class Chip(NamedTuple):
    """One device, by its maker's data sheet; memory of a TPU is what its compiler leaves to a program."""

    platform: str  # "tpu" or "gpu"
    hbm_bytes: int
    peak_flops: float  # bfloat16 operations a second, dense
    hbm_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second that a device sends along one axis of its torus, both ways, or over NVLink
    accelerator: str = ""  # libtpu's name of a machine, for a number of cores
    cores: int = 1  # of a chip
    sides: int = 2  # of a TPU's torus
    largest: int = 2**31  # chips in a pod
    network_bandwidth: float = 0.0  # bytes a second to other slices, of a GPU to those outside its machine of 8


CHIPS = {
    # The network, as Google states it: 6.4 and 25.6 Tbit/s of a pod of 256 (v5e, v6e), 50 Gbit/s of a chip (v5p).
    "v5e": Chip("tpu", int(15.75 * _GIB), 197e12, 819e9, 90e9, "v5litepod-{}", largest=256, network_bandwidth=3.125e9),
    "v6e": Chip("tpu", int(31.25 * _GIB), 918e12, 1640e9, 180e9, "v6e-{}", largest=256, network_bandwidth=12.5e9),
    "v5p": Chip("tpu", int(95.74 * _GIB), 459e12, 2765e9, 180e9, "v5p-{}", 2, 3, 8960, 6.25e9),
    "a100": Chip("gpu", int(80e9), 312e12, 2039e9, 300e9, network_bandwidth=25e9),
    "h100": Chip("gpu", int(80e9), 989e12, 3350e9, 450e9, network_bandwidth=50e9),
    "h200": Chip("gpu", int(141e9), 989e12, 4800e9, 450e9, network_bandwidth=50e9),
}
# Two-dimensional slices that there are.
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_MACHINE = 8  # GPUs that NVLink joins


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some chips of one kind and how they are joined."""

    name: str  # "v5e:4x4", "h100:8"
    chip: Chip
    shape: tuple[int, ...]  # of a slice
    slices: int = 1  # that only the network joins

    @property
    def devices(self) -> int:
        """How many there are, in all slices."""
        return math.prod(self.shape) * self.slices

    def __str__(self):
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"

    @property
    def link_bandwidth(self) -> float:
        """Bytes a second that a device sends to the others of its slice."""
        chip = self.chip
        beyond = chip.platform == "gpu" and math.prod(self.shape) > _MACHINE
        return chip.network_bandwidth if beyond else chip.link_bandwidth

    @property
    def estimate(self) -> bool:
        """Whether no compiler for these devices is here, so that one for CPUs has to stand in for it."""
        return self.chip.platform != "tpu" or importlib.util.find_spec("libtpu") is None


def find_topology(name: str | None, slices: int = 1) -> Topology:
    """Returns the topology of slices that are named such as v5e:4x4 or h100:8; raises one line if there is none."""
    kinds = ", ".join(CHIPS)
    if name is None:
        raise ValueError("say what to plan for: --topology v5e:4x4, for example")
    kind, _, text = name.partition(":")
    if kind not in CHIPS:
        raise ValueError(f"no topology {name}: write a kind of chip ({kinds}), a colon and a shape, such as v5e:4x4")
    chip = CHIPS[kind]
    pattern = r"[1-9]\d*" if chip.platform == "gpu" else "x".join([r"[1-9]\d*"] * chip.sides)
    if not re.fullmatch(pattern, text):
        example = "8" if chip.platform == "gpu" else "4x4x4" if chip.sides == 3 else "4x4"
        raise ValueError(f"no topology {name}: the shape of {kind} is written as in {kind}:{example}")
    topology = Topology(name, chip, tuple(map(int, text.split("x"))), slices)
    if chip.sides == 2 and chip.platform == "tpu" and text not in _SQUARES:
        raise ValueError(f"no topology {name}: of {kind} there are {', '.join(_SQUARES)}")
    if math.prod(topology.shape) > chip.largest:
        raise ValueError(f"no topology {name}: a pod of {kind} has {chip.largest} chips")
    return topology


def planned_devices(topology: Topology) -> list:
    """Returns the devices to compile for, which need not be there.

    It decides what JAX and libtpu take from the environment, so it has to come before anything that asks for devices.
    """
    jax.config.update("jax_platforms", "cpu")  # on a machine that has the chips: leave them to who uses them
    if topology.estimate:
        jax.config.update("jax_num_cpu_devices", topology.devices)
        return jax.devices()
    chip = topology.chip
    # Without these, libtpu asks a metadata server that exists only in a cloud, and one process at a time may load it.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    chips = math.prod(topology.shape)
    os.environ["TPU_ACCELERATOR_TYPE"] = chip.accelerator.format(chip.cores * chips)
    options = {"chips_per_host_bounds": (1, 1, 1) if chips == 1 else (2, 2, 1)}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"no topology {topology.name}, says libtpu: {str(error).partition(': ')[2]}") from None
    return list(found)
