"""Buckets hold what they must, with the least padding; batches come from one bucket at a time."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napo_jax.data.buckets import _cheapest_bounds, choose_buckets, padding_share
from napo_jax.data.order import NO_GROUP, Order


def rlaif_like(count=20_000, spread=0.5, seed=0):
    """Returns prefix lengths int[N] and answer lengths int[N, 4] like RLAIF-V's: lognormal around 60 to 120 tokens."""
    random = np.random.default_rng(seed)
    answers = np.rint(np.array([85, 85, 60, 120]) * np.exp(spread * random.normal(size=(count, 4)))).astype(int)
    questions = np.rint(14 * np.exp(0.5 * random.normal(size=count))).astype(int)
    return 576 + 46 + questions, np.maximum(answers, 2)


def holds(bucket, prefix_lengths, answer_lengths, prefixes):
    """Returns which groups fit a bucket, bool[N], with the prefix repeated for each image."""
    answers = answer_lengths.sum(axis=1)
    return (
        (prefixes * prefix_lengths + answers <= bucket.tokens)
        & (prefix_lengths <= bucket.prefix)
        & (answer_lengths.max(axis=1) <= bucket.answer)
        & (answers <= bucket.answers)
    )


def test_padding_is_under_five_percent_of_a_mix_like_rlaif_v():
    prefix, answers = rlaif_like()
    buckets, bucket_of = choose_buckets(prefix, answers, count=8)
    assert len(buckets) <= 8
    assert padding_share(buckets, bucket_of, prefix, answers) < 0.05
    # Why tokens are packed: with each answer padded to the longest of its group, a bucket for every group would not do.
    padded = prefix + 4 * answers.max(axis=1)
    assert 1 - (prefix + answers.sum(axis=1)).sum() / padded.sum() > 0.15


def test_the_order_of_batches_keeps_the_padding():
    """Groups that move up from a full bucket cost next to nothing."""
    prefix, answers = rlaif_like(4_000)
    buckets, bucket_of = choose_buckets(prefix, answers)
    order = Order(bucket_of, 32)
    computed = valid = 0
    for step in range(order.steps_per_epoch):
        bucket, groups = order[step]
        assert holds(buckets[bucket], prefix[groups], answers[groups], 1).all()
        computed += 32 * buckets[bucket].tokens
        valid += prefix[groups].sum() + answers[groups].sum()
    assert 1 - valid / computed < 0.05


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bounds_are_the_cheapest_of_all(data):
    sizes = np.array(sorted(data.draw(st.sets(st.integers(1, 60), min_size=1, max_size=9))))
    frequency = np.array(data.draw(st.lists(st.integers(1, 20), min_size=len(sizes), max_size=len(sizes))))
    count = data.draw(st.integers(1, 5))

    def cost(bounds):
        return sum(
            n * min(sizes[b] for b in bounds if sizes[b] >= size) for size, n in zip(sizes, frequency, strict=True)
        )

    last = len(sizes) - 1
    choices = ((*some, last) for k in range(min(count, len(sizes))) for some in itertools.combinations(range(last), k))
    got = _cheapest_bounds(sizes, frequency, count)
    assert len(got) <= count
    assert got[-1] == last
    assert cost(got) == min(map(cost, choices))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.sampled_from([1, 8, 128]))
def test_every_group_fits_its_bucket_and_all_above(seed, prefixes, cells, count, multiple):
    random = np.random.default_rng(seed)
    size = int(random.integers(1, 40))
    prefix, answers = random.integers(1, 99, size), random.integers(0, 99, (size, cells))
    buckets, bucket_of = choose_buckets(prefix, answers, prefixes, count=count, attention_multiple=multiple)
    assert list(buckets) == sorted(buckets)
    for i, bucket in enumerate(buckets):
        assert holds(bucket, prefix[bucket_of <= i], answers[bucket_of <= i], prefixes).all()
        assert (prefixes * bucket.prefix + cells * bucket.answer) % multiple == 0
    tokens = np.array([bucket.tokens for bucket in buckets])
    totals = prefixes * prefix + answers.sum(axis=1)
    assert (totals <= tokens[bucket_of]).all()
    assert all(bucket == 0 or totals[i] > tokens[bucket - 1] for i, bucket in enumerate(bucket_of))


