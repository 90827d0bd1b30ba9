"""Where arrays lie: one mesh of three axes, one table of rules for parameters, and batches over all but the last axis.

* `data`: whole copies of the model, each with rows of its own.
* `fsdp`: rows too, and every large parameter cut in pieces that are gathered where they are used.
* `tensor`: heads and hidden units; these devices work on the same rows.
"""

import dataclasses
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that a batch is cut over

# Path of a leaf -> how it is cut; each path has to match one rule and no more. Layers are stacked in front.
RULES = (
    (r"language/embedding", ("tensor", "fsdp")),
    (r"language/head", ("fsdp", "tensor")),
    (r"language/layers/(attention/(query|key|value)|mlp/(gate|up))/kernel", (None, "fsdp", "tensor")),
    (r"language/layers/(attention/out|mlp/down)/kernel", (None, "tensor", "fsdp")),
    (r"language/layers/(attention|mlp)/\w+/lora_a", (None, "fsdp", None)),
    (r"language/layers/(attention|mlp)/\w+/lora_b", (None, None, "fsdp")),
    (r"projector/up/kernel", ("fsdp", "tensor")),
    (r"projector/down/kernel", ("tensor", "fsdp")),
    (r"vision/layers/(query|key|value|up)/kernel", (None, "fsdp", "tensor")),
    (r"vision/layers/(out|down)/kernel", (None, "tensor", "fsdp")),
    (r"vision/unused/layer/(query|key|value|up)/kernel", ("fsdp", "tensor")),
    (r"vision/unused/layer/(out|down)/kernel", ("tensor", "fsdp")),
    (r"vision/patch/kernel", (None, "fsdp")),
    (r"vision/position_embedding", (None, "fsdp")),
    (r".*/(scale|bias)|vision/class_embedding|reward/kernel", ()),
)
# Whatever is larger has to be cut over fsdp; smaller leaves may be copied to every device.
_SMALL = 2**20


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out. Their product is the number of devices."""

    # Copies of the model; -1: as many as there are devices for.
    data: int = 1
    # Pieces that each large parameter is cut into; -1 likewise.
    fsdp: int = -1
    # Devices that share the arithmetic of one row.
    tensor: int = 1
    # Groups of devices that only a slow network joins, such as slices of TPU pods: `data` is cut over them first, so
    # that pieces of parameters stay within one. -1: as many as TPUs say, and one of other devices.
    slices: int = -1


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Lays out devices as a config says; raises if they are not as many as it needs."""
    devices = jax.devices() if devices is None else list(devices)
    shape = [config.data, config.fsdp, config.tensor]
    if any(size < 1 and size != -1 for size in (*shape, config.slices)) or shape.count(-1) > 1:
        raise ValueError(f"mesh sizes must be at least 1, and one may be -1, got {config}")
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"a mesh of data, fsdp, tensor = {shape} takes {math.prod(shape)} devices, and there are {len(devices)}"
        )
    slices = slices_of(devices) if config.slices == -1 else config.slices
    if shape[0] % slices:
        raise ValueError(
            f"{shape[0]} copies of the model (data) do not divide among {slices} slices: --mesh.data {slices}, say"
        )
    if devices[0].platform == "cpu":
        layout = np.array(devices).reshape(shape)
    # A side of the torus may be cut among two axes: 32 x 2 is laid over 8 x 8 too, with neighbours along both.
    elif slices > 1:
        inner = (shape[0] // slices, shape[1], shape[2])
        layout = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        layout = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(layout, AXES)


def slices_of(devices) -> int:
    """Counts the slices that TPUs lie in; GPUs call each machine one, and are cut over machines like any others."""
    return len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1


def shard_params(shapes, mesh: Mesh):
    """Finds the sharding of every leaf.

    Args:
      shapes: {path: anything with a shape and a dtype}.
      mesh: made by `make_mesh`.

    Returns:
      {path: NamedSharding}, and the paths of leaves that every device holds whole though a rule would cut them, for the
      start-up report: a dimension does not divide, and they are small. A large one raises.
    """
    shardings, whole = {}, []
    for path, leaf in shapes.items():
        spec = list(_rule(path))
        if len(spec) > len(leaf.shape):
            raise ValueError(f"the rule for {path} is of {len(spec)} dimensions, and it has {len(leaf.shape)}")
        for i, axis in enumerate(spec):
            if axis is not None and leaf.shape[i] % mesh.shape[axis]:
                if math.prod(leaf.shape) > _SMALL:
                    raise ValueError(
                        f"{path} of shape {list(leaf.shape)} does not divide by {mesh.shape[axis]} ({axis}) in "
                        f"dimension {i}: choose another mesh"
                    )
                spec[i] = None
                whole.append(path)
        if math.prod(leaf.shape) > _SMALL and "fsdp" not in spec:
            raise ValueError(f"{path} of shape {list(leaf.shape)} is large and no rule cuts it over fsdp: add one")
        shardings[path] = NamedSharding(mesh, PartitionSpec(*spec))
    return shardings, sorted(set(whole))


def _rule(path):
    found = [(rule, spec) for rule, spec in RULES if re.fullmatch(rule, path)]
    if len(found) != 1:
        raise ValueError(f"{path} must match one sharding rule, and it matches {[rule for rule, _ in found]}")
    return found[0][1]


def over_rows(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds."""
    return NamedSharding(mesh, PartitionSpec())


def keep_rows(x):
    """Tells the compiler that x [B, ...] lies by rows; does nothing outside `jax.set_mesh`.

    Left to itself it may cut activations as some parameter is cut, and gather the batch on every device.
    """
    return _constrain(x, PartitionSpec(ROWS))


def gather_whole(x):
    """Tells the compiler to gather x on every device; does nothing outside `jax.set_mesh`.

    For the table of embeddings: read row by row where it is cut, the result would have to be gathered instead.
    """
    return _constrain(x, PartitionSpec())


def inside_mesh() -> bool:
    """Tells whether the program is traced inside `jax.set_mesh` of a mesh as made here."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and set(AXES) == set(mesh.axis_names)


def _constrain(x, spec):
    return jax.lax.with_sharding_constraint(x, spec) if inside_mesh() else x
