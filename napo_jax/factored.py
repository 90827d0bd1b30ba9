"""AdamW's second moment as a product of rows and columns (Adafactor, arXiv 1804.04235): next to no memory.

A matrix of n x m squares is kept as the mean of each row and of each column, n + m numbers. Their product, over the
mean of all, is exact where the squares are a product themselves, and the one of least I-divergence from them elsewhere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

_LEAST = 32  # a leaf with fewer rows or columns is kept whole: there is little to save


class FactoredState(NamedTuple):
    """The moments of {path: leaf} trees; a leaf stands in `rows` and `columns`, or in `whole`."""

    count: jax.Array  # int32[], steps so far
    first: dict  # {path: [..., n, m]}, means of gradients
    rows: dict  # {path: float32[..., n]}, means of squares over columns
    columns: dict  # {path: float32[..., m]}, and over rows
    whole: dict  # {path: float32[...]}, means of squares


def scale_by_factored_adam(b1, b2, eps, mu_dtype=jnp.float32) -> optax.GradientTransformation:
    """Returns Adam's scaling, with bias correction, by a factored second moment.

    Args:
      b1: decay of the first moment.
      b2: decay of the second.
      eps: added to its root.
      mu_dtype: type of the first moment.
    """

    def init(params):
        matrices = {path: leaf for path, leaf in params.items() if _is_matrix(leaf)}
        zeros = lambda shape: jnp.zeros(shape, jnp.float32)
        return FactoredState(
            jnp.zeros((), jnp.int32),
            {path: jnp.zeros(leaf.shape, mu_dtype) for path, leaf in params.items()},
            {path: zeros(leaf.shape[:-1]) for path, leaf in matrices.items()},
            {path: zeros((*leaf.shape[:-2], leaf.shape[-1])) for path, leaf in matrices.items()},
            {path: zeros(leaf.shape) for path, leaf in params.items() if path not in matrices},
        )

    def update(gradients, state, params=None):
        del params
        count = state.count + 1
        mix = lambda old, new, decay: decay * old + (1 - decay) * new
        unbiased = lambda decay: 1 - jnp.float32(decay) ** count.astype(jnp.float32)
        first, rows, columns, whole, updates = {}, {}, {}, {}, {}
        for path, gradient in gradients.items():
            gradient = gradient.astype(jnp.float32)
            squares = gradient * gradient
            mean = mix(state.first[path].astype(jnp.float32), gradient, b1)
            if path in state.rows:
                rows[path] = mix(state.rows[path], squares.mean(axis=-1), b2)
                columns[path] = mix(state.columns[path], squares.mean(axis=-2), b2)
                second = _product(rows[path], columns[path])
            else:
                second = whole[path] = mix(state.whole[path], squares, b2)
            updates[path] = (mean / unbiased(b1)) / (jnp.sqrt(second / unbiased(b2)) + eps)
            first[path] = mean.astype(mu_dtype)
        return updates, FactoredState(count, first, rows, columns, whole)

    return optax.GradientTransformation(init, update)


def _is_matrix(leaf):
    return leaf.ndim >= 2 and min(leaf.shape[-2:]) >= _LEAST


def _product(rows, columns):
    """Maps float32[..., n] and [..., m] to [..., n, m], of the same means; 0 where there was no gradient yet."""
    mean = rows.mean(axis=-1, keepdims=True)
    return (rows / jnp.where(mean == 0, 1, mean))[..., :, None] * columns[..., None, :]
