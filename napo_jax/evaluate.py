"""Evaluates on a benchmark: `answer` asks a model, `score` makes numbers of its answers, `compare` holds two together.

    python -m napo_jax.evaluate answer --benchmark pope --data POPE --images val2014 --checkpoint DIR --answers a.jsonl
    python -m napo_jax.evaluate score --benchmark pope --data POPE --answers a.jsonl --out a.json
    python -m napo_jax.evaluate compare a.json b.json

The three meet in files alone, so that answers of any other code can be scored, and scores need no model.
"""

import dataclasses
import importlib
import inspect
import json
import math
import sys
from typing import Annotated, Literal

import tyro
from etils import epath

from napo_jax.config import exit_with_one_line, read_flags
from napo_jax.decoding import Decoding
from napo_jax.evals import compare as comparison
from napo_jax.evals.answers import fingerprint, read_rows
from napo_jax.pieces import BOOKS, write_durably
from napo_jax.sharding import MeshConfig

Benchmark = Literal["vlind", "chair", "amber", "pope", "mmhal", "world"]
_MADE_BY = ("model", "weights", "dtype", "decoding", "template", "image_rule")  # of answers, that go into their score


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """Asks a model all questions of a benchmark. The same command, given again, goes on where it was."""

    benchmark: Benchmark
    # The folder of the benchmark's own files.
    data: str
    # The file of answers to write, one JSON object a line.
    answers: str
    # A Hugging Face folder in any layout, or the workdir of a run.
    checkpoint: str
    # The folder that the names of pictures start from; by default that of the data.
    images: str | None = None
    # The wording, where sources differ: see docs/evaluation.md.
    prompts: str | None = None
    # The part of AMBER, or the splits of POPE, that is asked.
    part: str | None = None
    splits: tuple[str, ...] | None = None
    # Greedy by default; each table of a paper has its own.
    decoding: Decoding = dataclasses.field(default_factory=lambda: Decoding(max_tokens=1024))
    # The conversation around question and answer.
    template: Literal["llava_v1", "vicuna_v1"] = "llava_v1"
    # "pad" to a square in the mean colour, as LLaVA evaluates; "crop" the centre.
    image_rule: Literal["pad", "crop"] = "pad"
    # Type of weights and matrix products; by default bfloat16, and float32 on a CPU.
    dtype: Literal["bfloat16", "float32"] | None = None
    # Questions that are answered at a time on each device of mesh.data x mesh.fsdp.
    slots: int = 8
    # How the devices of a process are laid out.
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    # Whether this is one of several processes that answer together, one for each host.
    distributed: bool = False


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """Turns files of answers into numbers, and prints them."""

    benchmark: Benchmark
    # The folder of the benchmark's own files.
    data: str
    # The answers: a file, a folder or a glob, in our layout or in that of the benchmark's own scripts.
    answers: str
    # The file of numbers to write, for `compare`.
    out: str | None = None
    # The wording that the questions had, and the rule that answers are read by: see docs/evaluation.md.
    prompts: str | None = None
    variant: str | None = None
    # The part of AMBER, or the splits of POPE, that was asked.
    part: str | None = None
    splits: tuple[str, ...] | None = None
    # What a judge replied, where there is one.
    replay: str | None = None


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Prints two files of numbers beside each other, with 95% intervals by a paired bootstrap."""

    # The two files that `score` has written.
    runs: Annotated[tuple[str, str], tyro.conf.Positional]
    # Times that the questions are drawn again, and of what is drawn.
    resamples: int = 2000
    seed: int = 0


def find_questions(benchmark, data, **options):
    """Returns what a benchmark asks; options are those of its module's `questions`, None for its own default."""
    module = _module(benchmark)
    return module.questions(data, **_fitting(module.questions, benchmark, options))


def score(options: ScoreOptions) -> dict:
    """Returns the numbers, for JSON, with all that `compare` needs."""
    module = _module(options.benchmark)
    rows = read_rows(options.answers)
    names = ("prompts", "variant", "part", "splits", "replay")
    given = {name: getattr(options, name) for name in names}
    scored = module.score(options.data, rows, **_fitting(module.score, options.benchmark, given))
    asked = {name: given[name] for name in ("prompts", "part", "splits")}
    questions = fingerprint(find_questions(options.benchmark, options.data, **asked))
    return {"benchmark": module.NAME, "questions": questions, **_made_by(options.answers), **scored}


def _module(benchmark):
    package = "napo_jax.world.exam" if benchmark == "world" else f"napo_jax.evals.{benchmark}"
    return importlib.import_module(package)


def _fitting(function, benchmark, options):
    """Returns the options that were given; raises a ValueError for one that a function does not know."""
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - inspect.signature(function).parameters.keys()):
        raise ValueError(f"{benchmark} has no {unknown[0]}: leave it out")
    return given


def _made_by(answers) -> dict:
    """Returns how answers were made, if `answer` has made them."""
    manifest = epath.Path(f"{answers}{BOOKS}") / "manifest.json"
    if not manifest.exists():
        return {}
    settings = json.loads(manifest.read_text())["settings"]
    return {name: settings[name] for name in _MADE_BY}


def _print_score(options):
    scored = score(options)
    for name, value in scored.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            print(f"{name:<24}{value:>10.2f}")
    if options.out is not None:
        write_durably(epath.Path(options.out), json.dumps(_without_nan(scored), indent=1))
        print(f"wrote {options.out}")


def _without_nan(value):
    """Returns a value in which null stands for numbers that are none: JSON has no nan."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _print_comparison(options):
    runs = []
    for path in options.runs:
        if not epath.Path(path).exists():
            raise ValueError(f"{path} is not there; write it with: python -m napo_jax.evaluate score ... --out {path}")
        runs.append(json.loads(epath.Path(path).read_text()))
    compared = comparison.compare(*runs, resamples=options.resamples, seed=options.seed)
    print(comparison.as_text(compared, options.runs))


def _answer(options):
    from napo_jax.answering import answer  # heavy, and scores need none of it

    answer(options)


_COMMANDS = {
    "answer": (AnswerOptions, _answer),
    "score": (ScoreOptions, _print_score),
    "compare": (CompareOptions, _print_comparison),
}


def main(argv=None):
    """Runs the command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    if not argv or argv[0] not in _COMMANDS:
        raise ValueError(f"say what to do: {', '.join(_COMMANDS)}; got {argv[0] if argv else 'nothing'}")
    kind, run = _COMMANDS[argv[0]]
    run(read_flags(kind, argv[1:], description=kind.__doc__))


if __name__ == "__main__":
    exit_with_one_line(main)
