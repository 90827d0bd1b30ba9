"""What is taken from a record before a model is asked: its picture, its question, or neither.

How the answer is decoded is another matter: any prompt made here can be decoded in any way.
"""

import dataclasses
import functools
import zlib

import jax
import numpy as np

from napo_jax.data.corruptions import VARIANTS, image_variants
from napo_jax.data.images import decode, fit, normalise
from napo_jax.generate import Prompt
from napo_jax.models import IMAGE_SLOT

_OTHERS = (
    "clean",
    "crop_anew",
    "region",
    "swap",
    "rejected_image",
)  # image variants that mask nothing, or need more than the picture
IMAGE_MASKS = (
    "kept",
    "no_image",  # no picture and no place for one
    "blank",  # the token <unk> in each place of the picture's tokens: the answer stands where it would
    *(name for name in VARIANTS if name not in _OTHERS),  # another picture: black, white, mean, noise, ...
)
QUESTION_MASKS = (
    "kept",
    "empty",  # the picture alone
    "generic",  # a request that says nothing of the record's own question
)
GENERIC = "What can be seen in this picture?"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the prompt of an answer is made."""

    image: str = "kept"
    question: str = "kept"

    def __post_init__(self):
        """Checks the names."""
        for name, value, there in (("image", self.image, IMAGE_MASKS), ("question", self.question, QUESTION_MASKS)):
            if value not in there:
                raise ValueError(f"there is no {name} mask {value!r}; there are {', '.join(there)}")
        if self.image == "no_image" and self.question == "empty":
            raise ValueError("without the picture and without the question there is nothing to ask")

    def __str__(self):
        """Says it in a few words."""
        return f"image {self.image}, question {self.question}"


class Asker:
    """Makes prompts of records by one recipe."""

    def __init__(self, recipe: Recipe, prompter, vision, *, unk=0, image_rule="pad", exif=False, seed=0):
        """Takes what prompts are made with.

        Args:
          recipe: the `Recipe`.
          prompter: the model's `Prompter`.
          vision: the model's `ClipConfig`.
          unk: the id of <unk>.
          image_rule: how a picture becomes a square; see `data.images.fit`.
          exif: whether pictures are turned as their EXIF says.
          seed: of masks that are drawn and of answers that are, beside the record's own.
        """
        self._recipe, self._prompter, self._vision, self._unk = recipe, prompter, vision, unk
        self._rule, self._exif, self._seed, self._device = image_rule, exif, seed, _host_device()

    def lengths(self, questions) -> list:
        """Returns how many tokens the prompt of each question has, or a PromptError in its place."""
        places = self._vision.image_tokens if self._has_places else 0
        found = self._prompter.prefixes([self._text(question) for question in questions], self._has_places, slots=0)
        return [ids if isinstance(ids, Exception) else len(ids) + places for ids in found]

    @property
    def asks_one_thing(self) -> bool:
        """Whether the text of the prompt is the same for every record."""
        return self._recipe.question != "kept"

    @property
    def _has_places(self):
        return self._recipe.image != "no_image"

    def _text(self, question):
        return {"empty": "", "generic": GENERIC}.get(self._recipe.question, question)

    def __call__(self, key, record, name="") -> Prompt:
        """Returns the prompt of a record; raises PromptError if its question cannot be used.

        Args:
          key: of the prompt.
          record: `Record`.
          name: of the answer, so that no two of a record are drawn alike.
        """
        ids = np.array(self._prompter.prefix(self._text(record.question), self._has_places), np.int32)
        if self._recipe.image == "blank":
            ids = np.where(ids == IMAGE_SLOT, np.int32(self._unk), ids)
        number = lambda text: np.uint32(zlib.crc32(f"{self._seed} {record.key} {text}".encode()))
        return Prompt(key, ids, self._picture(record.image, number("picture")), int(number(name)))

    def _picture(self, data, seed):
        """Returns the picture that is shown, float32[I, I, 3], normalised; None if none is."""
        if self._recipe.image in ("no_image", "blank"):
            return None
        pixels = fit(decode(data, exif=self._exif), self._vision.image_size, self._rule)
        variant = "clean" if self._recipe.image == "kept" else self._recipe.image
        with jax.default_device(self._device):
            return np.asarray(_variant(pixels, seed, variant, self._vision.patch_size))


def _host_device():
    """Returns the host's CPU, as accelerators have answers to say; one of them where JAX is told to know no other."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _variant(pixels, seed, name, patch):
    return image_variants(normalise(pixels)[None], seed[None], (name,), patch=patch)[0, 0]
