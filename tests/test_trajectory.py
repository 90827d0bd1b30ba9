"""Training is the paper's, and the released code's: twenty steps beside a PyTorch twin, which knows nothing of ours.

Both start from the same weights, which are the reference's too, and see the same batches. At every step the loss and
each term's loss, q and weight are compared, and at the end all leaves and how far they went. The batches are uneven, so
that a wrong mean shows: answers and prompts differ in length, an answer is missing in each, and at times so are two
and a whole group, such that a micro-batch has nothing to say of one term.
"""

import copy
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from quick import quick_jit
from torch_llava import params_of, tiny_config, torch_llava
from torch_twin import PAPER, RELEASED, Group, Recipe, Twin, cosine, paper_q

from napo_jax.data.buckets import Bucket
from napo_jax.data.loader import Batch
from napo_jax.data.order import NO_GROUP
from napo_jax.methods import napo, napo_released
from napo_jax.models import IMAGE_SLOT, Llava
from napo_jax.objective import Objective
from napo_jax.optim import OptimizerConfig, flatten, make_optimizer, split_trained
from napo_jax.step import Frozen, init_state, make_train_step

CONFIG = tiny_config(kv_heads=2, remat="none")
IMAGE_TOKENS, VOCABULARY = CONFIG.vision.image_tokens, CONFIG.text.vocab_size
STEPS, ROWS, PARTS, ANSWER = 20, 6, 3, 9
# A large eps, for two reasons. With the usual one AdamW forgets how large a gradient is, and a loss that is wrong by a
# factor would pass. And where a gradient is near 0, its rounding noise would move the parameter as far as a gradient.
OPTIMIZER = OptimizerConfig(learning_rate=5e-3, weight_decay=0.1, eps=1e-2)
TORCH = torch_llava(CONFIG, seed=3)


def leaves_of(model):
    """Returns {path: leaf} of a torch model, copied."""
    return {path: np.array(leaf) for path, leaf in flatten(params_of(model)).items()}


START = leaves_of(TORCH)


def groups_of(step):
    """Makes the batch of a step."""
    random = np.random.default_rng(step)
    words = lambda low, high, least, most: random.integers(low, high, random.integers(least, most + 1)).tolist()
    groups = [
        Group(
            random.integers(0, 256, (CONFIG.vision.image_size,) * 2 + (3,), dtype=np.uint8),
            words(0, VOCABULARY, 1, 4),
            words(0, VOCABULARY, 1, 5),
            # Of words of their own, so that there is something to learn that holds for the next batch too: margins far
            # from 0, by which weights are divided. In one batch the third answers are no worse than the chosen ones.
            [words(low, low + 10, 2, ANSWER) for low in (0, 25, 0 if step == 12 else 50, 75)],
        )
        for _ in range(ROWS)
    ]
    groups[step % ROWS].answers[step % 4] = []
    if step % 5 == 4:
        groups[-2].answers[2] = []
        groups[-1] = groups[-1]._replace(answers=[[], [], [], []])
    return groups


def batch_of(groups):
    """Returns the same as our loader has it; what is past a length is noise."""
    random = np.random.default_rng(0)
    bucket = Bucket(tokens=70, prefix=IMAGE_TOKENS + 12, answer=ANSWER + 2, answers=4 * ANSWER)
    prefix_ids = random.integers(0, VOCABULARY, (ROWS, bucket.prefix), dtype=np.int32)
    answer_ids = random.integers(0, VOCABULARY, (ROWS, 4, bucket.answer), dtype=np.int32)
    prefix_lengths, ids = np.ones(ROWS, np.int32), np.full(ROWS, NO_GROUP, np.int32)
    for row, group in enumerate(groups):
        if any(group.answers):
            prefix = [*group.before, *[IMAGE_SLOT] * IMAGE_TOKENS, *group.after]
            prefix_ids[row, : len(prefix)] = prefix
            prefix_lengths[row], ids[row] = len(prefix), row
        for cell, answer in enumerate(group.answers):
            answer_ids[row, cell, : len(answer)] = answer
    answer_lengths = np.array([[len(answer) for answer in group.answers] for group in groups], np.int32)
    images = np.stack([group.image for group in groups])
    seeds = np.zeros(ROWS, np.uint32)
    return Batch(images, prefix_ids, prefix_lengths, answer_ids, answer_lengths, seeds, ids, bucket)


BATCHES = [groups_of(step) for step in range(STEPS)]


class Case(NamedTuple):
    """One way to train, told to both."""

    objective: Objective
    accumulate: int
    recipe: Recipe


CASES = {
    "paper": Case(napo(), PARTS, PAPER),
    "paper, by micro-batch": Case(
        dataclasses.replace(napo(), noise_scope="microbatch"), PARTS, dataclasses.replace(PAPER, scope="microbatch")
    ),
    "released": Case(napo_released(), PARTS, RELEASED),
    # Ours computes the batch at once, and the twin in micro-batches.
    "released, by batch": Case(
        dataclasses.replace(napo_released(), noise_scope="batch"), 1, dataclasses.replace(RELEASED, scope="batch")
    ),
}


