"""A record's picture among others, and the prompt that asks a model about it."""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from napo_jax.composed.drawing import Drawn
from napo_jax.composed.pictures import NOISE, cells_of_box, encode, grid, inset, middle_cells, with_noise
from napo_jax.composed.wording import name_picture
from napo_jax.data.images import decode, fit
from napo_jax.models import IMAGE_SLOT

Form = Literal["sequence", "grid", "inset"]


class Composed(NamedTuple):
    """Pictures, and a question that is about one of them."""

    images: list[bytes]  # encoded
    question: str
    box: tuple[int, int, int, int] | None  # where the true picture lies in the one there is; None in a sequence


class Asked(NamedTuple):
    """What a model is asked."""

    ids: np.ndarray  # int32[P]
    pictures: np.ndarray  # uint8[n, I, I, 3]
    on_target: np.ndarray  # bool[P], the slots of the true picture
    seed: int


@dataclasses.dataclass(frozen=True)
class Composer:
    """Composes pictures in one form."""

    form: Form
    released: bool  # numbers on the cells of a grid, noise in what is asked, the middle for the box of an inset
    exif: bool

    @property
    def labelled(self) -> bool:
        """Whether pictures bear numbers, to be named by."""
        return self.released and self.form == "grid"

    def compose(self, picture: bytes, others: list[bytes], question: str, drawn: Drawn) -> Composed:
        """Returns a record's picture among others, with the words that name it.

        Args:
          picture: the record's own, encoded.
          others: the pictures of `drawn.others`.
          question: the record's.
          drawn: `Drawn`.
        """
        count, place, labelled = drawn.count, drawn.place, self.labelled
        wording = {"labelled": labelled, "wording": drawn.wording}
        question = name_picture(self.form, count, place, question, **wording)
        if self.form == "sequence":
            return Composed([*others[:place], picture, *others[place:]], question, None)
        own, others = decode(picture, exif=self.exif), [decode(other, exif=self.exif) for other in others]
        if self.form == "grid":
            whole, boxes = grid([*others[:place], own, *others[place:]], labelled=labelled)
            return Composed([encode(whole)], question, boxes[place])
        whole, box = inset(own, others[0])
        return Composed([encode(whole)], question, box)

    def ask(self, composed: Composed, drawn: Drawn, prompter, vision, rule) -> Asked:
        """Returns what a model is asked; raises PromptError where the question cannot be used.

        Args:
          composed: what `compose` returned.
          drawn: `Drawn`.
          prompter: the model's `Prompter`.
          vision: its `ClipConfig`.
          rule: how a picture becomes a square; see `data.images.fit`.
        """
        ids = np.array(prompter.prefix(composed.question, pictures=len(composed.images)), np.int32)
        # Composed pictures are upright already.
        exif = self.exif and self.form == "sequence"
        pictures = [decode(image, exif=exif) for image in composed.images]
        each, side = vision.image_tokens, vision.image_size // vision.patch_size
        of_target = np.zeros((len(pictures), each), bool)
        if composed.box is None:
            of_target[drawn.place] = True
        elif self.released and self.form == "inset":
            of_target[0] = middle_cells(side).reshape(-1)
        else:
            of_target[0] = cells_of_box(composed.box, *pictures[0].size, rule, side).reshape(-1)
        if self.released and self.form in NOISE:
            box = composed.box if self.form == "grid" else (0, 0, *pictures[0].size)
            pictures = [with_noise(pictures[0], box, NOISE[self.form], np.random.default_rng(drawn.seed))]
        on_target = np.zeros(len(ids), bool)
        on_target[ids == IMAGE_SLOT] = of_target.reshape(-1)
        squares = np.stack([fit(picture, vision.image_size, rule) for picture in pictures])
        return Asked(ids, squares, on_target, drawn.seed)
