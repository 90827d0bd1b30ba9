"""KTO's value of answers, for pairs."""

import jax
import jax.numpy as jnp

from napo_jax.losses.inputs import masked, pair_log_ratios, rewards, scaled
from napo_jax.losses.statistics import batch_mean


def kto_pair_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    *,
    beta=0.1,
    where=None,
    axis_name=None,
):
    """Computes KTO's loss (arXiv 2402.01306) of the two answers of each pair.

    A chosen answer should gain on what the policy has moved in general, and a rejected one should lose on it:

        loss = 1 - (sigmoid(beta h_chosen - z_rejected) + sigmoid(z_chosen - beta h_rejected)) / 2

    What it has moved in general, z, is beta times the divergence of policy and reference. The paper estimates that on
    answers to other questions. Here, as is customary for pairs, it is the batch mean of h over the answers of the other
    kind, but at least 0: a constant to the gradient.

    Args:
      policy_chosen_logps: float[B] (or any shape, the same for all), summed log-probs of the chosen answers.
      policy_rejected_logps: float[B], the policy's of the rejected ones.
      reference_chosen_logps: float[B], the reference's of the chosen answers.
      reference_rejected_logps: float[B], the reference's of the rejected ones.
      beta: scale of the rewards.
      where: bool[B] or None; valid pairs.
      axis_name: mapped axis or axes that the batch is split over.

    Returns:
      losses: float32[B], 0 where masked.
      stats: dict of `chosen_rewards` and `rejected_rewards`, float32[B] each, constants to the gradient.
    """
    h_chosen, h_rejected, where = pair_log_ratios(
        where, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    moved = lambda h: jax.lax.stop_gradient(jnp.maximum(batch_mean(h, where, axis_name), 0))
    gain = jax.nn.sigmoid(scaled(beta, h_chosen - moved(h_rejected)))
    loss = jax.nn.sigmoid(scaled(beta, moved(h_chosen) - h_rejected))
    return masked(1 - (gain + loss) / 2, where), rewards(beta, chosen_rewards=h_chosen, rejected_rewards=h_rejected)
