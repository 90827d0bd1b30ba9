"""Asks a model about a picture: `python -m napo_jax.chat --checkpoint DIR --image cat.jpg`.

Questions are read one a line, from a terminal or a pipe. Each stands alone: the model does not hear what was said
before. On a terminal Ctrl-C stops the answer, and Ctrl-D, or Ctrl-C in place of a question, ends the chat. Answers go
to the standard output, and all else to the standard error. With `--mask` each question is answered twice, the second
time with the picture or the question taken away: what is still said is bias.
"""

import contextlib
import dataclasses
import re
import sys
import unicodedata
from typing import Literal

import jax
from etils import epath

from napo_jax.bias.masks import Asker, Recipe
from napo_jax.command import exit_with_one_line, one_line, read_flags
from napo_jax.config import ModelConfig
from napo_jax.data.images import ImageError
from napo_jax.data.prompts import Prompter, PromptError
from napo_jax.data.records import Record
from napo_jax.decoding import Decoding
from napo_jax.model_source import find_model
from napo_jax.sharding import MeshConfig, make_mesh
from napo_jax.speaker import load_speaker, unknown_word

_QUESTION_TOKENS = 512  # room for a question and the words around it; what is kept of prompts grows with it
_INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's options."""

    # A Hugging Face folder in any layout, or the workdir of a run; without one, a random model that babbles.
    checkpoint: str | None = None
    # The picture, local or gs://; without one, the chat is about none.
    image: str | None = None
    # Ask this alone, and end.
    question: str | None = None
    # Say each answer again, with the picture or the question taken away.
    mask: Literal["image", "question"] | None = None
    # How the picture is taken away: no_image, blank, white, black, mean, noise, or another image variant.
    image_mask: str = "no_image"
    # How the question is taken away: empty or generic.
    question_mask: str = "empty"
    # How answers are decoded. With several beams an answer is shown when it is done: until then they may change it.
    decoding: Decoding = dataclasses.field(default_factory=lambda: Decoding(max_tokens=512))
    # The conversation around question and answer.
    template: Literal["llava_v1", "vicuna_v1"] = "llava_v1"
    # "pad" to a square in the mean colour, as LLaVA trains and evaluates; "crop" the centre, as NaPO's code trains.
    image_rule: Literal["pad", "crop"] = "pad"
    # Whether the picture is turned as its camera noted; models are trained without.
    exif: bool = False
    # Type of weights and matrix products; by default bfloat16, and float32 on a CPU.
    dtype: Literal["bfloat16", "float32"] | None = None

    def __post_init__(self):
        """Checks what one option needs of another."""
        if self.mask and self.image is None:
            raise ValueError("--mask shows how much of an answer comes from a picture: name one, --image cat.jpg")
        for name, default in (("image", "no_image"), ("question", "empty")):
            if self.mask != name and getattr(self, f"{name}_mask") != default:
                raise ValueError(f"--{name}-mask says how --mask {name} is done, which is not asked for")
        if self.question is not None and not self.question.strip():
            raise ValueError("--question is empty; --mask question shows what is said about the picture alone")
        Recipe(image=self.image_mask)  # raises if a mask is not known
        Recipe(question=self.question_mask)

    @property
    def recipes(self) -> dict[str, Recipe]:
        """How the prompt of each answer is made, by the answer's heading; an only one has none."""
        if self.mask == "image":
            return {"with the picture": Recipe(), f"without the picture ({self.image_mask})": Recipe(self.image_mask)}
        if self.mask == "question":
            masked = Recipe(question=self.question_mask)
            return {"with the question": Recipe(), f"without the question ({self.question_mask})": masked}
        return {"": Recipe("no_image" if self.image is None else "kept")}


