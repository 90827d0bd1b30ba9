"""Builds biased answers: `python -m napo_jax.build_bias --config configs/llava7b.py --input FILES --output DIR`.

Each row of some parquet files of preferences is answered with the picture taken away, `question_only`, and with the
question taken away, `image_only`. The same command, given again, goes on where it was.
"""

import contextlib
import dataclasses
import functools
import json
from typing import Literal

import jax

from napo_jax.bias.filters import FILTERS
from napo_jax.bias.finish import PAGE, SUMMARY, finish
from napo_jax.bias.inputs import SUFFIXES
from napo_jax.bias.masks import Recipe
from napo_jax.bias.work import Work
from napo_jax.command import exit_with_one_line
from napo_jax.config import Config, parse
from napo_jax.decoding import Decoding
from napo_jax.journal import exit_when_stopped, raise_if_asked
from napo_jax.metrics import Console
from napo_jax.pieces import Line, read_manifest, write_manifest
from napo_jax.preemption import StopSignal
from napo_jax.processes import together
from napo_jax.progress import AnswerProgress, wait_until
from napo_jax.sharding import make_mesh
from napo_jax.speaker import load_speaker
from napo_jax.storage import check_writable


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's own options."""

    # Parquet files of preferences: paths, folders or globs, local or gs://.
    input: tuple[str, ...] = ()
    # The folder for the pieces, the files with the answers beside their rows, and the report. Local or gs://.
    output: str | None = None
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
    # The first so many rows alone, to try things out; without it the same command goes on with the rest.
    limit: int | None = None
    # Say what would be done, and do nothing.
    dry_run: bool = False
    # Prompts that are answered at a time on each device of mesh.data x mesh.fsdp.
    slots: int = 8
    # Answers that are written at a time: as many may be lost when the process is killed.
    piece: int = 64
    # Whether this is one of several processes that build together, one for each host. Each has a model of its own.
    distributed: bool = False

    def __post_init__(self):
        """Checks the numbers and the masks."""
        for name in ("limit", "slots", "piece"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
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


def build(config: Config, options: Options, console=None):
    """Builds the answers, or goes on with them; returns the report's summary, None where another process writes it."""
    if not options.input or options.output is None:
        raise ValueError("say what to read and where to write: --input rlaifv/*.parquet --output biased/")
    console = console or Console()
    decoding, limit = options.decoding, options.limit
    work = Work(config, options.input, options.output, options.recipes, decoding, limit=limit, piece=options.piece)
    written = {"rows": work.rows, "filters": sorted(options.filters)}
    for line in _plan(work, decoding):
        console.note(line)
    if options.dry_run:
        return None
    files = [work.inputs[number].path.name for number in work.written_files]
    there = all((work.folder / name).exists() for name in (*files, SUMMARY, PAGE))
    if there and not work.count_missing() and work.manifest.get("written") == written:
        console.note(f"all of that is done: {work.folder / PAGE}")
        return json.loads((work.folder / SUMMARY).read_text())
    check_writable(work.folder)
    with StopSignal(alone=True) as stop:
        check = functools.partial(raise_if_asked, stop, "what was said is kept")
        if work.count_missing():
            say(work, config, options, console, check)
            wait_until(work.is_done, check)
        if jax.process_index() > 0:
            wait_until(lambda: read_manifest(work.books, {}).get("written") == written, check)
            return None
    summary = finish(work, written, options.filters)
    for name, answers in summary["answers"].items():
        why = "".join(f", {fault} {count}" for fault, count in answers["faults"].items())
        console.note(f"{name}: {answers['kept']} of {answers['rows']} kept{why}")
    console.note(f"wrote {work.folder}; see {work.folder / PAGE}")
    return summary


def _plan(work, decoding):
    """Yields what a person wants to read before it starts."""
    yield f"model    {work.source}"
    for name, recipe in work.recipes.items():
        yield f"answers  {name}: {recipe}; prompts of up to {work.rooms[name]} tokens"
    how = f"{decoding.beams} beams" if decoding.beams > 1 else "drawn" if decoding.temperature else "greedy"
    yield f"decoding {how}, {decoding.max_tokens} tokens at most"
    files = len(work.inputs)
    yield f"rows     {work.rows} in {files} file{'s' if files > 1 else ''}; {work.count_missing()} answers to go"
    yield f"output   {work.folder}"


def say(work, config, options, console, check):
    """Says this process's share of the answers.

    Args:
      work: the `Work`.
      config: the `Config`.
      options: with `decoding`, `slots` and `distributed`.
      console: a `Console`.
      check: called often; raises if the process was asked to end.
    """
    share = (jax.process_index(), jax.process_count()) if options.distributed else (0, 1)
    # Each process has a mesh of its own devices: none waits for another's longest answer.
    mesh = make_mesh(config.mesh, jax.local_devices())
    speaker = load_speaker(work.source, mesh, dtype=config.model.dtype, attention=config.model.attention)
    work.settings["weights"] = speaker.digest
    if jax.process_index() == 0 and not work.manifest:
        write_manifest(work.books, work.settings)
    # This also says if weights are not those it began with.
    wait_until(lambda: read_manifest(work.books, work.settings), check)
    try:
        for name in work.recipes:
            if not (missing := sum(map(len, work.missing(name, share).values()))):
                continue
            room = work.rooms[name]
            generator = speaker.generator(options.decoding, room=room, slots=options.slots)
            size = generator.kept_bytes / mesh.size / 2**30
            console.note(
                f"{name}: prompts of up to {room} tokens, {generator.slots} at a time, {size:.2f} GiB a device for them"
            )
            before, progress = len(work.lines), AnswerProgress(console, missing)
            for answer in generator(work.prompts(name, room, share)):
                line = Line.of(*answer.key, name, speaker.spell(answer.ids), answer)
                work.keep(line)
                progress(len(work.lines) - before, line.tokens)
                check()
    finally:
        work.flush()
        console.close()


def main(argv=None):
    """Runs the command."""
    config, options = parse(Options, argv, description=__doc__)
    with together() if options.distributed else contextlib.nullcontext(), exit_when_stopped():
        build(config, options)


if __name__ == "__main__":
    exit_with_one_line(main)
