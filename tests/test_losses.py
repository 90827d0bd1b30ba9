"""Every loss: literal numbers, the naive twin, masks, dtypes, refusals, and the properties that make it a loss."""

import inspect
from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from jax.test_util import check_grads

from napo_jax import losses

RNG = np.random.default_rng(0)
PC, PR, RC, RR, PX, RX = (np.float32(RNG.normal(-50, 8, 6)) for _ in range(6))
PAIR = (PC, PR, RC, RR)
SEVERAL = (PC, np.stack([PR, PX]), RC, np.stack([RR, RX]))

# loss with its options -> (its arguments, its naive twin on the same arguments)
CASES = {
    "napo": (partial(losses.napo_loss, q=0.3), PAIR, lambda *a: naive.box_cox(0.1 * (a[0] - a[2] - a[1] + a[3]), 0.3)),
    "napo_measured": (
        partial(losses.napo_loss, alpha=0.2),
        PAIR,
        lambda *a: naive.box_cox(0.1 * (a[0] - a[2] - a[1] + a[3]), naive.q_paper(a[0] - a[2] - a[1] + a[3], 0.2, 0.1)),
    ),
    "dpo": (losses.dpo_loss, PAIR, naive.dpo),
    "dpo_smoothed": (
        partial(losses.dpo_loss, label_smoothing=0.2),
        PAIR,
        partial(naive.dpo, label_smoothing=0.2),
    ),
    "robust_dpo": (
        partial(losses.robust_dpo_loss, flip_rate=0.3),
        PAIR,
        partial(naive.robust_dpo, beta=0.1, flip_rate=0.3),
    ),
    "ipo": (partial(losses.ipo_loss, beta=0.2), PAIR, partial(naive.ipo, beta=0.2)),
    "hinge": (losses.hinge_loss, PAIR, partial(naive.hinge, beta=0.1)),
    "simpo": (
        partial(losses.simpo_loss, beta=2.5, target_margin=0.8),
        (PC / 40, PR / 40),
        partial(naive.simpo, beta=2.5, target_margin=0.8),
    ),
    "kto_pair": (  # on the whole, both kinds of answers have gained
        partial(losses.kto_pair_loss, beta=0.3),
        (PC, PR, RC - 12, RR - 12),
        partial(naive.kto_pair, beta=0.3),
    ),
    "kto_pair_unmoved": (  # both have lost
        partial(losses.kto_pair_loss, beta=0.3),
        (PC, PR, RC + 40, RR + 40),
        partial(naive.kto_pair, beta=0.3),
    ),
    "sft": (losses.sft_loss, (PC,), lambda logps: -logps),
    "anchor": (
        partial(losses.anchor_loss, delta=0.5),
        (PC, RC),
        partial(naive.anchor, beta=0.1, delta=0.5),
    ),
    "reward": (  # of a negative mean
        partial(losses.reward_loss, centring_weight=0.02),
        (PC / 40, PR / 40),
        partial(naive.reward, weight=0.02, centring="absolute"),
    ),
    "reward_squared": (
        partial(losses.reward_loss, centring_weight=0.02, centring="square"),
        (PC / 40, PR / 40 + 3),
        partial(naive.reward, weight=0.02, centring="square"),
    ),
    "softmax": (losses.softmax_preference_loss, SEVERAL, partial(naive.softmax_preference, beta=0.1)),
    "single_sigmoid": (
        partial(losses.single_sigmoid_loss, chosen_weight=2.0, rejected_weights=(1.0, 0.5)),
        SEVERAL,
        partial(naive.single_sigmoid, beta=0.1, a=2.0, b=(1.0, 0.5)),
    ),
}
each_loss = pytest.mark.parametrize("case", CASES)


@each_loss
def test_equals_the_naive_twin(case):
    loss, arguments, twin = CASES[case]
    want = twin(*(np.float64(argument) for argument in arguments))
    got, _ = loss(*arguments)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(jax.jit(loss)(*arguments)[0], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case != "kto_pair"])
