"""Made-up records, for trying out a config and for tests: little pictures of noise, and words without sense."""

import hashlib
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from napo_jax.data.records import Record

ANSWERS = ("chosen", "rejected", "question_only", "image_only")
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

    def __init__(self, count, *, seed=0, image_size=32):
        """Makes `count` records."""
        self.rows, self.seed, self.image_size = count, seed, image_size
        self.dropped = {}

    def __len__(self):
        return self.rows

    def __getitem__(self, number):
        """Returns a Record."""
        if not 0 <= number < self.rows:
            raise IndexError(number)
        key, question, answers = self._texts(number)
        return Record(key, self.image(number), question, answers)

    def image(self, number):
        """Returns the picture of a record, a PNG."""
        random = np.random.default_rng([self.seed, number, 1])
        pixels = random.integers(0, 256, (self.image_size, self.image_size, 3), np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        return data.getvalue()

    def texts(self) -> Iterator:
        """Yields (key, question, answers) of all records in order."""
        return (self._texts(number) for number in range(self.rows))

    @property
    def fingerprint(self):
        """A digest of all records."""
        return hashlib.sha256(repr((self.rows, self.seed, self.image_size)).encode()).hexdigest()

    def _texts(self, number):
        random = np.random.default_rng([self.seed, number, 0])
        sentence = lambda low, high: " ".join(random.choice(_WORDS, random.integers(low, high)))
        answers = {name: sentence(1, 12) + "." for name in ANSWERS}
        key = hashlib.sha256(repr((self.seed, self.image_size, number)).encode()).hexdigest()[:48]
        return key, sentence(3, 8) + "?", answers
