"""Tells how hard rows are: `python -m napo_jax.build_difficulty --config configs/mfpo7b.py --input FILES --output DIR`.

The model answers each row's question several times, drawn anew; the more the answers differ in meaning, the harder the
row is to it. The column `difficulty` has their semantic entropy, for `--data.curriculum thirds`; `drawn` the answers.
The same command, given again, goes on where it was.
"""

import dataclasses

import numpy as np
import pyarrow as pa

from napo_jax.bias.inputs import write_output
from napo_jax.bias.masks import Recipe
from napo_jax.bias.work import Work
from napo_jax.building import RowwiseOptions, run_command, run_job
from napo_jax.command import exit_with_one_line
from napo_jax.config import Config, parse
from napo_jax.data.sources import DataError, read_columns
from napo_jax.decoding import Decoding
from napo_jax.meaning import ALIKE, semantic_entropy

_FIELDS = [pa.field("difficulty", pa.float64()), pa.field("drawn", pa.list_(pa.string()))]


@dataclasses.dataclass(frozen=True)
class Options(RowwiseOptions):
    """The command's own options."""

    # How many answers are drawn for a row.
    answers: int = 8
    # How they are drawn.
    decoding: Decoding = dataclasses.field(default_factory=lambda: Decoding(temperature=1.0, max_tokens=64))
    # The share of words that two answers of one meaning have in common. It is looked at when the files are written:
    # answers are not drawn again.
    alike: float = ALIKE
    # Prompts that are answered at a time on each device of mesh.data x mesh.fsdp.
    slots: int = 8

    def __post_init__(self):
        """Checks the numbers."""
        super().__post_init__()
        if self.answers < 2:
            raise ValueError(f"answers must be at least 2, or none can differ, got {self.answers}")
        if not self.decoding.temperature:
            raise ValueError("decoding.temperature must be above 0: without one all answers to a row are the same")
        if not 0 < self.alike <= 1:
            raise ValueError(f"alike must be above 0 and at most 1, got {self.alike}")

    @property
    def names(self) -> list[str]:
        """The names of the answers."""
        return [f"drawn_{number}" for number in range(self.answers)]


class Job:
    """Some files whose rows are measured."""

    def __init__(self, config: Config, options: Options):
        """Looks at the files, the model and what was said so far; raises one line if something cannot be used."""
        self.options, self.work = options, (work := Work(config, options, dict.fromkeys(options.names, Recipe())))
        self.folder, self.books, self.settings, self.manifest = work.folder, work.books, work.settings, work.manifest
        self.count_missing, self.build = work.count_missing, work.say
        for file in work.inputs:
            if taken := {field.name for field in _FIELDS} & set(read_columns(file.path)):
                raise DataError(f"{file.path} has a column {min(taken)} already; drop it there")
        self.written = {"rows": work.rows, "alike": options.alike}
        self.summary, self.files = work.books / "difficulty.json", work.files

    def plan(self):
        """Yields what a person wants to read before it starts."""
        yield f"model    {self.work.source}"
        yield f"rows     {self.work.rows}, {self.options.answers} answers each; {self.count_missing()} answers to go"

    def finish(self) -> dict:
        """Writes the files; returns what there is to say of all rows."""
        work, found = self.work, []
        for number in work.written_files:

            def made(row, _, number=number):
                lines = [work.lines[number, row, name] for name in work.recipes]
                if any(line.why is not None for line in lines):
                    return {"difficulty": None, "drawn": None}
                texts = [line.text for line in lines]
                found.append(semantic_entropy(texts, self.options.alike))
                return {"difficulty": found[-1], "drawn": texts}

            write_output(work.inputs[number], work.folder, work.wanted(number), _FIELDS, made)
        thirds = [float(np.quantile(found, share)) for share in (1 / 3, 2 / 3)] if found else [0.0, 0.0]
        sure = sum(value == 0 for value in found)
        return {"rows": work.rows, "measured": len(found), "thirds": thirds, "sure": sure}

    def says(self, counts):
        """Yields what there is to say of the rows."""
        first, second = counts["thirds"]
        yield (
            f"{counts['measured']} of {counts['rows']} rows measured; thirds end at {first:.3f} and {second:.3f} nats; "
            f"{counts['sure']} rows have one answer alone"
        )
        yield f"wrote {self.folder}"


def build(config: Config, options: Options, console=None):
    """Draws the answers, or goes on with them; returns the summary, None where another process writes it."""
    return run_job(Job, config, options, console)


def main(argv=None):
    """Runs the command."""
    run_command(build, *parse(Options, argv, description=__doc__))


if __name__ == "__main__":
    exit_with_one_line(main)
