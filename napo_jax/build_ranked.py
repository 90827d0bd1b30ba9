"""Makes pairs of drawn answers: `python -m napo_jax.build_ranked --config FILE --clip CLIP --input FILES --output DIR`.

Of the answers that `build_difficulty` drew for each row, CLIP tells which fits the picture best and which least: the
columns `fits` and `fits_least` (CLIP-DPO). With `--reward RUN` in place of `--clip CLIP`, a reward model tells it. A
row whose two are too much alike has none; `ranked_fault` says why, and it is counted. The same command, given again,
goes on where it was; it takes one process.
"""

import collections
import dataclasses
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from napo_jax.answer_scores import Asked, ByClip, ByReward
from napo_jax.bias.inputs import open_inputs, write_output
from napo_jax.building import BuildOptions, run_command, run_job
from napo_jax.command import exit_with_one_line
from napo_jax.config import Config, parse
from napo_jax.data.sources import DataError, read_columns
from napo_jax.model_source import absolute
from napo_jax.pieces import read_manifest, write_manifest
from napo_jax.row_pieces import RowPieces

BOOKS = "ranking"


@dataclasses.dataclass(frozen=True)
class Options(BuildOptions):
    """The command's own options."""

    # A folder of a whole CLIP checkpoint, such as openai/clip-vit-large-patch14-336.
    clip: str | None = None
    # In its place, a reward model: the workdir of its run, or the folder that was exported of it.
    reward: str | None = None
    # The column of the answers, a list of texts, as `build_difficulty` writes it.
    answers: str = "drawn"
    # Whether CLIP reads the question before each answer, for answers that say little alone; a reward model always does.
    with_question: bool = False
    # How much better the best must fit than the other one. None: 2 of 100 times the cosine, as in CLIP-DPO; any of
    # rewards.
    gap: float | None = None
    # How many times as many words the longer of the two may have. CLIP-DPO asks for similar lengths, with no number.
    longer: float = 1.5
    # The least that the best must fit. CLIP-DPO drops pictures that nothing fits, and does not say where it cuts. None:
    # 0 of the cosine, and any reward.
    least: float | None = None
    # Rows that are computed at a time; for a reward model on each device of mesh.data x mesh.fsdp.
    batch: int = 16

    def __post_init__(self):
        """Checks the numbers."""
        super().__post_init__()
        if (self.gap or 0) < 0 or self.longer < 1:
            raise ValueError(f"gap must not be negative and longer at least 1, got {self.gap} and {self.longer}")
        if self.clip is not None and self.reward is not None:
            raise ValueError("answers are ranked by --clip or by --reward, not by both: leave one out")
        if self.reward is not None and self.with_question:
            raise ValueError("a reward model always reads the question: leave out --with-question")


class Scored(NamedTuple):
    """How good the answers to a row are."""

    scores: list[float] | None  # of each answer
    fault: str | None  # why there are none


def choose(texts, scores, *, gap, longer, least) -> tuple[str | None, str | None, str | None]:
    """Returns the answer that fits best, the one that fits least, and why there is no such pair.

    Answers of another length than the best are passed over.

    Args:
      texts: the answers.
      scores: float[N], how well each fits.
      gap: how much better the best must fit than the other one.
      longer: how many times as many words the longer of the two may have.
      least: the least that the best must fit; None for any.
    """
    best = int(np.argmax(scores))
    if least is not None and scores[best] < least:
        return None, None, "fits_badly"
    words = [max(len(text.split()), 1) for text in texts]
    others = [number for number, text in enumerate(texts) if text != texts[best]]
    if not others:
        return None, None, "all_the_same"
    length = words[best]
    alike = [n for n in others if max(words[n], length) <= longer * min(words[n], length)]
    if not alike:
        return None, None, "other_lengths"
    worst = min(alike, key=lambda number: scores[number])
    if scores[best] - scores[worst] < gap:
        return None, None, "small_gap"
    return texts[best], texts[worst], None


