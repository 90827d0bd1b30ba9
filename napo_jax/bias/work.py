"""A build under way: what is asked of which rows, what was said, and how the rest is said."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math

import jax

from napo_jax.bias.inputs import image_root_of, open_inputs, read_questions, read_rows
from napo_jax.bias.masks import Asker
from napo_jax.config import Config
from napo_jax.data.prompts import Prompter, PromptError
from napo_jax.data.sources import RowError
from napo_jax.data.store import read_picture
from napo_jax.model_source import absolute, find_model
from napo_jax.pieces import Line, Pieces, read_manifest, write_manifest
from napo_jax.progress import AnswerProgress, wait_until
from napo_jax.sharding import make_mesh
from napo_jax.speaker import load_speaker, unknown_word

BOOKS = "build"  # inside the output, where what reads the output as data does not look
_TOO_LONG = "prefix_too_long"


class Work:
    """A build under way.

    Attributes:
      folder: epath.Path of all that is written.
      inputs: list of `InputFile`.
      rows: how many of their rows are wanted, from the first.
      recipes: {name of an answer: `Recipe`}.
      source: where the model comes from, a `model_source.Source`; and `shape`, its `LlavaConfig`.
      tokenizer: the model's.
      settings: all that decides the answers, a dict for JSON.
      books: epath.Path of the folder of pieces and manifest: what reads `folder` as data does not look there.
      manifest: what an earlier call has left; empty if there was none.
      lines: {(file, row, name): `Line`} of what was said when it was last counted, and by this process since.
      files: epath.Paths of the files to write.
    """

    def __init__(self, config: Config, options, recipes):
        """Looks at the inputs and at what was said so far; raises one line if something cannot be used.

        Args:
          config: the `Config`; of its data, how rows are read.
          options: the command's own, `RowwiseOptions` with `decoding` and `slots`.
          recipes: {name of an answer: `Recipe`}.
        """
        self._config, self.options, self.recipes, decoding = config, options, recipes, options.decoding
        self.folder = absolute(options.output)
        self.inputs = open_inputs(options.input, recipes, config.data.columns, self.folder)
        self.source = find_model(config.model, config.train.seed)
        self.tokenizer, self.shape = self.source.tokenizer, self.source.shape
        data, self._root = config.data, config.data.image_root and str(absolute(config.data.image_root))
        self._questions = [list(read_questions(file)) for file in self.inputs]
        prompter = Prompter(self.tokenizer, data.template, self.shape.vision.image_tokens)
        looks = {"image_rule": data.image_rule, "exif": data.exif, "seed": decoding.seed}
        looks["unk"] = unknown_word(self.tokenizer)
        self._askers = {name: Asker(recipe, prompter, self.shape.vision, **looks) for name, recipe in recipes.items()}
        self.settings = {
            "model": str(self.source),
            "source": self.source.fingerprint,
            "dtype": config.model.dtype,
            "template": data.template,
            "tokenizer": prompter.fingerprint,
            "answers": {name: dataclasses.asdict(recipe) for name, recipe in recipes.items()},
            "decoding": dataclasses.asdict(decoding),
            "image_rule": data.image_rule,
            "exif": data.exif,
            "columns": data.columns,
            "image_root": self._root,
            "inputs": {
                file.path.name: {"bytes": file.bytes, "questions": _digest(questions)}
                for file, questions in zip(self.inputs, self._questions, strict=True)
            },
        }
        self.books = self.folder / BOOKS
        self.manifest = read_manifest(self.books, self.settings)
        self.rows = min(sum(file.rows for file in self.inputs), options.limit or math.inf)
        before = (self.manifest.get("written") or {}).get("rows", 0)
        if self.rows < before:
            raise ValueError(f"{self.folder} has {before} rows already; name another output for the first {self.rows}")
        self._check_targets()
        self._pieces = Pieces(self.books, size=options.piece)
        self.lines = {}
        self.files = [self.folder / self.inputs[number].path.name for number in self.written_files]

    def _check_targets(self):
        """Raises if files of others would be written over."""
        for file in self.inputs if not self.manifest else ():
            if (self.folder / file.path.name).exists():
                raise ValueError(f"{self.folder / file.path.name} is there, and no build of it: name another output")

    @property
    def written_files(self) -> list[int]:
        """The numbers of the files that have a row that is wanted, or none at all."""
        return [number for number, file in enumerate(self.inputs) if self.wanted(number) or not file.rows]

    def wanted(self, number):
        """Returns how many rows of a file are wanted, from its first."""
        before = sum(file.rows for file in self.inputs[:number])
        return max(0, min(self.inputs[number].rows, self.rows - before))

    def missing(self, name, share=(0, 1)) -> dict[int, set[int]]:
        """Returns {file: rows} that have no answer of a name yet.

        Args:
          name: of the answer.
          share: (i, n), for every n-th row alone.
        """
        index, count = share
        return {
            number: {row for row in range(index, self.wanted(number), count) if (number, row, name) not in self.lines}
            for number in range(len(self.inputs))
        }

    def count_missing(self) -> int:
        """Takes in what was said since the last time, by any process; returns how many answers are left to say."""
        self.lines |= {line.key: line for line in self._pieces.new()}
        return sum(len(rows) for name in self.recipes for rows in self.missing(name).values())

    @functools.cached_property
    def rooms(self) -> dict[str, int]:
        """{name: the most tokens of a prompt}: those of the longest one that leaves room for an answer."""
        most = self.shape.text.max_positions - self.options.decoding.max_tokens
        if most < 1:
            raise ValueError(
                f"decoding.max_tokens is {self.options.decoding.max_tokens}, and the model has "
                f"{self.shape.text.max_positions} positions, for the prompt too: lower it"
            )
        questions = [question for some in self._questions for question in some if question is not None]
        rooms = {}
        for name, asker in self._askers.items():
            lengths = asker.lengths(questions[:1] if asker.asks_one_thing else questions)
            rooms[name] = max([1, *(length for length in lengths if isinstance(length, int) and length <= most)])
        return rooms

    def say(self, console, check):
        """Says this process's share of the answers.

        Args:
          console: a `Console`.
          check: called often; raises if the process was asked to end.
        """
        model, part = self._config.model, self.options.part
        # Each process has a mesh of its own devices: none waits for another's longest answer.
        mesh = make_mesh(self._config.mesh, jax.local_devices())
        speaker = load_speaker(self.source, mesh, dtype=model.dtype, attention=model.attention)
        self.settings["weights"] = speaker.digest
        if jax.process_index() == 0 and not self.manifest:
            write_manifest(self.books, self.settings)
        # This also says if weights are not those it began with.
        wait_until(lambda: read_manifest(self.books, self.settings), check)
        try:
            for name, room in self.rooms.items():
                if not (missing := sum(map(len, self.missing(name, part).values()))):
                    continue
                generator = speaker.generator(self.options.decoding, room=room, slots=self.options.slots)
                kept = f"{generator.kept_bytes / mesh.size / 2**30:.2f} GiB"
                console.note(
                    f"{name}: prompts of up to {room} tokens, {generator.slots} at a time, {kept} a device for them"
                )
                before, progress = len(self.lines), AnswerProgress(console, missing)
                for answer in generator(self._prompts(name, room, part)):
                    line = Line.of(*answer.key, name, speaker.spell(answer.ids), answer)
                    self._keep(line)
                    progress(len(self.lines) - before, line.tokens)
                    check()
                del generator  # what it keeps goes before that of the next one comes
        finally:
            self._pieces.flush()

    def _prompts(self, name, room, share):
        """Yields the prompts of rows that have no answer of a name yet; why a row gives none is kept as its line.

        Args:
          name: of the answer.
          room: the most tokens of a prompt.
          share: as for `missing`.
        """

        def ask(number, row, record):
            if isinstance(record, str):
                return record
            try:
                prompt = self._askers[name]((number, row), record, name)
            except PromptError as error:
                return error.reason
            return prompt if len(prompt.ids) <= room else _TOO_LONG

        data = self._config.data
        look = {"image_root": self._root, "exif": data.exif, "threads": data.threads}
        for number, rows in self.missing(name, share).items():
            work = lambda row, record, _, number=number: ask(number, row, record)
            for row, prompt in read_rows(self.inputs[number], rows, work, **look):
                if isinstance(prompt, str):
                    self._keep(Line(number, row, name, None, 0, False, None, prompt))
                else:
                    yield prompt

    def picture(self, number, image) -> bytes | None:
        """Returns the picture of a row of a file, whose column holds it or its path; None if there is none."""
        if not isinstance(image, str):
            return image
        with contextlib.suppress(RowError):
            return read_picture(image_root_of(self.inputs[number], self._root), image)
        return None

    def _keep(self, line):
        self.lines[line.key] = line
        self._pieces.add(line)


def _digest(questions):
    """Returns 32 hex digits that stand for the questions of a file, in their order."""
    return hashlib.blake2b(json.dumps(questions).encode(), digest_size=16).hexdigest()
