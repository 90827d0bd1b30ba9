"""Image variants: what an objective holds the clean picture against, made on the device.

Every random choice comes from the record's own seed and the variant's name. The policy, the reference and a resumed run
therefore see the same corruption, wherever in a batch the record is; only `swap` looks at the rest of the batch.

Each function takes one normalised picture, float32[S, S, 3], and returns another; `image_variants` maps them over a
batch.
"""

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from napo_jax.data.images import MEAN, STD

VARIANTS = (
    "clean",  # the picture itself
    "crop",  # a random 1% to 20% of it, at full size (mDPO)
    "crop_anew",  # the same, but the reference draws another one than the policy (mDPO as released)
    "diffusion",  # noise as of a diffusion step, on the normalised picture (CHiP)
    "diffusion_pixels",  # that noise on pixels in [0, 1], clamped (POVID, but for the clamp)
    "region",  # that noise inside a mask only (MFPO)
    "black",  # pixels of 0
    "white",  # pixels of 255
    "mean",  # CLIP's mean colour: 0 once normalised, and what CHiP's code calls black
    "noise",  # nothing but noise, with mean 0 and standard deviation 1 once normalised
    "rotate",  # turned by 10 to 80 degrees (CHiP)
    "shuffle_patches",  # its patches in another order
    "swap",  # the picture of the next record in the batch
    "rejected_image",  # another picture, which the record brings (rDPO, AdaViP)
)
BATCH_DEPENDENT = frozenset({"swap"})  # of these, a record's variant changes with its company

CROP_SCALE = (0.01, 0.2)  # of the area, as mDPO
CROP_RATIO = (3 / 4, 4 / 3)  # width to height
ROTATION = (10, 80)  # degrees, as CHiP

# The schedule of POVID and CHiP: abar_t, the share of the picture's variance that is left at step t.
_BETAS = (0.5e-2 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, 1000))) + 1e-5
ABAR = np.cumprod(1 - _BETAS)  # float64[1000]


