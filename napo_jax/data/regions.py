"""Regions: where in a record's picture the noise of the image variant `region` goes, as the bits of a square grid."""

import base64
from typing import Any, NamedTuple

import numpy as np

from napo_jax.data.images import RULES
from napo_jax.data.sources import RowError

_LARGEST = 4096  # cells on a side: a picture has no more pixels


class Frame(NamedTuple):
    """The square that a picture became before a region was marked in it; a region is right in no other."""

    rule: str  # of `data.images.fit`
    exif: bool  # whether the picture was turned as its EXIF says
    side: int  # cells on a side: the model's patches, or any number that divides its pixels

    def __str__(self):
        return f"{self.side} x {self.side} cells, image_rule {self.rule}, exif {self.exif}"


class Region(NamedTuple):
    """The marked cells of a frame."""

    frame: Frame
    bits: bytes  # row by row, eight cells a byte, the first one in the highest bit; what is left over is 0

    @classmethod
    def of(cls, mask, rule, exif=False):
        """Returns the region of a mask, bool[side, side]."""
        mask = np.asarray(mask, bool)
        if mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
            raise ValueError(f"a region's mask must be square, got {list(mask.shape)}")
        return cls(Frame(rule, bool(exif), len(mask)), np.packbits(mask).tobytes())

    @property
    def mask(self) -> np.ndarray:
        """bool[side, side]."""
        side = self.frame.side
        return np.unpackbits(np.frombuffer(self.bits, np.uint8), count=side**2).reshape(side, side).astype(bool)

    @property
    def column(self) -> dict[str, Any]:
        """What a parquet column holds of it: a struct of rule, exif, side and bits."""
        return {**self.frame._asdict(), "bits": self.bits}


def read_region(value) -> Region:
    """Returns what a column holds, with the bits as bytes or, in JSON, as base64; raises RowError where it has none."""
    if value is None:
        raise RowError("no_region")
    try:
        rule, exif, side, bits = (value[name] for name in (*Frame._fields, "bits"))
        bits = base64.b64decode(bits, validate=True) if isinstance(bits, str) else bits
    except (KeyError, TypeError, ValueError):
        raise RowError("bad_region") from None
    sound = rule in RULES and isinstance(exif, bool) and type(side) is int and isinstance(bits, bytes)
    if not sound or not 0 < side <= _LARGEST or len(bits) != -(-(side**2) // 8):
        raise RowError("bad_region")
    return Region(Frame(rule, exif, side), bits)