def test_gradients_by_finite_differences(case):
    """In float64, where differences can be told from rounding. The measured q is a constant to the gradient."""
    loss, arguments, _ = CASES[case]
    count = len(arguments) // 2 if "reference_chosen_logps" in inspect.signature(loss).parameters else len(arguments)
    with jax.enable_x64(True):
        arguments = [jnp.float64(argument) for argument in arguments]
        options = {"q": float(loss(*arguments)[1]["q"])} if case == "napo_measured" else {}
        fixed = lambda *policy: loss(*policy, *arguments[count:], **options)[0]
        check_grads(fixed, arguments[:count], order=2, modes=("fwd", "rev"), rtol=1e-5, atol=1e-6)
        if options:
            measured = jax.grad(lambda *policy: loss(*policy, *arguments[count:])[0].sum())(*arguments[:count])
            np.testing.assert_allclose(measured, jax.grad(lambda *p: fixed(*p).sum())(*arguments[:count]), rtol=1e-12)


def test_what_kto_takes_for_moved_is_a_constant_to_the_gradient():
    """So differences of the loss, in which it moves too, are no gradient; by hand it is -beta s (1 - s) / 2."""
    loss, (pc, pr, rc, rr), _ = CASES["kto_pair"]
    assert np.mean(pc - rc) > 1
    assert np.mean(pr - rr) > 1
    gain = naive.sigmoid(0.3 * ((pc - rc) - np.mean(pr - rr)))
    got = jax.grad(lambda pc: loss(pc, pr, rc, rr)[0].sum())(jnp.asarray(pc))
    np.testing.assert_allclose(got, -0.3 * gain * (1 - gain) / 2, rtol=1e-5, atol=1e-8)


@each_loss
@pytest.mark.parametrize("rotten", [np.nan, np.inf, -np.inf])
def test_a_masked_row_changes_nothing(case, rotten):
    """B4: in the released code, one empty answer makes q and the loss NaN on every GPU."""
    loss, arguments, _ = CASES[case]
    where = np.array([True, True, False, True, True, False])

    def run(arguments, where=None):
        def total(policy_chosen, *rest):
            values, stats = loss(policy_chosen, *rest, where=where)
            return values.sum(), (values, stats)

        return jax.grad(total, has_aux=True)(jnp.asarray(arguments[0]), *arguments[1:])

    spoilt = [np.where(where, argument, np.float32(rotten)) for argument in arguments]
    gradient, (values, stats) = run(spoilt, where)
    kept_gradient, (kept_values, kept_stats) = run([argument[..., where] for argument in arguments])
    np.testing.assert_allclose(values[where], kept_values, rtol=1e-6)
    np.testing.assert_allclose(gradient[where], kept_gradient, rtol=1e-6)
    assert not np.any(values[~where])
    assert not np.any(gradient[~where])
    assert all(np.all(np.isfinite(value)) for value in stats.values())
    if "q" in stats:
        np.testing.assert_allclose(stats["q"], kept_stats["q"], rtol=1e-6)


@each_loss
def test_nothing_valid_is_zero_and_finite(case):
    loss, arguments, _ = CASES[case]
    nothing = np.zeros(6, bool)
    values, stats = loss(*(np.full_like(argument, np.nan) for argument in arguments), where=nothing)
    assert not np.any(values)
    assert all(np.all(np.isfinite(value)) for value in stats.values())


@each_loss
def test_bfloat16_in_float32_out(case):
    loss, arguments, _ = CASES[case]
    half = [jnp.asarray(argument, jnp.bfloat16) for argument in arguments]
    values, stats = loss(*half)
    assert values.dtype == jnp.float32
    assert {value.dtype for value in stats.values()} <= {jnp.dtype("float32")}
    np.testing.assert_array_equal(values, loss(*(argument.astype(jnp.float32) for argument in half))[0])


@each_loss
def test_integers_are_refused(case):
    loss, arguments, _ = CASES[case]
    with pytest.raises(ValueError, match=r"floating point, got int32 of shape \(6,\)"):
        loss(np.int32(arguments[0]), *arguments[1:])


@pytest.mark.parametrize("case", [case for case in CASES if case != "sft"])
def test_unequal_shapes_are_refused_with_both(case):
    loss, arguments, _ = CASES[case]
    with pytest.raises(ValueError, match=r"\(6,\).*\(5,\)|\(5,\).*\(6,\)"):
        loss(arguments[0][:5], *arguments[1:])


@each_loss
def test_masks_must_be_masks(case):
    loss, arguments, _ = CASES[case]
    with pytest.raises(ValueError, match="where must be bool, got float32"):
        loss(*arguments, where=np.ones(6, np.float32))
    with pytest.raises(ValueError, match=r"where has shape \(5,\).*\(6,\)"):
        loss(*arguments, where=np.ones(5, bool))


