"""What is wrong with a built answer, if anything: each fault has a name, to be counted by and to be switched off by."""

import numpy as np

from napo_jax.bias.words import words

FILTERS = ("empty", "equal", "cut", "repeats")  # in the order in which they are asked

_TIMES = 4  # Prose says a thing three times for effect; a model that has begun a fourth time seldom finds out again.
_WORDS = 12  # So that "no no no no" and "1 0 1 0 1 0 1 0" pass: a loop is long or does not end.
_CHARACTERS = 24  # The same where there are few words to count.
_LONGEST = 128  # Words of one turn. Bounds the work; turns that are longer still run into the most tokens.
_WORD_LENGTH = 10  # Characters to a word, with spaces and punctuation, past which a text is not made of words.


def find_fault(text, *, others, ended, filters=FILTERS):
    """Names the first fault of an answer, in the order of `FILTERS`.

    `empty`: nothing but white space. `equal`: one of the others, whatever the white space. `cut`: stopped at the most
    tokens. `repeats`: says one thing at least four times in a row, twelve words or more in all, whatever the case and
    punctuation; where there are few words, as in "!!!!!!", characters are counted instead.

    Args:
      text: the answer.
      others: the texts that it must differ from; None among them says nothing.
      ended: whether the model ended the answer itself.
      filters: the names of the faults that are asked for.

    Returns:
      A name out of `FILTERS`, or None.

    >>> find_fault(" A red  bus.", others=["A red bus."], ended=True)
    'equal'
    """
    filters = set(filters)
    if unknown := sorted(filters.difference(FILTERS)):
        raise ValueError(f"filters must be among {', '.join(FILTERS)}, got {', '.join(unknown)}")
    has_fault = {
        "empty": lambda: not text.strip(),
        "equal": lambda: _plain(text) in [_plain(other) for other in others if other is not None],
        "cut": lambda: not ended,
        "repeats": lambda: _repeats(text),
    }
    return next((name for name in FILTERS if name in filters and has_fault[name]()), None)


def _plain(text):
    return " ".join(text.split())


def _repeats(text):
    said, least = words(text), _WORDS
    if len(text) > _WORD_LENGTH * len(said):
        said, least = "".join(text.split()), _CHARACTERS
    numbers = {}
    said = np.array([numbers.setdefault(piece, len(numbers)) for piece in said])
    return any(_repeats_at(said, turn, least) for turn in range(1, min(len(said) // _TIMES, _LONGEST) + 1))


def _repeats_at(said, turn, least):
    """Says whether a stretch of int64[N] of at least `least`, and four turns, equals what lies one turn before."""
    again = max((_TIMES - 1) * turn, least - turn)
    same = said[turn:] == said[:-turn]
    if np.count_nonzero(same) < again:
        return False
    total = np.concatenate([[0], np.cumsum(same)])
    return bool((total[again:] - total[:-again] == again).any())
