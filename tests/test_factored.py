"""A second moment of rows and columns: against NumPy, against AdamW where it is exact, and in a run's state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from napo_jax.factored import scale_by_factored_adam
from napo_jax.optim import OptimizerConfig, make_optimizer
from napo_jax.sharding import MeshConfig, make_mesh, shard_params
from napo_jax.start import first_state

UP, SCALE = "language/layers/mlp/up/kernel", "language/norm/scale"
SHAPES = {UP: (2, 32, 40), SCALE: (48,), "projector/up/kernel": (8, 64)}


def draw(random, shapes=SHAPES):
    return {path: jnp.asarray(random.normal(size=shape), jnp.float32) for path, shape in shapes.items()}


def naive(history, b1=0.9, b2=0.95, eps=1e-6):
    """Returns the update after some gradients [T, ...] of one leaf, by sums over all of them, in float64."""
    steps = len(history)
    decay = lambda b: np.array([(1 - b) * b ** (steps - 1 - t) for t in range(steps)]) / (1 - b**steps)
    mean = np.tensordot(decay(b1), history, 1)
    squares = np.tensordot(decay(b2), history**2, 1)
    if squares.ndim >= 2 and min(squares.shape[-2:]) >= 32:
        rows, columns = squares.sum(-1, keepdims=True), squares.sum(-2, keepdims=True)
        squares = rows * columns / squares.sum((-2, -1), keepdims=True)
    return mean / (np.sqrt(squares) + eps)


def test_updates_are_those_of_numpy():
    """The matrix of 8 rows is too narrow to be factored."""
    random = np.random.default_rng(0)
    history = [draw(random) for _ in range(4)]
    adam = scale_by_factored_adam(0.9, 0.95, 1e-6)
    state = adam.init(history[0])
    assert set(state.rows) == set(state.columns) == {UP}
    assert state.rows[UP].shape == (2, 32)
    assert state.columns[UP].shape == (2, 40)
    for gradients in history:
        updates, state = adam.update(gradients, state)
    for path in SHAPES:
        want = naive(np.stack([np.float64(gradients[path]) for gradients in history]))
        np.testing.assert_allclose(updates[path], want, rtol=2e-6, atol=1e-6)


def test_where_squares_are_a_product_it_is_adamw():
    random = np.random.default_rng(1)
    outer = lambda: np.abs(random.normal(size=(2, 32, 1))) * np.abs(random.normal(size=(2, 1, 40)))
    size = outer()  # of every gradient: only their signs differ
    options = {"learning_rate": 0.01, "schedule": "constant", "warmup": 0, "weight_decay": 0.1}
    params = {which: {UP: jnp.ones((2, 32, 40))} for which in ("full", "factored")}
    optimizers = {which: make_optimizer(OptimizerConfig(**options, second_moment=which), 10) for which in params}
    states = {which: optimizer.init(params[which]) for which, optimizer in optimizers.items()}
    for _ in range(3):
        slope = {UP: jnp.asarray(size * random.choice([-1, 1], size.shape), jnp.float32)}
        for which, optimizer in optimizers.items():
            with jax.numpy_dtype_promotion("standard"):  # optax mixes counts with rates
                updates, states[which] = optimizer.update(slope, states[which], params[which])
            params[which] = {UP: params[which][UP] + updates[UP]}
    np.testing.assert_allclose(params["factored"][UP], params["full"][UP], rtol=1e-6)
    assert np.abs(np.asarray(params["full"][UP]) - 1).max() > 1e-3


def test_without_a_gradient_nothing_moves():
    adam = scale_by_factored_adam(0.9, 0.999, 1e-8)
    zeros = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
    updates, _ = adam.update(zeros, adam.init(zeros))
    assert all(not np.any(update) for update in updates.values())


@pytest.mark.parametrize("which", ["full", "factored"])
def test_what_is_kept_lies_where_the_leaf_does_or_everywhere(which):
    """And takes as many bytes as it should: with a narrow first moment, 6 a parameter instead of 10."""
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2, data=1), jax.devices()[:8])
    leaf = jax.ShapeDtypeStruct((2, 512, 1024), jnp.float32)
    shardings, _ = shard_params({UP: leaf}, mesh)
    trained = {UP: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[UP])}
    config = OptimizerConfig(moment_dtype="bfloat16", second_moment=which)
    _, shapes = first_state(trained, make_optimizer(config, 10), mesh)
    for kept in jax.tree.leaves(shapes):
        if kept.shape == leaf.shape:
            assert kept.sharding == shardings[UP]
        else:
            assert kept.sharding.is_fully_replicated
    size = sum(kept.size * kept.dtype.itemsize for kept in jax.tree.leaves(shapes)) / leaf.size
    assert size == pytest.approx({"full": 10, "factored": 6}[which], rel=0.03)