@each_loss
def test_no_gradient_flows_into_the_reference_or_out_of_the_stats(case):
    loss, arguments, _ = CASES[case]
    names = list(inspect.signature(loss).parameters)
    for position in range(len(arguments)):
        if names[position].startswith("reference_"):
            assert not np.any(jax.grad(lambda *a: loss(*a)[0].sum(), argnums=position)(*arguments))
    gradient = jax.grad(lambda first: sum(s.sum() for s in loss(first, *arguments[1:])[1].values()) + 0 * first.sum())
    assert not np.any(gradient(jnp.asarray(arguments[0])))


def test_literal_numbers():
    """By hand: z = 0.1 * (2 - -3) = 0.5, sigmoid(0.5) = 0.6224593."""
    pair = [jnp.float32([value]) for value in (-40.0, -44.0, -42.0, -41.0)]
    value, stats = losses.dpo_loss(*pair)
    np.testing.assert_allclose(value, [0.4740770], rtol=1e-6)
    np.testing.assert_allclose(stats["chosen_rewards"], [0.2], rtol=1e-6)
    np.testing.assert_allclose(stats["rejected_rewards"], [-0.3], rtol=1e-6)
    np.testing.assert_allclose(losses.napo_loss(*pair, q=1.0)[0], [1 - 0.6224593], rtol=1e-6)
    np.testing.assert_allclose(losses.napo_loss(*pair, q=0.5)[0], [(1 - 0.7889609) / 0.5], rtol=1e-6)
    np.testing.assert_allclose(losses.hinge_loss(*pair)[0], [0.5], rtol=1e-6)
    np.testing.assert_allclose(losses.ipo_loss(*pair)[0], [0.0], atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("sft", "simpo", "reward", "reward_squared")])
def test_rewards_are_beta_times_the_log_ratio(case):
    loss, arguments, _ = CASES[case]
    _, stats = loss(*arguments, beta=0.3)
    reference = arguments[1] if case == "anchor" else arguments[2]
    np.testing.assert_allclose(stats["chosen_rewards"], 0.3 * (arguments[0] - reference), rtol=1e-5, atol=1e-6)
    if case != "anchor":
        rejected = arguments[1] - arguments[3]
        np.testing.assert_allclose(stats["rejected_rewards"], 0.3 * rejected, rtol=1e-5, atol=1e-6)


def test_rewards_of_simpo_have_no_reference():
    _, stats = losses.simpo_loss(PC, PR, beta=0.3)
    np.testing.assert_allclose(stats["chosen_rewards"], 0.3 * PC, rtol=1e-6)
    np.testing.assert_allclose(stats["rejected_rewards"], 0.3 * PR, rtol=1e-6)


def test_options_may_be_numbers_of_any_kind():
    """A float64 from NumPy, or a traced number, makes nothing wider and nothing fail."""
    want, _ = losses.napo_loss(*PAIR, beta=0.2, alpha=0.3)
    np.testing.assert_array_equal(losses.napo_loss(*PAIR, beta=np.float64(0.2), alpha=np.float64(0.3))[0], want)
    traced = jax.jit(lambda beta, alpha: losses.napo_loss(*PAIR, beta=beta, alpha=alpha)[0])
    np.testing.assert_allclose(traced(0.2, 0.3), want, rtol=1e-6)
    flipped = jax.jit(lambda rate: losses.robust_dpo_loss(*PAIR, flip_rate=rate)[0])
    np.testing.assert_allclose(flipped(0.3), losses.robust_dpo_loss(*PAIR, flip_rate=0.3)[0], rtol=1e-6)
    with jax.enable_x64(True):
        half = [jnp.asarray(argument, jnp.bfloat16) for argument in PAIR]
        values, stats = losses.napo_loss(*half, beta=np.float64(0.2), alpha=np.float64(0.3))
        assert (values.dtype, stats["q"].dtype) == (jnp.float32, jnp.float32)
        wide, stats = losses.napo_loss(*map(jnp.float64, PAIR), q=0.3)
        assert (wide.dtype, stats["q"].dtype) == (jnp.float64, jnp.float64)


def test_masks_may_be_lists():
    where = [True, False, True, True, False, True]
    for loss, arguments, _ in CASES.values():
        np.testing.assert_array_equal(loss(*arguments, where=where)[0], loss(*arguments, where=np.array(where))[0])


