"""The NaPO loss: a negative Box-Cox transform between DPO's cross-entropy and the noise-robust MAE."""

import jax
import jax.numpy as jnp
import numpy as np

from napo_jax.losses.inputs import log_ratio, masked, prepare, rewards
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

    As q falls to 0 it becomes DPO's -log sigmoid(z); at q = 1 it is the MAE 1 - sigmoid(z), whose gradient leaves alone
    the pairs that the policy finds wrong, as mislabelled pairs are. q is measured on the batch (Eq. 12, see
    `noise_coefficient`) unless it is given.

    Args:
      policy_chosen_logps: float[B] (or any shape, the same for all), summed log-probs of the chosen answers.
      policy_rejected_logps: float[B], the policy's of the rejected ones.
      reference_chosen_logps: float[B], the reference's of the chosen answers.
      reference_rejected_logps: float[B], the reference's of the rejected ones.
      beta: scale of the rewards.
      q: noise robustness in (0, 1], a number or float[B]. None measures it on the batch.
      alpha: how fast q falls with the noise margin.
      noise_margin: float[B], margin to measure the noise on, without beta. None takes the margin of the loss.
      rule: "paper" or "released", see `noise_coefficient`.
      where: bool[B] or None; valid pairs.
      axis_name: mapped axis or axes over which q is measured, inside `shard_map`, `pmap` or `vmap`.

    Returns:
      losses: float32[B], 0 where masked. It is at most 1 / q.
      stats: dict of `q` float32[] and of `chosen_rewards` and `rejected_rewards`, float32[B] each: beta times the
        log-ratios. All are constants to the gradient.

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
    logps = prepare(
        where,
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
        **({} if noise_margin is None else {"noise_margin": noise_margin}),
    )
    policy_chosen, policy_rejected, reference_chosen, reference_rejected, *rest = logps
    h_chosen = log_ratio(policy_chosen, reference_chosen)
    h_rejected = log_ratio(policy_rejected, reference_rejected)
    margin = h_chosen - h_rejected
    if q is None:
        q = noise_coefficient(
            rest[0] if rest else margin, alpha=alpha, beta=beta, rule=rule, where=where, axis_name=axis_name
        )
    else:
        if noise_margin is not None:
            raise ValueError("give q, or a noise_margin to measure it on, not both")
        q = _fixed_coefficient(q, margin)
    losses = masked(_box_cox(beta * margin, q), where)
    return losses, {"q": q, **rewards(beta, chosen_rewards=h_chosen, rejected_rewards=h_rejected)}


def _fixed_coefficient(q, margin):
    """Returns a given q as a constant; raises if it is known to lie outside (0, 1] or does not fit the batch."""
    if isinstance(q, (int, float, np.generic, np.ndarray)) and not np.all((np.asarray(q) > 0) & (np.asarray(q) <= 1)):
        raise ValueError(f"q must be in (0, 1], got {q}; its limit at 0 is dpo_loss")
    q = jax.lax.stop_gradient(jnp.asarray(q, margin.dtype))
    if q.shape not in ((), margin.shape):
        raise ValueError(f"q has shape {q.shape}, but the log-probs have shape {margin.shape}")
    return q
