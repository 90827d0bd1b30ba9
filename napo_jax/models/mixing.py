"""How tokens see each other: those of a whole group at once, of a prompt that is kept, or the next token of beams."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from napo_jax.models.attention import attend
from napo_jax.models.layout import Layout
from napo_jax.models.packing import TokenOrder


class Mix:
    """Who sees whom, and which tokens ask, and so go on.

    All ask, unless a last layer that is computed apart leaves out those whose results nobody reads.
    """

    def asking(self, x):
        """Returns what of float[B, S, ...] belongs to tokens that ask."""
        return x

    @property
    def in_last_layer(self) -> "Mix":
        """The mix of the last layer."""
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WholeGroups(Mix):
    """Every stream of a layout over what it may see; nothing is kept."""

    prefix_lengths: jax.Array  # int32[B, M]
    answer_lengths: jax.Array  # int32[B, C]
    order: TokenOrder | None  # in which tokens come, if they are packed
    layout: Layout = dataclasses.field(metadata={"static": True})
    backend: str = dataclasses.field(metadata={"static": True})

    def __call__(self, q, k, v, kept):
        """Maps queries float[B, S, H, K], and keys and values float[B, S, G, K], to (float[B, S, H, K], kept)."""
        if self.order is not None:
            q, k, v = self.order.unpack(q), self.order.unpack(k), self.order.unpack(v)
        out = attend(q, k, v, self.layout, self.prefix_lengths, self.answer_lengths, self.backend)
        return (out if self.order is None else self.order.pack(out)), kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts(Mix):
    """A prompt over itself, causally; its keys and values are kept."""

    lengths: jax.Array  # int32[B]
    backend: str = dataclasses.field(metadata={"static": True})
    last_alone: bool = dataclasses.field(default=False, metadata={"static": True})  # whether its last token alone asks

    def __call__(self, q, k, v, kept):
        """Maps float[B, P or 1, H, K] and float[B, P, G, K] to (float[B, P or 1, H, K], (keys, values)).

        Keys are float[B, G, K, P] and values float[B, G, P, K].
        """
        del kept
        keys, values = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
        if self.last_alone:
            return _attend_last(q, keys, values, self.lengths), (keys, values)
        layout, no_answers = Layout(q.shape[1]), jnp.zeros((q.shape[0], 0), jnp.int32)
        return attend(q, k, v, layout, self.lengths[:, None], no_answers, self.backend), (keys, values)

    def asking(self, x):
        """Returns what of float[B, P, ...] belongs to tokens that ask, [B, P or 1, ...]."""
        if not self.last_alone:
            return x
        return jnp.take_along_axis(x, (self.lengths - 1).reshape(-1, *[1] * (x.ndim - 1)), axis=1)

    @property
    def in_last_layer(self):
        """The mix of the last layer: what is said behind a prompt depends on no other token of it."""
        return dataclasses.replace(self, last_alone=True)


def _attend_last(q, keys, values, lengths):
    """Maps one query of each row, float[B, 1, H, K], over int32[B] of P keys and values to float[B, 1, H, K]."""
    batch, _, _, width = q.shape
    grouped = (q * jnp.asarray(width**-0.5, q.dtype)).reshape(batch, keys.shape[1], -1, width)
    scores = jnp.einsum("bgrk,bgkp->bgrp", grouped, keys, preferred_element_type=jnp.float32)
    there = jnp.arange(keys.shape[3])[None] < lengths[:, None]
    weights = jax.nn.softmax(jnp.where(there[:, None, None], scores, -jnp.inf), axis=-1).astype(values.dtype)
    out = jnp.einsum("bgrp,bgpk->bgrk", weights, values, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(values.dtype)


class Kept(NamedTuple):
    """Keys and values of S prompts and of what each of their N beams has said so far; layers in front.

    They lie as a CPU's products with few queries want them, or every step would turn all of it over: heads before
    tokens, and the tokens of keys last. What accelerators would rather have has not been measured.
    """

    prompt_keys: jax.Array  # float[L, S, G, K, P]
    prompt_values: jax.Array  # float[L, S, G, P, K]
    beam_keys: jax.Array  # float[L, S, G, K, N, T], by the row that a beam had when it said the token
    beam_values: jax.Array  # float[L, S, G, N, T, K]

    def say(self, keys, values, said) -> "Kept":
        """Returns the same of one layer with the token behind said int32[S]: keys and values float[S, N, G, K]."""
        # Slot by slot, which tells the compiler that no device needs what another one writes.
        to_keys = jax.vmap(lambda old, new, at: old.at[..., at].set(new.transpose(1, 2, 0), mode="drop"))
        to_values = jax.vmap(lambda old, new, at: old.at[:, :, at].set(new.swapaxes(0, 1), mode="drop"))
        return self._replace(
            beam_keys=to_keys(self.beam_keys, keys, said), beam_values=to_values(self.beam_values, values, said)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NextToken(Mix):
    """The next token of every beam, over its prompt, over what the beam has said, and over itself.

    The prompt's keys are read once for all its beams. What beams have said stays where it was written when beams are
    exchanged: a table says in which row each beam finds its token of a time, so that nothing is copied.
    """

    prompt_lengths: jax.Array  # int32[S]
    row_of: jax.Array  # int32[S, N, T], in which row beam n finds its token of time t
    said: jax.Array  # int32[S], tokens that were said before
    # Whether the token goes to what is kept here, or is handed back. A loop over layers would copy all that it writes
    # to; without one it is written before it is read, so that it is in place.
    writes: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, q, k, v, kept):
        """Maps q float[S, N, H, K] and k, v float[S, N, G, K] to (float[S, N, H, K], kept or (k, v)), of a layer."""
        after = k, v
        if self.writes:
            kept = after = kept.say(k, v, self.said)
        prompt_keys, prompt_values, beam_keys, beam_values = kept
        slots, beams, _, width = q.shape
        rows, times = beam_values.shape[2:4]
        grouped = (q * jnp.asarray(width**-0.5, q.dtype)).reshape(slots, beams, k.shape[2], -1, width).swapaxes(1, 2)
        product = lambda spec, x, y: jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)
        over_prompt = product("sgnrk,sgkp->sgnrp", grouped, prompt_keys)
        there = jnp.arange(prompt_keys.shape[3])[None] < self.prompt_lengths[:, None]
        over_prompt = jnp.where(there[:, None, None, None], over_prompt, -jnp.inf)
        # Rows and times as one axis: products over two are slow.
        beam_keys = beam_keys.reshape(*beam_keys.shape[:3], rows * times)
        beam_values = beam_values.reshape(*beam_values.shape[:2], rows * times, width)
        over_beams = product("sgnrk,sgkp->sgnrp", grouped, beam_keys)
        own = self.row_of[:, :, None] == jnp.arange(rows)[None, None, :, None]
        own &= (jnp.arange(times)[None] < self.said[:, None])[:, None, None]
        own = own.reshape(slots, 1, beams, 1, rows * times)
        over_beams = jnp.where(own, over_beams, -jnp.inf)
        over_itself = product("sgnrk,sngk->sgnr", grouped, k)[..., None]
        scores = [over_prompt, over_beams, over_itself]
        weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(v.dtype)
        cuts = [prompt_keys.shape[3], prompt_keys.shape[3] + rows * times]
        of_prompt, of_beams, of_itself = jnp.split(weights, cuts, axis=-1)
        out = product("sgnrp,sgpk->sgnrk", of_prompt, prompt_values)
        out += product("sgnrp,sgpk->sgnrk", of_beams, beam_values)
        out += of_itself.astype(jnp.float32) * v.swapaxes(1, 2)[:, :, :, None].astype(jnp.float32)
        return out.swapaxes(1, 2).reshape(q.shape).astype(v.dtype), after
