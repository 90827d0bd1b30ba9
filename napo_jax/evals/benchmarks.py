"""A benchmark by its name, and what of it is asked: what every command about one is told."""

import dataclasses
import importlib
import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from napo_jax.evals.answers import Question


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked."""

    # Whose questions.
    benchmark: Literal["vlind", "chair", "amber", "pope", "mmhal", "world"]
    # The folder of the benchmark's own files.
    data: str
    # The wording, where sources differ: see docs/evaluation.md.
    prompts: str | None = None
    # The part of AMBER.
    part: str | None = None
    # The splits of POPE.
    splits: tuple[str, ...] | None = None

    @property
    def module(self):
        """The benchmark's module, with `NAME`, `questions` and `score`."""
        package = "napo_jax.world.exam" if self.benchmark == "world" else f"napo_jax.evals.{self.benchmark}"
        return importlib.import_module(package)

    def questions(self) -> list[Question]:
        """Returns all that is asked, in its order; raises if that is nothing, or two questions have one key."""
        asked = self.apply(self.module.questions)
        if not asked:
            raise ValueError(f"{self.data} has no question of {self.benchmark}; fetch its files again")
        if repeated := [key for key, count in Counter(question.key for question in asked).items() if count > 1]:
            raise ValueError(
                f"{self.data} has {len(repeated)} questions of {self.benchmark} more than once (first "
                f"{repeated[0]!r}); fetch its files again"
            )
        return asked

    def size(self, asked: Sequence[Question]) -> dict[str, Any]:
        """Returns how large the benchmark is beside the published one, for its result.

        Args:
          asked: what `questions` returned.

        Returns:
          `size`, {what is counted: {"here": int, "published": the numbers that published files have}}; and `warning`,
          one line, where a number is none of those. Empty for what was never published.
        """
        sizes = self.module.sizes(asked, **({} if self.part is None else {"part": self.part}))
        size = {name: {"here": here, "published": list(published)} for name, (here, published) in sizes.items()}
        others = [
            f"{here:,} {name}, published are {' or '.join(f'{count:,}' for count in published)}"
            for name, (here, published) in sizes.items()
            if here not in published
        ]
        said = f"these numbers are not those of papers, for {self.data} has {'; '.join(others)}"
        return ({"size": size} if size else {}) | ({"warning": said} if others else {})

    def apply(self, function, *args, **options):
        """Calls a function of the module on the data.

        Args:
          function: `questions` or `score`.
          *args: what it takes behind the data.
          **options: what it may take besides, like the fields here; None for its own default.

        Returns:
          What it returns.

        Raises:
          ValueError: an option is given that the benchmark does not have.
        """
        options |= {name: getattr(self, name) for name in ("prompts", "part", "splits")}
        given = {name: value for name, value in options.items() if value is not None}
        if unknown := sorted(given.keys() - inspect.signature(function).parameters.keys()):
            raise ValueError(f"{self.benchmark} has no {unknown[0]}: leave it out")
        return function(self.data, *args, **given)
