"""The NaPO loss: a negative Box-Cox transform between DPO's cross-entropy and the noise-robust MAE."""

import jax
import jax.numpy as jnp
import numpy as np

from napo_jax.losses.inputs import check_range, masked, pair_log_ratios, rewards, scaled
from napo_jax.losses.statistics import noise_coefficient


@jax.custom_jvp
def _box_cox(z, q):
    # (1 - sigmoid(z)^q) / q loses all digits for small q, and its gradient is 0 * inf = NaN for z below about -88.
    return -jnp.expm1(q * jax.nn.log_sigmoid(z)) / q


@_box_cox.defjvp
def _box_cox_jvp(primals, tangents):
    z, q = primals
    z_tangent, _ = tangents  # q is a constant to the gradient
    # d/dz = -sigmoid(z)^q sigmoid(-z), as one exp of a sum: expm1's own derivative rounds to 0 for very negative z.
    slope = -jnp.exp(q * jax.nn.log_sigmoid(z) + jax.nn.log_sigmoid(-z))
    return _box_cox(z, q), slope * z_tangent


def napo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    *,
    beta=0.1,
    q=None,
    alpha=0.01,
    noise_margin=None,
    rule="paper",
    where=None,
    axis_name=None,
):
    """Computes the noise-aware preference loss of each pair (NaPO, arXiv 2503.17928).

    With z = beta (h_chosen - h_rejected) and h = policy - reference, the loss is the negative Box-Cox transform of the
    preference's probability (Eq. 9):

        loss = (1 - sigmoid(z)^q) / q,    d loss / d z = -sigmoid(z)^q sigmoid(-z)

    As q falls to 0 it becomes DPO's -log sigmoid(z); at q = 1 it is the MAE 1 - sigmoid(z), whose gradient lets go of
    pairs that the policy holds to be the wrong way round, because those are the ones likely mislabelled. q is measured
    on the batch (Eq. 12, see `noise_coefficient`) unless it is given.

    Args:
      policy_chosen_logps: float[B] (or any shape, the same for all), summed log-probs of the chosen answers.
      policy_rejected_logps: float[B], the policy's of the rejected ones.
      reference_chosen_logps: float[B], the reference's of the chosen answers.
      reference_rejected_logps: float[B], the reference's of the rejected ones.
      beta: scale of the rewards.
      q: noise robustness in (0, 1], a number or float[B]. None measures it on the batch.
      alpha: how fast q falls with the noise margin: the paper's 0.01 fits a summed margin, 0.5 a token mean.
      noise_margin: float[B], margin to measure the noise on, without beta. None takes the margin of the loss.
      rule: "paper" or "released", see `noise_coefficient`.
      where: bool[B] or None; valid pairs.
      axis_name: mapped axis or axes over which q is measured, inside `shard_map`, `pmap` or `vmap`: those that the
        batch is split over, and no others.

    Returns:
      losses: float32[B], 0 where masked. It is at most 1 / q.
      stats: dict of `q` float32[] (or as given) and of `chosen_rewards` and `rejected_rewards`, float32[B] each: beta
        times the log-ratios. All are constants to the gradient.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
          >>> from napo_jax import napo_loss
      >>> policy = jnp.array([-40.0, -52.0]), jnp.array([-44.0, -51.0])
      >>> reference = jnp.array([-42.0, -50.0]), jnp.array([-41.0, -50.0])
      >>> losses, stats = napo_loss(*policy, *reference)
      >>> print([f"{loss:.4f}" for loss in losses], f"q = {stats['q']:.4f}")
      ['0.4221', '0.6217'] q = 0.4995

      Across devices, name the axis, and q comes from the whole batch:

      >>> P = jax.sharding.PartitionSpec
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> def mean_loss(*logps):
      ...     losses, stats = napo_loss(*logps, axis_name="data")
      ...     return jax.lax.pmean(losses.mean(), "data"), stats["q"]
      >>> sharded_loss = jax.jit(jax.shard_map(mean_loss, mesh=mesh, in_specs=P("data"), out_specs=P()))
      >>> batch = [jnp.linspace(low, -40.0, 64) for low in (-50.0, -70.0, -60.0, -60.0)]
      >>> (loss, q), gradient = jax.value_and_grad(sharded_loss, has_aux=True)(*batch)
      >>> print(f"{loss:.4f} {q:.4f} {gradient.shape == batch[0].shape}")
      0.3128 0.4975 True

      With `pmap`, likewise: each device holds its row of the batch and they agree on q:

      >>> rows = [array.reshape(jax.device_count(), -1) for array in batch]
      >>> losses, qs = jax.pmap(mean_loss, axis_name="data")(*rows)
      >>> print(f"{losses[0]:.4f} {qs[0]:.4f}")
      0.3128 0.4975
    """
    h_chosen, h_rejected, where = pair_log_ratios(
        where, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    margin = h_chosen - h_rejected
    if q is None:
        if noise_margin is None:
            noise_margin = margin
        elif jnp.shape(noise_margin) != margin.shape:
            raise ValueError(f"noise_margin has shape {jnp.shape(noise_margin)}, but the log-probs {margin.shape}")
        q = noise_coefficient(noise_margin, alpha=alpha, beta=beta, rule=rule, where=where, axis_name=axis_name)
    elif noise_margin is not None:
        raise ValueError("give q, or a noise_margin to measure it on, not both")
    else:
        q = _given_coefficient(q, margin, where)
    losses = masked(_box_cox(scaled(beta, margin), q.astype(margin.dtype)), where)
    return losses, {"q": q, **rewards(beta, chosen_rewards=h_chosen, rejected_rewards=h_rejected)}


def _given_coefficient(q, margin, where):
    """Returns a given q as a constant; raises if it does not fit the batch, or is known to lie outside (0, 1]."""
    if np.shape(q) not in ((), margin.shape):
        raise ValueError(f"q has shape {np.shape(q)}, but the log-probs have shape {margin.shape}")
    if np.ndim(q) and where is not None:
        q = jnp.where(where, jnp.asarray(q, margin.dtype), 1)
    check_range("q", q, lambda q: (q > 0) & (q <= 1), "in (0, 1] (its limit at 0 is dpo_loss)")
    return jax.lax.stop_gradient(jnp.asarray(q, margin.dtype))
