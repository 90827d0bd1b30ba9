"""Where a model looks when it says a word: the attention of the word's tokens to the image tokens."""

import math

import jax
import jax.numpy as jnp

from napo_jax.models import IMAGE_SLOT, Groups
from napo_jax.models.looking import looks


def image_attention(model, params, groups: Groups, weights, layers=(0.25, 0.75)) -> jax.Array:
    """Computes how much some words of an answer look at each place of its picture.

    The mean over all heads, and over a band of layers. Which heads look at things is no property of the architecture,
    so none is chosen.

    Args:
      model: `Llava`.
      params: its parameters.
      groups: `Groups` of one prefix and one answer each.
      weights: float32[B, K, T], for each of K words its share in each answer token.
      layers: the band, from and to as shares of the depth; see `band_of`.

    Returns:
      float32[B, K, N], in the order of the patches, row by row; 0 for a word without tokens, and NaN for a
      prefix without a whole picture.
    """
    total = jnp.sum(weights, axis=2, keepdims=True)
    shares = weights / jnp.where(total == 0, 1, total)
    looked = looks(model, params, groups, (0,), shares[:, None])[band_of(layers, model.config.text.layers), :, 0]
    slots, count = groups.prefix_ids[:, 0] == IMAGE_SLOT, model.config.vision.image_tokens
    places = jnp.argsort(~slots, axis=1, stable=True)[:, :count]
    whole = jnp.sum(slots, axis=1) == count
    found = jnp.take_along_axis(jnp.mean(looked, axis=0), places[:, None], axis=2)
    return jnp.where(whole[:, None, None], found, jnp.nan)


def band_of(layers, count) -> slice:
    """Returns the layers that a band of the depth touches, at least one of them.

    >>> band_of((0.25, 0.75), 32), band_of((1.0, 1.0), 4)
    (slice(8, 24, None), slice(3, 4, None))
    """
    low, high = layers
    first = min(math.floor(low * count), count - 1)
    return slice(first, max(math.ceil(high * count), first + 1))
