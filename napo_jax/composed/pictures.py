"""Several pictures in one: a grid of cells, or one set into the middle of another, and where each came to lie."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from napo_jax.composed.wording import GRIDS

CELL, MARGIN = 448, 40  # pixels of a cell's side, and above it where its label stands: those of the published code
INSET = 0.7  # of the host's width and height: the inset picture fits into so much of both
_QUALITY = 95  # of JPEG: pictures of preference data are JPEG already
# Noise of the published code in what a model is asked, in levels of 255: over the cell, and over the whole of an inset.
NOISE = {"grid": 225.0, "inset": 49.0}


def grid(pictures, *, labelled=False) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """Sets pictures into the cells of a grid, each as large as fits, at the top left of its white cell.

    Args:
      pictures: list of RGB pictures, as many as one of `GRIDS`.
      labelled: whether "Image 1" and so on stand above them.

    Returns:
      The grid, and the box of each cell in it: left, top, right, bottom.
    """
    rows, columns = GRIDS[len(pictures)]
    above = MARGIN if labelled else 0
    whole = Image.new("RGB", (columns * CELL, rows * (CELL + above)), "white")
    boxes = []
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        left, top = column * CELL, row * (CELL + above) + above
        whole.paste(_fitting(picture, CELL, CELL), (left, top))
        boxes.append((left, top, left + CELL, top + CELL))
        if labelled:
            font = ImageFont.load_default(MARGIN - 12)
            ImageDraw.Draw(whole).text((left + 6, top - MARGIN + 4), f"Image {number + 1}", fill="black", font=font)
    return whole, boxes


def inset(picture, host) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """Sets a picture into the middle of another one; returns that, and the box of what was set in."""
    whole, inner = host.copy(), _fitting(picture, INSET * host.width, INSET * host.height)
    left, top = (host.width - inner.width) // 2, (host.height - inner.height) // 2
    whole.paste(inner, (left, top))
    return whole, (left, top, left + inner.width, top + inner.height)


def _fitting(picture, width, height):
    """Returns a picture as large as fits, larger or smaller than it was."""
    scale = min(width / picture.width, height / picture.height)
    size = max(1, int(picture.width * scale)), max(1, int(picture.height * scale))
    return picture.resize(size, Image.Resampling.BICUBIC)


def encode(picture) -> bytes:
    """Returns a picture as JPEG."""
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=_QUALITY, subsampling=0)
    return data.getvalue()


def with_noise(picture, box, strength, random) -> Image.Image:
    """Returns a picture with Gaussian noise in a box, cut to what a pixel can be.

    Args:
      picture: RGB.
      box: left, top, right and bottom.
      strength: standard deviation, in levels of 255.
      random: np.random.Generator.
    """
    left, top, right, bottom = box
    pixels = np.array(picture)
    inside = pixels[top:bottom, left:right]
    noisy = inside + random.normal(0, strength, inside.shape)
    pixels[top:bottom, left:right] = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


def cells_of_box(box, width, height, rule, side) -> np.ndarray:
    """Marks the model's patches whose middle lies in a box of a picture, bool[side, side].

    Args:
      box: left, top, right and bottom, in pixels of the picture.
      width: of the picture, in pixels.
      height: likewise.
      rule: how the picture becomes a square, "pad" or "crop"; see `data.images.fit`.
      side: patches on a side of the square.
    """
    span = max(width, height) if rule == "pad" else min(width, height)
    middles = (np.arange(side) + 0.5) * span / side
    across, down = middles + (width - span) / 2, middles + (height - span) / 2
    left, top, right, bottom = box
    return np.outer((top <= down) & (down < bottom), (left <= across) & (across < right))


def middle_cells(side) -> np.ndarray:
    """Marks the middle 16 x 16 of 24 x 24 patches, or as much of another side: an inset, to the published code."""
    rim = side // 6
    mask = np.zeros((side, side), bool)
    mask[rim : side - rim, rim : side - rim] = True
    return mask
