"""From an encoded picture to the uint8 square that the vision tower sees, and on the device to what it reads.

Both rules give the pixels of the processors that they are named after: "pad" those of LLaVA, which trained and is
evaluated with it, "crop" those of plain CLIP, which the released preference code trained with.
"""

from io import BytesIO

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's, of pixels in [0, 1]
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
PAD_COLOUR = (122, 116, 104)  # 255 * MEAN, cut to whole numbers as LLaVA does

RULES = ("pad", "crop")

# 256 MiB once decoded. Below Pillow's own limit, so that its warning stays silent, and room for any camera but a few.
MAX_PIXELS = 2**26
# Padded, a picture over 24 times as long as wide fills less than one of CLIP's 24 rows of patches; cropped, less than a
# 24th of it is left. There is nothing to see, and to scale its short side up can take gigabytes.
MAX_RATIO = 24

# Not opened: EPS and WMF are drawn by other programs, the others wrap a picture whose size their header does not say.
_REFUSED_FORMATS = {"EPS", "WMF", "BLP", "ICNS", "ICO", "IPTC"}

# All formats now, and not when a thread first meets a rare one.
Image.preinit()
Image.init()


class ImageError(ValueError):
    """A picture that cannot be used.

    Attributes:
      reason: what to count it by. `image_empty`: no bytes. `image_unreadable`: no header of a format that is read here.
        `image_truncated`: a header, but the pixels end early or are damaged. `image_too_large`, `image_too_thin`: so
        its header says.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)  # both, or a worker process could not send it
        self.reason = reason

    def __str__(self):
        return self.args[1]


def decode(data: bytes, *, exif: bool = False) -> Image.Image:
    """Decodes a picture, or the first frame of an animation, as the released code does: alpha is dropped.

    Args:
      data: the encoded picture, in any format of Pillow that holds its pixels itself.
      exif: whether to turn the picture as its EXIF data says.

    Returns:
      An RGB picture, read to the end.

    Raises:
      ImageError: for whatever is wrong with the picture, and before memory is taken for its pixels if it is too large.
    """
    if not data:
        raise ImageError("image_empty", "the image has no bytes")
    image = _open(data)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError("image_too_large", f"the image is {width}x{height}, over {MAX_PIXELS:,} pixels")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError("image_too_thin", f"the image is {width}x{height}, over {MAX_RATIO} times as long as wide")
    try:
        image.load()
    except MemoryError:  # says nothing of the picture
        raise
    except Exception as error:  # Pillow promises no classes: OSError, SyntaxError, ValueError, struct.error, ...
        raise ImageError("image_truncated", f"the image ends early or is damaged: {error}") from None
    try:
        if exif:
            ImageOps.exif_transpose(image, in_place=True)
        image.info.pop("transparency", None)  # `convert` would carry it along, with a warning where it cannot
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise ImageError("image_unreadable", f"the image cannot be made upright RGB: {error}") from None


def _open(data):
    """Reads a picture's header.

    `Image.open` would do, but warns of large pictures before they can be refused, and warnings belong to the process.
    """
    for name in tuple(Image.ID):
        factory, accepts = Image.OPEN[name]
        if name in _REFUSED_FORMATS:
            continue
        try:
            accepted = accepts is None or accepts(data[:16])
            if accepted and not isinstance(accepted, str):  # a string says why this build cannot read the format
                return factory(BytesIO(data), "")
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # of a frame or a tile
            raise ImageError("image_too_large", f"the image is too large: {error}") from None
        except MemoryError:  # says nothing of the picture
            raise
        except Exception:  # not of this format, whatever it began with
            continue
    raise ImageError("image_unreadable", "the image is in no format that is read here, or its header is damaged")


def fit(image: Image.Image, size: int, rule: str) -> np.ndarray:
    """Fits a picture into a square, bicubically and pixel by pixel as the official processors do.

    Args:
      image: RGB, as `decode` returns it.
      size: the square's side in pixels.
      rule: "pad" puts the picture in the middle of a square of the mean colour first (`LlavaImageProcessor` with
        `do_pad`); "crop" scales its short side to `size` and keeps the middle of the long one (`CLIPImageProcessor`).

    Returns:
      uint8[size, size, 3].
    """
    if rule not in RULES:
        raise ValueError(f"the image rule must be one of {', '.join(RULES)}, got {rule!r}")
    return np.asarray((_pad if rule == "pad" else _crop)(image, size))


# Of a square or wide picture, Pillow resizes the rows, rounds to uint8, and then resizes the columns. Two calls do this
# with less between them: the rows of padding need no resizing, and the columns that are cut off no second one.


def _pad(image, size):
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    square = Image.new("RGB", (size, side), PAD_COLOUR)
    if width == side:
        square.paste(image.resize((size, height), Image.Resampling.BICUBIC), (0, top))
    else:  # in strips: the whole square of a long picture would be many times its size
        rows = min(height, 2**24 // side)
        strip = Image.new("RGB", (side, rows), PAD_COLOUR)
        for start in range(0, height, rows):
            strip.paste(image, (left, -start))
            square.paste(strip.resize((size, rows), Image.Resampling.BICUBIC), (0, start))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def _crop(image, size):
    width, height = image.size
    short = min(width, height)
    scaled_width, scaled_height = int(size * width / short), int(size * height / short)
    left, top = (scaled_width - size) // 2, (scaled_height - size) // 2
    if width > height:
        image = image.resize((scaled_width, height), Image.Resampling.BICUBIC).crop((left, 0, left + size, height))
    # One call for a tall picture: in which order its sides are resized depends on the version of Pillow.
    return image.resize((size, scaled_height), Image.Resampling.BICUBIC).crop((0, top, size, top + size))


def normalise(images) -> jax.Array:
    """Normalises pixels to what CLIP reads, uint8[..., H, W, 3] -> float32[..., H, W, 3]."""
    images = jnp.asarray(images).astype(jnp.float32) / 255
    return (images - jnp.broadcast_to(MEAN, images.shape)) / jnp.broadcast_to(STD, images.shape)
