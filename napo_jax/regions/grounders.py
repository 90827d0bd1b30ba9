"""From the words of an answer to places in its picture, by the boxes or masks that come with it."""

import contextlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from napo_jax.data.images import decode
from napo_jax.regions.chunks import find_chunks

_MOST = 2**16  # rows or columns of a mask: no picture that is read has more


def matching_boxes(word: str, boxes: Sequence[Mapping], what: str = "box") -> list:
    """Returns the boxes whose label names the same kind of thing as a word: "two small dogs", and "dog".

    Args:
      word: a keyword.
      boxes: mappings of `label`, a text, and `box`, four numbers.
      what: "mask" for mappings of `label` and `mask`.
    """
    heads = lambda text: {chunk.head for chunk in find_chunks(text)} or {text.strip().lower()}
    wanted = heads(word)
    return [each[what] for each in boxes if wanted & heads(each["label"])]


def read_boxes(value) -> list:
    """Returns the boxes of a column that can be read; others find nothing, which is counted."""
    boxes = []
    for each in value if isinstance(value, list) else ():
        with contextlib.suppress(KeyError, TypeError, ValueError):
            left, top, right, bottom = map(float, each["box"])
            if isinstance(each["label"], str) and left < right and top < bottom:
                boxes.append({"label": each["label"], "box": (left, top, right, bottom)})
    return boxes


def read_masks(value) -> list:
    """Returns the masks of a column that can be read; see `read_mask`."""
    masks = []
    for each in value if isinstance(value, list) else ():
        if isinstance(each, Mapping) and isinstance(each.get("label"), str):
            mask = read_mask(each.get("mask"))
            masks += [] if mask is None else [{"label": each["label"], "mask": mask}]
    return masks


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
    span, left, top = _square(width, height, rule)
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


def _square(width, height, rule):
    """Returns side, left and top of the square in pixels of the picture: around all of it, or the largest within."""
    span = max(width, height) if rule == "pad" else min(width, height)
    return span, (width - span) / 2, (height - span) / 2


def _shares(edges, low, high):
    """Returns the share of each interval between edges that another interval covers."""
    covered = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
    return np.clip(covered, 0, None) / (edges[1] - edges[0])


def mask_of_masks(masks, width, height, rule, side) -> np.ndarray:
    """Marks the cells of a frame that masks cover by a quarter at least, and the one that holds most of each.

    Args:
      masks: of bool[rows, columns] each, over the whole picture; of its own size, or coarser or finer.
      width: of the picture, in pixels.
      height: likewise.
      rule: how the picture becomes a square, "pad" or "crop"; see `data.images.fit`.
      side: cells on a side of the square.

    Returns:
      bool[side, side].
    """
    span, left, top = _square(width, height, rule)
    edges = np.arange(side + 1) * span / side
    marked = np.zeros((side, side), bool)
    for mask in masks:
        rows, columns = (
            np.arange(n + 1)[:, None] * size / n for n, size in zip(mask.shape, (height, width), strict=True)
        )
        down, across = _shares(edges + top, rows[:-1], rows[1:]), _shares(edges + left, columns[:-1], columns[1:])
        covered = down.T @ mask @ across
        marked |= covered >= 0.25 - 1e-9  # sums of many parts
        if covered.any():  # what was cropped away is nowhere
            marked[np.unravel_index(covered.argmax(), covered.shape)] = True
    return marked


def read_mask(value) -> np.ndarray | None:
    """Returns a mask as a column holds it, bool[rows, columns]; None if it is none.

    Args:
      value: an encoded picture, marked where it is not black; rows of numbers, marked where they are not 0; or a
        mapping of `width`, `height` and `bits`: row by row, eight a byte, the first one in the highest bit.
    """
    try:
        if isinstance(value, bytes):
            mask = np.asarray(decode(value)).any(axis=-1)
        elif isinstance(value, Mapping):
            shape = value["height"], value["width"]
            bits = np.frombuffer(value["bits"], np.uint8)
            if len(bits) != -(-math.prod(shape) // 8):
                return None
            mask = np.unpackbits(bits, count=math.prod(shape)).reshape(shape).astype(bool)
        else:
            mask = np.array(value, float) != 0
    except (ValueError, TypeError, KeyError):  # an ImageError is a ValueError
        return None
    return mask if mask.ndim == 2 and mask.size and max(mask.shape) <= _MOST else None