class Chat:
    """A model, and the picture that it is asked about.

    Attributes:
      tokenizer: the model's.
    """

    def __init__(self, options: Options):
        """Loads both; raises one line if they cannot be used, where it can be known before weights are read."""
        self._decoding, self._path, self._asked = options.decoding, options.image, 0
        self._data = b"" if self._path is None else epath.Path(self._path).read_bytes()
        source = find_model(ModelConfig(path=options.checkpoint))
        shape, self.tokenizer = source.shape, source.tokenizer
        prompter = Prompter(self.tokenizer, options.template, shape.vision.image_tokens)
        looks = {
            "unk": unknown_word(self.tokenizer),
            "image_rule": options.image_rule,
            "exif": options.exif,
            "seed": options.decoding.seed,
        }
        self._askers = {
            heading: Asker(recipe, prompter, shape.vision, **looks) for heading, recipe in options.recipes.items()
        }
        positions, most = shape.text.max_positions, options.decoding.max_tokens
        self._room = min(shape.vision.image_tokens + _QUESTION_TOKENS, positions - most)
        least = max(len(prompt.ids) for prompt in self._prompts("").values())
        if least >= self._room:
            raise ValueError(
                f"decoding.max_tokens is {most} and the model has {positions} positions, of which a prompt takes "
                f"{least} without any question: lower it"
            )
        mesh = _make_mesh(shape.text)
        speaker = load_speaker(source, mesh, dtype=options.dtype)
        _note(f"{source}, as {speaker.model.config.dtype} on {mesh.size} x {mesh.devices.flat[0].device_kind}")
        if source.folder is None:
            _note("what it says means nothing: name a model with --checkpoint")
        self._generator = speaker.generator(options.decoding, room=self._room)

    def answers(self, question):
        """Yields (heading, its tokens) of each answer, the tokens as they are said if there is one beam.

        Raises PromptError if the question cannot be asked. Asked again, it is drawn anew.
        """
        self._asked += 1
        prompts = self._prompts(question)
        longest = max(len(prompt.ids) for prompt in prompts.values())
        if longest > self._room:
            raise PromptError(
                f"the prompt has {longest} tokens, and there is room for {self._room}: ask in fewer words",
                "prefix_too_long",
            )
        for heading, prompt in prompts.items():
            if self._decoding.beams == 1:
                yield heading, self._generator.stream(prompt)
            else:
                yield heading, (token for answer in self._generator([prompt]) for token in answer.ids)

    def _prompts(self, question):
        """Returns {heading: `Prompt`}."""
        record = Record(str(self._asked), self._data, question, {})
        try:
            return {heading: asker(heading, record) for heading, asker in self._askers.items()}
        except ImageError as error:
            raise ValueError(f"{self._path}: {error}") from None


def spell(tokens, tokenizer):
    """Yields what tokens spell as they come: for each token what has become sure, and at last what is left.

    All of it is `tokenizer.decode(tokens, skip_special_tokens=True).strip()`.
    """
    special, ids, text, shown, in_bytes = set(tokenizer.all_special_ids), [], "", 0, False
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if token not in special:
            # In Llama's vocabulary: a letter whose bytes stay incomplete spoils those of the letters just before it.
            in_bytes = re.fullmatch(r"<0x[0-9A-F]{2}>", tokenizer.convert_ids_to_tokens(token))
        sure = shown if in_bytes or text.endswith("\N{REPLACEMENT CHARACTER}") else len(text)
        yield text[shown:sure]
        shown = sure
    yield text[shown:]


def _make_mesh(text):
    """Returns a mesh of all devices that share one row's arithmetic; of one, where the model does not divide."""
    devices = jax.local_devices()
    sizes = (text.heads, text.kv_heads, text.mlp_width, text.vocab_size)
    divides = all(size % len(devices) == 0 for size in sizes)
    return make_mesh(MeshConfig(fsdp=1, tensor=-1), devices if divides else devices[:1])


def _note(line):
    print(line, file=sys.stderr, flush=True)


def _harmless(text):
    """Returns a text that moves no cursor: its control characters are spelt out."""
    control = lambda c: unicodedata.category(c) == "Cc" and c not in "\n\t"
    return "".join(c.encode("unicode_escape").decode() if control(c) else c for c in text)


def _answer(chat, question, most):
    """Prints the answers to a question, of so many tokens at most."""
    for heading, tokens in chat.answers(question):
        if heading:
            print(f"{heading}:", flush=True)
        for said, piece in enumerate(spell(tokens, chat.tokenizer)):  # noqa: B007  there is one more piece than tokens
            print(_harmless(piece), end="", flush=True)
        print(flush=True)
        if said == most:
            _note(f"cut off after {most} tokens: --decoding.max-tokens")


def _questions():
    """Yields what is asked, line by line; empty lines ask nothing."""
    prompt = ""
    if sys.stdin.isatty() and sys.stdout.isatty():
        prompt = "> "
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lines can be edited, and called back
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            print(end="\n" if prompt else "")
            return
        if line:
            yield line


def chat(options: Options):
    """Answers one question, or all that are asked."""
    most, terminal = options.decoding.max_tokens, sys.stdin.isatty()
    model = Chat(options)
    if options.question is not None:
        _answer(model, options.question.strip(), most)
        return
    if terminal:
        _note("each question stands alone; the first answer takes longer; Ctrl-C stops an answer, Ctrl-D ends")
    for question in _questions():
        try:
            _answer(model, question, most)
        except PromptError as error:
            _note(one_line(error))
        except KeyboardInterrupt:
            if not terminal:  # nobody is there to ask something else
                raise
            print(flush=True)


def main(argv=None):
    """Runs the command."""
    options = read_flags(Options, argv, description=__doc__)
    try:
        chat(options)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None


if __name__ == "__main__":
    exit_with_one_line(main)
