"""What every loss does with its arguments before any arithmetic: check, convert, mask."""

import jax
import jax.numpy as jnp
import numpy as np


def prepare(where, arrays):
    """Checks that arrays are floating and equally shaped, then converts and masks them.

    Args:
      where: bool[...] or None; examples to keep.
      arrays: {name: float[...]}, all of one shape; the names are for error messages.

    Returns:
      The arrays in their order, float32 (float64 if any of them is), with 0 where `where` is False. Masking the inputs
      and not only the result is what keeps a NaN out of the gradient: 0 times NaN is NaN.
      `where` as an array, or None.
    """
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    expected_name, expected = next(iter(arrays.items()))
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {array.dtype} of shape {array.shape}")
        if array.shape != expected.shape:
            raise ValueError(f"{name} has shape {array.shape}, but {expected_name} has shape {expected.shape}")
    dtype = jnp.float64 if any(array.dtype == jnp.float64 for array in arrays.values()) else jnp.float32
    converted = [array.astype(dtype) for array in arrays.values()]
    if where is None:
        return converted, None
    where = check_where(where, expected.shape, expected_name)
    return [jnp.where(where, array, 0) for array in converted], where


def check_where(where, shape, name):
    """Returns `where` as bool[shape]; raises if it is another shape, or numbers that only look like a mask."""
    where = jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise ValueError(f"where must be bool, got {where.dtype} of shape {where.shape}")
    if where.shape != shape:
        raise ValueError(f"where has shape {where.shape}, but {name} has shape {shape}")
    return where


def check_range(name, value, inside, words):
    """Raises if a value is known and not all of it is inside; inside jit it may not be known."""
    if not isinstance(value, jax.core.Tracer) and not np.all(inside(np.asarray(value))):
        raise ValueError(f"{name} must be {words}, got {value}")


def masked(losses, where):
    """Returns the losses with 0 where `where` is False."""
    return losses if where is None else jnp.where(where, losses, 0)


def log_ratio(policy, reference):
    """Returns h = policy - reference, with the reference as a constant."""
    return policy - jax.lax.stop_gradient(reference)


def pair_log_ratios(where, policy_chosen, policy_rejected, reference_chosen, reference_rejected):
    """Returns h of the chosen and of the rejected answers, and `where`, all prepared."""
    (policy_chosen, policy_rejected, reference_chosen, reference_rejected), where = prepare(
        where,
        {
            "policy_chosen_logps": policy_chosen,
            "policy_rejected_logps": policy_rejected,
            "reference_chosen_logps": reference_chosen,
            "reference_rejected_logps": reference_rejected,
        },
    )
    return log_ratio(policy_chosen, reference_chosen), log_ratio(policy_rejected, reference_rejected), where


def scaled(beta, h):
    """Returns beta * h in the type of h, whatever type of number beta is."""
    return jnp.asarray(beta, h.dtype) * h


def rewards(beta, **log_ratios):
    """Returns {name: beta * h}, detached: rewards are for logs and weights, never for gradients."""
    return {name: jax.lax.stop_gradient(scaled(beta, h)) for name, h in log_ratios.items()}
