"""Hidden states to log-probs, chunk by chunk: no array over the whole vocabulary outlives its chunk.

Each chunk is computed again in the backward pass. Logits and everything after them are float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Edited(NamedTuple):
    """The part of an answer's log-probs that lies in the spans where it differs from its counterpart, float[B] each."""

    sum: jax.Array
    mean: jax.Array  # over those tokens
    share: jax.Array  # of them in the answer's tokens


class Logps(NamedTuple):
    """Log-probs of one cell for a batch: summed and averaged over the answer's tokens, float[B] each."""

    sum: jax.Array
    mean: jax.Array


class DetailedLogps(NamedTuple):
    """The same with what some terms read besides, float[B] each; without sum and mean if no term reads log-probs."""

    sum: jax.Array | None
    mean: jax.Array | None
    edited: Edited | None = None  # if a term weighs edited spans
    kl: jax.Array | None = None  # summed KL(reference || policy), of the policy alone and if a term reads it
    reward: jax.Array | None = None  # of the reward head, of the policy alone and if a term reads it

    def weighing_edits(self, weight):
        """Returns the log-probs in which a token of an edited span counts 1 + weight times."""
        total = self.sum + weight * self.edited.sum
        whole = 1 + weight * self.edited.share
        return Logps(total, (self.mean + weight * self.edited.share * self.edited.mean) / whole)


def token_logps(hidden, head, targets, *, chunk):
    """Computes the log-prob of each target token.

    Args:
      hidden: float[B, C, T, D], the hidden states that predict the targets.
      head: float[D, V], the vocabulary projection.
      targets: int32[B, C, T].
      chunk: tokens of T per chunk; the largest array is float32[B, C, chunk, V].

    Returns:
      float32[B, C, T]; NaN for a target outside the vocabulary, such as the <image> of another layout's tokenizer.
    """

    def of_chunk(hidden, targets):
        logits = _logits(hidden, head)
        # A comparison and a sum, where an indexed read would scatter in the backward pass.
        hit = jnp.arange(head.shape[1])[None, None, None] == targets[..., None]
        found = jnp.sum(jnp.where(hit, logits, 0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)
        return jnp.where((targets >= 0) & (targets < head.shape[1]), found, jnp.nan)

    return _by_chunk(of_chunk, chunk, hidden, targets)


def token_kl(hidden, head, reference_hidden, reference_head, *, chunk):
    """Computes KL(reference || policy) over the whole vocabulary at each position (SeqKL of CHiP, before its sum).

    Args:
      hidden: float[B, C, T, D], the policy's hidden states.
      head: float[D, V], the policy's vocabulary projection.
      reference_hidden: float[B, C, T, D], the reference's.
      reference_head: float[D, V], the reference's.
      chunk: tokens of T per chunk.

    Returns:
      float32[B, C, T]; no gradient flows into the reference.
    """

    def of_chunk(hidden, reference_hidden):
        policy = jax.nn.log_softmax(_logits(hidden, head), axis=-1)
        reference = jax.nn.log_softmax(jax.lax.stop_gradient(_logits(reference_hidden, reference_head)), axis=-1)
        return jnp.sum(jnp.exp(reference) * (reference - policy), axis=-1)

    return _by_chunk(of_chunk, chunk, hidden, reference_hidden)


def over_answers(values, answer_lengths, token_weights=None):
    """Sums and averages per-token values over each answer.

    Args:
      values: float32[B, C, T].
      answer_lengths: int32[B, C]; tokens past it do not count, whatever they hold.
      token_weights: float[B, C, T] or None; a factor per token. The mean then divides by the sum of the factors.

    Returns:
      Logps of float32[B, C] each; the mean of an empty answer is 0, so that it can be masked without a NaN.
    """
    counted = jnp.arange(values.shape[-1])[None, None] < answer_lengths[..., None]
    weights = counted.astype(jnp.float32)
    if token_weights is not None:
        weights = jnp.where(counted, token_weights.astype(jnp.float32), 0)
    total = jnp.sum(jnp.where(counted, values, 0) * weights, axis=-1)
    weight = jnp.sum(weights, axis=-1)
    return Logps(total, total / jnp.where(weight == 0, 1, weight))


def over_edits(values, answer_lengths, edited):
    """Sums and averages per-token values over the edited tokens of each answer alone.

    Args:
      values: float32[B, C, T].
      answer_lengths: int32[B, C].
      edited: bool[B, C, T].

    Returns:
      Edited of float32[B, C] each; all 0 where nothing is edited.
    """
    total, mean = over_answers(values, answer_lengths, edited)
    counted = jnp.arange(values.shape[-1])[None, None] < answer_lengths[..., None]
    share = jnp.sum(edited & counted, axis=-1) / jnp.maximum(answer_lengths, 1)
    return Edited(total, mean, share.astype(jnp.float32))


def _logits(hidden, head):
    return jnp.einsum("bctd,dv->bctv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _by_chunk(function, chunk, *arrays):
    """Maps a function of [B, C, chunk, ...] arrays over T, rematerialised; returns float32[B, C, T]."""
    tokens = arrays[0].shape[2]
    count = -(-tokens // chunk)
    size = -(-tokens // count)  # even chunks: the last one is padded by less than one token per chunk

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, 0), (0, count * size - tokens), *[(0, 0)] * (x.ndim - 3)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], count, size, *x.shape[3:]), 2, 0)

    out = jax.lax.map(jax.checkpoint(lambda chunk: function(*chunk)), tuple(map(cut, arrays)))
    return jnp.moveaxis(out, 0, 2).reshape(*arrays[0].shape[:2], count * size)[:, :, :tokens]
