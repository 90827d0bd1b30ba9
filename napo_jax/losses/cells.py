"""Losses of one cell alone, and of one preferred cell against several."""

import jax
import jax.numpy as jnp

from napo_jax.losses.inputs import log_ratio, masked, prepare, rewards, scaled


def sft_loss(policy_chosen_logps, *, where=None):
    """Computes the negative log-likelihood of each answer.

    Args:
      policy_chosen_logps: float[B] (or any shape), log-probs of the answers: sums, or token means.
      where: bool[B] or None; valid answers.

    Returns:
      losses: float32[B], 0 where masked.
      stats: an empty dict; there is no reward without a reference.
    """
    (logps,), where = prepare(where, {"policy_chosen_logps": policy_chosen_logps})
    return masked(-logps, where), {}


def anchor_loss(policy_chosen_logps, reference_chosen_logps, *, beta=0.1, delta=0.0, where=None):
    """Computes the anchor that keeps the chosen answer's reward above delta (mDPO, arXiv 2406.11839; MFPO's margin).

        loss = -log sigmoid(beta h_chosen - delta)

    Args:
      policy_chosen_logps: float[B] (or any shape, the same for both), summed log-probs of the chosen answers.
      reference_chosen_logps: float[B], the reference's.
      beta: scale of the rewards.
      delta: reward to hold; MFPO's eta.
      where: bool[B] or None; valid answers.

    Returns:
      losses: float32[B], 0 where masked.
      stats: dict of `chosen_rewards` float32[B], a constant to the gradient.
    """
    (policy, reference), where = prepare(
        where, {"policy_chosen_logps": policy_chosen_logps, "reference_chosen_logps": reference_chosen_logps}
    )
    h_chosen = log_ratio(policy, reference)
    losses = -jax.nn.log_sigmoid(scaled(beta, h_chosen) - delta)
    return masked(losses, where), rewards(beta, chosen_rewards=h_chosen)


def _several_log_ratios(where, policy_chosen, policy_rejected, reference_chosen, reference_rejected):
    """Returns h float[B] of the chosen cell, h float[K, B] of the rejected ones, and `where`, all prepared."""
    if len(policy_rejected) != len(reference_rejected) or len(policy_rejected) == 0:
        raise ValueError(
            f"policy_rejected_logps has {len(policy_rejected)} cells and reference_rejected_logps "
            f"{len(reference_rejected)}: they need the same number, at least one"
        )
    count = len(policy_rejected)
    logps, where = prepare(
        where,
        {"policy_chosen_logps": policy_chosen}
        | {f"policy_rejected_logps[{k}]": cell for k, cell in enumerate(policy_rejected)}
        | {"reference_chosen_logps": reference_chosen}
        | {f"reference_rejected_logps[{k}]": cell for k, cell in enumerate(reference_rejected)},
    )
    h = log_ratio(jnp.stack(logps[: 1 + count]), jnp.stack(logps[1 + count :]))
    return h[0], h[1:], where


def softmax_preference_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    *,
    beta=0.1,
    where=None,
):
    """Computes the cross-entropy of the chosen cell against K rejected ones (S-DPO; AdaViP, arXiv 2504.15619).

        loss = -log softmax(beta [h_chosen, h_rejected_1, ..., h_rejected_K])_0

    The softmax makes the weighting adaptive: the cell that the policy confuses most gets most of the gradient. With one
    rejected cell it is DPO.

    Args:
      policy_chosen_logps: float[B] (or any shape), summed log-probs of the chosen cell.
      policy_rejected_logps: float[K, B], or a sequence of K, of the rejected cells.
      reference_chosen_logps: float[B], the reference's of the chosen cell.
      reference_rejected_logps: float[K, B], the reference's of the rejected cells.
      beta: scale of the rewards.
      where: bool[B] or None; valid examples.

    Returns:
      losses: float32[B], 0 where masked.
      stats: dict of `chosen_rewards` float32[B] and `rejected_rewards` float32[K, B], constants to the gradient.
    """
    h_chosen, h_rejected, where = _several_log_ratios(
        where, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    scores = scaled(beta, jnp.concatenate([h_chosen[None], h_rejected]))
    losses = jax.nn.logsumexp(scores, axis=0) - scores[0]
    return masked(losses, where), rewards(beta, chosen_rewards=h_chosen, rejected_rewards=h_rejected)


def single_sigmoid_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    *,
    beta=0.1,
    chosen_weight=1.0,
    rejected_weights,
    offset=None,
    where=None,
):
    """Computes one sigmoid over a weighted sum of cells (POVID's paper form; `chip_released_loss`).

        loss = -log sigmoid(beta (a h_chosen - sum_k b_k h_rejected_k + offset))

    POVID (arXiv 2402.11411) has a and b free, over the edited answer and the noisy image's answer.

    Args:
      policy_chosen_logps: float[B] (or any shape), summed log-probs of the chosen cell.
      policy_rejected_logps: float[K, B], or a sequence of K, of the rejected cells.
      reference_chosen_logps: float[B], the reference's of the chosen cell.
      reference_rejected_logps: float[K, B], the reference's of the rejected cells.
      beta: scale of the rewards.
      chosen_weight: the a above.
      rejected_weights: K numbers, the b above.
      offset: float[B] or None, added to the margin before beta; gradients flow through it.
      where: bool[B] or None; valid examples.

    Returns:
      losses: float32[B], 0 where masked.
      stats: dict of `chosen_rewards` float32[B] and `rejected_rewards` float32[K, B], constants to the gradient.
    """
    h_chosen, h_rejected, where = _several_log_ratios(
        where, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    if len(rejected_weights) != len(h_rejected):
        raise ValueError(f"rejected_weights has {len(rejected_weights)} numbers for {len(h_rejected)} rejected cells")
    margin = chosen_weight * h_chosen - sum(b * h for b, h in zip(rejected_weights, h_rejected, strict=True))
    if offset is not None:
        (_, offset), _ = prepare(where, {"policy_chosen_logps": policy_chosen_logps, "offset": offset})
        margin = margin + offset.astype(margin.dtype)
    losses = -jax.nn.log_sigmoid(scaled(beta, margin))
    return masked(losses, where), rewards(beta, chosen_rewards=h_chosen, rejected_rewards=h_rejected)
