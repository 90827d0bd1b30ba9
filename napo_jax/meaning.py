"""Which answers to a question mean the same, and how unsure of its answer a model is: the semantic entropy."""

import collections
import math
import re
from collections.abc import Sequence

from napo_jax.bias.words import words

ALIKE = 0.6  # the share of words that two answers of one meaning have in common, of those in either
# Words that carry no meaning of their own, in English: two answers do not differ by them.
_EMPTY = """
    a an the this that these those is are was were be been being am it its there here of in on at to with and or as by
    for from has have had do does did i you he she they we image picture photo shown shows appears seems
"""
_TURNS = "no not none never nothing without isn't aren't doesn't don't cannot can't false"
_NUMBERS = "zero one two three four five six seven eight nine ten"


def mean_the_same(one: str, other: str, alike: float = ALIKE) -> bool:
    """Tells whether two short answers to one question say the same.

    They do if they agree in what turns a meaning round (no, not, false) and in all numbers, and share most of their
    other words. No model decides: one of its own would be asked about itself, and another would have to be downloaded.

    >>> mean_the_same("There are two dogs.", "2 dogs are there.")
    True
    >>> mean_the_same("The bear is brown.", "The bear is not brown.")
    False
    """
    (said, turned, counted), (heard, other_turned, other_counted) = _content(one), _content(other)
    if turned != other_turned or counted != other_counted:
        return False
    both = said | heard
    return not both or len(said & heard) / len(both) >= alike


def group_meanings(answers: Sequence[str], alike: float = ALIKE) -> list[int]:
    """Returns the group of each answer: that of the first one before it that means the same, or a new one."""
    first, groups = [], []
    for answer in answers:
        group = next((n for n, other in enumerate(first) if mean_the_same(answer, other, alike)), len(first))
        if group == len(first):
            first.append(answer)
        groups.append(group)
    return groups


def semantic_entropy(answers: Sequence[str], alike: float = ALIKE) -> float:
    """Returns -sum p log p in nats, with p the share of the answers that mean the same; 0 where all do.

    >>> round(semantic_entropy(["Brown.", "It is brown.", "Black.", "Black."]), 4)  # log 2
    0.6931
    """
    shares = [count / len(answers) for count in collections.Counter(group_meanings(answers, alike)).values()]
    return -sum(share * math.log(share) for share in shares) + 0.0


def _content(text):
    """Returns the words of a text that mean something, whether it is turned round, and its numbers."""
    found = [_DIGITS.get(word, word) for word in words(text)]
    turned = sum(word in _TURNED for word in found) % 2 == 1
    numbers = sorted(word for word in found if word.isdecimal())
    rest = {_stem(word) for word in found if not word.isdecimal() and word not in _SMALL}
    return rest, turned, numbers


def _stem(word):
    return re.sub(r"(?<=\w{3})(?<!s)s$", "", word)


_TURNED, _SMALL = frozenset(_TURNS.split()), frozenset((_EMPTY + _TURNS).split())
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS.split())}
