"""Which other pictures a record gets, how many, and where its own stands among them: drawn from its own key."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from napo_jax.composed.wording import INSET_WORDS
from napo_jax.data.store import PICTURE_DIGITS


class Drawn(NamedTuple):
    """What is drawn for a record."""

    others: list[int]  # records whose pictures stand beside its own, in their order
    place: int  # of its own picture among all, from 0
    wording: int  # of those of an inset
    seed: int  # of noise, and of an answer that is drawn

    @property
    def count(self) -> int:
        """How many pictures there are."""
        return len(self.others) + 1


class Pool:
    """The pictures that others are drawn from: each once, however many records have it."""

    def __init__(self, keys: Sequence[str]):
        """Takes the keys of the records, in order."""
        digests, self._record_of = np.unique([key[:PICTURE_DIGITS] for key in keys], return_index=True)
        self._place_of = {digest: place for place, digest in enumerate(digests)}

    def __len__(self):
        return len(self._record_of)

    def draw(self, key: str, counts: Sequence[int], seed: int) -> Drawn:
        """Draws for a record, the same whenever it is asked and in whatever order.

        Args:
          key: the record's.
          counts: how many pictures there may be.
          seed: of all that is drawn.
        """
        digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
        random = np.random.default_rng(int.from_bytes(digest, "little"))
        count = int(random.choice(counts))
        own = self._place_of[key[:PICTURE_DIGITS]]
        drawn = random.choice(len(self) - 1, count - 1, replace=False)
        others = self._record_of[drawn + (drawn >= own)].tolist()
        place, wording = int(random.integers(count)), int(random.integers(len(INSET_WORDS)))
        return Drawn(others, place, wording, int(random.integers(2**32)))
