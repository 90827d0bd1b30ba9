"""What every loss does with its arguments before any arithmetic: check, convert, mask."""

import jax
import jax.numpy as jnp


def prepare(where, **arrays):
    """Checks that arrays are floating and equally shaped, then converts and masks them.

    Args:
      where: bool[...] or None; examples to keep.
      **arrays: float[...] each, all of one shape; the keys name them in error messages.

    Returns:
      The arrays in their order, float32 (float64 if any of them is), with 0 where `where` is False. Masking the inputs
      and not only the result is what keeps a NaN out of the gradient: 0 times NaN is NaN.
    """
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    expected_name, expected = next(iter(arrays.items()))
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {array.dtype} of shape {array.shape}")
        if array.shape != expected.shape:
            raise ValueError(f"{name} has shape {array.shape}, but {expected_name} has shape {expected.shape}")
    dtype = jnp.float64 if any(array.dtype == jnp.float64 for array in arrays.values()) else jnp.float32
    converted = (array.astype(dtype) for array in arrays.values())
    if where is None:
        return tuple(converted)
    where = check_where(where, expected.shape, expected_name)
    return tuple(jnp.where(where, array, 0) for array in converted)


def check_where(where, shape, name):
    """Returns `where` as bool[shape]; raises if it is another shape, or numbers that only look like a mask."""
    where = jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise ValueError(f"where must be bool, got {where.dtype} of shape {where.shape}")
    if where.shape != shape:
        raise ValueError(f"where has shape {where.shape}, but {name} has shape {shape}")
    return where


def masked(losses, where):
    """Returns the losses with 0 where `where` is False."""
    return losses if where is None else jnp.where(where, losses, 0)


def log_ratio(policy, reference):
    """Returns h = policy - reference, with the reference as a constant."""
    return policy - jax.lax.stop_gradient(reference)


def rewards(beta, **log_ratios):
    """Returns {name: beta * h}, detached: rewards are for logs and weights, never for gradients."""
    return {name: jax.lax.stop_gradient(beta * h) for name, h in log_ratios.items()}
