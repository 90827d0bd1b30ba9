"""A model's answers to questions about one of several pictures, and how much of them was seen in that one."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from napo_jax.composed.asker import Asked
from napo_jax.composed.misplaced import Said
from napo_jax.data.images import normalise
from napo_jax.decoding import Decoding
from napo_jax.generate import Prompt
from napo_jax.models import IMAGE_SLOT, Groups
from napo_jax.models.looking import looks
from napo_jax.sharding import over_rows

_ROUND = 64  # tokens are padded to multiples of this, so that few shapes are compiled


class Answerer:
    """Answers with one model, and looks at where it looked."""

    def __init__(self, speaker, decoding: Decoding, *, room, layer, slots, batch):
        """Makes one.

        Args:
          speaker: `Speaker`.
          decoding: how answers are decoded.
          room: the most tokens of a prompt.
          layer: of the decoder, from 0, whose attention counts.
          slots: prompts that are answered at a time on each device of mesh.data x mesh.fsdp.
          batch: answers whose attention is computed at a time, likewise.
        """
        self._speaker, self._decoding, self._layer = speaker, decoding, layer
        self._generator = speaker.generator(decoding, room=room, slots=slots)
        self._batch = batch * speaker.mesh.shape["data"] * speaker.mesh.shape["fsdp"]

    def __call__(self, asked: dict[int, Asked], check) -> dict[int, Said]:
        """Returns {row: what was said} for {row: what is asked}; `check` is called now and then."""
        prompts = (Prompt(row, one.ids, np.asarray(normalise(one.pictures)), one.seed) for row, one in asked.items())
        answers = {}
        for answer in self._generator(prompts):
            answers[answer.key] = answer
            check()
        found = {}
        # Of like lengths and as many pictures, so that little is padding.
        size = lambda row: (len(asked[row].pictures), len(asked[row].ids) + len(answers[row].ids))
        for count in sorted({len(one.pictures) for one in asked.values()}):
            rows = sorted((row for row in asked if len(asked[row].pictures) == count), key=size)
            for start in range(0, len(rows), self._batch):
                some = rows[start : start + self._batch]
                shares = self._on_target([asked[row] for row in some], [answers[row].ids for row in some])
                for row, share in zip(some, shares, strict=True):
                    said = answers[row]
                    text = self._speaker.spell(said.ids)
                    found[row] = Said(text, said.ended, self._perplexity(said), round(float(share), 6), None)
                check()
        return found

    def _perplexity(self, answer):
        """Returns the perplexity of an answer, its end included; the model's own, whatever it is decoded by."""
        tokens = len(answer.ids) + answer.ended
        total = answer.score * (tokens**self._decoding.length_penalty if self._decoding.beams > 1 else 1)
        return round(math.exp(-total / max(tokens, 1)), 6)

    def _on_target(self, asked, answers):
        """Returns the share of the attention to all pictures that each answer's tokens pay to the true one, float[N].

        An answer without a token has 0.
        """
        up = lambda length: -(-max(length, 1) // _ROUND) * _ROUND
        prefix_tokens, answer_tokens = up(max(len(one.ids) for one in asked)), up(max(map(len, answers)))
        rows = self._batch
        pictures = np.zeros((rows, 1, *asked[0].pictures.shape), np.uint8)
        prefix, lengths = np.zeros((rows, 1, prefix_tokens), np.int32), np.ones((rows, 1), np.int32)
        ids, said = np.zeros((rows, 1, answer_tokens), np.int32), np.zeros((rows, 1), np.int32)
        target = np.zeros((rows, prefix_tokens), bool)
        for row, (one, answer) in enumerate(zip(asked, answers, strict=True)):
            pictures[row, 0], prefix[row, 0, : len(one.ids)], lengths[row] = one.pictures, one.ids, len(one.ids)
            ids[row, 0, : len(answer)], said[row] = answer, len(answer)
            target[row, : len(one.ids)] = one.on_target
        speaker = self._speaker
        arrays = jax.device_put((Groups(pictures, prefix, lengths, ids, said), target), over_rows(speaker.mesh))
        with jax.set_mesh(speaker.mesh):
            return np.asarray(_shares(speaker.model, self._layer, speaker.params, *arrays))[: len(asked)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _shares(model, layer, params, groups, target):
    attention = looks(model, params, groups._replace(images=normalise(groups.images)), (0,))[layer, :, 0]
    on_pictures = jnp.where(groups.prefix_ids[:, 0] == IMAGE_SLOT, attention, 0)
    on_target = jnp.where(target, on_pictures, 0).sum(axis=1)
    return on_target / jnp.maximum(on_pictures.sum(axis=1), 1e-30)