def test_at_step_zero_every_loss_has_its_closed_form():
    same = (PC, PR, PC, PR)
    np.testing.assert_allclose(losses.dpo_loss(*same)[0], np.full(6, np.log(2)), rtol=1e-6)
    for rule, q in (("paper", 0.5), ("released", 1.0)):
        values, stats = losses.napo_loss(*same, rule=rule)
        np.testing.assert_allclose(stats["q"], q)
        np.testing.assert_allclose(values, np.full(6, (1 - 2.0**-q) / q), rtol=1e-6)
        assert not np.any(stats["chosen_rewards"])
        assert not np.any(stats["rejected_rewards"])


def test_scalars_and_matrices_are_batches_too():
    value, _ = losses.napo_loss(-40.0, -44.0, -42.0, -41.0, q=0.5)
    assert value.shape == ()
    matrix = [argument.reshape(2, 3) for argument in PAIR]
    np.testing.assert_array_equal(losses.napo_loss(*matrix)[0].ravel(), losses.napo_loss(*PAIR)[0])


def test_one_rejected_cell_under_softmax_is_dpo():
    several, _ = losses.softmax_preference_loss(PC, PR[None], RC, RR[None])
    np.testing.assert_allclose(several, losses.dpo_loss(*PAIR)[0], rtol=1e-6)


def test_chip_in_one_sigmoid():
    """With z = (h_w - h_l) + (h_w - h_v) - t (KL_l - KL_w), and a gradient through the KL of the rejected one."""
    kl_chosen, kl_rejected = np.float32(RNG.uniform(0, 9, (2, 6)))

    def chip(kl_rejected):
        offset = -0.1 * (kl_rejected - kl_chosen)
        return losses.single_sigmoid_loss(*SEVERAL, chosen_weight=2.0, rejected_weights=(1.0, 1.0), offset=offset)[0]

    h_w, h_l, h_v = (np.float64(a) - b for a, b in ((PC, RC), (PR, RR), (PX, RX)))
    z = (h_w - h_l) + (h_w - h_v) - 0.1 * (np.float64(kl_rejected) - kl_chosen)
    np.testing.assert_allclose(chip(kl_rejected), -naive.log_sigmoid(0.1 * z), rtol=1e-6, atol=1e-6)
    gradient = jax.grad(lambda kl: chip(kl).sum())(kl_rejected)
    np.testing.assert_allclose(gradient, 0.1 * 0.1 * naive.sigmoid(-0.1 * z), rtol=1e-5)


def test_a_masked_offset_cannot_spoil_its_gradient():
    where = np.arange(6) != 2
    offset = np.where(where, np.float32(0.5), np.float32(np.nan))

    def total(offset):
        return losses.single_sigmoid_loss(*SEVERAL, rejected_weights=(1.0, 1.0), offset=offset, where=where)[0].sum()

    assert np.all(np.isfinite(jax.grad(total)(jnp.asarray(offset))))


def test_cells_must_match_their_weights():
    with pytest.raises(ValueError, match="rejected_weights has 3 numbers for 2 rejected cells"):
        losses.single_sigmoid_loss(*SEVERAL, rejected_weights=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="2 cells and reference_rejected_logps 1"):
        losses.softmax_preference_loss(PC, SEVERAL[1], RC, RR[None])


@pytest.mark.parametrize("flip_rate", [-0.1, 0.5, 0.9])
def test_a_flip_rate_of_half_or_more_is_refused(flip_rate):
    with pytest.raises(ValueError, match="flip_rate must be in"):
        losses.robust_dpo_loss(*PAIR, flip_rate=flip_rate)


def test_robust_dpo_is_unbiased_under_flips():
    """Its expectation over labels flipped at the given rate is the loss of the clean labels."""
    flipped = (PR, PC, RR, RC)
    clean, wrong = (losses.robust_dpo_loss(*pair, flip_rate=0.3)[0] for pair in (PAIR, flipped))
    np.testing.assert_allclose(0.7 * clean + 0.3 * wrong, losses.dpo_loss(*PAIR)[0], rtol=1e-5)


# --- q, gamma, mixed references --------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.01, 0.5, 3.0])
def test_q_by_both_rules(alpha):
    margin = np.float32([8.0, -2.0, 30.0])
    paper = losses.noise_coefficient(margin, alpha=alpha, beta=0.2)
    np.testing.assert_allclose(paper, naive.q_paper(margin, alpha, 0.2), rtol=1e-6)
    released = losses.noise_coefficient(margin, alpha=alpha, beta=0.2, rule="released")
    np.testing.assert_allclose(released, naive.q_released(margin, alpha), rtol=1e-6)


