"""Makes what is shipped of the small world: `python -m napo_jax.world.make_base --output base`.

A base model from nothing on a biased teacher's answers, and preference pairs with the biased answers of that model. It
takes about half an hour on two cores. The same command, given again, goes on where it was.
"""

import dataclasses
import hashlib
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from napo_jax import build_bias, export
from napo_jax.command import exit_with_one_line, read_flags
from napo_jax.config import ModelConfig
from napo_jax.demo import build_options
from napo_jax.evals.answers import as_json
from napo_jax.metrics import Console
from napo_jax.model_source import find_model
from napo_jax.sharding import MeshConfig, make_mesh
from napo_jax.speaker import load_speaker
from napo_jax.train import train
from napo_jax.world.configs import PAIRS, cure, lessons
from napo_jax.world.examine import EXAMS, Examiner, in_short, write_exams
from napo_jax.world.language import vocabulary
from napo_jax.world.records import draw_lesson, draw_pair, write_lessons, write_pairs

LESSONS, LESSONS_SEED = 60_000, 0
PAIRS_COUNT, PAIRS_SEED = 1600, 1
CARD = "card.json"
_SHOWN = 256  # rows whose texts stand for how rows are made


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's options."""

    # The folder to make.
    output: str | None = None
    # Where lessons, training and exams are kept meanwhile; by default OUTPUT.work.
    work: str | None = None


def recipe() -> str:
    """Returns 32 hex digits that stand for how the shipped files are made: all that a change of would make them others.

    Of how questions and answers are made, the first rows stand for all.
    """
    config = lessons()
    parts = {
        "config": _set(dataclasses.replace(config, data=dataclasses.replace(config.data, path=None))),
        "shape": _set(find_model(config.model).shape),
        "vocabulary": vocabulary(),
        "counts": (LESSONS, LESSONS_SEED, PAIRS_COUNT, PAIRS_SEED),
        "lessons": [_texts(draw_lesson(LESSONS_SEED, number)) for number in range(_SHOWN)],
        "pairs": [_texts(draw_pair(PAIRS_SEED, number)) for number in range(_SHOWN)],
        "built": _set(build_options("", "")),
    }
    name = lambda value: getattr(value, "__name__", str(value))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=name).encode()).hexdigest()[:32]


def _set(value):
    """Returns what differs from the defaults of a dataclass, so that a new field with one makes no new recipe."""
    if isinstance(value, tuple):
        return [_set(part) for part in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: field for field in dataclasses.fields(value)}
    default = lambda field: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    now = {name: getattr(value, name) for name in fields}
    return {name: _set(now[name]) for name, field in fields.items() if now[name] != default(field)}


def _texts(drawn):
    _, asked, answers = drawn
    return [asked.kind, asked.text, answers]


def make(options: Options, console=None):
    """Makes the folder."""
    if options.output is None:
        raise ValueError("say where to: --output base, for example")
    output, console = Path(options.output), console or Console()
    if output.exists():
        raise ValueError(f"{output} is there; name another folder")
    work = Path(options.work or f"{output}.work")
    work.mkdir(parents=True, exist_ok=True)

    rows = work / "lessons.parquet"
    if not rows.exists():
        console.note(f"draws {LESSONS} lessons")
        write_lessons(rows, LESSONS, seed=LESSONS_SEED)
    config = lessons()
    data = dataclasses.replace(config.data, path=(str(rows),), cache=str(work / "cache"))
    train(dataclasses.replace(config, data=data), work / "run", console)

    model = work / "model"
    shutil.rmtree(model, ignore_errors=True)
    export.export(export.Options(workdir=str(work / "run"), output=str(model)))
    drawn = work / "pairs" / PAIRS
    drawn.parent.mkdir(exist_ok=True)
    write_pairs(drawn, PAIRS_COUNT, seed=PAIRS_SEED)
    shutil.rmtree(work / "built", ignore_errors=True)  # by a model that may have been another
    built = dataclasses.replace(cure(), model=dataclasses.replace(cure().model, path=str(model)))
    build_bias.build(built, build_options(drawn, work / "built"), console)

    shutil.rmtree(work / "exams", ignore_errors=True)
    write_exams(work / "exams")
    speaker = load_speaker(find_model(ModelConfig(path=str(model))), make_mesh(MeshConfig()), dtype="float32")
    examiner = Examiner(work / "exams", speaker)
    card = {
        "recipe": recipe(),
        "seeds": {"parameters": config.train.seed, "lessons": LESSONS_SEED, "pairs": PAIRS_SEED},
        "scores": in_short(examiner.score(examiner())),
        "questions": {name: one.many for name, one in EXAMS.items()},
        "made_with": {name: version(name) for name in ("jax", "flax", "optax", "numpy", "pillow")}
        | {"python": platform.python_version(), "machine": platform.machine()},
    }
    shutil.copy(work / "built" / PAIRS, model)
    card["files"] = {file.name: digest(file) for file in sorted(model.iterdir())}
    (model / CARD).write_text(json.dumps(json.loads(as_json(card)), indent=1))
    shutil.move(model, output)
    console.note(f"wrote {output}: {', '.join(f'{name} {value:.1f}' for name, value in card['scores'].items())}")


def digest(file) -> str:
    """Returns the SHA-256 of a file, as hex digits."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def main(argv=None):
    """Runs the command."""
    make(read_flags(Options, argv, description=__doc__))


if __name__ == "__main__":
    exit_with_one_line(main)
