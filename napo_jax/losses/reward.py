"""The loss of a reward model: a number for each answer, larger for the better one."""

import jax
import jax.numpy as jnp

from napo_jax.losses.inputs import check_range, masked, prepare
from napo_jax.losses.statistics import batch_mean

_CENTRINGS = ("absolute", "square")


def reward_loss(
    chosen_rewards,
    rejected_rewards,
    *,
    centring_weight=1e-3,
    centring="absolute",
    where=None,
    axis_name=None,
):
    """Computes the pairwise loss of a reward model (LLaVA-RLHF, arXiv 2309.14525), with its centring term.

        loss = -log sigmoid(r_chosen - r_rejected) + c * centring

    Only differences of rewards are compared, so that they could all drift together: centring holds them near 0. The
    published code takes the absolute value of a batch mean, ``|mean(r_chosen + r_rejected)|`` ("absolute"). Here each
    example has its share of that, its own sum times the sign of the batch's mean: the mean of the losses is the loss of
    the published code, value and gradient. "square" is each example's own ``(r_chosen + r_rejected)^2``, no statistic.

    Args:
      chosen_rewards: float[B] (or any shape, the same for both), the rewards of the chosen answers.
      rejected_rewards: float[B], those of the rejected ones.
      centring_weight: the c above, not negative; 0 for none.
      centring: "absolute" or "square".
      where: bool[B] or None; valid pairs.
      axis_name: mapped axis or axes that the batch is split over.

    Returns:
      losses: float32[B], 0 where masked. With "absolute", those of single examples may be negative.
      stats: dict of `chosen_rewards`, `rejected_rewards` and their mean, `mean_rewards`, float32[B] each, constants to
        the gradient.

    Examples:
      >>> import jax.numpy as jnp
      >>> from napo_jax.losses import reward_loss
      >>> losses, _ = reward_loss(jnp.array([2.0]), jnp.array([1.0]), centring_weight=0.1)
      >>> print(f"{losses[0]:.4f}")  # 0.3133 + 0.1 * 3
      0.6133
    """
    if centring not in _CENTRINGS:
        raise ValueError(f"centring must be one of {list(_CENTRINGS)}, got {centring!r}")
    check_range("centring_weight", centring_weight, lambda c: c >= 0, "0 or more")
    (chosen, rejected), where = prepare(where, {"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards})
    both = chosen + rejected
    if centring == "absolute":
        off_centre = jnp.sign(jax.lax.stop_gradient(batch_mean(both, where, axis_name))) * both
    else:
        off_centre = jnp.square(both)
    losses = -jax.nn.log_sigmoid(chosen - rejected) + jnp.asarray(centring_weight, both.dtype) * off_centre
    stats = {"chosen_rewards": chosen, "rejected_rewards": rejected, "mean_rewards": both / 2}
    return masked(losses, where), jax.lax.stop_gradient(stats)
