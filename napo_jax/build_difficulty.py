"""Tells how hard rows are: `python -m napo_jax.build_difficulty --config configs/mfpo7b.py --input FILES --output DIR`.

The model answers each row's question several times, drawn anew; the more the answers differ in meaning, the harder the
row is to it. The column `difficulty` has their semantic entropy, for `--data.curriculum thirds`; `drawn` the answers.
The same command, given again, goes on where it was.
"""

import contextlib
import dataclasses
import functools
import json

import jax
import numpy as np
import pyarrow as pa

from napo_jax.bias.inputs import write_output
from napo_jax.bias.masks import Recipe
from napo_jax.bias.work import Work
from napo_jax.build_bias import say
from napo_jax.command import exit_with_one_line
from napo_jax.config import Config, parse
from napo_jax.data.sources import DataError, read_columns
from napo_jax.decoding import Decoding
from napo_jax.journal import exit_when_stopped, raise_if_asked
from napo_jax.meaning import ALIKE, semantic_entropy
from napo_jax.metrics import Console
from napo_jax.pieces import read_manifest, write_durably, write_manifest
from napo_jax.preemption import StopSignal
from napo_jax.processes import together
from napo_jax.progress import wait_until

SUMMARY = "build/difficulty.json"
_FIELDS = [pa.field("difficulty", pa.float64()), pa.field("drawn", pa.list_(pa.string()))]


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's own options."""

    # Parquet files of preferences: paths, folders or globs, local or gs://.
    input: tuple[str, ...] = ()
    # The folder for the pieces and the files with the difficulty beside their rows. Local or gs://.
    output: str | None = None
    # How many answers are drawn for a row.
    answers: int = 8
    # How they are drawn.
    decoding: Decoding = dataclasses.field(default_factory=lambda: Decoding(temperature=1.0, max_tokens=64))
    # The share of words that two answers of one meaning have in common. It is looked at when the files are written:
    # answers are not drawn again.
    alike: float = ALIKE
    # The first so many rows alone, to try things out; without it the same command goes on with the rest.
    limit: int | None = None
    # Say what would be done, and do nothing.
    dry_run: bool = False
    # Prompts that are answered at a time on each device of mesh.data x mesh.fsdp.
    slots: int = 8
    # Answers that are written at a time: as many may be lost when the process is killed.
    piece: int = 256
    # Whether this is one of several processes that work together, one for each host. Each has a model of its own.
    distributed: bool = False

    def __post_init__(self):
        """Checks the numbers."""
        for name in ("limit", "slots", "piece"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
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


def build(config: Config, options: Options, console=None):
    """Draws the answers, or goes on with them; returns the summary, None where another process writes it."""
    if not options.input or options.output is None:
        raise ValueError("say what to read and where to write: --input pairs/*.parquet --output measured/")
    console = console or Console()
    recipes = dict.fromkeys(options.names, Recipe())
    decoding, limit = options.decoding, options.limit
    work = Work(config, options.input, options.output, recipes, decoding, limit=limit, piece=options.piece)
    for file in work.inputs:
        if taken := {field.name for field in _FIELDS} & set(read_columns(file.path)):
            raise DataError(f"{file.path} has a column {min(taken)} already; drop it there")
    console.note(f"model    {work.source}")
    console.note(f"rows     {work.rows}, {options.answers} answers each; {work.count_missing()} answers to go")
    console.note(f"output   {work.folder}")
    if options.dry_run:
        return None
    written = {"rows": work.rows, "alike": options.alike}
    files = [work.inputs[number].path.name for number in work.written_files]
    there = all((work.folder / name).exists() for name in (*files, SUMMARY))
    if there and not work.count_missing() and work.manifest.get("written") == written:
        console.note(f"all of that is done: {work.folder}")
        return json.loads((work.folder / SUMMARY).read_text())
    with StopSignal(alone=True) as stop:
        check = functools.partial(raise_if_asked, stop, "what was said is kept")
        if work.count_missing():
            say(work, config, options, console, check)
            wait_until(work.is_done, check)
        if jax.process_index() > 0:
            wait_until(lambda: read_manifest(work.books, {}).get("written") == written, check)
            return None
    summary = _finish(work, options, written)
    console.note(
        f"{summary['measured']} of {summary['rows']} rows measured; thirds end at {summary['thirds'][0]:.3f} and "
        f"{summary['thirds'][1]:.3f} nats; {summary['sure']} rows have one answer alone"
    )
    console.note(f"wrote {work.folder}")
    return summary


def _finish(work, options, written):
    """Writes the files; returns what there is to say of all rows."""
    found = []
    for number in work.written_files:

        def made(row, _, number=number):
            lines = [work.lines[number, row, name] for name in options.names]
            if any(line.why is not None for line in lines):
                return {"difficulty": None, "drawn": None}
            texts = [line.text for line in lines]
            found.append(semantic_entropy(texts, options.alike))
            return {"difficulty": found[-1], "drawn": texts}

        write_output(work.inputs[number], work.folder, work.wanted(number), _FIELDS, made)
    thirds = [float(np.quantile(found, share)) for share in (1 / 3, 2 / 3)] if found else [0.0, 0.0]
    summary = {"rows": work.rows, "measured": len(found), "thirds": thirds, "sure": sum(value == 0 for value in found)}
    write_durably(work.folder / SUMMARY, json.dumps(summary, indent=1))
    write_manifest(work.books, read_manifest(work.books, work.settings)["settings"], written)
    return summary


def main(argv=None):
    """Runs the command."""
    config, options = parse(Options, argv, description=__doc__)
    with together() if options.distributed else contextlib.nullcontext(), exit_when_stopped():
        build(config, options)


if __name__ == "__main__":
    exit_with_one_line(main)
