"""One reference made of several."""

import jax
import jax.numpy as jnp

from napo_jax.losses.inputs import check_range, prepare


def mixed_reference_logps(reference_logps, extra_logps, *, extra_weight=0.5, clip_range=0.1):
    """Mixes the initial policy with a second reference (MRPO, arXiv 2405.16388).

    The mixture is the weighted harmonic mean of the two probabilities, so an answer that either reference finds
    unlikely stays unlikely:

        1 / p = (1 - w) / p_reference + w / p_extra

    The extra reference is first clipped to within a share of the initial policy's log-prob: log p_extra in
    [(1 + c) log p_reference, (1 - c) log p_reference].

    The published code writes this as ``r1 + r2 - log(a exp(r1) + (1 - a) exp(r2))`` with r1 the extra reference; its a
    is the weight of the initial policy, 1 - w here.

    Args:
      reference_logps: float[B] (or any shape, the same for both), summed log-probs under the initial policy, at most 0.
      extra_logps: float[B], summed log-probs under the second reference.
      extra_weight: w in [0, 1], a number or float[B].
      clip_range: c, a number or float[B]; None leaves the extra reference as it is.

    Returns:
      float32[B]: log-probs of the mixture, constants to the gradient. They go where a loss takes its reference's.

    Examples:
      >>> import jax.numpy as jnp
      >>> from napo_jax.losses import mixed_reference_logps
      >>> float(mixed_reference_logps(-50.0, -60.0, extra_weight=0.0))
      -50.0
      >>> float(mixed_reference_logps(-50.0, -60.0, extra_weight=1.0))  # clipped to 1.1 times the initial policy's
      -55.0
      >>> print(f"{mixed_reference_logps(-50.0, -60.0):.3f}")
      -54.314
    """
    check_range("extra_weight", extra_weight, lambda w: (w >= 0) & (w <= 1), "in [0, 1]")
    (reference, extra), _ = prepare(None, {"reference_logps": reference_logps, "extra_logps": extra_logps})
    if clip_range is not None:
        clip_range = jnp.asarray(clip_range, extra.dtype)
        extra = jnp.clip(extra, reference * (1 + clip_range), reference * (1 - clip_range))
    weight = jnp.broadcast_to(jnp.asarray(extra_weight, extra.dtype), extra.shape)
    mixed = -jax.nn.logsumexp(-jnp.stack([reference, extra]), b=jnp.stack([1 - weight, weight]), axis=0)
    return jax.lax.stop_gradient(mixed)
