"""What is counted of the answers of one name: how many are kept, how long they are, and how like the chosen ones."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from napo_jax.bias.words import words

SIZES = (1, 2, 4)  # words of the n-grams that are compared
FIRST_WORDS = ("yes", "no")


class Profile(NamedTuple):
    """What is compared of a text.

    Attributes:
      ngrams: its distinct n-grams, for each size.
      first: its first word, None where there is none.
    """

    ngrams: dict[int, set]
    first: str | None

    @classmethod
    def of(cls, text: str | None):
        """Returns the profile of a text, None of no text."""
        if text is None:
            return None
        said = words(text)
        ngrams = {n: set(zip(*(said[i:] for i in range(n)), strict=False)) for n in SIZES}
        return cls(ngrams, said[0] if said else None)


class Tally:
    """Counts the answers of one name, and of the rows where they are kept, what the other texts are like."""

    def __init__(self):
        self._rows = 0
        self._faults = Counter()
        self._lengths = Counter()
        self._overlap = _Means()
        self._begins = _Means()

    def add(self, said, chosen: Profile | None, rejected: Profile | None):
        """Counts a `Said`, beside the profiles of its row's other texts."""
        self._rows += 1
        if said.fault is not None:
            self._faults[said.fault] += 1
            return
        self._lengths[said.tokens] += 1
        answer = Profile.of(said.text)
        for who, profile in (("answer", answer), ("chosen", chosen)):
            if profile is not None:
                for word in FIRST_WORDS:
                    self._begins.add((who, word), profile.first == word)
        for who, profile in (("answer", answer), ("rejected", rejected)):
            if profile is not None and chosen is not None:
                for n, ngrams in profile.ngrams.items():
                    if ngrams:  # a text of three words has no four in a row to compare
                        self._overlap.add((who, n), len(ngrams & chosen.ngrams[n]) / len(ngrams))

    def summary(self) -> dict:
        """Returns the counts and means as a dict for JSON; a mean of nothing is None."""
        return {
            "rows": self._rows,
            "kept": self._lengths.total(),
            "faults": dict(sorted(self._faults.items(), key=lambda item: (-item[1], item[0]))),
            "tokens": _quantiles(self._lengths),
            "overlap": {who: {str(n): self._overlap.mean((who, n)) for n in SIZES} for who in ("answer", "rejected")},
            "begins": {who: {w: self._begins.mean((who, w)) for w in FIRST_WORDS} for who in ("answer", "chosen")},
        }


class _Means:
    """Means of shares, by name. Added up in whole billionths: the order of the rows must not show in the last digit."""

    def __init__(self):
        self._sums, self._counts = Counter(), Counter()

    def add(self, name, share):
        self._sums[name] += round(share * 10**9)
        self._counts[name] += 1

    def mean(self, name):
        count = self._counts[name]
        return round(self._sums[name] / count / 10**9, 4) if count else None


def _quantiles(counts):
    """Returns quantiles of {value: count}, each one of the values."""
    names = {"min": 0, "median": 0.5, "95%": 0.95, "max": 1}
    if not counts:
        return dict.fromkeys(names)
    values, weights = np.array(list(counts)), np.array(list(counts.values()))
    return {n: int(np.quantile(values, q, weights=weights, method="inverted_cdf")) for n, q in names.items()}
