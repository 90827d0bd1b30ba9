"""Which leaves train and decay, and how the learning rate goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from napo_jax.optim import OptimizerConfig, flatten, learning_rates, make_optimizer, split_trained, unflatten

LEAVES = {
    "language/layers/mlp/up/kernel": jnp.array([[0.3, -0.2], [0.1, 0.7]]),
    "language/norm/scale": jnp.array([1.0, 0.9]),
    "vision/patch/kernel": jnp.array([[1.0]]),
}


def test_leaves_are_split_by_path():
    trained, frozen = split_trained(LEAVES, OptimizerConfig())
    assert list(trained) == ["language/layers/mlp/up/kernel", "language/norm/scale"]
    assert list(frozen) == ["vision/patch/kernel"]
    trained, frozen = split_trained(LEAVES, OptimizerConfig(trainable=".*/kernel"))
    assert list(trained) == ["language/layers/mlp/up/kernel", "vision/patch/kernel"]
    with pytest.raises(ValueError, match="'vision' matches no leaf, such as language/layers/mlp/up/kernel"):
        split_trained(LEAVES, OptimizerConfig(trainable="vision"))


def test_paths_go_both_ways():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    leaves = flatten(tree)
    assert leaves == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert unflatten({"a/b": 1}, {"e": 3, "a/c/d": 2}) == tree


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_learning_rate_is_that_of_transformers(kind):
    config = OptimizerConfig(learning_rate=3e-4, schedule=kind, warmup=0.1)
    weight = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.AdamW([weight], lr=3e-4)
    make = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}[kind]
    scheduler, ours = make(theirs, 5, 50), learning_rates(config, 50)
    for step in range(50):
        assert float(ours(step)) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-5, abs=1e-10)
        theirs.step()
        scheduler.step()


def test_the_constant_rate_stays():
    ours = learning_rates(OptimizerConfig(learning_rate=0.5, schedule="constant", warmup=0.2), 10)
    assert [float(ours(step)) for step in range(5)] == [0, 0.25, 0.5, 0.5, 0.5]
    assert float(learning_rates(OptimizerConfig(learning_rate=0.5, warmup=0), 10)(0)) == 0.5


@pytest.mark.parametrize("clip", [None, 0.5])
def test_steps_are_those_of_torch(clip):
    """Decay on kernels and not on scales, clipping by the norm of all."""
    config = OptimizerConfig(learning_rate=0.01, schedule="constant", warmup=0, weight_decay=0.2, clip_norm=clip)
    trained, _ = split_trained(LEAVES, config)
    optimizer = make_optimizer(config, 10)
    state = optimizer.init(trained)
    weights = {path: torch.nn.Parameter(torch.tensor(np.array(leaf))) for path, leaf in trained.items()}
    kernel, scale = weights.values()
    theirs = torch.optim.AdamW(
        [{"params": [kernel], "weight_decay": 0.2}, {"params": [scale], "weight_decay": 0.0}], lr=0.01, eps=1e-8
    )
    random = np.random.default_rng(0)
    for _ in range(5):
        slopes = {path: random.normal(size=leaf.shape).astype(np.float32) for path, leaf in trained.items()}
        with jax.numpy_dtype_promotion("standard"):  # optax mixes counts with rates
            updates, state = optimizer.update(slopes, state, trained)
        trained = {path: leaf + updates[path] for path, leaf in trained.items()}
        for path, weight in weights.items():
            weight.grad = torch.tensor(slopes[path])
        if clip:
            torch.nn.utils.clip_grad_norm_(list(weights.values()), clip)
        theirs.step()
    for path, leaf in trained.items():
        np.testing.assert_allclose(leaf, weights[path].detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"warmup": 1.0}, r"warmup in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay not negative"),
        ({"trainable": "("}, "optimizer.trainable is no regular expression"),
        ({"no_decay": "["}, "optimizer.no_decay is no regular expression"),
    ],
)
def test_senseless_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**change)


def test_the_second_moment_is_wide_whatever_the_parameters_are():
    """In bfloat16 it would stand still: 0.001 of it is less than its last bit."""
    config = OptimizerConfig(param_dtype="bfloat16", moment_dtype="bfloat16", schedule="constant", warmup=0)
    optimizer = make_optimizer(config, 10)
    params = {"language/norm/scale": jnp.ones(4, jnp.bfloat16)}
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        _, state = optimizer.update({"language/norm/scale": jnp.full(4, 0.5, jnp.bfloat16)}, state, params)
    moments = next(part for part in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "nu")) if hasattr(part, "nu"))
    assert moments.mu["language/norm/scale"].dtype == jnp.bfloat16
    assert moments.nu["language/norm/scale"].dtype == jnp.float32
    np.testing.assert_allclose(moments.nu["language/norm/scale"], 0.25e-3, rtol=1e-6)


@pytest.mark.parametrize("wrong", [{"schedule": "cos"}, {"param_dtype": "float16"}, {"moment_dtype": "int8"}])
def test_a_choice_that_there_is_not_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"optimizer.{name} must be one of .*{value}"):
        OptimizerConfig(**wrong)
