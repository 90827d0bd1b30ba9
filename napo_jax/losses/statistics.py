"""Batch statistics of NaPO: how noisy a preference is (q), and how much its term weighs (gamma)."""

import jax
import jax.numpy as jnp

from napo_jax.losses.inputs import prepare


def batch_mean(values, where=None, axis_name=None):
    """Averages the valid values of all devices.

    Sums and counts cross the devices, not means, so the result does not depend on how the valid examples fall on them.

    Args:
      values: float[...].
      where: bool[...] or None; values to count.
      axis_name: mapped axis or axes to average over too, inside `shard_map`, `pmap` or `vmap`.

    Returns:
      float32[]: the mean, or 0 if nothing is valid.
    """
    (values,), where = prepare(where, {"values": values})
    count = jnp.asarray(values.size if where is None else jnp.sum(where), values.dtype)
    total = jnp.sum(values)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1)


def _paper_coefficient(mean_margin, alpha, beta):
    return jnp.clip(jax.nn.sigmoid(-alpha * beta * mean_margin), 0.01, 1.0)


def _released_coefficient(mean_margin, alpha, beta):
    del beta  # the released code measures the noise on the margin alone
    return jnp.clip(2 * jax.nn.sigmoid(-alpha * mean_margin), 0.001, 1.0)


_COEFFICIENT_RULES = {"paper": _paper_coefficient, "released": _released_coefficient}


def noise_coefficient(margin, *, alpha, beta=0.1, rule="paper", where=None, axis_name=None):
    """Measures the noise robustness q that a preference needs (Eq. 12).

    Well separated answers are taken for clean data, and q falls towards DPO; answers that the policy hardly tells apart
    are taken for noise, and q rises towards the noise-robust MAE. With M the mean of the valid margins:

    * ``rule="paper"``: q = 1 - sigmoid(alpha beta M), clipped to [0.01, 1]. At M = 0 it is 0.5.
    * ``rule="released"``: q = 2 (1 - sigmoid(alpha M)), clipped to [0.001, 1], as in the published code. At M = 0 it
      is 1.

    Args:
      margin: float[...], (policy - reference) of the preferred answer minus the other's, summed or averaged over
        tokens, without beta.
      alpha: how fast q falls with the margin. The paper uses 0.5 on token means and 0.01 on sums.
      beta: scale of the rewards; the paper's rule multiplies by it.
      rule: "paper" or "released".
      where: bool[...] or None; valid examples.
      axis_name: mapped axis or axes to average over too.

    Returns:
      float32[]: q, a constant to the gradient. If no example is valid, M counts as 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from napo_jax import noise_coefficient
      >>> margin = jnp.array([8.0, -2.0, 30.0])
      >>> print(f"{noise_coefficient(margin, alpha=0.5):.4f}")
      0.3543
      >>> print(f"{noise_coefficient(margin, alpha=0.01, rule='released'):.4f}")
      0.9401
    """
    if rule not in _COEFFICIENT_RULES:
        raise ValueError(f"rule must be one of {sorted(_COEFFICIENT_RULES)}, got {rule!r}")
    mean_margin = batch_mean(margin, where, axis_name)
    alpha, beta = (jnp.asarray(number, mean_margin.dtype) for number in (alpha, beta))
    return jax.lax.stop_gradient(_COEFFICIENT_RULES[rule](mean_margin, alpha, beta))


def term_weights(margins, *, where=None, axis_name=None, floor=0.01, cap=1.0, least=1e-4):
    """Weighs the terms of an objective by how well each separates its answers: the dynamic gamma (Eq. 13).

    gamma_i = psi_i / sum_j psi_j, clipped to [floor, cap], with psi_i the mean margin of term i over the valid examples
    of the whole batch. The equation says nothing of two cases, so this is the rule:

    * A negative psi counts as 0: a term that points the wrong way keeps the floor, and takes nothing from the others.
    * If the positive psi do not add up to `least`, every weight is 1 / K before clipping. So it is at step 0, where the
      policy is the reference and Eq. 13 would be 0 / 0: of log-probs that were computed in another batch, a ratio
      there would be one of rounding errors.

    The weights are clipped and not normalised again, as in the paper: with the default cap their sum is between 1 and
    1 + (K - 1) floor.

    Args:
      margins: float[K, ...], summed margins of K terms. A factor that all terms share, such as beta, cancels.
      where: bool[K, ...] or None; valid examples of each term.
      axis_name: mapped axis or axes to average over too.
      floor: least weight.
      cap: greatest weight.
      least: the least sum of margins that is told from rounding.

    Returns:
      float32[K]: the weights, constants to the gradient.

    Examples:
      >>> import jax.numpy as jnp
      >>> from napo_jax.losses import term_weights
      >>> print(term_weights(jnp.array([[6.0, 4.0], [2.0, 4.0], [1.0, 3.0]])))  # means 5, 3 and 2
      [0.5 0.3 0.2]
      >>> print(term_weights(jnp.array([[-9.0], [4.0], [0.0]])))
      [0.01 1. 0.01]
    """
    (margins,), where = prepare(where, {"margins": margins})
    if margins.ndim < 1 or margins.shape[0] == 0:
        raise ValueError(f"margins must be float[K, ...] with K > 0, got shape {margins.shape}")
    valid = [None] * len(margins) if where is None else where
    means = jnp.stack([batch_mean(*row, axis_name) for row in zip(margins, valid, strict=True)])
    positive = jnp.maximum(means, 0)
    total = jnp.sum(positive)
    share = jnp.where(total < least, 1 / len(means), positive / jnp.maximum(total, least))
    return jax.lax.stop_gradient(jnp.clip(share, floor, cap))