@pytest.mark.parametrize(
    ("prefixes", "cells", "multiple", "prefix", "answer"),
    [(1, 4, 128, 640, 96), (1, 3, 128, 640, 128), (2, 3, 128, 576, 128), (3, 4, 8, 544, 72), (1, 4, 1, 537, 71)],
)
def test_attention_pads_no_more_than_it_must(prefixes, cells, multiple, prefix, answer):
    """C answers of a 128th over C each are whole tiles together; each padded to tiles of its own would be waste."""
    lengths = np.full(5, 537), np.full((5, cells), 71)
    (bucket,), _ = choose_buckets(*lengths, prefixes, attention_multiple=multiple)
    assert (bucket.prefix, bucket.answer) == (prefix, answer)
    # The packed axes are padded to sixteens, both of them.
    assert (bucket.tokens, bucket.answers) == (-(-(prefixes * 537 + cells * 71) // 16) * 16, -(-cells * 71 // 16) * 16)


def test_padding_counts_every_prefix():
    prefix, answers = np.array([100, 90]), np.array([[10, 20], [5, 5]])
    buckets, bucket_of = choose_buckets(prefix, answers, 3, count=1)
    assert buckets[0].tokens == 336
    assert padding_share(buckets, bucket_of, prefix, answers, 3) == pytest.approx(1 - (330 + 280) / 672)


@pytest.mark.parametrize("option", ["count", "multiple", "attention_multiple"])
def test_senseless_bucket_options_are_refused(option):
    with pytest.raises(ValueError, match="at least 1"):
        choose_buckets(np.array([3]), np.array([[1]]), **{option: 0})
    with pytest.raises(ValueError, match="no group"):
        choose_buckets(np.zeros(0, int), np.zeros((0, 2), int))


BUCKET_OF = np.random.default_rng(0).integers(0, 4, 103)


def epoch(order, number):
    steps = range(number * order.steps_per_epoch, (number + 1) * order.steps_per_epoch)
    return [order[step] for step in steps]


def test_an_epoch_has_every_group_at_most_once_and_leaves_less_than_a_batch():
    order = Order(BUCKET_OF, 8, seed=3)
    for number in range(3):
        batches = epoch(order, number)
        groups = np.concatenate([groups for _, groups in batches])
        assert len(groups) == len(set(groups.tolist())) == 103 // 8 * 8
        assert all((BUCKET_OF[groups] <= bucket).all() for bucket, groups in batches)
        moved = sum((BUCKET_OF[groups] < bucket).sum() for bucket, groups in batches)
        assert moved < 8 * 3


def test_epochs_differ_and_a_seed_repeats():
    """B9: one shuffle for all epochs would show here."""
    one, same, other = Order(BUCKET_OF, 8, seed=3), Order(BUCKET_OF, 8, seed=3), Order(BUCKET_OF, 8, seed=4)
    flat = lambda order, number: np.stack([groups for _, groups in epoch(order, number)]).tolist()
    assert flat(one, 0) == flat(same, 0) != flat(other, 0)
    assert flat(one, 1) != flat(one, 0)
    assert [bucket for bucket, _ in epoch(one, 0)] != sorted(bucket for bucket, _ in epoch(one, 0))
    left = [set(range(103)) - set(np.ravel(flat(one, number)).tolist()) for number in range(4)]
    assert len(set(map(frozenset, left))) > 1, "it is always the same groups that are left over"


def test_the_longest_groups_are_left_out_no_more_than_others():
    """Were those left out that are over in the end, the groups of a small last bucket would never be trained on."""
    order = Order(np.repeat([0, 1], [100, 5]), 32)
    epochs = 300
    seen = np.bincount(np.concatenate([groups for e in range(epochs) for _, groups in epoch(order, e)]), minlength=105)
    # 96 of 105 are in an epoch: binomial, with a standard deviation of 4.8 around 274.
    assert abs(seen / epochs - 96 / 105).max() < 5 * np.sqrt(96 / 105 * 9 / 105 / epochs)


def test_any_step_in_any_order_is_the_same():
    order, fresh = Order(BUCKET_OF, 8, seed=3), Order(BUCKET_OF, 8, seed=3)
    forth = [order[step][1].tolist() for step in range(60)]
    back = [fresh[step][1].tolist() for step in reversed(range(60))][::-1]
    assert forth == back


def test_an_order_that_keeps_its_rest_has_every_group_once():
    """T19: a ragged last batch is filled up, and the filling can be told."""
    for size in (2, 8, 64, 200):
        order = Order(BUCKET_OF, size, shuffle=False, keep_rest=True)
        groups = np.concatenate([groups for _, groups in epoch(order, 0)])
        assert len(groups) == order.steps_per_epoch * size
        for bucket, batch in epoch(order, 0):
            assert BUCKET_OF[batch[batch != NO_GROUP]].max() <= bucket, "a group lies in a bucket that is too small"
        assert sorted(groups[groups != NO_GROUP].tolist()) == list(range(103))
        assert [g.tolist() for _, g in epoch(order, 0)] == [g.tolist() for _, g in epoch(order, 1)]


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="103 groups are too few for a batch of 104"):
        Order(BUCKET_OF, 104)
    with pytest.raises(ValueError, match="at least one group"):
        Order(BUCKET_OF, 0)


def test_the_fingerprint_is_of_everything_that_decides():
    prints = {
        Order(BUCKET_OF, 8).fingerprint,
        Order(BUCKET_OF, 8, seed=1).fingerprint,
        Order(BUCKET_OF, 4).fingerprint,
        Order(BUCKET_OF[::-1], 8).fingerprint,
        Order(BUCKET_OF, 8, shuffle=False).fingerprint,
        Order(BUCKET_OF, 8, keep_rest=True).fingerprint,
    }
    assert len(prints) == 6
    assert Order(BUCKET_OF, 8).fingerprint in prints
