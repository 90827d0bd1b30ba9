"""Evaluates on a benchmark: `answer` asks a model, `score` makes numbers of its answers, `compare` holds two together.

`judge` asks whoever rates answers where a benchmark has that, and `unpack` lays out Object HalBench's pictures.

    python -m napo_jax.evaluate answer --benchmark pope --data POPE --images val2014 --checkpoint DIR --answers a.jsonl
    python -m napo_jax.evaluate score --benchmark pope --data POPE --answers a.jsonl --out a.json
    python -m napo_jax.evaluate compare a.json b.json

They meet in files alone, so that answers of any other code can be scored, and scores need no model.
"""

import contextlib
import dataclasses
import sys
from typing import Annotated

import tyro
from etils import epath

from napo_jax.command import exit_with_one_line, read_flags
from napo_jax.evals import chair
from napo_jax.evals import compare as comparison
from napo_jax.evals.answers import fingerprint, read_object, read_rows, row_files, strict_json
from napo_jax.evals.benchmarks import Asked
from napo_jax.pieces import BOOKS, digest, make_room, read_manifest, write_durably
from napo_jax.processes import together

_MADE_BY = ("model", "weights", "dtype", "decoding", "template", "image_rule")  # of answers, that go into their score


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreOptions(Asked):
    """Turns a file of answers into numbers, and prints them. What is asked is told as it was told to `answer`."""

    # The answers: a file, a folder or a glob, in our layout or in that of the benchmark's own scripts.
    answers: str
    # The file of numbers to write, for `compare`.
    out: str | None = None
    # How answers are read and counted, where sources differ: see docs/evaluation.md.
    variant: str | None = None
    # The file of a judge's replies, where there is a judge.
    replay: str | None = None


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Prints two files of numbers beside each other, with 95% intervals by a paired bootstrap."""

    # The two files that `score` has written.
    runs: Annotated[tuple[str, str], tyro.conf.Positional]
    # Times that the questions are drawn again, and the seed of the drawing.
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self):
        """Checks the number of resamples."""
        if self.resamples < 1:
            raise ValueError(f"resamples must be at least 1, got {self.resamples}")


@dataclasses.dataclass(frozen=True)
class UnpackOptions:
    """Writes the pictures that Object HalBench's question file holds to a folder."""

    # The folder of the benchmark's own files.
    data: str
    # The folder to write to: what `answer` takes as --images.
    images: str


def score(options: ScoreOptions) -> dict:
    """Returns the numbers, for JSON, with all that `compare` needs and, where `answer` has said it, the model."""
    rows, asked = read_rows(options.answers), options.questions()
    made_by = _read_books(options.answers)
    scored = options.apply(options.module.score, rows, variant=options.variant, replay=options.replay)
    about = {"benchmark": options.module.NAME, "questions": fingerprint(asked), **options.size(asked)}
    return {**about, **made_by, **scored}


def _read_books(answers):
    """Returns how answers were made, if they are one file and just as `answer` has written it."""
    file, books = epath.Path(answers), epath.Path(f"{answers}{BOOKS}")
    manifest = read_manifest(books, {}) if file.is_file() else {}
    if not manifest:
        return {}
    if manifest.get("written") != {"answers": digest(file.read_bytes())}:
        return {"note": f"{answers} is not the file that {books} wrote, so model, weights and decoding are left out"}
    return {name: manifest["settings"][name] for name in _MADE_BY if name in manifest["settings"]}


def as_text(scored) -> str:
    """Renders numbers for a terminal, each with what it is a ratio of where that is one pair of counts."""
    lines = []
    for name in ("benchmark", "prompts", "variant", "model", "dtype", "judge", "note", "warning"):
        lines += [f"{name:<24}{scored[name]}"] if name in scored else []
    for name, value in scored.items():
        if isinstance(value, int | float):
            pair = scored["counts"].get(name)
            of = "{:g}/{:g}".format(*pair) if isinstance(pair, list) else ""
            lines.append(f"{name:<24}{value:>8.2f}  {of}".rstrip())
    return "\n".join(lines)


def _answer(argv):
    from napo_jax.answering import AnswerOptions, answer  # heavy, and scores need none of it

    options = read_flags(AnswerOptions, argv, description=AnswerOptions.__doc__)
    with together() if options.distributed else contextlib.nullcontext():
        answer(options)


def _score(argv):
    options = read_flags(ScoreOptions, argv, description=ScoreOptions.__doc__)
    out = None if options.out is None else epath.Path(options.out)
    if out is not None:
        read = [*row_files(options.answers), *([] if options.replay is None else [epath.Path(options.replay)])]
        if out.resolve() in [file.resolve() for file in read]:
            raise ValueError(f"{out} is what numbers are made of, and would be lost; name another --out")
        make_room(out)
    scored = score(options)
    if out is not None:
        write_durably(out, strict_json(scored))  # before anything is printed, for who reads that may go at any time
    print(as_text(scored))
    if out is not None:
        print(f"wrote {out}")


def _compare(argv):
    options = read_flags(CompareOptions, argv, description=CompareOptions.__doc__)
    compared = comparison.compare(*map(_read_run, options.runs), resamples=options.resamples, seed=options.seed)
    print(comparison.as_text(compared, options.runs))


def _read_run(path):
    """Returns what `score` wrote to a file."""
    if not epath.Path(path).exists():
        raise ValueError(f"{path} is not there; write it with: python -m napo_jax.evaluate score ... --out {path}")
    run = read_object(path, "write it again with `score`")
    comparison.check(run, path)
    return run


def _judge(argv):
    from napo_jax.journal import exit_when_stopped
    from napo_jax.judging import JudgeOptions, judge

    options = read_flags(JudgeOptions, argv, description=JudgeOptions.__doc__)
    with exit_when_stopped():
        judge(options)


def _unpack(argv):
    options = read_flags(UnpackOptions, argv, description=UnpackOptions.__doc__)
    print(f"wrote {chair.write_pictures(options.data, options.images)} pictures to {options.images}")


_COMMANDS = {"answer": _answer, "judge": _judge, "unpack": _unpack, "score": _score, "compare": _compare}


def main(argv=None):
    """Runs the command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--compare"]:  # as a flag too
        argv[0] = "compare"
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\nEach has a --help of its own.")
        return
    if not argv or argv[0] not in _COMMANDS:
        raise ValueError(f"say what to do: {', '.join(_COMMANDS)}; got {argv[0] if argv else 'nothing'}")
    _COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    exit_with_one_line(main)
