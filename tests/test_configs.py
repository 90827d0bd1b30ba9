"""Every file in configs/: it loads, and what it trains has a place on a mesh."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_jit

from napo_jax.config import ModelConfig, load_config
from napo_jax.model_source import find_model, load_leaves, random_shape
from napo_jax.models import IMAGE_SLOT, Groups, Llava
from napo_jax.optim import flatten, make_optimizer, split_trained
from napo_jax.sharding import MeshConfig, make_mesh
from napo_jax.start import abstract_parts, first_state, make_model

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
# Four layers of four matrices of 128 and three of 128 x 384, 79 words in and out, the projector.
SHAPES = 4 * (4 * 128**2 + 3 * 128 * 384 + 2 * 128) + 2 * 79 * 128 + 128 + (96 + 1 + 128 + 1) * 128
# Of the published shapes, by hand: decoder and projector, or two factors of rank 64 beside seven matrices of 32 layers.
TRAINED = {
    "debug": 134_976,
    # All of it: and the tower, two of its layers, patches, places and norms.
    "shapes_sft": SHAPES + 2 * (4 * 96 * 97 + 2 * 96 * 256 + 256 + 5 * 96) + 16**2 * 3 * 96 + 17 * 96 + 3 * 96,
    "shapes": SHAPES,
    "llava7b": 6_738_415_616 + 20_979_712,
    "llava13b": 13_015_864_320 + 31_467_520,
    **dict.fromkeys(("llava7b_lora", "mfpo7b", "mdpo7b"), 32 * 64 * (4 * (4096 + 4096) + 3 * (4096 + 11008))),
    # The decoder's adapters, and a row of a head with its bias.
    "reward7b": 32 * 64 * (4 * (4096 + 4096) + 3 * (4096 + 11008)) + 4096 + 1,
    "mrpo7b": 32 * 64 * 2 * (4096 + 4096),
    "povid7b": 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008)),
    "rdpo7b": 32 * 128 * 4 * (4096 + 4096),
}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_its_state_has_a_place(file):
    config = load_config(file)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    there = config.model.path is not None and Path(config.model.path).exists()  # the small world's base is shipped
    model = make_model(config, find_model(config.model).shape if there else random_shape(config.model.size or "tiny"))
    trained, frozen, whole = abstract_parts(config, model, mesh)
    assert not (trained.keys() & frozen.keys())
    count = sum(leaf.size for leaf in trained.values())
    assert count == TRAINED.get(file.stem, TRAINED["llava7b"])
    _, state = first_state(trained, make_optimizer(config.optimizer, 10), mesh)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state))
    # Moments lie where their parameters do, and every large array is cut.
    for leaf in [*jax.tree.leaves(state), *frozen.values()]:
        assert leaf.size <= 2**20 or leaf.size >= 2 * math.prod(leaf.sharding.shard_shape(leaf.shape)), leaf
    assert not whole or config.model.size in (None, "shapes")  # whose vocabulary is odd


@pytest.mark.parametrize("trainable", [None, r"(?!vision/unused).*"], ids=["by default", "all"])
def test_t16_what_trains_is_in_the_gradient(trainable):
    """The tower is left out of the gradient where it is frozen, and nowhere else."""
    config = load_config(CONFIGS[0].with_name("shapes_sft.py"))
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, trainable=trainable))
    model = make_model(config, random_shape("shapes"))
    params, size = model.init(jax.random.key(0)), model.config.vision.image_size
    picture = jax.random.normal(jax.random.key(1), (1, 1, size, size, 3))
    prefix = jnp.array([[[1, *[IMAGE_SLOT] * model.config.vision.image_tokens, 9]]])
    groups = Groups(picture, prefix, jnp.array([[prefix.size]]), jnp.array([[[9, 2]]]), jnp.array([[2]]))
    slopes = flatten(quick_jit(jax.grad(lambda params: model.logps(params, groups, (0,)).sum.sum()))(params))
    trained, _ = split_trained(slopes, config.optimizer)
    still = {path for path, slope in slopes.items() if not np.any(np.asarray(slope))}
    assert {path for path in trained if path in still} <= {"vision/layers/key/bias"}, "softmax does not see it"
    assert still >= {path for path in slopes if path not in trained}


def test_a_random_model_is_the_same_in_any_type():
    """Drawn wide and rounded, so that an export in bfloat16 has the tower that trained in float32."""
    mesh, source = make_mesh(MeshConfig()), find_model(ModelConfig())
    narrow, wide = (
        load_leaves(source, Llava(dataclasses.replace(source.shape, param_dtype=dtype)), mesh)
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    for path, leaf in wide.items():
        np.testing.assert_array_equal(narrow[path], leaf.astype(jnp.bfloat16), err_msg=path)
