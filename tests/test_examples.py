"""The examples run as they stand, and compute what the library computes when it is called directly."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_jit

from napo_jax import methods, napo_loss

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    """Returns an example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def ordinary_rules():
    """Lets other people's loops and optimizers follow JAX's own rules of promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"first_look", "nnx_loop", "pmap_loop", "one_batch"}


def test_a_first_look_prints(capsys):
    module = example("first_look")
    module.pulls()
    assert "DPO" in capsys.readouterr().out


def test_the_nnx_loop_cures_its_model_of_habit(capsys):
    before, after = example("nnx_loop").main()
    assert before < 0.3
    assert after > 0.9
    assert capsys.readouterr().out.count("step") == 4


def test_the_pmap_loop_takes_the_steps_of_one_device():
    assert jax.local_device_count() == 8
    module = example("pmap_loop")
    here, there = module.main(steps=6)
    np.testing.assert_allclose(here, there, rtol=1e-5)
    assert here[-1][0] < here[0][0]
    # Without the axis each device would measure a q of its own, and another one.
    batch = module.draw(jax.random.key(0))
    cut = jax.tree.map(lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:]), batch)
    own = quick_jit(jax.vmap(lambda rows: module.loss_of(jnp.ones(8), rows)[1]))(cut)
    assert np.abs(own - module.loss_of(jnp.ones(8), batch)[1]).max() > 1e-4


def test_one_batch_of_four_blocks_is_the_objective(capsys):
    module = example("one_batch")
    policy, reference, mask = quick_jit(module.draw)(jax.random.key(3))
    loss, q = quick_jit(module.napo_on_one_batch)(policy, reference, mask)
    cells = lambda logps: {
        name: (jnp.where(some, one, 0).sum(-1), jnp.where(some, one, 0).sum(-1) / jnp.maximum(some.sum(-1), 1))
        for (name, one), some in zip(
            module.split(logps, module.BLOCKS).items(), jnp.split(mask, len(module.BLOCKS)), strict=True
        )
    }
    there = dict(zip(module.BLOCKS, jnp.split(mask.any(-1), len(module.BLOCKS)), strict=True))
    objective = methods.napo(weight=1.0)
    call = quick_jit(lambda policy, reference: objective(cells(policy), cells(reference), where=there))
    direct, metrics = call(policy, reference)
    np.testing.assert_allclose(loss, direct, rtol=1e-6)
    np.testing.assert_allclose(q["question_only"], metrics["language_bias/q"], rtol=1e-6)
    np.testing.assert_allclose(q["image_only"], metrics["vision_bias/q"], rtol=1e-6)
    assert np.isfinite(loss)
    assert not mask[-1].any(), "an empty answer is among them"
    module.main()
    assert "q of image_only" in capsys.readouterr().out


def test_tunix_shaped_arrays_give_the_direct_call():
    """Prompts to the left, answers to the right, chosen on top of rejected; an answer's first token counts."""
    module = example("one_batch")
    rows, prompt, answer, words = 3, 5, 4, 11
    keys = jax.random.split(jax.random.key(0), 4)
    ids = jax.random.randint(keys[0], (2 * rows, prompt + answer), 0, words)
    table = jax.random.normal(keys[1], (words, words))  # a bigram model: what is next depends on the token alone
    mask = (jnp.arange(answer) < jnp.array([4, 2, 3, 1, 4, 2])[:, None]).astype(jnp.int32)
    reference = jax.random.normal(keys[2], (2, rows)) - 8
    made = SimpleNamespace(
        input_ids=ids,
        positions=None,
        attention_mask=None,
        completion_mask=mask,
        ref_chosen_logps=reference[0],
        ref_rejected_logps=reference[1],
        logits_to_keep=answer,
    )
    loss, stats = quick_jit(lambda table: module.tunix_loss(lambda ids, *_: table[ids], made, 0.1, 0.0))(table)
    said, tokens, naive = np.asarray(jax.nn.log_softmax(table)), np.asarray(ids), np.zeros(2 * rows)
    for row, length in enumerate(np.asarray(mask).sum(axis=1)):
        for place in range(prompt, prompt + length):
            naive[row] += said[tokens[row, place - 1], tokens[row, place]]
    losses, direct = quick_jit(napo_loss)(*jnp.float32(naive).reshape(2, rows), *reference)
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(stats["q"], direct["q"], rtol=1e-5)
