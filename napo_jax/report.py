"""Makes one page of a run, with its curves, benchmarks and samples: `python -m napo_jax.report --workdir runs/a`.

It reads the run's files alone, while the run goes on or after it has ended in any way; no model and no device.
"""

import dataclasses
import math
import os
import reprlib
from collections import Counter
from typing import Any

from etils import epath

from napo_jax.command import exit_with_one_line, read_flags
from napo_jax.evals.answers import misfit, parse_json, read_object

_FIRST, _LAST = "before", "after"  # labels of evaluations
_MOST_STEPS = 2**53  # whole numbers beyond have no place on an axis
_DEEPEST = 50  # levels of a config or a result; no run writes as many


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's own options."""

    # The run's folder, local or gs://.
    workdir: str
    # The page to write; None: report.html in the workdir.
    output: str | None = None
    # The page's heading; None: what the workdir is called.
    title: str | None = None


@dataclasses.dataclass(frozen=True)
class Log:
    """The lines of metrics.jsonl or held_out.jsonl.

    Attributes:
      steps: of the lines, increasing.
      points: {metric: [(step, value)]}, the values that are numbers.
      not_finite: {metric: {what it was: how often}}.
      last: {metric: value}, the numbers of the last line.
    """

    steps: list[int]
    points: dict[str, list[tuple[int, float]]]
    not_finite: dict[str, Counter]
    last: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Run:
    """What the files of a run say.

    Attributes:
      workdir: epath.Path.
      metrics: the `Log` of training.
      held_out: the `Log` of the groups held out.
      config: what config.json says; empty without it.
      versions: what versions.json says; empty without it.
      stopped: what not_finite.json says, if that is what ended the run; else None.
      scores: {benchmark: {label: what `evaluate score` wrote}}; labels begin with "before" and end with "after".
      samples: the objects of samples.jsonl; None without the file.
      notes: sentences on what could not be read.
    """

    workdir: Any
    metrics: Log
    held_out: Log
    config: dict
    versions: dict
    stopped: dict | None
    scores: dict[str, dict[str, dict]]
    samples: list[dict] | None
    notes: list[str]


