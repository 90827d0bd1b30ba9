"""Where two answers differ: the tokens of a corrected span and of what stands there in the other answer."""

import difflib

import numpy as np


def edited_tokens(one, other, shortest=3):
    """Marks the tokens of two answers that are no common run, bool[T] each.

    A common run shorter than `shortest` tokens, such as a comma between corrections, belongs to the spans around it.
    A span that the other answer has nothing for is not marked: an answer that only says more has no counterpart there.

    Args:
      one: the ids of an answer, int[T].
      other: those of another answer.
      shortest: tokens of a run that counts as common; CHiP's and NaPO's published code have 3.
    """
    one, other = np.asarray(one), np.asarray(other)
    marks = np.zeros(len(one), bool), np.zeros(len(other), bool)
    # Without junk: frequent tokens are as good as others.
    runs = difflib.SequenceMatcher(None, one.tolist(), other.tolist(), autojunk=False).get_matching_blocks()
    start = 0, 0
    for run in runs:  # the last one is empty, and ends both
        if shortest <= run.size or run.size == 0:
            if run.a > start[0] and run.b > start[1]:
                marks[0][start[0] : run.a] = True
                marks[1][start[1] : run.b] = True
            start = run.a + run.size, run.b + run.size
    return marks