@pytest.mark.parametrize(("rule", "low"), [("paper", 0.01), ("released", 0.001)])
def test_q_is_clipped(rule, low):
    q = partial(losses.noise_coefficient, alpha=1.0, rule=rule)
    np.testing.assert_allclose(q(np.float32([1e4])), low)
    np.testing.assert_allclose(q(np.float32([-1e4])), 1.0)


def test_q_of_an_unmasked_nan_is_nan():
    """What is not masked is not hidden."""
    assert np.isnan(losses.noise_coefficient(np.float32([1.0, np.nan]), alpha=1.0))


def test_a_given_noise_margin_sets_q_and_nothing_else():
    means = np.float32(RNG.normal(0.3, 0.1, 6))
    values, stats = losses.napo_loss(*PAIR, alpha=0.5, noise_margin=means)
    np.testing.assert_allclose(stats["q"], naive.q_paper(means, 0.5, 0.1), rtol=1e-6)
    np.testing.assert_array_equal(values, losses.napo_loss(*PAIR, q=stats["q"])[0])


def test_bad_q_and_rule_are_refused():
    for q in (
        0.0,
        -0.5,
        1.5,
        np.float32(2.0),
        jnp.float32(0.0),
        [0.5, 0.5, 0.5, 0.5, 0.5, 2.0],
        np.float32([0.5, 0.0, 0.5, 0.5, 0.5, 0.5]),
        float("nan"),
    ):
        with pytest.raises(ValueError, match=r"q must be in \(0, 1\]"):
            losses.napo_loss(*PAIR, q=q)
    with pytest.raises(ValueError, match=r"q has shape \(2,\), but the log-probs have shape \(6,\)"):
        losses.napo_loss(*PAIR, q=jnp.float32([0.5, 0.5]))
    with pytest.raises(ValueError, match="not both"):
        losses.napo_loss(*PAIR, q=0.5, noise_margin=PC)
    with pytest.raises(ValueError, match=r"rule must be one of \['paper', 'released'\], got 'papers'"):
        losses.napo_loss(*PAIR, rule="papers")


def test_a_given_q_is_a_constant_and_may_differ_by_row():
    rows = np.float32(RNG.uniform(0.1, 1.0, 6))
    values, stats = losses.napo_loss(*PAIR, q=rows)
    np.testing.assert_allclose(values, naive.box_cox(0.1 * (PC - RC - PR + RR), rows), rtol=1e-5)
    np.testing.assert_array_equal(stats["q"], rows)
    both = lambda q: (lambda values, stats: values.sum() + stats["q"].sum())(*losses.napo_loss(*PAIR, q=q))
    assert not np.any(jax.grad(both)(jnp.asarray(rows)))
    where = np.arange(6) != 2
    values, stats = losses.napo_loss(*PAIR, q=np.where(where, rows, np.nan), where=where)
    assert np.all(np.isfinite(stats["q"]))
    assert values[2] == 0


def test_weights_follow_the_margins():
    margins = np.float32(RNG.uniform(1, 9, (3, 5)))
    np.testing.assert_allclose(losses.term_weights(margins), naive.gamma(margins), rtol=1e-6)


@pytest.mark.parametrize(
    ("means", "want"),
    [
        ([0, 0, 0], [1 / 3, 1 / 3, 1 / 3]),  # step 0: Eq. 13 is 0/0
        ([-1, -2, -3], [1 / 3, 1 / 3, 1 / 3]),  # Eq. 13 would weigh the worst term most
        ([-1, 0, 0], [1 / 3, 1 / 3, 1 / 3]),
        ([-9, 4, 0], [0.01, 1.0, 0.01]),
        ([-1, 3, 1], [0.01, 0.75, 0.25]),
        ([3e-5, -1e-5, 6e-5], [1 / 3, 1 / 3, 1 / 3]),  # what rounding leaves of zeros
        ([1e-4, 3e-4, 0], [0.25, 0.75, 0.01]),
        ([1e30, 1e30, 2e30], [0.25, 0.25, 0.5]),
        ([np.nan, 1, 2], [np.nan, np.nan, np.nan]),  # what is not masked is not hidden
        ([999, 1, 0], [0.999, 0.01, 0.01]),
    ],
)
def test_weights_where_the_equation_says_nothing(means, want):
    margins = np.float32(means)[:, None]
    np.testing.assert_allclose(losses.term_weights(margins), want, rtol=1e-6)


