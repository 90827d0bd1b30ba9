"""Answers to prompts with and without pictures: a fixed number of slots, each with a prompt and the beams that go on.

A prompt is read once for all of its beams. As soon as some slots are done they are filled anew, so that one long answer
does not hold up the others. What a prompt's answer is does not depend on its company, its slot or its turn.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from napo_jax.decoding import Decoding, Search, begin, best, choose
from napo_jax.models import Llava
from napo_jax.models.mixing import Kept, NextToken

_PROMPT_STEP = 64  # prompts are padded to multiples of this many tokens, for each of which a program is compiled


class Prompt(NamedTuple):
    """What is asked."""

    key: object  # whatever names it; comes back with the answer
    ids: np.ndarray  # int32[P], with IMAGE_SLOT where image tokens go
    image: np.ndarray | None = None  # float32[I, I, 3], normalised
    seed: int = 0  # of what is drawn, beside that of the decoding


class Answer(NamedTuple):
    """What is said."""

    key: object
    ids: list[int]  # without the end
    score: float  # log-prob, with the length penalty where beams are searched
    ended: bool  # whether it came to its end, and not to the most tokens


class _State(NamedTuple):
    search: Search
    kept: Kept
    logits: jax.Array  # float32[S, N, V], of the next token
    prompt_lengths: jax.Array  # int32[S]


class Generator:
    """Generates answers with one model and one way of decoding."""

    def __init__(self, model: Llava, params, decoding: Decoding, *, eos=2, slots=8, prompt_tokens=1024):
        """Makes one; programs are compiled when they are needed.

        Args:
          model: the `Llava`.
          params: its parameters.
          decoding: how answers are decoded.
          eos: the token that ends an answer.
          slots: prompts that are answered at a time.
          prompt_tokens: the most tokens of a prompt, its image tokens included.
        """
        text = model.config.text
        if prompt_tokens + decoding.max_tokens > text.max_positions:
            raise ValueError(
                f"prompts of {prompt_tokens} tokens and answers of {decoding.max_tokens} exceed the model's "
                f"{text.max_positions} positions"
            )
        self._model, self._params, self._decoding, self._eos = model, params, decoding, eos
        self._slots, self._prompt_tokens = slots, prompt_tokens
        self._together = max(1, slots // 4)  # prompts that are read at a time
        self._empty = jax.jit(self._empty)  # compiled, so that no two of its arrays are one
        self._read = jax.jit(self._read, donate_argnums=1)
        self._go_on = jax.jit(self._go_on, donate_argnums=1)

    def __call__(self, prompts: Iterable[Prompt]) -> Iterator[Answer]:
        """Yields an answer to each prompt, in the order in which they are done."""
        prompts = iter(prompts)
        state, keys = self._empty(), [None] * self._slots
        free, more = list(range(self._slots)), True
        while more or len(free) < self._slots:
            while more and len(free) >= self._together:
                some = list(itertools.islice(prompts, self._together))
                more = len(some) == self._together
                if some:
                    taken, free = free[: len(some)], free[len(some) :]
                    for slot, prompt in zip(taken, some, strict=True):
                        keys[slot] = (prompt.key,)
                    state = self._read(self._params, state, *self._arrays(some, taken))
            if len(free) == self._slots:
                return
            # Until enough slots are done to read new prompts, or, when there are none, until all are.
            enough = self._together if more else self._slots - len(free)
            state = self._go_on(self._params, state, len(free) + enough)
            tokens, lengths, scores, done = jax.device_get((*best(state.search), state.search.done))
            for slot in [slot for slot in range(self._slots) if done[slot] and keys[slot] is not None]:
                ids = tokens[slot, : lengths[slot]].tolist()
                ended = bool(ids) and ids[-1] == self._eos
                yield Answer(keys[slot][0], ids[:-1] if ended else ids, float(scores[slot]), ended)
                keys[slot] = None
                free.append(slot)

    def _empty(self) -> _State:
        """Returns the state of slots without prompts."""
        config, beams = self._model.config, self._decoding.beams
        text, slots = config.text, self._slots
        zeros = lambda *shape: jnp.zeros((text.layers, slots, *shape, text.kv_heads, text.head_width), config.dtype)
        prompt, beam = (self._prompt_tokens,), (beams, self._decoding.max_tokens)
        kept = Kept(zeros(*prompt), zeros(*prompt), zeros(*beam), zeros(*beam))
        logits = jnp.zeros((slots, beams, text.vocab_size), jnp.float32)
        return _State(begin(slots, self._decoding), kept, logits, jnp.ones(slots, jnp.int32))

    def _arrays(self, prompts, slots):
        """Returns images, ids, lengths, seeds and slots of prompts, filled up with some that no slot takes."""
        longest = max(len(prompt.ids) for prompt in prompts)
        if longest > self._prompt_tokens:
            raise ValueError(f"a prompt has {longest} tokens, and there is room for {self._prompt_tokens}")
        count, size = self._together, self._model.config.vision.image_size
        width = min(-(-longest // _PROMPT_STEP) * _PROMPT_STEP, self._prompt_tokens)
        images, ids = np.zeros((count, size, size, 3), np.float32), np.zeros((count, width), np.int32)
        lengths, seeds = np.ones(count, np.int32), np.zeros(count, np.uint32)
        places = np.full(count, self._slots, np.int32)  # past the end: written nowhere
        for row, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
            if prompt.image is not None:
                images[row] = prompt.image
            ids[row, : len(prompt.ids)], lengths[row] = prompt.ids, len(prompt.ids)
            seeds[row], places[row] = prompt.seed, slot
        return images, ids, lengths, seeds, places

    def _read(self, params, state, images, ids, lengths, seeds, places):
        """Reads prompts into slots."""
        logits, (keys, values) = self._model.prompts(params, images, ids, lengths)
        kept = state.kept._replace(
            prompt_keys=state.kept.prompt_keys.at[:, places, : ids.shape[1]].set(keys, mode="drop"),
            prompt_values=state.kept.prompt_values.at[:, places, : ids.shape[1]].set(values, mode="drop"),
        )
        new = begin(len(places), self._decoding)._replace(seeds=seeds, done=jnp.zeros(len(places), bool))
        put = functools.partial(jax.tree.map, lambda old, fresh: old.at[places].set(fresh, mode="drop"))
        logits = jnp.broadcast_to(logits[:, None], (len(places), *state.logits.shape[1:]))
        search, logits, lengths = put((state.search, state.logits, state.prompt_lengths), (new, logits, lengths))
        return _State(search, kept, logits, lengths)

    def _go_on(self, params, state, enough):
        """Says tokens until at least so many slots are done."""

        def say(state):
            before, search = state.search.said, choose(state.search, state.logits, self._decoding, self._eos)
            ids = jnp.take_along_axis(search.tokens, before[:, None, None], axis=2)[..., 0]
            mix = NextToken(state.prompt_lengths, search.row_of, before)
            logits, (keys, values) = self._model.next_token(params, ids, mix, state.kept)
            slots = jnp.arange(self._slots)
            write = lambda kept, new: kept.at[:, slots, :, before].set(new.swapaxes(0, 1), mode="drop")
            kept = state.kept._replace(
                beam_keys=write(state.kept.beam_keys, keys), beam_values=write(state.kept.beam_values, values)
            )
            return _State(search, kept, logits, state.prompt_lengths)

        return jax.lax.while_loop(lambda state: jnp.sum(state.search.done) < enough, say, state)
