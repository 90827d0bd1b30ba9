"""Which answers to a question about one of several pictures are good to reject: those that looked at the others."""

import dataclasses
import math
from typing import NamedTuple

from napo_jax.bias.filters import find_fault

# The most of an answer's attention to all pictures that may lie on the true one, by form and number of pictures.
MOST_ON_TARGET = {
    "sequence": {2: 0.8, 3: 0.7, 4: 0.6, 5: 0.6},
    "grid": {2: 0.7, 3: 0.6, 4: 0.5, 6: 0.4, 9: 0.3},
    "inset": {2: 0.8},
}


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which of the model's answers become rejected ones."""

    # The most of an answer's attention to pictures that may lie on the true one; None: as published, by the number of
    # pictures: 0.8 to 0.6 in a sequence, 0.7 to 0.3 in a grid, 0.8 of an inset.
    most_on_target: float | None = None
    # The perplexity of an answer, at least and at most. As published at least; the paper tells no most.
    least_perplexity: float = 1.1
    most_perplexity: float = math.inf
    # The longer of the two answers has at most so many times the words of the other one. The paper says that lengths
    # are held near each other, and not how near: twice as long is a matter of taste, four times another kind of answer.
    longer: float = 4.0
    # The least share of words that turning one answer into the other takes. The paper tells none: with a tenth, one
    # word of ten is another one.
    least_edited: float = 0.1

    def __post_init__(self):
        """Checks the numbers."""
        if self.most_on_target is not None and not 0 < self.most_on_target <= 1:
            raise ValueError(f"selection.most_on_target must be above 0 and at most 1, got {self.most_on_target}")
        if not self.least_perplexity <= self.most_perplexity:
            raise ValueError(
                f"selection.least_perplexity {self.least_perplexity} is above most_perplexity {self.most_perplexity}"
            )
        if self.longer < 1 or not 0 <= self.least_edited <= 1:
            raise ValueError(
                "selection.longer must be at least 1 and selection.least_edited from 0 to 1, got "
                f"{self.longer} and {self.least_edited}"
            )


class Said(NamedTuple):
    """What the model said to a composed question, or why it was not asked."""

    text: str | None
    ended: bool
    perplexity: float | None  # of what was said, by the model itself
    on_target: float | None  # the share of the attention to all pictures that the true one had
    fault: str | None  # why nothing was asked


def why_not(said: Said, chosen: str, form: str, count: int, selection: Selection) -> str | None:
    """Returns why an answer is not to be rejected, None if it is.

    Args:
      said: the answer.
      chosen: the answer to prefer.
      form: how the pictures were composed.
      count: how many they are.
      selection: `Selection`.
    """
    if said.fault is not None:
        return said.fault
    fault = find_fault(said.text, others=[chosen], ended=said.ended, filters=("empty", "equal"))
    if fault is not None:
        return f"answer_{fault}"
    most = MOST_ON_TARGET[form][count] if selection.most_on_target is None else selection.most_on_target
    if said.on_target > most:
        return "looks_at_target"
    if not selection.least_perplexity < said.perplexity <= selection.most_perplexity:
        return "perplexity"
    one, other = chosen.split(), said.text.split()
    if max(len(one), len(other)) > selection.longer * min(len(one), len(other)):
        return "length_ratio"
    if edit_distance(one, other) < selection.least_edited * max(len(one), len(other)):
        return "edit_distance"
    return None


def edit_distance(one, other) -> int:
    """Returns how many items of a sequence are put in, taken out or exchanged to make another one of it."""
    before = list(range(len(other) + 1))
    for row, item in enumerate(one, 1):
        now = [row]
        for column, wanted in enumerate(other, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (item != wanted)))
        before = now
    return before[-1]
