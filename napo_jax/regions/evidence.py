"""Where a model finds what it says: how much each image token adds to the log-prob of some words of an answer."""

import jax
import jax.numpy as jnp
import numpy as np

from napo_jax.models import Groups


def image_evidence(model, params, groups: Groups, weights) -> jax.Array:
    """Computes how much each image token of a prefix adds to some tokens of its answer.

    That is the slope of their log-prob by a gate on the image token, which opens from the mean of the picture's tokens
    to the token itself: to first order, what would change if there were nothing particular in that place. It needs
    neither a detector nor attention weights, which fused kernels do not give.

    Args:
      model: `Llava`.
      params: its parameters.
      groups: `Groups` of one prefix and one answer each.
      weights: float32[B, K, T], for each of K words its share in each answer token.

    Returns:
      float32[B, K, N], in the order of the patches, row by row.
    """
    batch, prefixes = groups.prefix_ids.shape[:2]
    if (prefixes, groups.answer_ids.shape[1]) != (1, 1):
        raise ValueError(f"evidence is found in one answer to one picture, got {groups.answer_ids.shape[1]} answers")
    gates = jnp.ones((batch, 1, model.config.vision.image_tokens), jnp.float32)
    score = lambda gates: model.token_logps(params, groups, (0,), gates=gates)[:, 0]
    _, pull = jax.vjp(score, gates)
    # One word after the other: a backward pass each, and the memory of one.
    slopes = jax.lax.map(lambda share: pull(share)[0], jnp.swapaxes(weights, 0, 1))
    return jnp.swapaxes(slopes[:, :, 0], 0, 1)


def mask_of(evidence, share=0.5) -> np.ndarray:
    """Marks the places of a picture that a word depends on most.

    The sign of a slope is left aside: what makes a word less likely is as much a place that it depends on, and in the
    small world masks by size cover what the word names about twice as often.

    Args:
      evidence: float32[N], of one word; N is a square number.
      share: how much of all evidence the marked places hold at least; as few places as hold it.

    Returns:
      bool[side, side]; nothing is marked where the word depends on nothing in the picture.
    """
    side = round(len(evidence) ** 0.5)
    held = np.abs(np.nan_to_num(np.asarray(evidence, np.float64)))
    order = np.argsort(-held, kind="stable")
    reached = np.cumsum(held[order])
    marked = np.zeros(len(held), bool)
    if reached[-1] > 0:
        marked[order[: np.searchsorted(reached, share * reached[-1]) + 1]] = True
    return marked.reshape(side, side)