def image_variants(
    images,
    seeds,
    variants: Sequence[str],
    *,
    masks=None,
    rejected_images=None,
    reference: bool = False,
    step: int = 500,
    space: Literal["normalised", "pixels"] = "normalised",
    patch: int = 14,
) -> jax.Array:
    """Makes the image variants of a batch.

    Args:
      images: float32[B, S, S, 3], normalised.
      seeds: uint32[B], the records' own.
      variants: M names out of `VARIANTS`; static, as all that follows but the masks and pictures.
      masks: bool[B, h, w], true where `region` puts its noise, by pixel or by patch: h and w divide S. All false means
        the whole picture, as in MFPO: two equal pictures would be no preference.
      rejected_images: float32[B, S, S, 3], normalised, for `rejected_image`.
      reference: whether they are made for the reference, which matters to `crop_anew` alone.
      step: of the diffusion, 0 to 999.
      space: where `diffusion` and `region` add their noise: to the normalised picture, as CHiP does, or to pixels in
        [0, 1], clamped, as POVID does but for the clamp.
      patch: the side of the squares that `shuffle_patches` moves, in pixels.

    Returns:
      float32[B, M, S, S, 3].
    """
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise ValueError(f"there is no image variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    images, seeds = jnp.asarray(images), jnp.asarray(seeds)
    batch, size = images.shape[:2] if images.ndim == 4 else (0, 0)
    if images.shape != (batch, size, size, 3) or images.dtype != jnp.float32:
        raise ValueError(f"images must be float32[B, S, S, 3], got {images.dtype}{list(images.shape)}")
    if seeds.shape != (batch,) or seeds.dtype != jnp.uint32:
        raise ValueError(f"seeds must be uint32[{batch}], got {seeds.dtype}{list(seeds.shape)}")
    if not 0 <= step < len(ABAR):
        raise ValueError(f"the diffusion step must be from 0 to {len(ABAR) - 1}, got {step}")
    if space not in ("normalised", "pixels"):
        raise ValueError(f"the space of the diffusion must be 'normalised' or 'pixels', got {space!r}")
    if "region" in variants:
        masks = _pixel_masks(masks, batch, size)
    if "rejected_image" in variants and np.shape(rejected_images) != images.shape:
        raise ValueError(f"rejected_image needs pictures {list(images.shape)}, got {list(np.shape(rejected_images))}")
    if "shuffle_patches" in variants and size % patch:
        raise ValueError(f"patches of {patch} pixels do not tile a picture of {size}")
    if "swap" in variants and batch == 1:
        raise ValueError("swap takes the picture of another record, and the batch has only one")

    def make(name):
        # Named by a number of its own: adding variants changes none, and no two of a record share their noise.
        number = zlib.crc32(b"crop_anew of the reference" if name == "crop_anew" and reference else name.encode())
        keys = jax.vmap(lambda seed: jax.random.fold_in(_key(seed), number))(seeds)
        each = lambda one, *more: jax.vmap(one)(images, keys, *more)
        match name:
            case "clean":
                return images
            case "crop" | "crop_anew":
                return each(crop)
            case "diffusion":
                return each(functools.partial(diffusion, step=step, space=space))
            case "diffusion_pixels":
                return each(functools.partial(diffusion, step=step, space="pixels"))
            case "region":
                return each(functools.partial(region, step=step, space=space), masks)
            case "black":
                return jnp.broadcast_to((0 - MEAN) / STD, images.shape)
            case "white":
                return jnp.broadcast_to((1 - MEAN) / STD, images.shape)
            case "mean":
                return jnp.zeros_like(images)
            case "noise":
                return each(lambda image, key: jax.random.normal(key, image.shape, jnp.float32))
            case "rotate":
                return each(rotate)
            case "shuffle_patches":
                return each(functools.partial(shuffle_patches, patch=patch))
            case "swap":
                return jnp.roll(images, -1, axis=0)
            case "rejected_image":
                return jnp.asarray(rejected_images, jnp.float32)

    return jnp.stack([make(name) for name in variants], axis=1)


def _key(seed):
    """Returns a record's key, of the one generator whose numbers do not depend on what else is in the batch."""
    return jax.random.key(seed, impl="threefry2x32")


def _pixel_masks(masks, batch, size):
    """Checks masks and spreads them over pixels, bool[B, S, S]."""
    if masks is None:
        raise ValueError("region needs masks of where its noise goes")
    masks = jnp.asarray(masks)
    height, width = masks.shape[1:] if masks.ndim == 3 else (0, 0)
    if masks.dtype != jnp.bool or len(masks) != batch or not height or not width or size % height or size % width:
        raise ValueError(
            f"masks must be bool[{batch}, h, w] with h and w that divide {size}, got {masks.dtype}{list(masks.shape)}"
        )
    return jnp.repeat(jnp.repeat(masks, size // height, axis=1), size // width, axis=2)


def crop(image, key):
    """Cuts out a random box and resizes it to the whole picture.

    As torchvision's `RandomResizedCrop(S, scale=(0.01, 0.2))` does with a tensor. The resizing is bilinear; as it only
    ever enlarges, antialiasing would do nothing.
    """
    size = image.shape[0]
    starts, sides = _crop_box(key, size)
    rows, columns = jax.vmap(functools.partial(_enlarging, size=size))(starts, sides)
    return jnp.einsum("ih,hwc,jw->ijc", rows, image, columns, precision=jax.lax.Precision.HIGHEST)


def _crop_box(key, size):
    """Draws a box: (top, left) and (height, width), int32[2] each.

    Its share of the area is uniform, and so is the logarithm of its aspect ratio. Of ten draws, rounded to pixels, the
    first that fits is taken, or else the whole square.
    """
    shape_key, place_key = jax.random.split(key)
    share, tilt = jax.random.uniform(shape_key, (2, 10), jnp.float32)
    share = CROP_SCALE[0] + (CROP_SCALE[1] - CROP_SCALE[0]) * share
    tilt = math.log(CROP_RATIO[0]) + math.log(CROP_RATIO[1] / CROP_RATIO[0]) * tilt  # log(width / height)
    side = size * jnp.sqrt(share)
    sides = jnp.round(jnp.stack([side * jnp.exp(-tilt / 2), side * jnp.exp(tilt / 2)])).astype(jnp.int32)
    fits = jnp.all((sides > 0) & (sides <= size), axis=0)
    sides = jnp.where(jnp.any(fits), sides[:, jnp.argmax(fits)], size)
    return jax.random.randint(place_key, (2,), 0, size + 1 - sides), sides


def _enlarging(start, length, size):
    """Returns float32[S, S], which bilinearly resizes the `length` of S values that begin at `start` to S values."""
    number = jnp.arange(size)
    # Places in units of 1 / (2 S) of an old value, counted from the start: whole numbers, so weights are rounded once.
    wanted = ((2 * number + 1) * length)[:, None]
    given = ((2 * (number - start) + 1) * size)[None]
    weights = jnp.maximum(2 * size - jnp.abs(given - wanted), 0)
    weights = jnp.where((number >= start)[None] & (number < start + length)[None], weights, 0).astype(jnp.float32)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def diffusion(image, key, *, step=500, space="normalised"):
    """Adds the noise of a diffusion step: sqrt(abar) of the picture and sqrt(1 - abar) of N(0, 1)."""
    noise = jax.random.normal(key, image.shape, jnp.float32)
    add_noise = lambda x: np.float32(math.sqrt(ABAR[step])) * x + np.float32(math.sqrt(1 - ABAR[step])) * noise
    if space == "normalised":
        return add_noise(image)
    mean, std = jnp.broadcast_to(MEAN, image.shape), jnp.broadcast_to(STD, image.shape)
    return (jnp.clip(add_noise(image * std + mean), 0, 1) - mean) / std


def region(image, key, mask, *, step=500, space="normalised"):
    """Adds that noise where a mask, bool[S, S], is true; everywhere if it is true nowhere."""
    return jnp.where((mask | ~jnp.any(mask))[..., None], diffusion(image, key, step=step, space=space), image)


def rotate(image, key):
    """Turns a picture counter-clockwise by 10 to 80 degrees about its middle.

    As torchvision's `RandomRotation((10, 80))` does with a tensor: to the nearest pixel, and with zeros where there was
    no picture, which once normalised are the mean colour.
    """
    return _turn(image, jax.random.uniform(key, (), jnp.float32, *np.radians(ROTATION)))


def _turn(image, angle):
    size = image.shape[0]
    middle = (size - 1) / 2
    y, x = jnp.meshgrid(*[jnp.arange(size, dtype=jnp.float32) - middle] * 2, indexing="ij")
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    row = jnp.round(middle + cos * y + sin * x).astype(jnp.int32)
    column = jnp.round(middle + cos * x - sin * y).astype(jnp.int32)
    inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    return jnp.where(inside[..., None], image[jnp.where(inside, row, 0), jnp.where(inside, column, 0)], 0)


def shuffle_patches(image, key, *, patch=14):
    """Puts a picture's patches in a random order."""
    side = image.shape[0] // patch
    patches = image.reshape(side, patch, side, patch, 3).swapaxes(1, 2).reshape(side * side, patch, patch, 3)
    patches = jax.random.permutation(key, patches)
    return patches.reshape(side, side, patch, patch, 3).swapaxes(1, 2).reshape(image.shape)