class Training(NamedTuple):
    """What came of a training."""

    metrics: list[dict[str, float]]  # of each step
    leaves: dict[str, np.ndarray]  # in the end


@functools.cache
def ours(case):
    """Trains with our step, the reference running along."""
    objective, accumulate, _ = CASES[case]
    trained, frozen = split_trained(jax.tree.map(jnp.array, START), OPTIMIZER)
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    step = quick_jit(make_train_step(Llava(CONFIG), objective, optimizer, accumulate=accumulate))
    state, frozen, metrics = init_state(trained, optimizer), Frozen(frozen, trained), []
    with jax.numpy_dtype_promotion("standard"):  # optax mixes counts with rates
        for groups in BATCHES:
            state, measured = step(state, frozen, batch_of(groups))
            metrics.append({name: float(value) for name, value in measured.items()})
    return Training(metrics, {path: np.array(leaf) for path, leaf in (state.params | frozen.params).items()})


def compare(training, recipe):
    """Trains the twin beside a training of ours; raises where they come apart."""
    twin = Twin(
        copy.deepcopy(TORCH),
        TORCH,
        recipe,
        steps=STEPS,
        learning_rate=OPTIMIZER.learning_rate,
        weight_decay=OPTIMIZER.weight_decay,
        eps=OPTIMIZER.eps,
    )
    for step, groups in enumerate(BATCHES):
        for name, want in twin.step(groups).items():
            got = training.metrics[step][name]
            assert abs(got - want) <= 1e-5, f"step {step}: {name} is {got} and not {want}"
    want = leaves_of(twin.policy)
    assert training.leaves.keys() == want.keys()
    for path, leaf in want.items():
        change, error = np.max(np.abs(leaf - START[path])), np.max(np.abs(training.leaves[path] - leaf))
        if path.startswith("vision/"):
            assert change == error == 0, f"{path} is frozen"
        else:
            assert change > 0, f"{path} did not move"
            assert error <= 1e-4 * np.max(np.abs(leaf)), f"{path} is off by {error}"
            assert error <= 2e-4 * change, f"{path} is off by {error} and moved by {change}"


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_the_twin(case):
    compare(ours(case), CASES[case].recipe)
    # And it went somewhere: a hundred times as far as what is let pass, or further.
    series = {name: [metrics[name] for metrics in ours(case).metrics] for name in ours(case).metrics[0]}
    for name in ("loss", "preference/loss", "language_bias/loss", "vision_bias/loss", "language_bias/q"):
        assert np.ptp(series[name]) > 1e-2, name
    assert np.ptp(series["vision_bias/q"]) > 1e-3
    if CASES[case].recipe.weights is PAPER.weights:
        assert np.ptp(series["preference/weight"]) > 0.1
        assert min(series["language_bias/weight"]) < 0.02, "it never came down to its floor"


one_step_late = lambda step, steps: cosine(max(step - 1, 0), steps)


@pytest.mark.parametrize(
    ("case", "mistake", "seen"),
    [
        pytest.param(case, mistake, seen, id=name)
        for name, case, mistake, seen in [
            ("q without beta", "paper", {"q": lambda m, alpha: 1 - torch.sigmoid(alpha * m.mean())}, "language_bias/q"),
            ("q with beta", "released", {"q": lambda m, alpha: 2 * paper_q(m, alpha)}, "language_bias/q"),
            ("q of each pair", "released", {"q": lambda m, a: 2 * (1 - torch.sigmoid(a * m))}, "language_bias/q"),
            ("statistics of micro-batches", "paper", {"scope": "microbatch"}, "preference/weight"),
            ("statistics of the batch", "released", {"scope": "batch"}, "preference/loss"),
            ("fixed weights", "paper", {"weights": lambda psi: torch.full_like(psi, 1 / 3)}, "preference/weight"),
            ("targets a place late", "paper", {"shift": 2}, "preference/"),
            ("targets a place early", "paper", {"shift": 0}, "preference/"),
            ("weight decay on norms", "paper", {"decays": lambda weight: True}, "preference/"),
            ("no weight decay", "paper", {"decays": lambda weight: False}, "preference/"),
            ("a schedule one step late", "paper", {"schedule": one_step_late}, "preference/"),
        ]
    ],
)
def test_a_mistake_is_seen(case, mistake, seen):
    """The same comparison refuses a twin that errs in one thing, at the first step that moved."""
    with pytest.raises(AssertionError, match=f"step 2: {seen}"):
        compare(ours(case), dataclasses.replace(CASES[case].recipe, **mistake))


@pytest.mark.parametrize("path", ["language/norm/scale", "vision/patch/kernel"])
def test_a_leaf_that_is_off_is_seen(path):
    """One that stayed where it was, and a frozen one that moved in its last bit."""
    training = ours("paper")
    leaf = START[path] if path.startswith("language/") else np.nextafter(START[path], np.float32(9))
    with pytest.raises(AssertionError, match=path):
        compare(training._replace(leaves=training.leaves | {path: leaf}), PAPER)
