"""Spans where two answers differ: which tokens they are, and what they weigh, from the row to the loss."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from quick import quick_jit
from test_groups import PROMPTER, pair, table_of

from napo_jax import Objective, Term, dpo_loss, methods
from napo_jax.config import DataConfig
from napo_jax.data.buckets import Bucket
from napo_jax.data.byte_tokenizer import BYTE_VOCABULARY, byte_tokenizer
from napo_jax.data.dataset import open_dataset
from napo_jax.data.edits import edited_tokens
from napo_jax.data.order import NO_GROUP
from napo_jax.evaluation import HeldOut
from napo_jax.logps import DetailedLogps, Edited, Logps
from napo_jax.losses import token_kl_loss
from napo_jax.models import Groups, Llava, LlavaConfig
from napo_jax.optim import OptimizerConfig, flatten, make_optimizer, split_trained
from napo_jax.reference import open_reference
from napo_jax.score import pictures_of, score
from napo_jax.sharding import MeshConfig, make_mesh
from napo_jax.step import Frozen, _over_mesh, init_state, make_train_step

CHIP = methods.chip(edited=2.0)


@pytest.mark.parametrize(
    ("one", "other", "marks"),
    [
        (
            "the star is blue over there now",
            "the star is red over there now",
            ("0001000", "0001000"),
        ),  # both runs have 3 words
        ("a star is blue and big", "a star is red and big", ("000111", "000111")),  # the second one has 2
        ("a b c d e f", "a b c d e f", ("000000", "000000")),
        ("a b c", "d e", ("111", "11")),
        ("a b c x d e f", "a b c d e f", ("0000000", "000000")),  # nothing stands there in the other one
        ("a b c x y z d e f", "a b c y d e f", ("000111000", "0001000")),  # a run of one belongs to the span
        ("", "a b c", ("", "000")),
    ],
)
def test_spans_by_hand(one, other, marks):
    found = lambda *answers: tuple("".join(map(str, 1 * marks)) for marks in edited_tokens(*answers))
    assert found(one.split(), other.split()) == marks
    assert found(other.split(), one.split()) == marks[::-1]


def test_frequent_tokens_are_no_junk():
    """In answers of 200 tokens and more difflib would else not look at those that are in every hundredth place."""
    words = [*"abcdefghij" * 30]
    changed = [*words[:150], "x", *words[151:]]
    assert [np.flatnonzero(marks).tolist() for marks in edited_tokens(words, changed)] == [[150], [150]]


def test_a_table_keeps_the_spans_beside_the_ids(tmp_path):
    table = table_of(tmp_path, pair("It is a red car.", "It is a cat."), pair("Same.", "Same."), objective=CHIP)
    plain = table_of(tmp_path, pair("It is a red car.", "It is a cat."), pair("Same.", "Same."))
    for group in range(2):
        ids, marks, want = table.tokens(group)[1], table.edited(group), plain.tokens(group)[1]
        for name in ("chosen", "rejected"):
            assert ids[name].tolist() == want[name].tolist()
        expected = edited_tokens(*(want[name] for name in ("chosen", "rejected")))
        assert [marks[name].tolist() for name in ("chosen", "rejected")] == [each.tolist() for each in expected]
    assert table.largest_id == plain.largest_id
    arrays = table.arrays(np.array([1, NO_GROUP, 0]), Bucket(0, 240, 20, 60), seed=0)
    assert arrays["edited"].shape == (3, 3, 20)
    assert not arrays["edited"][:2].any()
    rejected = PROMPTER.answers(["It is a cat."])[0]
    counts = [table.edited(0)[name].sum() for name in ("chosen", "rejected", "chosen")]  # under either picture
    assert arrays["edited"][2].sum(axis=-1).tolist() == counts
    assert 0 < counts[1] < len(rejected)
    assert "edited" not in plain.arrays(np.array([0]), Bucket(0, 240, 20, 60), seed=0)


def test_what_cannot_be_told_is_refused():
    pair_of = lambda name, other, **options: Term(name, dpo_loss, "chosen", other, **options)
    with pytest.raises(ValueError, match="those of two answers, and it has"):
        Objective((pair_of("image", "chosen@crop", edited=1.0),))
    with pytest.raises(ValueError, match="'chosen' is edited against 'rejected' already"):
        Objective((pair_of("one", "rejected", edited=1.0), pair_of("two", "question_only", edited=1.0)))
    with pytest.raises(ValueError, match="edited must be a finite number, 0 or more"):
        pair_of("one", "rejected", edited=-1.0)
    plain = dict.fromkeys(CHIP.cells, Logps(*np.zeros((2, 3), np.float32)))
    with pytest.raises(ValueError, match="does not tell the part of edited spans"):
        CHIP(plain, plain)
    edited = Edited(*np.zeros((3, 3), np.float32))
    without_kl = dict.fromkeys(CHIP.cells, DetailedLogps(*np.zeros((2, 3), np.float32), edited))
    with pytest.raises(ValueError, match="how far the policy is from the reference, and no kl is given"):
        CHIP(without_kl, without_kl)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    tiny = LlavaConfig.tiny(remat="none", logits_chunk=256)
    text = dataclasses.replace(tiny.text, vocab_size=BYTE_VOCABULARY, max_positions=1024, layers=1)
    model = Llava(dataclasses.replace(tiny, text=text))
    cache = str(tmp_path_factory.mktemp("edits"))
    data = DataConfig(made_up=6, held_out=2, batch_size=4, max_tokens=1024, buckets=1, cache=cache)
    dataset = open_dataset(data, CHIP, byte_tokenizer(), model.config)
    (batch,) = dataset.loader(rows=(0, 4))(0, 1)
    params = model.init(jax.random.key(0))
    reference = jax.tree.map(lambda leaf: leaf * (2.5 if leaf.ndim > 1 else 1.0), params)
    return model, params, reference, dataset, batch


def test_log_probs_tell_the_part_of_edited_tokens_and_the_divergence(setting):
    model, params, reference, _, batch = setting
    assert 0 < batch.edited.sum() < batch.edited.size
    run = lambda params, reference, batch: score(model, params, batch, CHIP, kl_to=(model, reference))
    got = quick_jit(run)(params, reference, batch)
    prefix = lambda x: np.broadcast_to(x[:, None], (4, 2, *x.shape[1:]))
    pictures = pictures_of(batch, CHIP, model.config.vision.patch_size)
    prefixes = prefix(batch.prefix_ids), prefix(batch.prefix_lengths)
    groups = Groups(pictures, *prefixes, batch.answer_ids, batch.answer_lengths)
    tokens, kl = map(
        np.asarray,
        quick_jit(
            lambda params, reference, groups: (
                model.token_logps(params, groups, CHIP.cell_image),
                model.token_kl(params, reference, groups, CHIP.cell_image),
            )
        )(params, reference, groups),
    )
    for c, cell in enumerate(CHIP.cells):
        for row, length in enumerate(batch.answer_lengths[:, c]):
            values, marks = np.float64(tokens[row, c, :length]), batch.edited[row, c, :length]
            edited = got[cell].edited
            np.testing.assert_allclose(got[cell].sum[row], values.sum(), rtol=1e-5)
            np.testing.assert_allclose(edited.sum[row], values[marks].sum(), rtol=1e-5)
            np.testing.assert_allclose(edited.mean[row], values[marks].sum() / max(marks.sum(), 1), rtol=1e-5)
            np.testing.assert_allclose(edited.share[row], marks.mean(), rtol=1e-6)
            np.testing.assert_allclose(got[cell].kl[row], kl[row, c, :length].sum(), rtol=1e-4, atol=1e-5)
    weighed = got["chosen"].weighing_edits(2.0)
    weights = np.where(batch.edited[:, 0], 3.0, 1.0) * (np.arange(tokens.shape[-1]) < batch.answer_lengths[:, :1])
    np.testing.assert_allclose(weighed.sum, (tokens[:, 0] * weights).sum(axis=-1), rtol=1e-5)
    np.testing.assert_allclose(weighed.mean, (tokens[:, 0] * weights).sum(axis=-1) / weights.sum(axis=-1), rtol=1e-5)


@jax.numpy_dtype_promotion("standard")
def test_a_step_needs_the_reference_beside_it(setting):
    """And then computes the same whole and in parts."""
    model, params, reference, _, batch = setting
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, schedule="constant", warmup=0.0), 1)
    trained, frozen = split_trained(flatten(params), OptimizerConfig())
    theirs, _ = split_trained(flatten(reference), OptimizerConfig())
    carried = dict.fromkeys(CHIP.reference_cells, CHIP.logps_like(np.zeros(4, np.float32), reference=True))
    carried = dataclasses.replace(batch, reference=carried)
    losses = []
    for accumulate in (2, 1):
        step = quick_jit(make_train_step(model, CHIP, optimizer, accumulate=accumulate))
        _, metrics = step(init_state(trained, optimizer), Frozen(frozen, theirs), batch)
        losses.append({name: float(value) for name, value in metrics.items()})
        with pytest.raises(ValueError, match="reads the reference's whole distributions, and none runs along"):
            step(init_state(trained, optimizer), Frozen(frozen), carried)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-5)
    _, metrics = step(init_state(trained, optimizer), Frozen(frozen, trained), batch)
    assert float(metrics["token/loss"]) == pytest.approx(0, abs=1e-4)  # of a policy that is the reference
    assert float(metrics["segment/loss"]) == pytest.approx(math.log(2))


def test_groups_held_out_and_rows_of_a_mesh_say_the_same(setting):
    model, params, reference, dataset, _ = setting
    order = dataset.order(held_out=True, batch_size=2, shuffle=False)
    batch = next(dataset.loader(order, rows=(0, 2))())
    score_all = quick_jit(
        lambda params, reference, batch: (
            score(model, params, batch, CHIP, kl_to=(model, reference)),
            score(model, reference, batch, CHIP, reference=True),
        )
    )
    policy, theirs = score_all(params, reference, batch)
    want = {name: float(value) for name, value in CHIP(policy, theirs)[1].items()}
    assert abs(want["token/loss"]) > 1e-3
    got = HeldOut(dataset, CHIP, model, (model, reference))(params)
    assert {name: got[name] for name in want} == pytest.approx(want, rel=1e-3, abs=1e-3)
    where = dict.fromkeys(CHIP.cells, np.ones(2, bool))
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        _, spread = jax.jit(_over_mesh(CHIP, mesh))(policy, theirs, where)
    assert {name: float(value) for name, value in spread.items()} == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_a_cache_keeps_the_part_of_edited_tokens(setting, tmp_path):
    model, params, reference, dataset, batch = setting
    dense = Objective(tuple(term for term in CHIP.terms if term.loss is not token_kl_loss))
    with pytest.raises(ValueError, match="the term token reads the reference's whole distributions"):
        open_reference(tmp_path, dataset, CHIP, model, params)
    want = quick_jit(lambda reference, batch: score(model, reference, batch, dense, reference=True))(reference, batch)
    for _ in range(2):  # computed, and read again
        cached = open_reference(tmp_path, dataset, dense, model, reference)
        attached = cached.attach(batch).reference
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), attached, want)
    assert cached.deviation is not None
    assert dense.columns(reference=True) == ["sum", "mean", "edited_sum", "edited_mean", "edited_share"]
