"""The training step: the same on any mesh and in any number of micro-batches, and what it leaves alone."""

import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loader_run import dataset_of
from quick import quick_jit

from napo_jax.data.byte_tokenizer import BYTE_VOCABULARY
from napo_jax.methods import napo, napo_released
from napo_jax.models import Llava, LlavaConfig
from napo_jax.optim import OptimizerConfig, flatten, make_optimizer, split_trained, unflatten
from napo_jax.score import score
from napo_jax.sharding import MeshConfig, make_mesh, over_rows, shard_params
from napo_jax.step import Frozen, init_state, make_train_step, split_rows

TINY = LlavaConfig.tiny(remat="none", logits_chunk=256)
MODEL = Llava(
    dataclasses.replace(
        TINY, text=dataclasses.replace(TINY.text, vocab_size=BYTE_VOCABULARY, max_positions=1024, layers=1)
    )
)
PARAMS = flatten(quick_jit(MODEL.init)(jax.random.key(0)))
TRAINED, FROZEN = split_trained(PARAMS, OptimizerConfig())
# The reference is quite another model than the policy, so that margins are far from 0, where weights divide by them.
REFERENCE = {path: leaf * (2.5 if leaf.ndim > 1 else 1.0) for path, leaf in TRAINED.items()}
DESCENT = optax.sgd(1.0)  # so that what a step changes is its gradient


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    dataset = dataset_of(None, tmp_path_factory.mktemp("cache"), batch_size=8, made_up=24, buckets=1)
    return next(dataset.loader(rows=(0, 8))())


@functools.cache
def step_of(objective, optimizer, accumulate, mesh):
    return quick_jit(make_train_step(MODEL, objective, optimizer, accumulate=accumulate, mesh=mesh))


def run(objective, batch, mesh=None, accumulate=1, optimizer=DESCENT, steps=1, reference=REFERENCE):
    """Runs steps on a mesh; returns the trained leaves, the frozen ones, and the metrics of each step."""
    state, frozen = init_state(TRAINED, optimizer), Frozen(FROZEN, reference)
    if mesh is not None:
        shardings, _ = shard_params(PARAMS, mesh)
        put = lambda leaves: {path: jax.device_put(leaf, shardings[path]) for path, leaf in leaves.items()}
        state, frozen = init_state(put(TRAINED), optimizer), Frozen(put(FROZEN), reference and put(reference))
        batch = jax.device_put(batch, over_rows(mesh))
    step, metrics = step_of(objective, optimizer, accumulate, mesh), []
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for _ in range(steps):
            state, measured = step(state, frozen, batch)
            metrics.append({name: float(value) for name, value in measured.items()})
    assert int(state.step) == steps
    return state.params, frozen.params, metrics


@pytest.fixture(scope="module")
def alone(batch):
    """One device, one batch."""
    return run(napo(), batch)


@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [(None, 8), ((8, 1, 1), 1), ((1, 4, 2), 1), ((2, 2, 2), 2)],
    ids=["8 micro-batches", "8 devices", "4 fsdp x 2 tensor", "2 x 2 x 2, 2 micro-batches"],
)
def test_any_mesh_and_any_accumulation_is_one_step(batch, alone, mesh, accumulate):
    """T17 and B3: loss, q, weights and every gradient are those of one device and one batch."""
    params, _, (metrics,) = run(napo(), batch, mesh and make_mesh(MeshConfig(*mesh)), accumulate)
    want_params, _, (want,) = alone
    assert metrics.keys() == want.keys()
    for name, value in want.items():
        # Margins and rewards are differences of sums of some -160, in float32.
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=5e-5 if "margin" in name else 1e-5), name
    assert want["language_bias/q"] != want["vision_bias/q"] != 0.5, "the comparison is empty"
    for path, leaf in want_params.items():
        gradient, wanted = (np.asarray(x) - np.asarray(TRAINED[path]) for x in (params[path], leaf))
        assert np.any(wanted), path
        # The change is a difference of rounded numbers of size 1 at most, hence the absolute part.
        assert np.max(np.abs(gradient - wanted)) <= 1e-4 * np.max(np.abs(wanted)) + 1e-6, path


