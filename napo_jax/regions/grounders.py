"""From the words of an answer to places in its picture, by the boxes that come with it."""

from collections.abc import Mapping, Sequence

import numpy as np

from napo_jax.regions.chunks import find_chunks


def matching_boxes(word: str, boxes: Sequence[Mapping]) -> list:
    """Returns the boxes whose label names the same kind of thing as a word: "two small dogs", and "dog".

    Args:
      word: a keyword.
      boxes: mappings of `label`, a text, and `box`, four numbers.
    """
    heads = lambda text: {chunk.head for chunk in find_chunks(text)} or {text.strip().lower()}
    wanted = heads(word)
    return [each["box"] for each in boxes if wanted & heads(each["label"])]


def mask_of_boxes(boxes, width, height, rule, side) -> np.ndarray:
    """Marks the cells of a frame that boxes cover by a quarter at least, and the one under the middle of each.

    Args:
      boxes: of left, top, right and bottom, in pixels of the picture.
      width: of the picture, in pixels.
      height: likewise.
      rule: how the picture becomes a square, "pad" or "crop"; see `data.images.fit`.
      side: cells on a side of the square.

    Returns:
      bool[side, side].
    """
    # The square, in pixels of the picture: around all of it, or the largest within.
    span = max(width, height) if rule == "pad" else min(width, height)
    left, top = (width - span) / 2, (height - span) / 2
    edges = np.arange(side + 1) * span / side
    marked = np.zeros((side, side), bool)
    for x0, y0, x1, y1 in boxes:
        across = _shares(edges + left, x0, x1)
        down = _shares(edges + top, y0, y1)
        marked |= np.outer(down, across) >= 0.25
        column, row = (
            (((low + high) / 2 - start) * side) // span for low, high, start in ((x0, x1, left), (y0, y1, top))
        )
        if 0 <= row < side and 0 <= column < side:  # what was cropped away is nowhere
            marked[int(row), int(column)] = True
    return marked


def _shares(edges, low, high):
    """Returns the share of each interval between edges that another interval covers."""
    covered = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
    return np.clip(covered, 0, None) / (edges[1] - edges[0])
