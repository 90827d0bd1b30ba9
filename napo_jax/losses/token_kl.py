"""Losses that hold the policy's distributions to the reference's, token by token (CHiP)."""

import jax

from napo_jax.losses.cells import single_sigmoid_loss
from napo_jax.losses.inputs import masked, prepare, scaled


def token_kl_loss(chosen_kl, rejected_kl, *, beta=0.1, where=None):
    """Computes the token-level term of CHiP (arXiv 2501.16629, Eq. 11).

        loss = stop_gradient(beta KL_chosen) - beta KL_rejected

    So it falls as the policy moves away from the reference in the tokens of the rejected answer, without an end. (The
    published code has the opposite sign there: `chip_released_loss`.)

    Args:
      chosen_kl: float[B] (or any shape), KL(reference || policy) summed over the tokens of the chosen answer.
      rejected_kl: float[B], the same of the rejected answer.
      beta: a factor.
      where: bool[B] or None; valid pairs.

    Returns:
      losses: float32[B], 0 where masked.
      stats: an empty dict; these are no rewards.
    """
    (chosen_kl, rejected_kl), where = prepare(where, {"chosen_kl": chosen_kl, "rejected_kl": rejected_kl})
    return masked(scaled(beta, jax.lax.stop_gradient(chosen_kl) - rejected_kl), where), {}


def chip_released_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    chosen_kl,
    rejected_kl,
    *,
    beta=0.1,
    kl_weight=0.1,
    where=None,
):
    """Computes CHiP's loss as its published code has it: answers, pictures and tokens in one sigmoid.

        loss = -log sigmoid(beta (2 h_chosen - h_rejected - h_picture - w (KL_rejected - stop_gradient(KL_chosen))))

    Args:
      policy_chosen_logps: float[B] (or any shape), summed log-probs of the chosen answer.
      policy_rejected_logps: two of float[B]: the rejected answer, and the chosen one under another picture.
      reference_chosen_logps: float[B], the reference's of the chosen answer.
      reference_rejected_logps: two of float[B], the reference's of the others.
      chosen_kl: float[B], KL(reference || policy) summed over the tokens of the chosen answer.
      rejected_kl: two of float[B], the same of the others; only that of the rejected answer is read.
      beta: scale of the rewards.
      kl_weight: the w above.
      where: bool[B] or None; valid examples.

    Returns:
      losses: float32[B], 0 where masked.
      stats: dict of `chosen_rewards` float32[B] and `rejected_rewards` float32[2, B], constants to the gradient.
    """
    away, _ = token_kl_loss(chosen_kl, rejected_kl[0], beta=kl_weight, where=where)
    return single_sigmoid_loss(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
        chosen_weight=2.0,
        rejected_weights=(1.0, 1.0),
        offset=away,
        where=where,
    )
