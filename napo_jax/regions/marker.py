"""What a row's picture must show for its chosen answer to be true: the answer's keywords, and where they are seen."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from napo_jax.data.images import decode, fit, normalise
from napo_jax.data.prompts import PromptError
from napo_jax.data.regions import Region
from napo_jax.models import Groups
from napo_jax.regions.attention import image_attention
from napo_jax.regions.chunks import find_chunks
from napo_jax.regions.evidence import image_evidence, mask_of
from napo_jax.regions.grounders import mask_of_boxes, mask_of_masks, matching_boxes
from napo_jax.regions.keywords import Keyword, Ranking, keywords
from napo_jax.sharding import over_rows

_ROUND = 32  # tokens are padded to multiples of this, so that few shapes are compiled
NO_KEYWORD, NOT_FOUND = "no_keyword", "not_found"  # faults of rows whose whole picture is the region


class Marked(NamedTuple):
    """What was found for a row."""

    keywords: list[str]
    bits: str | None  # the region's, as hex digits; None where the row has no picture to mark one in
    fault: str | None  # why the region is the whole picture, or not there


class Asked(NamedTuple):
    """A row that can be marked."""

    words: list[Keyword]
    picture: np.ndarray  # uint8[I, I, 3], as the model sees it
    size: tuple[int, int]  # width and height of the picture as it came
    prefix: list[int]
    answer: list[int]
    spans: list[tuple[int, int]]  # of the answer's tokens in its text
    boxes: list  # that came with the row
    masks: list  # likewise
    image: bytes  # the picture as it came


@dataclasses.dataclass(frozen=True)
class Marker:
    """Marks regions in the frame of one model."""

    prompter: object  # `Prompter`
    vision: object  # `ClipConfig`
    ranking: Ranking
    rule: str  # how a picture becomes a square
    exif: bool
    max_tokens: int  # of prefix and answer together
    share: float  # of the evidence for a word that its places hold
    find: Callable = find_chunks  # what finds the things that an answer names

    def ask(self, record, boxes=None, masks=None) -> Asked | Marked:
        """Returns what is to be marked of a row, or why nothing is.

        Args:
          record: `Record`, or the reason why there is none.
          boxes: mappings of `label` and `box`, where the row came with some.
          masks: mappings of `label` and `mask`, likewise.
        """
        if isinstance(record, str):
            return Marked([], None, record)
        text = record.answers.get("chosen", "")
        if not text.strip():
            return Marked([], None, "no_chosen")
        words = keywords(text, ranking=self.ranking, find=self.find)
        if not words:
            return self._whole(NO_KEYWORD)
        picture = decode(record.image, exif=self.exif)
        try:
            prefix, (answer,) = self.prompter.prefix(record.question), self.prompter.answers([text])
            if isinstance(answer, PromptError):
                raise answer
        except PromptError as error:
            return Marked([], None, error.reason)
        room = self.max_tokens - len(prefix)
        if room < 1:
            return Marked([], None, "prefix_too_long")
        pixels = fit(picture, self.vision.image_size, self.rule)
        spans = self.prompter.answer_spans(text)
        came = boxes or [], masks or [], record.image
        return Asked(words, pixels, picture.size, prefix, answer[:room], spans[:room], *came)

    def by_boxes(self, asked: Asked) -> Marked:
        """Marks where the boxes are whose labels name a keyword."""
        found = [box for word in asked.words for box in matching_boxes(word.text, asked.boxes)]
        return self._marked(asked.words, mask_of_boxes(found, *asked.size, self.rule, self._side))

    def by_masks(self, asked: Asked) -> Marked:
        """Marks where the masks are whose labels name a keyword."""
        found = [mask for word in asked.words for mask in matching_boxes(word.text, asked.masks, "mask")]
        return self._marked(asked.words, mask_of_masks(found, *asked.size, self.rule, self._side))

    def by_detector(self, detector, asked: Asked) -> Marked:
        """Marks where a `Detector` finds the keywords; what it cannot take is not found."""
        image = decode(asked.image, exif=self.exif)
        boxes = detector.find(image, [word.text for word in asked.words])
        of = mask_of_boxes
        if boxes and detector.outlines:
            boxes, of = detector.outline(image, boxes), mask_of_masks
        return self._marked(asked.words, of(boxes, *asked.size, self.rule, self._side))

    def by_model(self, speaker, rows: list[Asked], batch: int, layers=None) -> list[Marked]:
        """Marks the places that a model's own words depend on, or look at.

        Args:
          speaker: `Speaker`, the model.
          rows: at most `batch` of them.
          batch: rows that are computed at a time, over all devices of the speaker's mesh.
          layers: the band of layers whose attention counts, of `image_attention`; None for `image_evidence`.
        """
        longest = lambda lengths: -(-max(lengths) // _ROUND) * _ROUND
        prefix = np.zeros((batch, 1, longest(len(row.prefix) for row in rows)), np.int32)
        answer = np.zeros((batch, 1, longest(len(row.answer) for row in rows)), np.int32)
        images = np.zeros((batch, 1, *rows[0].picture.shape), np.uint8)
        weights = np.zeros((batch, self.ranking.count, answer.shape[2]), np.float32)
        prefix_lengths, answer_lengths = np.ones((batch, 1), np.int32), np.zeros((batch, 1), np.int32)
        for i, row in enumerate(rows):
            images[i, 0] = row.picture
            prefix[i, 0, : len(row.prefix)], prefix_lengths[i] = row.prefix, len(row.prefix)
            answer[i, 0, : len(row.answer)], answer_lengths[i] = row.answer, len(row.answer)
            for k, word in enumerate(row.words):
                weights[i, k, : len(row.spans)] = [start < word.end and word.start < end for start, end in row.spans]
        # A place for the picture in a row that only fills the batch, too: it is thrown away.
        groups = Groups(images, prefix, prefix_lengths, answer, answer_lengths)
        groups, weights = jax.device_put((groups, weights), over_rows(speaker.mesh))
        with jax.set_mesh(speaker.mesh):
            found = np.asarray(_of_model(speaker.model, layers, speaker.params, groups, weights))
        masks = [
            np.any([mask_of(found[i, k], self.share) for k in range(len(row.words))], axis=0)
            for i, row in enumerate(rows)
        ]
        return [self._marked(row.words, mask) for row, mask in zip(rows, masks, strict=True)]

    def region(self, marked: Marked) -> Region | None:
        """Returns the region of a row."""
        if marked.bits is None:
            return None
        return self._region(np.ones((1, 1)))._replace(bits=bytes.fromhex(marked.bits))

    @property
    def _side(self):
        return self.vision.image_size // self.vision.patch_size

    def _region(self, mask):
        whole = np.broadcast_to(mask, (self._side, self._side))
        return Region.of(whole, self.rule, self.exif)

    def _whole(self, fault, words=()):
        return Marked(list(words), self._region(np.ones((1, 1))).bits.hex(), fault)

    def _marked(self, words, mask):
        texts = [word.text for word in words]
        return Marked(texts, self._region(mask).bits.hex(), None) if mask.any() else self._whole(NOT_FOUND, texts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _of_model(model, layers, params, groups, weights):
    groups = groups._replace(images=normalise(groups.images))
    if layers is None:
        return image_evidence(model, params, groups, weights)
    return image_attention(model, params, groups, weights, layers)
