"""A model asked all questions of a benchmark: on from where it stopped, over processes, and all answers or none."""

import dataclasses
import json
import time
from typing import Literal

import jax
from etils import epath

from napo_jax.bias.masks import Asker, Recipe
from napo_jax.config import ModelConfig
from napo_jax.data.images import ImageError, decode
from napo_jax.data.prompts import Prompter
from napo_jax.data.store import Record
from napo_jax.decoding import Decoding
from napo_jax.evals.answers import fingerprint, write_row
from napo_jax.evals.benchmarks import Asked
from napo_jax.metrics import Console
from napo_jax.model_source import absolute, find_model
from napo_jax.pieces import BOOKS, Line, Pieces, read_manifest, write_durably, write_manifest
from napo_jax.sharding import MeshConfig, make_mesh
from napo_jax.speaker import load_speaker, unknown_word

_WAIT = 2.0  # seconds between looks at what other processes have done
_SHOW = 5.0  # seconds between lines of progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerOptions(Asked):
    """Asks a model all questions of a benchmark. The same command, given again, goes on where it was."""

    # The file of answers to write, one JSON object a line. Local or gs://.
    answers: str
    # A Hugging Face folder in any layout, or the workdir of a run.
    checkpoint: str
    # The folder that the names of pictures start from; by default that of the data.
    images: str | None = None
    # Greedy by default; published tables differ, see docs/evaluation.md.
    decoding: Decoding = dataclasses.field(default_factory=lambda: Decoding(max_tokens=1024))
    # The conversation around question and answer.
    template: Literal["llava_v1", "vicuna_v1"] = "llava_v1"
    # "pad" to a square in the mean colour, as LLaVA evaluates; "crop" the centre.
    image_rule: Literal["pad", "crop"] = "pad"
    # Type of weights and matrix products; by default float32 on a CPU, and bfloat16 elsewhere.
    dtype: Literal["bfloat16", "float32"] | None = None
    # Questions that are answered at a time on each device of mesh.data x mesh.fsdp.
    slots: int = 8
    # How the devices of a process are laid out.
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    # Whether this is one of several processes that answer together, one for each host. Each has a model of its own.
    distributed: bool = False

    def __post_init__(self):
        """Checks the number of slots."""
        if self.slots < 1:
            raise ValueError(f"slots must be at least 1, got {self.slots}")


def answer(options: AnswerOptions, console=None):
    """Asks a model all questions, and writes its answers when all are there.

    Args:
      options: `AnswerOptions`.
      console: a `Console`; None for one on the standard output.
    """
    questions, target = options.questions(), absolute(options.answers)
    pictures, books = absolute(options.images or options.data), epath.Path(f"{target}{BOOKS}")
    console, source = console or Console(), find_model(ModelConfig(path=options.checkpoint))
    asker = _Asker(source, pictures, options)
    room = asker.room(questions, source.shape.text.max_positions - options.decoding.max_tokens)
    settings = {
        "model": str(source),
        "source": source.fingerprint,
        "questions": fingerprint(questions),
        "decoding": dataclasses.asdict(options.decoding),
        "template": options.template,
        "image_rule": options.image_rule,
        "tokenizer": asker.fingerprint,
    }
    settings |= {} if options.dtype is None else {"dtype": options.dtype}
    manifest, pieces = read_manifest(books, settings), Pieces(books)
    if target.exists() and not manifest:
        raise ValueError(f"{target} is there, and nothing in {books} says how it was made; name another file")
    said = {line.row: line.text for line in pieces.new()}
    console.note(f"model    {source}")
    console.note(f"asks     {len(questions)} questions of {options.benchmark}, {len(questions) - len(said)} to go")
    if len(said) < len(questions):
        _check_pictures(questions, pictures)
        speaker = load_speaker(source, make_mesh(options.mesh, jax.local_devices()), dtype=options.dtype)
        settings |= {"weights": speaker.digest, "dtype": str(speaker.model.config.dtype)}
        if jax.process_index() == 0 and not manifest:
            write_manifest(books, settings)
        _wait(lambda: read_manifest(books, settings))  # also says if weights are not those it began with
        index, count = (jax.process_index(), jax.process_count()) if options.distributed else (0, 1)
        own = [i for i in range(index, len(questions), count) if i not in said]
        generator = speaker.generator(options.decoding, room=room, slots=options.slots)
        show = _Progress(console, len(own))
        try:
            for done, each in enumerate(generator(asker(i, questions[i]) for i in own), 1):
                pieces.add(Line.of(0, each.key, questions[each.key].key, speaker.spell(each.ids), each))
                show(done)
        finally:
            pieces.flush()
            console.close()

    def all_said():
        said.update((line.row, line.text) for line in pieces.new())
        return len(said) == len(questions)

    _wait(all_said)
    if jax.process_index() == 0:
        lines = [json.dumps(write_row(question, said[i]), ensure_ascii=False) for i, question in enumerate(questions)]
        write_durably(target, "".join(f"{line}\n" for line in lines))
        console.note(f"wrote    {target}")


class _Asker:
    """Makes prompts of questions, with a picture and without."""

    def __init__(self, source, pictures, options):
        tokenizer, vision = source.tokenizer, source.shape.vision
        prompter = Prompter(tokenizer, options.template, vision.image_tokens)
        looks = {"unk": unknown_word(tokenizer), "image_rule": options.image_rule, "seed": options.decoding.seed}
        ask = lambda image: Asker(Recipe(image=image), prompter, vision, **looks)
        self._askers = {True: ask("kept"), False: ask("no_image")}
        self._pictures, self.fingerprint = pictures, prompter.fingerprint

    def __call__(self, number, question):
        """Returns the prompt of a question, with its number as the key."""
        seen = question.image is not None
        data = (self._pictures / question.image).read_bytes() if seen else b""
        return self._askers[seen](number, Record(question.key, data, question.text, {}), "answer")

    def room(self, questions, most) -> int:
        """Returns the tokens of the longest prompt; raises if it leaves no room for an answer."""
        longest = 1
        for seen, asker in self._askers.items():
            some = [question for question in questions if (question.image is not None) == seen]
            for question, length in zip(some, asker.lengths([question.text for question in some]), strict=True):
                if isinstance(length, Exception):
                    raise ValueError(f"question {question.key!r}: {length}")
                if length > most:
                    raise ValueError(
                        f"question {question.key!r} has {length} tokens, and decoding.max_tokens leaves room for "
                        f"{max(0, most)} of the model's positions: lower it"
                    )
                longest = max(longest, length)
        return longest


class _Progress:
    """Shows every few seconds how far this process is."""

    def __init__(self, console, total):
        self._console, self._total = console, total
        self._start = self._shown = time.monotonic()

    def __call__(self, done):
        """Takes how many answers there are now."""
        now = time.monotonic()
        if now - self._shown < _SHOW and done < self._total:
            return
        self._shown, left = now, round((self._total - done) * (now - self._start) / done)
        self._console.progress(f"{done} of {self._total} answers, {left // 60}:{left % 60:02} left")


def _check_pictures(questions, folder):
    """Raises if a picture is not there or damaged: a benchmark is never made smaller."""
    names = list(dict.fromkeys(question.image for question in questions if question.image is not None))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} pictures are not in {folder} (first {missing[0]}); name their folder with "
            "--images"
        )
    for name in names:
        try:
            decode((folder / name).read_bytes())
        except ImageError as error:
            raise ValueError(f"{folder / name}: {error}; fetch it again") from None


def _wait(done):
    """Waits for what other processes do."""
    while not done():
        time.sleep(_WAIT)
