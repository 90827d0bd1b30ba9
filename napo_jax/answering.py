"""A model asked all questions of a benchmark: on from where it stopped, over processes, and all answers or none."""

import dataclasses
import json
from typing import Literal

import jax
from etils import epath

from napo_jax.asking import QuestionAsker, check_pictures
from napo_jax.config import ModelConfig
from napo_jax.decoding import Decoding
from napo_jax.evals.answers import fingerprint, write_row
from napo_jax.evals.benchmarks import Asked
from napo_jax.metrics import Console
from napo_jax.model_source import absolute, find_model
from napo_jax.pieces import BOOKS, Line, Pieces, digest, make_room, read_manifest, write_durably, write_manifest
from napo_jax.progress import AnswerProgress, wait_until
from napo_jax.sharding import MeshConfig, make_mesh
from napo_jax.speaker import load_speaker
from napo_jax.storage import check_writable


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
    how = {"template": options.template, "image_rule": options.image_rule, "seed": options.decoding.seed}
    asker = QuestionAsker(source.tokenizer, source.shape.vision, pictures, **how)
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
    make_room(target)
    manifest, pieces = read_manifest(books, settings), Pieces(books)
    if target.exists() and not manifest:
        raise ValueError(f"{target} is there, and nothing in {books} says how it was made; name another file")
    check_writable(target.parent)
    said = dict(_read(pieces, questions, books))
    console.note(f"model    {source}")
    if warning := options.size(questions).get("warning"):
        console.note(f"warning  {warning}")
    console.note(f"asks     {len(questions)} questions of {options.benchmark}, {len(questions) - len(said)} to go")
    settings["pictures"] = check_pictures(questions, pictures)  # takes a while, so all else is looked at before
    read_manifest(books, settings)
    if len(said) < len(questions):
        speaker = load_speaker(source, make_mesh(options.mesh, jax.local_devices()), dtype=options.dtype)
        settings |= {"weights": speaker.digest, "dtype": str(speaker.model.config.dtype)}
        if jax.process_index() == 0 and not manifest:
            write_manifest(books, settings)
        wait_until(lambda: read_manifest(books, settings))  # also says if weights are not those it began with
        index, count = (jax.process_index(), jax.process_count()) if options.distributed else (0, 1)
        own = [i for i in range(index, len(questions), count) if i not in said]
        generator = speaker.generator(options.decoding, room=room, slots=options.slots)
        progress = AnswerProgress(console, len(own))
        try:
            for done, each in enumerate(generator(asker(i, questions[i]) for i in own), 1):
                pieces.add(line := Line.of(0, each.key, questions[each.key].key, speaker.spell(each.ids), each))
                progress(done, line.tokens)
        finally:
            pieces.flush()
            console.close()

    def all_said():
        said.update(_read(pieces, questions, books))
        return len(said) == len(questions)

    wait_until(all_said)
    if jax.process_index() == 0:
        lines = [json.dumps(write_row(question, said[i]), ensure_ascii=False) for i, question in enumerate(questions)]
        text = "".join(f"{line}\n" for line in lines)
        # First what the file will be, by which `score` knows it as the work of these books.
        write_manifest(books, read_manifest(books, settings)["settings"], {"answers": digest(text.encode())})
        write_durably(target, text)
        console.note(f"wrote    {target}")


def _read(pieces, questions, books):
    """Yields (number of the question, its answer) of what other pieces say; raises if one is no answer to these."""
    for line in pieces.new():
        asked = 0 <= line.row < len(questions) and line.name == questions[line.row].key
        if not asked or line.text is None:
            raise ValueError(f"{books} has an answer to {line.name!r} that is none to these questions; move it away")
        yield line.row, line.text
