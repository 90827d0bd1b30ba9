"""A batch under a model: the log-probs, or the rewards, of an objective's cells."""

import jax
import jax.numpy as jnp

from napo_jax.data.corruptions import image_variants
from napo_jax.data.images import normalise
from napo_jax.logps import DetailedLogps
from napo_jax.models import Groups
from napo_jax.models.packing import Packing


def score(model, params, batch, objective, *, reference=False, dropout=None, kl_to=None):
    """Computes the log-probs of all cells of an objective.

    Args:
      model: `Llava`.
      params: its parameters.
      batch: `Batch` of B groups.
      objective: `Objective` of C cells under M image variants.
      reference: whether it is the reference that scores them.
      dropout: a key for the dropout of adapters; None drops nothing.
      kl_to: a pair of the `Llava` and the parameters of the reference; for an objective that `needs_kl`.

    Returns:
      {cell: Logps of float32[B]}, or DetailedLogps as `Objective.logps_like` has them; of use where `valid_cells` is
      true.
    """
    kl_to = kl_to if objective.needs_kl and not reference else None
    images = pictures_of(batch, objective, model.config.vision.patch_size, reference=reference)
    repeat = lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], images.shape[1], *x.shape[1:]))
    groups = Groups(
        images,
        repeat(batch.prefix_ids),
        repeat(batch.prefix_lengths),
        batch.answer_ids,
        batch.answer_lengths,
        edited=batch.edited if objective.counterparts else None,
    )
    packing = Packing(batch.bucket.tokens, batch.bucket.answers)
    options = {"packing": packing, "dropout": dropout}
    logps = None, None
    if reference or objective.needs_logps:
        logps = model.logps(params, groups, objective.cell_image, reference=kl_to, **options)
    if objective.needs_rewards and not reference:
        rewards = model.rewards(params, groups, objective.cell_image, **options)
        logps = DetailedLogps(*logps)._replace(reward=rewards)
    of_cell = lambda c: jax.tree.map(lambda x: x[:, c], logps)
    return {cell: of_cell(c) for c, cell in enumerate(objective.cells)}


def pictures_of(batch, objective, patch, *, reference=False):
    """Returns a batch's pictures under the image variants of an objective, float32[B, M, S, S, 3], normalised.

    Of several pictures each has the variant, with a seed of its own: float32[B, M, n, S, S, 3].

    Args:
      batch: `Batch` of B groups.
      objective: `Objective`.
      patch: the side of the model's patches, in pixels.
      reference: whether they are made for the reference.
    """
    pictures, seeds = normalise(batch.images), jnp.asarray(batch.seeds)
    count = pictures.shape[1] if pictures.ndim == 5 else 1
    if count > 1:
        pictures = pictures.reshape(-1, *pictures.shape[2:])
        places = jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)  # the first one's seed is the record's
        seeds = (seeds[:, None] + places[None]).reshape(-1)
    found = image_variants(
        pictures,
        seeds,
        objective.image_variants,
        masks=batch.masks,
        rejected_images=None if batch.rejected_images is None else normalise(batch.rejected_images),
        reference=reference,
        patch=patch,
    )
    if count > 1:
        found = found.reshape(-1, count, *found.shape[1:]).swapaxes(1, 2)
    return found


def valid_cells(batch, objective):
    """Returns {cell: bool[B]}: where a group is there and the cell's answer has a token."""
    return {cell: batch.valid & (batch.answer_lengths[:, c] > 0) for c, cell in enumerate(objective.cells)}
