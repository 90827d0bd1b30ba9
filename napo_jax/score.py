"""A batch under a model: the log-probs of an objective's cells."""

import jax.numpy as jnp

from napo_jax.data.corruptions import image_variants
from napo_jax.data.images import normalise
from napo_jax.models import Groups
from napo_jax.models.packing import Packing
from napo_jax.objective import Logps


def score(model, params, batch, objective, *, masks=None, dropout=None):
    """Computes the log-probs of all cells of an objective.

    Args:
      model: `Llava`.
      params: its parameters.
      batch: `Batch` of B groups.
      objective: `Objective` of C cells under M image variants.
      masks: bool[B, h, h], for the variant `region`.
      dropout: a key for the dropout of adapters; None drops nothing.

    Returns:
      {cell: Logps of float32[B]}; of use where `valid_cells` is true.
    """
    images = image_variants(
        normalise(batch.images),
        batch.seeds,
        objective.image_variants,
        masks=masks,
        patch=model.config.vision.patch_size,
    )
    repeat = lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], images.shape[1], *x.shape[1:]))
    groups = Groups(
        images, repeat(batch.prefix_ids), repeat(batch.prefix_lengths), batch.answer_ids, batch.answer_lengths
    )
    packing = Packing(batch.bucket.tokens, batch.bucket.answers)
    logps = model.logps(params, groups, objective.cell_image, packing=packing, dropout=dropout)
    return {cell: Logps(logps.sum[:, c], logps.mean[:, c]) for c, cell in enumerate(objective.cells)}


def valid_cells(batch, objective):
    """Returns {cell: bool[B]}: where a group is there and the cell's answer has a token."""
    return {cell: batch.valid & (batch.answer_lengths[:, c] > 0) for c, cell in enumerate(objective.cells)}