def test_weights_ignore_masked_rows_and_gradients():
    margins = np.float32([[2.0, np.nan], [np.inf, 6.0]])
    where = np.array([[True, False], [False, True]])
    np.testing.assert_allclose(losses.term_weights(margins, where=where), [0.25, 0.75])
    gradient = jax.grad(lambda m: losses.term_weights(m)[0])(jnp.float32([[1.0], [2.0]]))
    assert not np.any(gradient)
    np.testing.assert_allclose(losses.term_weights(np.float32([[9.0], [1.0]]), floor=0.2, cap=0.5), [0.5, 0.2])
    with pytest.raises(ValueError, match=r"float\[K, \.\.\.\]"):
        losses.term_weights(jnp.float32(1.0))


def test_mixed_references_as_published():
    """r1 + r2 - log(a e^r1 + (1 - a) e^r2) with r1 the extra reference and r2 the initial policy."""
    initial, extra = np.float64(RC), np.float64(RX)
    for weight in (0.0, 0.3, 1.0):
        a = 1 - weight
        want = extra + initial - np.log(a * np.exp(extra) + (1 - a) * np.exp(initial))
        got = losses.mixed_reference_logps(RC, RX, extra_weight=weight, clip_range=None)
        np.testing.assert_allclose(got, want, rtol=1e-6)
    into = jax.grad(lambda r, e: losses.mixed_reference_logps(r, e).sum(), argnums=(0, 1))(RC, RX)
    assert not np.any(into)
    with pytest.raises(ValueError, match=r"extra_weight must be in \[0, 1\], got 1.5"):
        losses.mixed_reference_logps(RC, RX, extra_weight=1.5)
    clipped = np.clip(extra, 1.05 * initial, 0.95 * initial)
    assert np.any(clipped != extra)
    want = -np.log(0.5 * np.exp(-initial) + 0.5 * np.exp(-clipped))
    np.testing.assert_allclose(losses.mixed_reference_logps(RC, RX, clip_range=0.05), want, rtol=1e-6)


def test_mixed_references_are_bounded_by_the_two_and_survive_long_answers():
    mixed = losses.mixed_reference_logps(RC, RX, clip_range=None)
    assert np.all(mixed >= np.minimum(RC, RX) - 1e-4)
    assert np.all(mixed <= np.maximum(RC, RX) + 1e-4)
    np.testing.assert_allclose(losses.mixed_reference_logps(np.float32([-5e3]), np.float32([-5e3])), [-5e3])


# --- properties ------------------------------------------------------------------------------------------------------

margins = st.floats(-1e4, 1e4, width=32)
qs = st.floats(0.0010000000474974513, 1.0, width=32)


def loss_at(margin, q, beta=0.1):
    return float(losses.napo_loss(jnp.float32(margin), 0.0, 0.0, 0.0, beta=beta, q=q)[0])


@hypothesis.settings(deadline=None, max_examples=200, derandomize=True)
@hypothesis.given(margins, margins, qs)
def test_the_loss_falls_as_the_margin_grows(a, b, q):
    low, high = sorted((a, b))
    assert loss_at(high, q) <= loss_at(low, q) * (1 + 1e-6)


@hypothesis.settings(deadline=None, max_examples=200, derandomize=True)
@hypothesis.given(margins, qs)
def test_the_loss_is_bounded(margin, q):
    assert 0 <= loss_at(margin, q) <= 1 / q * (1 + 1e-6)


@hypothesis.settings(deadline=None, max_examples=100, derandomize=True)
@hypothesis.given(qs)
def test_the_loss_at_margin_zero(q):
    np.testing.assert_allclose(loss_at(0.0, q), -np.expm1(-q * np.log(2)) / q, rtol=2e-6)


@hypothesis.settings(deadline=None, max_examples=100, derandomize=True)
@hypothesis.given(st.lists(margins, min_size=1, max_size=8), st.sampled_from(["paper", "released"]))
def test_q_stays_in_its_range(batch, rule):
    q = float(losses.noise_coefficient(np.float32(batch), alpha=0.5, rule=rule))
    assert (0.01 if rule == "paper" else 0.001) * (1 - 1e-6) <= q <= 1
