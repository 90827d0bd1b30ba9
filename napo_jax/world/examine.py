"""The small world's model takes all of its exams, which are scored as the benchmarks they are written like."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from napo_jax.asking import QuestionAsker
from napo_jax.decoding import Decoding
from napo_jax.evals import chair, pope, vlind
from napo_jax.evals.answers import fingerprint, strict_json, write_row
from napo_jax.speaker import Speaker
from napo_jax.world import exam, exams

DECODING = Decoding(max_tokens=64)


class Exam(NamedTuple):
    """A benchmark's module, and how the world's edition of it is read."""

    module: object
    write: object  # (folder, how many, seed=) -> None
    prompts: str
    variant: str
    many: int


EXAMS = {
    "world": Exam(exam, exams.write_world, "plain", "first_sentence", 250),
    "vlind": Exam(vlind, exams.write_vlind, "released", "all", 42),
    "pope": Exam(pope, exams.write_pope, "plain", "mean", 60),
    "chair": Exam(chair, exams.write_chair, "official", "plain", 100),
}


def write_exams(folder, seed=0):
    """Writes the files of every exam to a folder each; another seed makes other exams."""
    for number, (name, one) in enumerate(EXAMS.items()):
        (Path(folder) / name).mkdir(parents=True)
        one.write(Path(folder) / name, one.many, seed=100 + seed + number)


class Examiner:
    """Asks a model, with any parameters, what the exams ask."""

    def __init__(self, folder, speaker: Speaker, *, slots=64):
        """Reads the exams.

        Args:
          folder: what `write_exams` has written.
          speaker: the model and its tokenizer; its parameters are those that are asked unless others are given.
          slots: questions that are answered at a time.
        """
        self._folder, self._speaker = Path(folder), speaker
        self._questions = {
            name: one.module.questions(self._folder / name, prompts=one.prompts) for name, one in EXAMS.items()
        }
        askers = {
            name: QuestionAsker(speaker.tokenizer, speaker.model.config.vision, self._folder / name) for name in EXAMS
        }
        most = speaker.model.config.text.max_positions - DECODING.max_tokens
        room = max(askers[name].room(asked, most) for name, asked in self._questions.items())
        self._generator = speaker.generator(DECODING, room=room, slots=slots)
        # The pictures are read once, for all parameters.
        self._prompts = [
            askers[name]((name, question.key), question)
            for name, asked in self._questions.items()
            for question in asked
        ]

    def __call__(self, params=None) -> dict[str, dict[str, str]]:
        """Returns {exam: {key: text}}, what the model answers; params: in place of the speaker's own."""
        said = {name: {} for name in EXAMS}
        for (name, key), text in self.ask(self._prompts, params).items():
            said[name][key] = text
        return said

    def ask(self, prompts, params=None) -> dict:
        """Returns {key: text}, the answers to prompts that are no longer than the exams' longest."""
        self._generator.use(self._speaker.params if params is None else params)
        return {answer.key: self._speaker.spell(answer.ids) for answer in self._generator(prompts)}

    def score(self, said) -> dict[str, dict]:
        """Returns {exam: numbers}, as `evaluate score` gives them."""
        return {
            name: {
                "benchmark": name,
                "questions": fingerprint(self._questions[name]),
                "dtype": str(self._speaker.model.config.dtype),
                "decoding": dataclasses.asdict(DECODING),
                **one.module.score(
                    self._folder / name, self._rows(name, said[name]), prompts=one.prompts, variant=one.variant
                ),
            }
            for name, one in EXAMS.items()
        }

    def write(self, folder, said, made_by) -> dict[str, dict]:
        """Writes the answers, and the numbers they come to with what made them, to a file of each exam.

        Returns:
          what `score` returns.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        scores = self.score(said)
        for name, scored in scores.items():
            lines = [f"{json.dumps(row)}\n" for row in self._rows(name, said[name])]
            (folder / f"{name}.jsonl").write_text("".join(lines))
            (folder / f"{name}.json").write_text(strict_json(made_by | scored))
        return scores

    def _rows(self, name, answers):
        return [write_row(question, answers[question.key]) for question in self._questions[name]]


def in_short(scores) -> dict[str, float]:
    """Returns the numbers that tell most of an examined model, in percent."""
    world, vlind_, pope_, chair_ = (scores[name] for name in ("world", "vlind", "pope", "chair"))
    return {
        "usual": world["usual"],
        "changed": world["changed"],
        "gap": world["gap"],
        "flood": world["flood"],
        **{name: vlind_[name] for name in ("CK", "VP", "CB", "LP", "LP_accuracy")},
        "pope_f1": pope_["f1"],
        "chair_i": chair_["CHAIRi"],
    }
