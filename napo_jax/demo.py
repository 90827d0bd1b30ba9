"""The whole method on a laptop, in a few minutes: `python -m napo_jax.demo`.

A small model that answers from habit builds its own biased answers, NaPO trains it against them, and exams before and
after tell what became of it. Everything is kept in one folder, with a page to look at.
"""

import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path

import jax
import pyarrow.parquet as pq

from napo_jax import build_bias
from napo_jax.asking import QuestionAsker
from napo_jax.command import exit_with_one_line, read_flags
from napo_jax.config import ModelConfig
from napo_jax.evals.answers import Question
from napo_jax.journal import StoppedError
from napo_jax.metrics import Console
from napo_jax.model_source import find_model, load_leaves
from napo_jax.optim import unflatten
from napo_jax.report import write_report
from napo_jax.sharding import MeshConfig, make_mesh
from napo_jax.speaker import load_speaker
from napo_jax.train import train
from napo_jax.world.configs import PAIRS_COUNT, PAIRS_SEED, cure
from napo_jax.world.examine import DECODING, Examiner, in_short, write_exams
from napo_jax.world.records import write_pairs

ANSWERS = ("chosen", "rejected", "question_only", "image_only")
_TITLE = "Demo: the small world's model before and after NaPO"
_SAMPLES = 8  # groups that the page shows
_ROWS = {
    "usual": "held-out accuracy, habit followed",
    "changed": "held-out accuracy, habit broken",
    "gap": "  the gap between them",
    "flood": "answers that say too much",
    "CK": "VLind CK, common sense",
    "VP": "VLind VP, perception",
    "CB": "VLind CB, says what the text says",
    "LP": "VLind LP, says what the picture shows",
    "LP_accuracy": "  the same of all, right before or not",
    "pope_f1": "POPE F1",
    "chair_i": "CHAIR, things named that are not there",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's options."""

    # Where all of it is kept: a new folder. None: runs/demo, or runs/demo2 and so on if that is there.
    workdir: str | None = None
    # Preference pairs to build biased answers for.
    pairs: int = PAIRS_COUNT
    # Of the pairs that are drawn.
    seed: int = PAIRS_SEED

    def __post_init__(self):
        """Checks the numbers and the folder."""
        least = cure().data.batch_size + cure().data.held_out
        if self.pairs < least:
            raise ValueError(f"pairs must be at least {least}, a batch and what is held out, got {self.pairs}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if "://" in str(self.workdir):
            raise ValueError(f"workdir must be a folder of this machine, got {self.workdir}")


def demo(options: Options, console=None) -> dict[str, dict[str, float]]:
    """Runs all of it; returns {"before": numbers, "after": numbers}, in percent."""
    console, workdir, begun = console or Console(), Path(options.workdir or _new_folder()).absolute(), time.monotonic()
    if workdir.exists():
        raise ValueError(f"{workdir} is there already; name a new folder, or leave --workdir out")
    workdir.mkdir(parents=True)
    say = lambda text: console.note(f"[{time.monotonic() - begun:4.0f} s] {text}")

    say(f"draws {options.pairs} pictures with questions, a right answer and a wrong one, and the exams")
    pairs = workdir / "pairs" / "pairs.parquet"
    pairs.parent.mkdir()
    write_pairs(pairs, options.pairs, seed=options.seed)
    write_exams(workdir / "exams")

    say("the base model answers them without the picture, and describes the pictures without the question")
    config, built = cure(), workdir / "biased"
    build_bias.build(config, build_options(pairs, built), console)

    say("the base model takes the exams")
    mesh = make_mesh(MeshConfig(), jax.devices())
    speaker = load_speaker(find_model(config.model), mesh)
    examiner = Examiner(workdir / "exams", speaker)
    said = {"before": examiner()}

    say("NaPO trains it")
    data = dataclasses.replace(config.data, path=(str(built / "*.parquet"),), cache=str(workdir / "cache"))
    train(dataclasses.replace(config, data=data), workdir / "run", console)

    say("the trained model takes the exams")
    trained = find_model(ModelConfig(path=str(workdir / "run")))
    params = unflatten(load_leaves(trained, speaker.model, mesh))
    made_by = {
        "before": {"model": config.model.path, "weights": speaker.digest},
        "after": {"model": str(trained), "weights": speaker._replace(params=params).digest},
    }
    said["after"] = examiner(params)
    write = lambda label: examiner.write(workdir / "run" / "evals" / label, said[label], made_by[label])
    scores = {label: in_short(write(label)) for label in said}
    both = {"before": speaker.params, "after": params}
    _write_samples(examiner, built / pairs.name, workdir / "run", speaker, both)
    page = write_report(workdir / "run", title=_TITLE)
    console.note(as_table(scores))
    say(f"done; see {page}")
    return scores


def _new_folder() -> str:
    """Returns the name of the first folder in runs/ that is not there yet."""
    names = (f"runs/demo{number if number > 1 else ''}" for number in itertools.count(1))
    return next(name for name in names if not Path(name).exists())


def build_options(pairs, output) -> build_bias.Options:
    """Returns how the biased answers to a file of pairs are built."""
    # The small model has met neither a question without a picture nor a picture without words: to the first it would
    # say words without sense, and not what is usual. So it sees a picture of one grey, and a request for a description.
    masks = {"image_mask": "mean", "question_mask": "generic"}
    # What equals another answer of its row stays: it is habit here, and a row that lacks an answer is not trained on.
    filters = ("empty", "cut", "repeats")
    return build_bias.Options(
        input=(str(pairs),), output=str(output), decoding=DECODING, filters=filters, slots=64, piece=256, **masks
    )


def _write_samples(examiner, file, run, speaker, params):
    """Writes some groups, with what is said to their questions before and after, for the page."""
    wanted = ("question", "image", *ANSWERS)
    rows = pq.read_table(file, columns=list(wanted)).slice(0, 20 * _SAMPLES).to_pylist()
    # Each question once, so that the page shows different ones; those with the most answers first.
    rows.sort(key=lambda row: -sum(row[name] is not None for name in ANSWERS))
    rows = list({row["question"]: row for row in reversed(rows)}.values())[::-1][:_SAMPLES]
    (run / "samples").mkdir()
    questions = []
    for number, row in enumerate(rows):
        picture = f"samples/{number}.png"
        (run / picture).write_bytes(row["image"])
        questions.append(Question(str(number), row["question"], picture, {}))
    asker = QuestionAsker(speaker.tokenizer, speaker.model.config.vision, run)
    prompts = [asker(question.key, question) for question in questions]
    said = {label: examiner.ask(prompts, some) for label, some in params.items()}
    lines = [
        {"picture": question.image, "question": question.text, "answers": {n: row[n] for n in ANSWERS if row[n]}}
        | {label: answers[question.key] for label, answers in said.items()}
        for question, row in zip(questions, rows, strict=True)
    ]
    (run / "samples.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def as_table(scores) -> str:
    """Renders numbers before and after for a terminal."""
    lines = [f"{'':<44}{'before':>8}{'after':>8}"]
    for name, words in _ROWS.items():
        values = "".join(f"{numbers[name]:8.1f}".replace("nan", "  -") for numbers in scores.values())
        lines.append(f"{words:<44}{values}")
    return "\n".join(lines)


def main(argv=None):
    """Runs the command."""
    try:
        demo(read_flags(Options, argv, description=__doc__))
    except StoppedError as reason:
        print(f"the demo was ended: {str(reason).partition(':')[0]}; it begins anew in another folder", file=sys.stderr)
        raise SystemExit(reason.status) from None


if __name__ == "__main__":
    exit_with_one_line(main)
