"""Builds biased answers: `python -m napo_jax.build_bias --config configs/llava7b.py --input FILES --output DIR`.

Each row of some parquet files of preferences is answered with the picture taken away, `question_only`, and with the
question taken away, `image_only`. The same command, given again, goes on where it was.
"""

import dataclasses
from typing import Literal

from napo_jax.bias.filters import FILTERS
from napo_jax.bias.finish import PAGE, finish
from napo_jax.bias.inputs import SUFFIXES
from napo_jax.bias.masks import Recipe
from napo_jax.bias.work import Work
from napo_jax.building import RowwiseOptions, run_command, run_job
from napo_jax.command import exit_with_one_line
from napo_jax.config import Config, parse
from napo_jax.decoding import Decoding


@dataclasses.dataclass(frozen=True)
class Options(RowwiseOptions):
    """The command's own options."""

    # How the picture is taken away for question_only: no_image, blank, white, black, mean, noise, or another image
    # variant; the question is kept.
    image_mask: str = "no_image"
    # How the question is taken away for image_only: empty or generic; the picture is kept.
    question_mask: str = "empty"
    # More answers to the question about a changed picture, each a name and an image mask: noisy diffusion.
    also: dict[str, str] = dataclasses.field(default_factory=dict)
    # How answers are decoded.
    decoding: Decoding = dataclasses.field(default_factory=lambda: Decoding(beams=3, max_tokens=1024))
    # Which faults take an answer out. They are looked for when the files are written: answers are not made again.
    filters: tuple[Literal["empty", "equal", "cut", "repeats"], ...] = FILTERS
    # Prompts that are answered at a time on each device of mesh.data x mesh.fsdp.
    slots: int = 8
    # Answers that are written at a time: as many may be lost when the process is killed.
    piece: int = 64

    def __post_init__(self):
        """Checks the numbers and the masks."""
        super().__post_init__()
        if taken := sorted({"question_only", "image_only"} & self.also.keys()):
            raise ValueError(f"also names {taken[0]}, which is built anyway; choose another name")
        columns = [f"{name}{suffix}" for name in self.recipes for suffix in SUFFIXES]  # raises if a mask is not known
        if twice := sorted({column for column in columns if columns.count(column) > 1}):
            raise ValueError(f"also gives two columns the name {twice[0]}; choose another name")

    @property
    def recipes(self) -> dict[str, Recipe]:
        """How the prompt of each answer is made."""
        return {
            "question_only": Recipe(image=self.image_mask),
            "image_only": Recipe(question=self.question_mask),
        } | {name: Recipe(image=mask) for name, mask in self.also.items()}


class Job:
    """Some files whose rows get biased answers."""

    def __init__(self, config: Config, options: Options):
        """Looks at the files, the model and what was said so far; raises one line if something cannot be used."""
        self.options, self.work = options, (work := Work(config, options, options.recipes))
        self.folder, self.books, self.settings, self.manifest = work.folder, work.books, work.settings, work.manifest
        self.count_missing, self.build = work.count_missing, work.say
        self.written = {"rows": work.rows, "filters": sorted(options.filters)}
        self.summary, self.files = work.books / "report.json", [*work.files, work.folder / PAGE]

    def plan(self):
        """Yields what a person wants to read before it starts."""
        work, decoding, files = self.work, self.options.decoding, len(self.work.inputs)
        yield f"model    {work.source}"
        for name, recipe in work.recipes.items():
            yield f"answers  {name}: {recipe}; prompts of up to {work.rooms[name]} tokens"
        how = f"{decoding.beams} beams" if decoding.beams > 1 else "drawn" if decoding.temperature else "greedy"
        yield f"decoding {how}, {decoding.max_tokens} tokens at most"
        yield f"rows     {work.rows} in {files} file{'s' if files > 1 else ''}; {work.count_missing()} answers to go"

    def finish(self) -> dict:
        """Writes the files with their answers, and the report; returns its summary."""
        return finish(self.work, self.options.filters)

    def says(self, counts):
        """Yields what there is to say of the answers."""
        for name, answers in counts["answers"].items():
            why = "".join(f", {fault} {count}" for fault, count in answers["faults"].items())
            yield f"{name}: {answers['kept']} of {answers['rows']} kept{why}"
        yield f"wrote {self.folder}; see {self.folder / PAGE}"


def build(config: Config, options: Options, console=None):
    """Builds the answers, or goes on with them; returns the report's summary, None where another process writes it."""
    return run_job(Job, config, options, console)


def main(argv=None):
    """Runs the command."""
    run_command(build, *parse(Options, argv, description=__doc__))


if __name__ == "__main__":
    exit_with_one_line(main)
