"""A build from its plan to its last line, of a job that only writes down what it is told to do."""

import dataclasses
import io
import json
import os
import signal

import pytest
from etils import epath

from napo_jax import build_bias, build_composed, build_difficulty, build_ranked, build_regions, build_retrieved
from napo_jax.building import BuildOptions, RowwiseOptions, run_job
from napo_jax.journal import StoppedError
from napo_jax.metrics import Console
from napo_jax.pieces import read_manifest, write_manifest

COMMANDS = (build_bias, build_composed, build_difficulty, build_ranked, build_regions, build_retrieved)


class Job:
    """Builds three things, one of them a file."""

    settings, written = {"colour": "red"}, {"rows": 3}

    def __init__(self, config, options):
        self.did, self.folder = config, epath.Path(options.output)
        self.books, self.files = self.folder / "books", [self.folder / "a.parquet"]
        self.summary, self.manifest = self.books / "report.json", read_manifest(self.books, self.settings)

    def plan(self):
        """Yields a line."""
        yield "three things"

    def count_missing(self):
        """Returns how many of a, b and c are not there."""
        return 3 - sum((self.books / name).exists() for name in "abc")

    def build(self, console, check):
        """Makes them, one by one."""
        write_manifest(self.books, self.settings)
        for name in "abc":
            if not (self.books / name).exists():
                check()
                self.did.append(name)
                (self.books / name).touch()

    def finish(self):
        """Writes the file."""
        self.did.append("finish")
        assert self.books.exists()
        assert self.manifest.get("written") is None or not self.files[0].exists()
        self.files[0].touch()
        return {"things": 3}

    def says(self, counts):
        """Yields a line, when all is written."""
        assert read_manifest(self.books, self.settings)["written"] == self.written
        yield f"{counts['things']} things"


def run(folder, make=Job, **options):
    """Returns the counts, what was done, and what was said."""
    did, said = [], io.StringIO()
    counts = run_job(make, did, BuildOptions(input=("in",), output=str(folder), **options), Console(said))
    return counts, did, said.getvalue().splitlines()


def test_a_job_is_done_once(tmp_path):
    folder = tmp_path / "out"
    assert run(folder, dry_run=True) == (None, [], ["three things", f"output   {folder}"])
    assert not folder.exists()
    counts, did, said = run(folder)
    assert (counts, did) == ({"things": 3}, ["a", "b", "c", "finish"])
    assert said == ["three things", f"output   {folder}", "3 things"]
    assert json.loads((folder / "books" / "report.json").read_text()) == counts
    again, did, said = run(folder)
    assert (again, did, said[-1]) == (counts, [], f"all of that is done: {folder}")
    (folder / "a.parquet").unlink()
    assert run(folder)[:2] == (counts, ["finish"])


def test_who_is_asked_to_end_goes_on_later(tmp_path):
    class Asked(Job):
        def build(self, console, check):
            def asked():
                if self.did == ["a", "b"]:
                    os.kill(os.getpid(), signal.SIGTERM)
                check()

            super().build(console, asked)

    with pytest.raises(StoppedError, match="asked to stop: what is done is kept, and the same command goes on"):
        run(tmp_path / "out", Asked)
    assert run(tmp_path / "out")[:2] == ({"things": 3}, ["c", "finish"])


def test_what_is_read_and_written_is_asked_for_before_anything_else():
    for options in (BuildOptions(), BuildOptions(input=("in",)), BuildOptions(output="out")):
        with pytest.raises(ValueError, match="say what to read and where to write: --input"):
            run_job(None, None, options)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__.removeprefix("napo_jax."))
def test_every_command_checks_what_it_does_at_a_time(command):
    names = {field.name for field in dataclasses.fields(command.Options)}
    assert {"input", "output", "dry_run", "piece"} <= names
    assert ("distributed" in names) == issubclass(command.Options, RowwiseOptions)
    for name in names & {"limit", "slots", "batch", "piece", "rank", "longest_chosen"}:
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            command.Options(**{name: 0})
