"""The questions of a benchmark as prompts of a model."""

from etils import epath

from napo_jax.bias.masks import Asker, Recipe
from napo_jax.data.images import ImageError, decode
from napo_jax.data.prompts import Prompter
from napo_jax.data.store import Record
from napo_jax.pieces import digest
from napo_jax.speaker import unknown_word


class QuestionAsker:
    """Makes prompts of questions, with a picture and without."""

    def __init__(self, tokenizer, vision, pictures, *, template="llava_v1", image_rule="pad", seed=0):
        """Takes what prompts are made with.

        Args:
          tokenizer: the model's.
          vision: the model's `ClipConfig`.
          pictures: the folder that the names of pictures start from.
          template: the conversation around question and answer.
          image_rule: how a picture becomes a square; see `data.images.fit`.
          seed: of answers that are drawn.
        """
        prompter = Prompter(tokenizer, template, vision.image_tokens)
        looks = {"unk": unknown_word(tokenizer), "image_rule": image_rule, "seed": seed}
        ask = lambda image: Asker(Recipe(image=image), prompter, vision, **looks)
        self._askers = {True: ask("kept"), False: ask("no_image")}
        self._pictures, self.fingerprint = epath.Path(pictures), prompter.fingerprint

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


def _is_file(path):
    try:
        return path.is_file()
    except OSError:  # too long for a name, as an encoded picture is
        return False


def check_pictures(questions, folder) -> dict[str, str]:
    """Returns a digest of the content of each picture, by its name.

    Of the content, and not of times and sizes: the pictures are read and decoded here in any case, which takes far
    longer, and a copy on another host has other times.

    Raises:
      ValueError: one is not there, or damaged: a benchmark is never made smaller.
    """
    names = list(dict.fromkeys(question.image for question in questions if question.image is not None))
    missing = [name for name in names if not _is_file(folder / name)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} pictures are not in {folder} (first {missing[0]}); name their folder with "
            "--images"
        )
    digests = {}
    for name in names:
        content = (folder / name).read_bytes()
        try:
            decode(content)
        except ImageError as error:
            raise ValueError(f"{folder / name}: {error}; fetch it again") from None
        digests[name] = digest(content)
    return digests
