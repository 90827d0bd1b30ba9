"""Padding left out of the decoder: the tokens of a group one behind another, and the way to a `Layout` and back."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from napo_jax.models.layout import Layout


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Packing:
    """How many places a group has for tokens that are no padding: U in all, A of them for those of its answers.

    Answers of one group differ much in length, so most padding lies between them. Packed, a group is
    [prefix 0 | ... | answer 0 | ... | padding], each stream without its own padding. All but attention works on that
    axis; attention alone unpacks to the layout, whose static mask it needs. A group with more tokens than places comes
    out as NaN: what is compiled cannot raise.
    """

    tokens: int  # U
    answer_tokens: int  # A

    def __post_init__(self):
        """Checks that answers have some of the places, and prefixes some too."""
        if not 0 < self.answer_tokens < self.tokens:
            raise ValueError(
                f"a packing needs places for answers and for prefixes, got {self.answer_tokens} of {self.tokens}"
            )

    def order(self, layout, prefix_lengths, answer_lengths, max_positions):
        """Works out where each token goes.

        Args:
          layout: the `Layout` that the tokens come from, with at least one cell.
          prefix_lengths: int32[B, M].
          answer_lengths: int32[B, C].
          max_positions: the most tokens of a prefix and an answer together; a group with more does not fit.

        Returns:
          The `TokenOrder` of each group.
        """
        places, answer_places = layout.prefixes * layout.prefix_tokens, layout.cells * layout.answer_tokens
        lengths = jnp.concatenate([prefix_lengths, answer_lengths], axis=1)
        offsets = np.arange(layout.cells) * layout.answer_tokens
        stream_offsets = np.concatenate([np.arange(layout.prefixes) * layout.prefix_tokens, places + offsets])
        layout_places = _source_places(lengths, stream_offsets, self.tokens, layout.tokens)
        answer_layout_places = _source_places(answer_lengths, offsets, self.answer_tokens, answer_places)

        starts = jnp.cumsum(lengths, axis=1) - lengths
        starts, answer_starts = starts[:, : layout.prefixes], starts[:, layout.prefixes :]
        in_prefix = starts[:, :, None] + jnp.arange(layout.prefix_tokens)[None, None]
        in_answer = answer_starts[:, :, None] + jnp.arange(layout.answer_tokens)[None, None]
        valid = layout.valid(prefix_lengths, answer_lengths)
        # Clipped, for in a group that does not fit, whose places are all NaN, each token has to read one of them.
        clip = lambda x, size: jnp.where(valid[:, -x.shape[1] :], jnp.minimum(x, size - 1), size)
        packed_places = clip(layout.join(in_prefix, in_answer), self.tokens)
        in_answers = (in_answer - answer_starts[:, :1, None]).reshape(-1, answer_places)
        answer_packed_places = clip(in_answers, self.answer_tokens)

        # Where the token before each answer token lies in the layout: in its prefix, for the first of an answer.
        ends = np.arange(layout.prefixes)[None] * layout.prefix_tokens + prefix_lengths - 1
        others = places + offsets[None, :, None] + np.arange(layout.answer_tokens - 1)[None, None]
        others = jnp.broadcast_to(others, (len(lengths), *others.shape[1:]))
        before = jnp.concatenate([layout.of_cells(ends)[:, :, None], others], axis=2)
        predictors = take(packed_places, before.reshape(-1, answer_places))
        predictors = take(predictors, answer_layout_places, fill=self.tokens)

        # The way back, to [what each image's last token predicts: M | answer tokens: A].
        nothing = layout.prefixes + self.answer_tokens
        is_end = jnp.arange(layout.prefix_tokens)[None, None] == prefix_lengths[:, :, None] - 1
        by_prefix = jnp.where(is_end, jnp.arange(layout.prefixes)[None, :, None], nothing)
        by_answer = (layout.prefixes + answer_packed_places).reshape(-1, layout.cells, layout.answer_tokens)
        by_answer = jnp.concatenate([by_answer[:, :, 1:], jnp.full_like(by_answer[:, :, :1], nothing)], axis=2)
        predicted = take(layout.join(by_prefix, by_answer), layout_places, fill=nothing)

        fits = jnp.all((prefix_lengths >= 1) & (prefix_lengths <= layout.prefix_tokens), axis=1)
        fits &= jnp.all(answer_lengths <= layout.answer_tokens, axis=1)
        fits &= jnp.all(layout.of_cells(prefix_lengths) + answer_lengths <= max_positions, axis=1)
        fits &= (jnp.sum(lengths, axis=1) <= self.tokens) & (jnp.sum(answer_lengths, axis=1) <= self.answer_tokens)
        return TokenOrder(
            layout,
            layout_places,
            packed_places,
            answer_layout_places,
            answer_packed_places,
            predictors,
            predicted,
            fits,
        )


def _source_places(lengths, offsets, size, nothing):
    """Tells the place in the layout of each packed token.

    Args:
      lengths: int32[B, n], tokens of the streams.
      offsets: int[n], where each stream starts in the layout.
      size: places of the packed axis.
      nothing: what to put where there is no token.

    Returns:
      int32[B, size].
    """
    ends = jnp.cumsum(lengths, axis=1)
    place = jnp.arange(size)[None]
    stream = jnp.sum(place[:, :, None] >= ends[:, None], axis=2, dtype=jnp.int32)
    shift = jnp.asarray(offsets, jnp.int32)[None] - (ends - lengths)
    return jnp.where(stream < lengths.shape[1], place + take(shift, stream), nothing)


class TokenOrder(NamedTuple):
    """Where the tokens of each group lie, packed and in the layout; made by `Packing.order`.

    A place says where to read; one past the end stands for padding, and reads 0.
    """

    layout: Layout
    layout_places: jax.Array  # int32[B, U], of each packed token
    packed_places: jax.Array  # int32[B, S], of each token of the layout
    answer_layout_places: jax.Array  # int32[B, A], the same among answers alone
    answer_packed_places: jax.Array  # int32[B, C T]
    predictor_places: jax.Array  # int32[B, A], among U: the token before each answer token
    predicted_places: jax.Array  # int32[B, U], among M + A: the way back
    fits: jax.Array  # bool[B], whether all of its tokens have a place

    def pack(self, x):
        """Maps [B, S, ...] to [B, U, ...]."""
        return reorder(x, self.layout_places, self.packed_places)

    def unpack(self, x):
        """Maps [B, U, ...] to [B, S, ...], with 0 at padding."""
        return reorder(x, self.packed_places, self.layout_places)

    def pack_answers(self, x):
        """Maps [B, C, T, ...] to [B, A, ...]."""
        flat = x.reshape(x.shape[0], -1, *x.shape[3:])
        return reorder(flat, self.answer_layout_places, self.answer_packed_places)

    def unpack_answers(self, x):
        """Maps [B, A, ...] to [B, C, T, ...], with 0 at padding."""
        x = reorder(x, self.answer_packed_places, self.answer_layout_places)
        return x.reshape(x.shape[0], self.layout.cells, -1, *x.shape[2:])

    def predictors(self, hidden):
        """Maps hidden states float[B, U, D] to those that predict the answer tokens, float[B, A, D].

        They are NaN all over in a group that does not fit.
        """
        return jnp.where(self.fits[:, None, None], _predictors(hidden, self), jnp.nan)

    def fill_slots(self, words, features, slots):
        """Puts image tokens into their slots.

        Args:
          words: float[B, U, D], packed embeddings.
          features: float[B, M, N, D], the image tokens of each prefix in their order.
          slots: bool[B, M, P], where they go.

        Returns:
          float[B, U, D].
        """
        batch, images, count = features.shape[:3]
        nothing, rank = images * count, jnp.cumsum(slots, axis=2)
        first = jnp.arange(images)[None, :, None]
        token = jnp.where(slots, first * count + jnp.minimum(rank - 1, count - 1), nothing)
        elsewhere = jnp.full((batch, self.layout.cells, self.layout.answer_tokens), nothing)
        token = take(self.layout.join(token, elsewhere), self.layout_places, fill=nothing)
        # The slot of image token n is the place where the count of slots passes n.
        slot = jnp.sum(rank[:, :, None] <= jnp.arange(count)[None, None, :, None], axis=3, dtype=jnp.int32)
        slot = jnp.where(slot < slots.shape[2], first * slots.shape[2] + slot, self.layout.tokens)
        slot = take(self.packed_places, slot.reshape(batch, nothing), fill=words.shape[1])
        pictures = reorder(features.reshape(batch, nothing, -1), token, slot)
        return jnp.where((token < nothing)[:, :, None], pictures, words)


def take(x, places, fill=0):
    """Reads x[B, n, ...] at int32[B, k] as [B, k, ...], row by row; `fill` where a place is past the end."""
    return jax.vmap(lambda x, places: x.at[places].get(mode="fill", fill_value=fill))(x, places)


@jax.custom_vjp
def reorder(x, places, back):
    """Reads x at places, 0 past the end, where reading the result at `back` would bring x's tokens home.

    The derivative that JAX would derive is a scatter, which is slow on a TPU. But each token is in both orders exactly
    once, and all else is 0 in either. So one map is the transpose of the other, and the derivative reads as well.

    Args:
      x: [B, n, ...].
      places: int32[B, k], below n where there is a token.
      back: int32[B, n], below k where there is a token.

    Returns:
      [B, k, ...].
    """
    del back
    return take(x, places)


reorder.defvjp(
    lambda x, places, back: (take(x, places), back),
    lambda back, slope: (take(slope, back), None, None),
)


@jax.custom_vjp
def _predictors(hidden, order):
    return take(hidden, order.predictor_places)


def _predictors_backward(order, slope):
    # A prefix's last token predicts the first token of every cell of its image; any other token predicts one or none.
    layout = order.layout
    first = order.answer_packed_places.reshape(-1, layout.cells, layout.answer_tokens)[:, :, 0]
    of_image = np.arange(layout.prefixes)[:, None] == np.array(layout.cell_image)
    by_image = jnp.where(of_image[None, :, :, None], take(slope, first)[:, None], 0).sum(axis=2)
    return take(jnp.concatenate([by_image, slope], axis=1), order.predicted_places), None


_predictors.defvjp(lambda hidden, order: (_predictors(hidden, order), order), _predictors_backward)
