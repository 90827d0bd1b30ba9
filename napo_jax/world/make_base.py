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

import numpy as np
import pyarrow.parquet as pq

from napo_jax import build_bias, export
from napo_jax.command import exit_with_one_line, read_flags
from napo_jax.demo import build_options
from napo_jax.evals.answers import strict_json
from napo_jax.journal import exit_when_stopped
from napo_jax.metrics import Console
from napo_jax.model_source import find_model
from napo_jax.sharding import MeshConfig, make_mesh
from napo_jax.speaker import load_speaker
from napo_jax.train import train
from napo_jax.world.configs import PAIRS, PAIRS_COUNT, PAIRS_SEED, cure, lessons
from napo_jax.world.examine import EXAMS, Examiner, in_short, write_exams
from napo_jax.world.language import vocabulary
from napo_jax.world.records import Bias, draw_lesson, draw_pair, picture_seed, write_lessons, write_pairs
from napo_jax.world.scenes import SIZE, render

LESSONS, LESSONS_SEED = 60_000, 0
CARD = "card.json"
_TEXTS, _PICTURES = 256, 8  # rows that stand for how rows are made


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's options."""

    # The folder to make, on this machine.
    output: str
    # Where lessons, training and exams are kept meanwhile; by default OUTPUT.work.
    work: str | None = None
    # How strongly the model is to be biased: how often its teacher says what is usual where it is not so, and how often
    # he goes on to describe everything.
    bias: Bias = dataclasses.field(default_factory=Bias)


def recipe(bias: Bias | None = None) -> dict:
    """Returns all that makes the files what they are, for JSON; the first rows stand for how rows are made.

    Args:
      bias: the teacher's; by default that of what is shipped.
    """
    config, built = lessons(), build_options("", "")
    drawn = [draw_lesson(LESSONS_SEED, number, bias) for number in range(_TEXTS)]
    parts = {
        "config": dataclasses.replace(config, data=dataclasses.replace(config.data, path=None)),
        "shape": find_model(config.model).shape,
        "vocabulary": vocabulary(),
        "rows": {"lessons": [LESSONS, LESSONS_SEED], "pairs": [PAIRS_COUNT, PAIRS_SEED]},
        "lessons": _digest([_texts(row) for row in drawn]),
        "pairs": _digest([_texts(draw_pair(PAIRS_SEED, number)) for number in range(_TEXTS)]),
        "pictures": [_look(scene, number) for number, (scene, _, _) in enumerate(drawn[:_PICTURES])],
        "built": {name: getattr(built, name) for name in ("recipes", "decoding", "filters")},
    }
    return json.loads(json.dumps(parts, default=_plain))


def recipe_digest(made) -> str:
    """Returns 32 hex digits that stand for a recipe."""
    return _digest(made)[:32]


def differences(made, now, name="") -> list[str]:
    """Returns the names of what a recipe has and another has otherwise.

    What only the other one has is passed over: a new option, as long as its default changes nothing. Pictures may be a
    little lighter or darker, as other releases of Pillow draw edges.
    """
    if isinstance(made, dict) and isinstance(now, dict):
        return [found for key in made for found in differences(made[key], now.get(key), f"{name}.{key}".lstrip("."))]
    rows = all(isinstance(each, list) and each and isinstance(each[0], dict) for each in (made, now))
    if rows and len(made) == len(now):
        pairs = enumerate(zip(made, now, strict=True))
        return [found for number, pair in pairs for found in differences(*pair, f"{name}.{number}")]
    if name == "pictures":
        bytes_of = lambda looks: np.frombuffer(bytes.fromhex("".join(looks)), np.uint8).astype(int)
        return [] if len(made) == len(now) and np.abs(bytes_of(made) - bytes_of(now)).max() <= 3 else [name]
    return [] if made == now else [name]


def _plain(value):
    """Returns what stands for a value in JSON."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return getattr(value, "__name__", str(value))


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _look(scene, number) -> str:
    """Returns what a picture looks like from afar: the mean colours of 8 x 8 parts, as hex digits."""
    pixels = np.asarray(render(scene, picture_seed(LESSONS_SEED, number)), np.float64)
    return pixels.reshape(8, SIZE // 8, 8, SIZE // 8, 3).mean(axis=(1, 3)).round().astype(np.uint8).tobytes().hex()


def _texts(drawn):
    _, asked, answers = drawn
    return [asked.kind, asked.text, answers]


def make(options: Options, console=None):
    """Makes the folder."""
    output, console = Path(options.output), console or Console()
    if output.exists():
        raise ValueError(f"{output} is there; name another folder")
    work, made = Path(options.work or f"{output}.work"), recipe(options.bias)
    work.mkdir(parents=True, exist_ok=True)
    begun = work / "recipe.json"
    if begun.exists() and json.loads(begun.read_text()) != made:
        raise ValueError(f"{work} was begun by another recipe; take it away, or name another with --work")
    begun.write_text(json.dumps(made))

    rows = work / "lessons.parquet"
    if not rows.exists():
        console.note(f"draws {LESSONS} lessons")
        write_lessons(rows, LESSONS, seed=LESSONS_SEED, bias=options.bias)
    config = lessons()
    data = dataclasses.replace(config.data, path=(str(rows),), cache=str(work / "cache"))
    train(dataclasses.replace(config, data=data), work / "run", console)

    model, built, taken = work / "model", work / "built", work / "exams"
    for folder in (model, built, taken):  # of an attempt that was cut short
        shutil.rmtree(folder, ignore_errors=True)
    export.export(export.Options(workdir=str(work / "run"), output=str(model)))
    drawn = work / "pairs" / PAIRS
    drawn.parent.mkdir(exist_ok=True)
    write_pairs(drawn, PAIRS_COUNT, seed=PAIRS_SEED)
    asked = dataclasses.replace(cure(), model=dataclasses.replace(cure().model, path=str(model)))
    build_bias.build(asked, build_options(drawn, built), console)

    write_exams(taken)
    speaker = load_speaker(find_model(asked.model), make_mesh(MeshConfig()), dtype="float32")
    examiner = Examiner(taken, speaker)
    table = pq.read_table(built / PAIRS)
    # What made the answers is in the card; the columns that say it of each name a folder that nobody else has.
    pq.write_table(
        table.drop_columns([name for name in table.column_names if name.endswith("_made_by")]), model / PAIRS
    )
    card = {
        "recipe_digest": recipe_digest(made),
        "scores": in_short(examiner.score(examiner())),
        "questions": {name: one.many for name, one in EXAMS.items()},
        "files": {file.name: file_digest(file) for file in sorted(model.iterdir())},
        "made_with": {name: version(name) for name in ("jax", "flax", "optax", "numpy", "pillow")}
        | {"python": platform.python_version(), "machine": platform.machine()},
        "recipe": made,
    }
    (model / CARD).write_text(json.dumps(json.loads(strict_json(card)), indent=1))
    shutil.move(model, output)
    console.note(f"wrote {output}: {', '.join(f'{name} {value:.1f}' for name, value in card['scores'].items())}")


def file_digest(file) -> str:
    """Returns the SHA-256 of a file, as hex digits."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def main(argv=None):
    """Runs the command."""
    options = read_flags(Options, argv, description=__doc__)
    with exit_when_stopped():
        make(options)


if __name__ == "__main__":
    exit_with_one_line(main)
