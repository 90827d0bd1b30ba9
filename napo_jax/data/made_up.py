"""Made-up records, for trying out a config and for tests: little pictures of noise, and words without sense."""

import hashlib
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from napo_jax.data.records import Record
from napo_jax.data.regions import Frame, Region

ANSWERS = ("chosen", "rejected", "question_only", "image_only")
_FRAME = Frame("pad", exif=False, side=4)
_WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "round",
    "small",
    "dog",
    "cat",
    "tree",
    "house",
    "sky",
    "is",
    "on",
    "under",
    "near",
    "three",
    "two",
    "many",
    "sees",
    "holds",
    "and",
]


class MadeUpRecords:
    """Records that are a function of a seed and their number; the same surface as `Records`."""

    def __init__(self, count, *, seed=0, image_size=32, frame=_FRAME, pictures=1):
        """Makes `count` records, with regions of a `Frame`, and from 1 to `pictures` pictures each, in turn."""
        self.rows, self.seed, self.image_size, self.pictures = count, seed, image_size, pictures
        self.dropped, self.frames = {}, {frame}

    def __len__(self):
        return self.rows

    def __getitem__(self, number):
        """Returns a Record."""
        if not 0 <= number < self.rows:
            raise IndexError(number)
        key, question, answers = self._texts(number)
        (frame,) = self.frames
        random = np.random.default_rng([self.seed, number, 2])
        (top, left), (bottom, right) = np.sort(random.integers(0, frame.side, (2, 2)), axis=0)
        mask = np.zeros((frame.side, frame.side), bool)
        mask[top : bottom + 1, left : right + 1] = True
        region = Region.of(mask, frame.rule, frame.exif)
        hard = float(self.difficulties()[number])
        image, *more = self.images(number)
        return Record(key, image, question, answers, self._picture(number, 3), region, hard, tuple(more))

    def image(self, number):
        """Returns the picture of a record, a PNG."""
        return self._picture(number, 1)

    def images(self, number):
        """Returns all pictures of a record."""
        return tuple(self._picture(number, 1 if which == 0 else 4 + which) for which in range(self._count(number)))

    def picture_counts(self):
        """Returns how many pictures each record has, int32[N]."""
        return np.array([self._count(number) for number in range(self.rows)], np.int32)

    def _count(self, number):
        return 1 + number % self.pictures

    def _picture(self, number, which):
        random = np.random.default_rng([self.seed, number, which])
        pixels = random.integers(0, 256, (self.image_size, self.image_size, 3), np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        return data.getvalue()

    def difficulties(self):
        """Returns how hard each record is, float64[N]."""
        return np.random.default_rng([self.seed, 4]).random(self.rows)

    def texts(self) -> Iterator:
        """Yields (key, question, answers) of all records in order."""
        return (self._texts(number) for number in range(self.rows))

    @property
    def fingerprint(self):
        """A digest of all records."""
        parts = (self.rows, self.seed, self.image_size, self.frames, *([self.pictures] if self.pictures > 1 else []))
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _texts(self, number):
        random = np.random.default_rng([self.seed, number, 0])
        sentence = lambda low, high: " ".join(random.choice(_WORDS, random.integers(low, high)))
        answers = {name: sentence(1, 12) + "." for name in ANSWERS}
        key = hashlib.sha256(repr((self.seed, self.image_size, number)).encode()).hexdigest()[:48]
        return key, sentence(3, 8) + "?", answers
