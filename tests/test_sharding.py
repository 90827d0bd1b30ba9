"""Where arrays lie: every leaf has its rule, and nothing large is copied in silence."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from napo_jax import sharding
from napo_jax.models import Llava, LlavaConfig
from napo_jax.optim import flatten
from napo_jax.sharding import MeshConfig, make_mesh, shard_params


def shapes_of(config):
    return flatten(jax.eval_shape(Llava(config).init, jax.random.key(0)))


@pytest.mark.parametrize("make", [LlavaConfig.llava7b, LlavaConfig.llava13b])
@pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 4, 2), (2, 2, 2), (1, 1, 8)])
def test_every_leaf_of_the_models_is_cut(make, mesh):
    """Per device, the parameters take their share and a little for norms and biases."""
    shapes = shapes_of(make())
    shardings, whole = shard_params(shapes, make_mesh(MeshConfig(*mesh)))
    assert list(shardings) == list(shapes)
    assert set(whole) <= {"vision/patch/kernel", "vision/position_embedding"}
    total = sum(leaf.size for leaf in shapes.values())
    held = sum(
        jnp.prod(jnp.array(shardings[path].shard_shape(leaf.shape), jnp.float32)) for path, leaf in shapes.items()
    )
    assert held < total / (mesh[1] * mesh[2]) * 1.01 + 3e6


def test_a_head_is_not_cut_and_its_projections_are():
    shardings, _ = shard_params(shapes_of(LlavaConfig.llava7b()), make_mesh(MeshConfig(1, 4, 2)))
    spec = lambda path: shardings[path].spec
    assert spec("language/layers/attention/query/kernel") == PartitionSpec(None, "fsdp", "tensor")
    assert spec("language/layers/attention/out/kernel") == PartitionSpec(None, "tensor", "fsdp")
    assert spec("language/layers/mlp_norm/scale") == PartitionSpec()


def test_small_leaves_that_do_not_divide_are_whole_and_named():
    shardings, whole = shard_params(shapes_of(LlavaConfig.tiny()), make_mesh(MeshConfig(1, 8, 1)))
    assert "vision/position_embedding" not in whole
    shapes = {"language/embedding": jax.ShapeDtypeStruct((259, 64), jnp.float32)}
    shardings, whole = shard_params(shapes, make_mesh(MeshConfig(1, 4, 2)))
    assert whole == ["language/embedding"]
    assert shardings["language/embedding"].spec == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("language/embedding", (32001, 4096), "does not divide by 2 .tensor. in dimension 0: choose another mesh"),
        ("language/new/kernel", (4, 4), r"must match one sharding rule, and it matches \[\]"),
        ("language/layers/large/bias", (2**10, 2**11), "large and no rule cuts it over fsdp: add one"),
        ("language/head", (4096,), "the rule for language/head is of 2 dimensions, and it has 1"),
    ],
)
def test_nothing_large_is_copied_in_silence(path, shape, message):
    with pytest.raises(ValueError, match=message):
        shard_params({path: jax.ShapeDtypeStruct(shape, jnp.float32)}, make_mesh(MeshConfig(1, 4, 2)))


def test_two_rules_for_one_leaf_collide(monkeypatch):
    monkeypatch.setattr(sharding, "RULES", (*sharding.RULES, (r"language/h.*", ())))
    with pytest.raises(
        ValueError, match=r"must match one sharding rule, and it matches \['language/head', 'language/h"
    ):
        shard_params({"language/head": jax.ShapeDtypeStruct((8, 8), jnp.float32)}, make_mesh(MeshConfig()))


def test_meshes():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(MeshConfig(-1, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    for config, message in (
        (MeshConfig(3, 1, 1), "takes 3 devices, and there are 8"),
        (MeshConfig(-1, 3, 1), "takes 6 devices, and there are 8"),
        (MeshConfig(-1, -1, 1), "one may be -1"),
        (MeshConfig(0, 8, 1), "at least 1"),
        (MeshConfig(1, 8, 1, slices=2), r"1 copies of the model .data. do not divide among 2 slices: --mesh.data 2"),
        (MeshConfig(1, 8, 1, slices=0), "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_mesh(config)


@dataclasses.dataclass(frozen=True)
class Tpu:
    """What a mesh asks of a device; those of two slices have the same coordinates."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def test_slices_are_the_outermost_axis():
    """Whatever order they come in, and without being told how many there are."""
    devices = [Tpu(4 * s + 2 * y + x, s, (x, y, 0)) for y in range(2) for s in range(2) for x in range(2)]
    of = lambda axes: [{device.slice_index for device in place.flat} for place in axes]
    for shape in ((2, 4, 1), (2, 2, 2), (4, 2, 1), (8, 1, 1)):
        copies = of(make_mesh(MeshConfig(*shape), devices).devices)
        assert copies == [{0}] * (shape[0] // 2) + [{1}] * (shape[0] // 2)
    with pytest.raises(ValueError, match=r"1 copies of the model .data. do not divide among 2 slices: --mesh.data 2"):
        make_mesh(MeshConfig(), devices)


@pytest.mark.parametrize(
    ("torus", "shape"),
    [((4, 4), (1, 8, 2)), ((8, 8), (1, 32, 2)), ((8, 8), (2, 32, 1)), ((16, 16), (2, 32, 4)), ((16, 16), (1, 32, 8))],
)
def test_a_mesh_need_not_have_the_sides_of_the_torus(torus, shape):
    """Those that share rows, and send most, are neighbours there; most of those that share parameters are."""
    places = itertools.product(*map(range, torus))
    devices = [Tpu(i, 0, (x, y, 0)) for i, (x, y) in enumerate(places)]
    mesh = make_mesh(MeshConfig(*shape), devices)
    assert tuple(mesh.shape.values()) == shape
    at = np.array([device.coords for device in mesh.devices.flat]).reshape(*shape, 3)
    apart = lambda axis: np.abs(np.diff(at, axis=axis)).sum(axis=-1)
    assert (apart(2) == 1).all()
    assert (apart(1) == 1).mean() > 0.75
