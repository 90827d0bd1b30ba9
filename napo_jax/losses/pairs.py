"""Losses of one chosen and one rejected answer, other than NaPO."""

import jax
import jax.numpy as jnp

from napo_jax.losses.inputs import check_range, masked, pair_log_ratios, prepare, rewards, scaled


def dpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    *,
    beta=0.1,
    label_smoothing=0.0,
    where=None,
):
    """Computes DPO's cross-entropy of each pair (arXiv 2305.18290, Eq. 7), with label smoothing if asked.

    With z = beta (h_chosen - h_rejected) and smoothing s:

        loss = -(1 - s) log sigmoid(z) - s log sigmoid(-z)

    Args:
      policy_chosen_logps: float[B] (or any shape, the same for all), summed log-probs of the chosen answers.
      policy_rejected_logps: float[B], the policy's of the rejected ones.
      reference_chosen_logps: float[B], the reference's of the chosen answers.
      reference_rejected_logps: float[B], the reference's of the rejected ones.
      beta: scale of the rewards.
      label_smoothing: probability in [0, 1) that a label is taken to be wrong.
      where: bool[B] or None; valid pairs.

    Returns:
      losses: float32[B], 0 where masked.
      stats: dict of `chosen_rewards` and `rejected_rewards`, float32[B] each, constants to the gradient.

    Examples:
      >>> import jax.numpy as jnp
      >>> from napo_jax import dpo_loss
      >>> losses, _ = dpo_loss(jnp.array([-40.0]), jnp.array([-44.0]), jnp.array([-42.0]), jnp.array([-41.0]))
      >>> print([f"{loss:.4f}" for loss in losses])
      ['0.4741']
    """
    h_chosen, h_rejected, where = pair_log_ratios(
        where, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    check_range("label_smoothing", label_smoothing, lambda s: (s >= 0) & (s < 1), "in [0, 1)")
    z = scaled(beta, h_chosen - h_rejected)
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)
    return masked(losses, where), rewards(beta, chosen_rewards=h_chosen, rejected_rewards=h_rejected)


def robust_dpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    *,
    beta=0.1,
    flip_rate,
    where=None,
):
    """Computes the robust DPO loss, unbiased when a known share of labels is flipped (rDPO, arXiv 2403.00409).

    With z = beta (h_chosen - h_rejected) and flip rate e:

        loss = (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e)

    Args:
      policy_chosen_logps: float[B] (or any shape, the same for all), summed log-probs of the chosen answers.
      policy_rejected_logps: float[B], the policy's of the rejected ones.
      reference_chosen_logps: float[B], the reference's of the chosen answers.
      reference_rejected_logps: float[B], the reference's of the rejected ones.
      beta: scale of the rewards.
      flip_rate: share of flipped labels, in [0, 0.5).
      where: bool[B] or None; valid pairs.

    Returns:
      losses: float32[B], 0 where masked. They may be negative.
      stats: dict of `chosen_rewards` and `rejected_rewards`, float32[B] each, constants to the gradient.
    """
    check_range("flip_rate", flip_rate, lambda e: (e >= 0) & (e < 0.5), "in [0, 0.5)")
    h_chosen, h_rejected, where = pair_log_ratios(
        where, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    z = scaled(beta, h_chosen - h_rejected)
    losses = -(1 - flip_rate) * jax.nn.log_sigmoid(z) + flip_rate * jax.nn.log_sigmoid(-z)
    return masked(losses / (1 - 2 * flip_rate), where), rewards(
        beta, chosen_rewards=h_chosen, rejected_rewards=h_rejected
    )


def ipo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    *,
    beta=0.1,
    where=None,
):
    """Computes the IPO loss of each pair (arXiv 2310.12036, Eq. 17): the margin is drawn to 1 / (2 beta).

        loss = (h_chosen - h_rejected - 1 / (2 beta))^2

    Args:
      policy_chosen_logps: float[B] (or any shape, the same for all), log-probs of the chosen answers; token means are
        customary, because the target does not grow with the length.
      policy_rejected_logps: float[B], the policy's of the rejected ones.
      reference_chosen_logps: float[B], the reference's of the chosen answers.
      reference_rejected_logps: float[B], the reference's of the rejected ones.
      beta: regularisation; the paper's tau.
      where: bool[B] or None; valid pairs.

    Returns:
      losses: float32[B], 0 where masked.
      stats: dict of `chosen_rewards` and `rejected_rewards`, float32[B] each, constants to the gradient.
    """
    h_chosen, h_rejected, where = pair_log_ratios(
        where, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    losses = jnp.square(h_chosen - h_rejected - 0.5 / jnp.asarray(beta, h_chosen.dtype))
    return masked(losses, where), rewards(beta, chosen_rewards=h_chosen, rejected_rewards=h_rejected)


def hinge_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    *,
    beta=0.1,
    where=None,
):
    """Computes the hinge loss on the reward margin of each pair (RSO, arXiv 2309.06657, after SLiC).

        loss = max(0, 1 - beta (h_chosen - h_rejected))

    Args:
      policy_chosen_logps: float[B] (or any shape, the same for all), summed log-probs of the chosen answers.
      policy_rejected_logps: float[B], the policy's of the rejected ones.
      reference_chosen_logps: float[B], the reference's of the chosen answers.
      reference_rejected_logps: float[B], the reference's of the rejected ones.
      beta: scale of the rewards.
      where: bool[B] or None; valid pairs.

    Returns:
      losses: float32[B], 0 where masked.
      stats: dict of `chosen_rewards` and `rejected_rewards`, float32[B] each, constants to the gradient.
    """
    h_chosen, h_rejected, where = pair_log_ratios(
        where, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    losses = jax.nn.relu(1 - scaled(beta, h_chosen - h_rejected))
    return masked(losses, where), rewards(beta, chosen_rewards=h_chosen, rejected_rewards=h_rejected)


def simpo_loss(policy_chosen_logps, policy_rejected_logps, *, beta=2.0, target_margin=1.0, where=None):
    """Computes the SimPO loss of each pair (arXiv 2405.14734, Eq. 6): no reference, and a margin to reach.

        loss = -log sigmoid(beta (A_chosen - A_rejected) - target_margin)

    Args:
      policy_chosen_logps: float[B] (or any shape, the same for both), token-mean log-probs A of the chosen answers.
      policy_rejected_logps: float[B], token-mean log-probs of the rejected ones.
      beta: scale of the rewards.
      target_margin: reward margin to reach; the paper's gamma.
      where: bool[B] or None; valid pairs.

    Returns:
      losses: float32[B], 0 where masked.
      stats: dict of `chosen_rewards` and `rejected_rewards` (beta A), float32[B] each, constants to the gradient.
    """
    (chosen, rejected), where = prepare(
        where, {"policy_chosen_logps": policy_chosen_logps, "policy_rejected_logps": policy_rejected_logps}
    )
    losses = -jax.nn.log_sigmoid(scaled(beta, chosen - rejected) - target_margin)
    return masked(losses, where), rewards(beta, chosen_rewards=chosen, rejected_rewards=rejected)