class Job:
    """Some files whose answers are ranked."""

    def __init__(self, config: Config, options: Options):
        """Looks at the files and what was done so far; raises one line if something cannot be used."""
        if options.clip is None and options.reward is None:
            raise ValueError("say what tells which answer fits: --clip CLIP, or --reward RUN")
        self.options, self.data, self.folder = options, config.data, absolute(options.output)
        columns = dict(config.data.columns) | {"answers": options.answers}
        column = (ByClip if options.reward is None else ByReward).column
        self.fields = [pa.field(name, pa.string()) for name in ("fits", "fits_least", "ranked_fault")]
        self.fields.insert(2, pa.field(column, pa.list_(pa.float32())))
        names = [field.name for field in self.fields]
        self.inputs = open_inputs(options.input, names, columns, self.folder, suffixes=("",))
        for file in self.inputs:
            if options.answers not in read_columns(file.path):
                raise DataError(f"{file.path} has no column {options.answers} of drawn answers; see build_difficulty")
        if options.reward is None:
            self.judge = ByClip(config, options.clip, with_question=options.with_question, batch=options.batch)
        else:
            self.judge = ByReward(config, options.reward, batch=options.batch)
        self.root = config.data.image_root and str(absolute(config.data.image_root))
        self.books, self.sizes = self.folder / BOOKS, [file.rows for file in self.inputs]
        self.settings = self.judge.settings | {
            "answers": options.answers,
            "piece": options.piece,
            "columns": config.data.columns,
            "image_root": self.root,
            "inputs": {file.path.name: file.bytes for file in self.inputs},
        }
        self.manifest = read_manifest(self.books, self.settings)
        self.pieces = RowPieces(self.books, self.sizes, options.piece, Scored)
        self.count_missing = self.pieces.count_missing
        self.summary = self.books / "report.json"
        self.files = [self.folder / file.path.name for file in self.inputs]
        # What is not told, the judge decides.
        told = {name: getattr(options, name) for name in ("gap", "least")}
        told = {name: getattr(self.judge, name) if value is None else value for name, value in told.items()}
        self.written = told | {"longer": options.longer}

    def plan(self):
        """Yields what a person wants to read before it starts."""
        yield str(self.judge)
        yield f"rows     {sum(self.sizes)} in {len(self.inputs)} file(s); {self.count_missing()} to go"

    def build(self, console, check):
        """Scores the rows that lack it."""
        if not self.manifest:
            write_manifest(self.books, self.settings)
        self.pieces.fill(self.inputs, self.data, self._ask, self._score, console, check)

    def _score(self, waiting, check):
        """Scores the answers of rows."""
        found = {}
        rows = sorted(waiting, key=lambda row: waiting[row].tokens)  # of like lengths together: little is padding
        for start in range(0, len(rows), self.judge.batch):
            some = rows[start : start + self.judge.batch]
            for row, scores in zip(some, self.judge.scores([waiting[row] for row in some]), strict=True):
                found[row] = Scored([round(score, 4) for score in scores], None)
            check()
        return found

    def _ask(self, _, record, values) -> Asked | Scored:
        """Returns what is to be scored of a row, or why nothing is; called on threads."""
        if isinstance(record, str):
            return Scored(None, record)
        texts = values.get("answers")
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(text, str) and text.strip() for text in texts)
        ):
            return Scored(None, "no_answers")
        asked = self.judge.ask(record, texts)
        return Scored(None, asked) if isinstance(asked, str) else asked

    def finish(self) -> dict:
        """Writes the files; returns the counts."""
        counts = collections.Counter()
        for number, file in enumerate(self.inputs):
            found = self.pieces.read(number)

            def made(row, values, found=found):
                scores, fault = found[row]
                best = worst = None
                if scores is not None:
                    best, worst, fault = choose(values["answers"], scores, **self.written)
                counts[fault or "ranked"] += 1
                return {"fits": best, "fits_least": worst, self.judge.column: scores, "ranked_fault": fault}

            write_output(file, self.folder, file.rows, self.fields, made)
        return {"rows": sum(self.sizes), "pairs": dict(counts.most_common())}

    def says(self, counts):
        """Yields what there is to say of the pairs."""
        yield ", ".join(f"{what} {count}" for what, count in counts["pairs"].items())
        yield f"wrote {self.folder}; train with --data.columns chosen fits rejected fits_least"


def build(config: Config, options: Options, console=None):
    """Ranks the answers, or goes on with it; returns the counts."""
    return run_job(Job, config, options, console)


def main(argv=None):
    """Runs the command."""
    run_command(build, *parse(Options, argv, description=__doc__))


if __name__ == "__main__":
    exit_with_one_line(main)
