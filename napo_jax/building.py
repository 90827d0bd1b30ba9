"""What the commands that build do alike: their common options, and a job from its plan to its last line."""

import contextlib
import dataclasses
import functools
import json
from typing import ClassVar

import jax

from napo_jax.journal import TERMINATED, StoppedError, exit_when_stopped
from napo_jax.metrics import Console
from napo_jax.pieces import read_manifest, write_durably, write_manifest
from napo_jax.preemption import StopSignal
from napo_jax.processes import together
from napo_jax.progress import wait_until
from napo_jax.storage import check_writable


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """The options of every command that builds."""

    # Parquet files of preferences: paths, folders or globs, local or gs://.
    input: tuple[str, ...] = ()
    # The folder for pieces on the way, the input's files with what is built beside their rows, and a report. Local or
    # gs://.
    output: str | None = None
    # Say what would be done, and do nothing.
    dry_run: bool = False
    # Rows, or answers, that are written at a time: as many may be lost when the process is killed.
    piece: int = 256

    distributed: ClassVar[bool] = False  # no flag of a command that takes one process

    def __post_init__(self):
        """Checks the numbers of things at a time."""
        for name in ("limit", "slots", "batch", "piece"):
            if (value := getattr(self, name, None)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclasses.dataclass(frozen=True)
class RowwiseOptions(BuildOptions):
    """Those of a command that builds each row by itself: a few of them first, or shared by several processes."""

    # The first so many rows alone, to try things out; without it the same command goes on with the rest.
    limit: int | None = None
    # Whether this is one of several processes that work together, one for each host. Each has a model of its own.
    distributed: bool = False

    @property
    def part(self) -> tuple[int, int]:
        """(i, n) where this process, number i, is to do every n-th."""
        return (jax.process_index(), jax.process_count()) if self.distributed else (0, 1)


def run_job(make, config, options: BuildOptions, console=None):
    """Builds, or goes on where it stopped, and writes the files.

    A job has these attributes and methods:
      folder, books: epath.Paths of all that is written, and in there of the manifest and the pieces.
      settings, manifest: all that decides what is found, as `pieces.read_manifest` takes it, and what that has given.
      files, summary: epath.Paths of what is there in the end; `summary` has the counts.
      written: what the manifest then says of them, a dict for JSON.
      plan(): lines to read before it starts.
      count_missing(): how much is left to do, by whatever process.
      build(console, check): does this process's share; calls `check` often, which raises to end it.
      finish(): writes `files` and returns the counts, a dict for JSON.
      says(counts): lines about them.

    Args:
      make: (config, options) -> the job; raises one line if something cannot be used.
      config: the `Config`.
      options: the command's own.
      console: a `Console`; None for one on the standard output.

    Returns:
      the counts; None of a dry run, and where another process writes them.
    """
    if not options.input or options.output is None:
        raise ValueError("say what to read and where to write: --input pairs/*.parquet --output built/")
    console, job = console or Console(), make(config, options)
    for line in (*job.plan(), f"output   {job.folder}"):
        console.note(line)
    if options.dry_run:
        return None
    there = all(file.exists() for file in (*job.files, job.summary))
    if there and not job.count_missing() and job.manifest.get("written") == job.written:
        console.note(f"all of that is done: {job.folder}")
        return json.loads(job.summary.read_text())
    check_writable(job.folder)
    with StopSignal(alone=True) as stop:
        check = functools.partial(raise_if_asked, stop)
        with contextlib.closing(console):
            if job.count_missing():
                job.build(console, check)
                wait_until(lambda: not job.count_missing(), check)
            if jax.process_index() > 0:
                wait_until(lambda: read_manifest(job.books, {}).get("written") == job.written, check)
                return None
        job.books.mkdir(parents=True, exist_ok=True)  # it may be that nothing was to be found
        counts = job.finish()  # who is asked to stop now ends when that is done
        write_durably(job.summary, json.dumps(counts, indent=1))
        manifest = read_manifest(job.books, job.settings) or {"settings": job.settings}
        write_manifest(job.books, manifest["settings"], job.written)
    for line in job.says(counts):
        console.note(line)
    return counts


def raise_if_asked(stop):
    """Raises StoppedError if a `StopSignal` says that the process was asked to end."""
    if stop.got:
        raise StoppedError("asked to stop: what is done is kept, and the same command goes on from there", TERMINATED)


def run_command(build, config, options: BuildOptions):
    """Runs a command's `build`, alone or as one of several processes, and ends as it was asked to."""
    with together() if options.distributed else contextlib.nullcontext(), exit_when_stopped():
        build(config, options)