def write_report(workdir, output=None, title=None):
    """Writes the page of a run; whoever opens the file meanwhile finds the old page or the new one.

    Args:
      workdir: the run's folder, local or gs://.
      output: the file to write; None for report.html in the workdir.
      title: the page's heading; None for what the workdir is called.

    Returns:
      epath.Path of the page.

    Raises:
      ValueError: there is no run, or one of its files is damaged.
    """
    from napo_jax.pieces import make_room  # the command line is known to be right
    from napo_jax.report_page import write_page

    run = read_run(workdir)
    path = run.workdir / "report.html" if output is None else epath.Path(output)
    make_room(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        write_page(aside, run, title or _called(run.workdir))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _called(workdir):
    """Returns the name of a run by its folder; one that is called run like many is told by the folder that it is in."""
    workdir = workdir.resolve()
    return f"Run {workdir.parent.name}/{workdir.name}" if workdir.name == "run" else f"Run {workdir.name}"


def read_run(workdir) -> Run:
    """Reads the files of a run; raises one line for what is missing or damaged."""
    workdir = epath.Path(workdir)
    if not workdir.is_dir():
        raise ValueError(f"{workdir} is not there; name the workdir of a run")
    if not (workdir / "metrics.jsonl").exists():
        raise ValueError(f"{workdir} has no metrics.jsonl; name the workdir of a run of napo_jax.train")
    notes = []
    metrics = _read_log(workdir / "metrics.jsonl", notes)
    stopped = _read_if_there(workdir / "not_finite.json")
    step = stopped.get("step", 0)
    if not _is_step(step) or not isinstance(stopped.get("metrics", {}), dict):
        raise ValueError(f"{workdir / 'not_finite.json'} has no step and its metrics; move it away")
    if not stopped or step <= max(metrics.steps, default=0):
        stopped = None  # or the run has been past it since
    return Run(
        workdir,
        metrics,
        _read_log(workdir / "held_out.jsonl", notes),
        _read_if_there(workdir / "config.json"),
        _read_if_there(workdir / "versions.json"),
        stopped,
        _read_scores(workdir / "evals"),
        _read_samples(workdir / "samples.jsonl", notes),
        notes,
    )


def _read_lines(file, notes):
    """Yields (number, object) of the lines; a last line that was cut short is left out, and that is noted."""
    # As bytes: a line may be cut within a character, and its texts may hold other characters that end lines.
    *lines, rest = file.read_bytes().split(b"\n") if file.exists() else [b""]
    for number, line in enumerate([*lines, rest] if rest else lines, 1):
        try:
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError("no object")
        except ValueError:
            if number <= len(lines):
                raise ValueError(f"{file}, line {number}, is not a JSON object; mend the line or take it out") from None
            notes.append(f"The last line of {file.name} was cut short and is left out.")
            return
        yield number, row


def _read_log(file, notes) -> Log:
    """Reads a file of metrics; none of a file that is not there."""
    log = Log([], {}, {}, {})
    for number, row in _read_lines(file, notes):
        step, odd = row.pop("step", None), row.pop("not_finite", None) or {}
        if not _is_step(step) or (log.steps and step <= log.steps[-1]):
            step = reprlib.repr(step)
            raise ValueError(f"{file}, line {number}, has the step {step}; steps must be whole numbers that increase")
        if wrong := misfit(odd, {...: str}, "not_finite"):
            raise ValueError(f"{file}, line {number}, {wrong}; mend the line or take it out")
        log.steps.append(step)
        log.last.clear()
        for name, value in row.items():
            if value is not None and not is_number(value):
                raise ValueError(f"{file}, line {number}: {name} is {reprlib.repr(value)}, expected a number")
            value = None if value is None else as_float(value)
            if value is not None and math.isfinite(value):
                log.points.setdefault(name, []).append((step, value))
                log.last[name] = value
            else:
                what = odd.get(name, "nothing") if value is None else str(value)
                log.not_finite.setdefault(name, Counter())[what] += 1
    return log


def _read_samples(file, notes):
    """Reads samples; returns None if there is no file."""
    if not file.exists():
        return None
    samples = []
    for number, row in _read_lines(file, notes):
        texts = [row.get(name) for name in ("picture", "before", "after", "truth")]
        answers = row.get("answers", {})
        fits = isinstance(row.get("question"), str) and all(text is None or isinstance(text, str) for text in texts)
        if not fits or not isinstance(answers, dict) or not all(isinstance(text, str) for text in answers.values()):
            raise ValueError(
                f"{file}, line {number}, is no sample: question, picture, before, after and truth are texts, and "
                "answers is an object of texts"
            )
        samples.append(row)
    return samples


def is_number(value) -> bool:
    """Tells whether a value out of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_float(value) -> float:
    """Returns a number out of JSON; one of more digits than any float has is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _is_step(value):
    return type(value) is int and abs(value) < _MOST_STEPS


def _read_if_there(file) -> dict:
    """Reads a file of one JSON object; returns an empty one if there is no file."""
    if not file.exists():
        return {}
    remedy = "write it again or move it away"
    content = read_object(file, remedy)
    level = [content]
    for _ in range(_DEEPEST):
        level = [part for value in level for part in (value.values() if isinstance(value, dict) else value)]
        level = [value for value in level if isinstance(value, dict | list)]
    if level:
        raise ValueError(f"{file} nests deeper than {_DEEPEST} levels; {remedy}")
    return content


def _read_scores(folder):
    scores = {}
    labels = [label for label in folder.iterdir() if label.is_dir()] if folder.is_dir() else []
    for label in sorted(labels, key=lambda label: (label.name == _LAST, label.name != _FIRST, label.name)):
        for file in sorted(label.glob("*.json")):
            scores.setdefault(file.stem, {})[label.name] = _read_if_there(file)
    return scores


def main(argv=None):
    """Runs the command."""
    options = read_flags(Options, argv, description=__doc__)
    print(f"wrote {write_report(options.workdir, options.output, options.title)}")


if __name__ == "__main__":
    exit_with_one_line(main)