def test_q_of_a_micro_batch_is_another(batch, alone):
    """The released scope: q is measured in each micro-batch, so that it depends on their number."""
    objective = dataclasses.replace(napo(), noise_scope="microbatch")
    whole, parts = (run(objective, batch, accumulate=count)[2][0] for count in (1, 4))
    for name in ("language_bias/q", "loss"):
        assert whole[name] == pytest.approx(alone[2][0][name], rel=1e-5)
    assert abs(parts["loss"] - whole["loss"]) > 1e-4


def test_the_gradient_is_that_of_the_objective(batch, alone):
    """Held against jax.grad of the plain objective on plain log-probs, without anything of the step."""
    objective = napo()

    @quick_jit
    def gradient(trained):
        def loss(trained):
            policy = score(MODEL, unflatten(trained, FROZEN), batch, objective)
            reference = score(MODEL, unflatten(REFERENCE, FROZEN), batch, objective)
            return objective(policy, jax.lax.stop_gradient(reference))[0]

        return jax.value_and_grad(loss)(trained)

    loss, gradients = gradient(TRAINED)
    assert alone[2][0]["loss"] == pytest.approx(float(loss), rel=1e-5)
    for path, slope in gradients.items():
        close = 1e-4 * np.max(np.abs(slope)) + 1e-6
        np.testing.assert_allclose(TRAINED[path] - slope, alone[0][path], rtol=0, atol=close, err_msg=path)


@pytest.mark.parametrize("objective", [napo(), napo_released()], ids=["paper", "released"])
def test_at_step_0_rewards_are_0_and_losses_have_their_closed_form(batch, objective):
    """T4: DPO is ln 2 and a NaPO term (1 - 2^-q) / q, where the policy is the reference."""
    _, _, (metrics,) = run(objective, batch, reference=TRAINED)
    # A processor may round the pass with derivatives and the one without in two ways: a log-prob of some -160 to 2e-5,
    # of which a reward is a tenth.
    rounding = 0.1 * float(np.spacing(np.float32(160)))
    for term in objective.terms:
        assert abs(metrics[f"{term.name}/chosen_reward"]) <= rounding
        assert abs(metrics[f"{term.name}/rejected_reward"]) <= rounding
        q = metrics[f"{term.name}/q"]
        want = (1 - 2**-q) / q if q else math.log(2)
        assert metrics[f"{term.name}/loss"] == pytest.approx(want, rel=1e-6)


def test_log_probs_in_the_batch_do_as_well_as_a_second_model(batch, alone):
    reference = quick_jit(lambda batch: score(MODEL, unflatten(REFERENCE, FROZEN), batch, napo()))(batch)
    carried = dataclasses.replace(batch, reference=reference)
    params, _, (metrics,) = run(napo(), carried, reference=None)
    for name, value in alone[2][0].items():  # as above: a margin is a difference of sums of some -160
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=5e-5 if "margin" in name else 1e-5), name
    assert metrics.keys() == alone[2][0].keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, alone[0])
    with pytest.raises(ValueError, match="needs the reference's log-probs, and neither batch nor frozen has them"):
        run(napo(), batch, reference=None)


def test_what_is_frozen_stays_to_the_bit(batch):
    """T16: also under a weight decay that would halve it, and the names say what moved."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=5.0, warmup=0, schedule="constant")
    with jax.numpy_dtype_promotion("standard"):  # optax mixes counts with rates
        params, frozen, metrics = run(napo(), batch, optimizer=make_optimizer(config, 10), steps=2)
    for path, leaf in frozen.items():
        assert path.startswith("vision/")
        np.testing.assert_array_equal(leaf, PARAMS[path])
    assert all(np.any(np.asarray(leaf) != np.asarray(TRAINED[path])) for path, leaf in params.items())
    assert metrics[0]["loss"] != metrics[1]["loss"]


def test_rows_are_split_where_they_lie():
    """Every device gives each micro-batch the same share of its own rows."""
    rows = {"x": jnp.arange(24)[:, None]}
    parts = split_rows(rows, parts=3, shards=2)["x"][..., 0]
    assert parts.tolist() == [
        [0, 1, 2, 3, 12, 13, 14, 15],
        [4, 5, 6, 7, 16, 17, 18, 19],
        [8, 9, 10, 11, 20, 21, 22, 23],
    ]
    with pytest.raises(ValueError, match="a batch of 24 does not divide into 5 micro-batches on 2 devices"):
        split_rows(rows, parts=5, shards=2)
