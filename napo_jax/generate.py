"""Answers to prompts with and without pictures: a fixed number of slots, each with a prompt and the beams that go on.

A prompt is read once for all of its beams. As soon as some slots are done they are filled anew, so that one long answer
does not hold up the others. What a prompt's answer is does not depend on its company, its slot or its turn.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from napo_jax.debias import calibrate, contrast, without_picture
from napo_jax.decoding import Decoding, Search, begin, best, choose
from napo_jax.models import IMAGE_SLOT, Llava
from napo_jax.models.llava import layers_apart
from napo_jax.models.mixing import Kept, NextToken
from napo_jax.sharding import ROWS, over_rows

_PROMPT_STEP = 128  # prompts are padded to multiples of this many tokens, for each of which a program is compiled
_FIRST_WINDOW = 64  # tokens of answers that are looked at; twice as many as soon as one is longer, and so on


class Prompt(NamedTuple):
    """What is asked."""

    key: object  # whatever names it; comes back with the answer
    ids: np.ndarray  # int32[P], with IMAGE_SLOT where image tokens go
    image: np.ndarray | None = None  # float32[I, I, 3], normalised; several as [n, I, I, 3]
    seed: int = 0  # of what is drawn, beside that of the decoding


class Answer(NamedTuple):
    """What is said."""

    key: object
    ids: list[int]  # without the end
    score: float  # log-prob, with the length penalty where beams are searched
    ended: bool  # whether it came to its end, and not to the most tokens


class _Stream(NamedTuple):
    """A prompt of each slot, with what was said behind it."""

    kept: Kept | list[Kept]  # layers in front, or by layer where they are apart
    lengths: jax.Array  # int32[S], of the prompts


class _State(NamedTuple):
    search: Search
    streams: tuple[_Stream, ...]  # the prompts, and those that they are held against: they hear what the first one says
    logits: jax.Array  # float32[S, N, V], of the next token


class Generator:
    """Generates answers with one model and one way of decoding.

    Attributes:
      slots: int, prompts that are answered at a time.
    """

    def __init__(
        self,
        model: Llava,
        params,
        decoding: Decoding,
        *,
        eos=2,
        unk=0,
        slots=8,
        prompt_tokens=1024,
        mesh=None,
        apart=None,
    ):
        """Makes one; programs are compiled when they are needed.

        Args:
          model: the `Llava`.
          params: its parameters.
          decoding: how answers are decoded.
          eos: the token that ends an answer.
          unk: the token that stands for a picture that is taken away, where `Decoding.debias` wants one.
          slots: prompts that are answered at a time, over all devices.
          prompt_tokens: the most tokens of a prompt, its image tokens included.
          mesh: made by `sharding.make_mesh`, on which the parameters lie: slots are cut over its rows, and what is kept
            of prompts and answers over heads besides. None: one device.
          apart: whether a layer's weights, and what is kept of it, are arrays of their own. The decoder's layers are
            there twice then. None: on a CPU, which in a loop over layers would copy them out of those of all at every
            token.
        """
        text = model.config.text
        if prompt_tokens + decoding.max_tokens > text.max_positions:
            raise ValueError(
                f"prompts of {prompt_tokens} tokens and answers of {decoding.max_tokens} exceed the model's "
                f"{text.max_positions} positions"
            )
        self._rows = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)
        if slots % self._rows:
            raise ValueError(f"{slots} slots do not divide among {self._rows} devices (mesh.data x mesh.fsdp)")
        self._model, self._decoding, self._eos, self._unk = model, decoding, eos, unk
        self.slots, self._prompt_tokens, self._mesh = slots, prompt_tokens, mesh
        self._in_row = max(1, slots // 4 // self._rows)  # prompts that are read at a time, by a row of devices
        self._others = len(without_picture(np.zeros(0, np.int32), decoding.debias))  # prompts that each is held against
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        self._apart = platform == "cpu" if apart is None else apart
        self.use(params)
        places = self._places()
        self._empty = jax.jit(self._empty, out_shardings=places)  # compiled, so that no two of its arrays are one
        self._read = jax.jit(self._read, donate_argnums=1, out_shardings=places)
        self._go_on = jax.jit(self._go_on, donate_argnums=1, static_argnums=2, out_shardings=places)

    def use(self, params) -> None:
        """Takes other parameters, of the same shapes; not while answers are being said."""
        self._params = layers_apart(params) if self._apart else params

    @property
    def kept_bytes(self) -> int:
        """How much is kept of prompts and answers, over all devices, while they are said."""
        streams = jax.eval_shape(self._empty).streams
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(streams))

    def __call__(self, prompts: Iterable[Prompt]) -> Iterator[Answer]:
        """Yields an answer to each prompt, in the order in which they are done."""
        prompts = iter(prompts)
        together = self._in_row * self._rows
        with self._on_mesh():
            state = self._empty()
        keys, free, more, longest = {}, set(range(self.slots)), True, 0
        while True:
            while more and len(free) >= together:
                places = self._free_places(free)
                some = list(itertools.islice(prompts, np.count_nonzero(places < self.slots)))
                more = bool(some)
                if some:
                    state = self._take_in(state, some, places)
                    taken = places[places < self.slots][: len(some)].tolist()
                    keys |= {slot: prompt.key for slot, prompt in zip(taken, some, strict=True)}
                    free -= set(taken)
            if not keys:
                return
            # Until enough slots are done to read new prompts, or, when there are none, until all are.
            enough = min(self.slots, len(free) + together) if more else self.slots
            with self._on_mesh():
                most = self._decoding.max_tokens
                state = self._go_on(self._params, state, self._window(longest), enough, most)
                tokens, lengths, scores, done, said = self._fetch(state.search)
            for slot in [slot for slot in keys if done[slot]]:
                ids = tokens[slot, : lengths[slot]].tolist()
                ended = bool(ids) and ids[-1] == self._eos
                yield Answer(keys.pop(slot), ids[:-1] if ended else ids, float(scores[slot]), ended)
                free.add(slot)
            longest = max((int(said[slot]) for slot in keys), default=0)

    def stream(self, prompt: Prompt) -> Iterator[int]:
        """Yields the tokens of one answer as they are said, without the end."""
        if self._decoding.beams > 1 or self.slots > 1:
            raise ValueError(
                "tokens can be had as they are said with one beam and one slot, got "
                f"{self._decoding.beams} and {self.slots}: of several beams, none is final before the end"
            )
        with self._on_mesh():
            state = self._take_in(self._empty(), [prompt], self._free_places({0}))
        for said in range(self._decoding.max_tokens):
            with self._on_mesh():  # and not around the yield: whoever listens has a mesh of their own, or none
                state = self._go_on(self._params, state, self._window(said), 1, 1)
                token = int(state.search.tokens[0, 0, said])
            if token == self._eos:
                return
            yield token

    def _on_mesh(self):
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _places(self):
        """Returns where the arrays of a state lie."""
        if self._mesh is None:
            return None
        heads = "tensor" if self._model.config.text.kv_heads % self._mesh.shape["tensor"] == 0 else None
        by_row = over_rows(self._mesh)
        spec = PartitionSpec(ROWS, heads) if self._apart else PartitionSpec(None, ROWS, heads)
        kept = Kept(*[NamedSharding(self._mesh, spec)] * 4)
        stream = _Stream([kept] * self._model.config.text.layers if self._apart else kept, by_row)
        return _State(Search(*[by_row] * len(Search._fields)), (stream,) * (1 + self._others), by_row)

    def _fetch(self, search):
        """Returns the best answers, their lengths and scores, which are done, and how much each slot has said."""
        return jax.device_get((*best(search), search.done, search.said))

    def _window(self, longest):
        """Returns how many tokens of answers to look at, where the longest has so many and wants to go on."""
        window = _FIRST_WINDOW
        while window <= longest:
            window *= 2
        return min(window, self._decoding.max_tokens)

    def _free_places(self, free):
        """Returns int32[R, n]: for each row of devices, slots of its own to fill, and the number of slots for none."""
        of_row = self.slots // self._rows
        places = np.full((self._rows, self._in_row), self.slots, np.int32)
        for row in range(self._rows):
            own = sorted(slot for slot in free if slot // of_row == row)[: self._in_row]
            places[row, : len(own)] = own
        return places

    def _empty(self) -> _State:
        """Returns the state of slots without prompts."""
        config, beams = self._model.config, self._decoding.beams
        text, slots = config.text, self.slots
        layers = () if self._apart else (text.layers,)
        zeros = lambda *shape: jnp.zeros((*layers, slots, text.kv_heads, *shape), config.dtype)
        asked, said, width = (self._prompt_tokens,), (beams, self._decoding.max_tokens), (text.head_width,)
        kept = Kept(zeros(*width, *asked), zeros(*asked, *width), zeros(*width, *said), zeros(*said, *width))
        stream = _Stream([kept] * text.layers if self._apart else kept, jnp.ones(slots, jnp.int32))
        streams = (stream,) * (1 + self._others)
        logits = jnp.zeros((slots, beams, text.vocab_size), jnp.float32)
        return _State(begin(slots, self._decoding), streams, logits)

    def _take_in(self, state, prompts, places):
        """Reads prompts into the first of some places."""
        for prompt in prompts:
            self._check(prompt)
        count, size = places.size, self._model.config.vision.image_size
        rows = np.flatnonzero(places < self.slots)[: len(prompts)]
        local = np.full(count, self.slots, np.int32)  # past the end: written nowhere
        local[rows] = places.reshape(-1)[rows] % (self.slots // self._rows)
        seeds = np.zeros(count, np.uint32)
        seeds[rows] = [prompt.seed for prompt in prompts]
        images = None
        most = max(map(_pictures, prompts))
        if most:
            images = np.zeros((count, most, size, size, 3), np.float32)
            for row, prompt in zip(rows, prompts, strict=True):
                if prompt.image is not None:
                    images[row, : _pictures(prompt)] = prompt.image
            images = images[:, 0] if most == 1 else images
        streams = zip(
            *[(prompt.ids, *without_picture(prompt.ids, self._decoding.debias, self._unk)) for prompt in prompts],
            strict=True,
        )
        batches = tuple(self._pad(texts, rows, count) for texts in streams)
        arrays = (images, batches, seeds, local)
        if self._mesh is not None:
            arrays = jax.device_put(arrays, over_rows(self._mesh))
        with self._on_mesh():
            return self._read(self._params, state, *arrays)

    def _check(self, prompt):
        """Raises if a prompt cannot be answered: what is compiled would say nonsense to it."""
        tokens, places = len(prompt.ids), np.count_nonzero(prompt.ids == IMAGE_SLOT)
        wanted = _pictures(prompt) * self._model.config.vision.image_tokens
        if not 0 < tokens <= self._prompt_tokens:
            raise ValueError(f"a prompt has {tokens} tokens, and there is room for 1 to {self._prompt_tokens}")
        if places != wanted:
            has = {0: "no picture", 1: "a picture"}.get(_pictures(prompt), f"{_pictures(prompt)} pictures")
            raise ValueError(f"a prompt with {has} needs {wanted} places for its tokens, and has {places}")
        if prompt.image is not None and not np.isfinite(prompt.image).all():
            raise ValueError("a prompt's picture holds numbers that are not finite")
        if not 0 <= prompt.seed < 2**32:
            raise ValueError(f"the seed of a prompt must be from 0 to 2**32 - 1, got {prompt.seed}")

    def _pad(self, texts, rows, count):
        """Returns ids int32[n, P] and lengths int32[n] with texts in some rows."""
        width = -(-max(map(len, texts)) // _PROMPT_STEP) * _PROMPT_STEP
        ids = np.zeros((count, min(width, self._prompt_tokens)), np.int32)
        lengths = np.ones(count, np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids[row, : len(text)], lengths[row] = text, len(text)
        return ids, lengths

    def _read(self, params, state, images, batches, seeds, local):
        """Reads prompts into slots."""
        cut = lambda x: x.reshape(self._rows, -1, *x.shape[1:])

        def put(old, new):
            """Writes new [n, ...] into some slots of old [S, ...]; each row of devices into its own."""
            written = jax.vmap(lambda old, new, at: old.at[at].set(new, mode="drop"))(cut(old), cut(new), cut(local))
            return written.reshape(old.shape)

        def put_prompts(kept, new):
            """Writes new keys [n, G, K, P] and values [n, G, P, K] into the first places of some prompts of a layer."""
            write = jax.vmap(lambda old, new, at: old.at[at, :, : new.shape[2], : new.shape[3]].set(new, mode="drop"))
            into = lambda old, new: write(cut(old), cut(new), cut(local)).reshape(old.shape)
            keys, values = into(kept.prompt_keys, new[0]), into(kept.prompt_values, new[1])
            return kept._replace(prompt_keys=keys, prompt_values=values)

        logits, streams = [], []
        for i, (stream, (ids, lengths)) in enumerate(zip(state.streams, batches, strict=True)):
            said, new = self._model.prompts(params, None if i else images, ids, lengths)
            logits.append(said)
            streams.append(_Stream(self._by_layer(put_prompts, stream.kept, new), put(stream.lengths, lengths)))
        debias, first = self._decoding.debias, logits[0]
        if debias.labels:
            pictured = jnp.any(batches[0][0] == IMAGE_SLOT, axis=1)
            first = calibrate(first, logits[1:], debias, pictured)
        elif logits[1:]:
            first = contrast(first, logits[1:], debias)
        first = jnp.broadcast_to(first[:, None], (len(seeds), *state.logits.shape[1:]))
        new = begin(len(seeds), self._decoding)._replace(seeds=seeds, done=jnp.zeros(len(seeds), bool))
        return _State(jax.tree.map(put, state.search, new), tuple(streams), put(state.logits, first))

    def _by_layer(self, change, *kept):
        """Applies a function of what is kept of one layer to that of each."""
        return list(map(change, *kept)) if self._apart else jax.vmap(change)(*kept)

    def _choose(self, search, logits):
        """Chooses the next token of every beam, each row of devices for its own slots: nothing else is like another."""
        run = lambda search, logits: choose(search, logits, self._decoding, self._eos)
        if self._mesh is not None:  # left to itself, the compiler gathers what top_k is taken of
            by_row = PartitionSpec(ROWS)
            run = jax.shard_map(run, in_specs=by_row, out_specs=by_row, check_vma=False)
        return run(search, logits)

    def _go_on(self, params, state, window, enough, most):
        """Says at most so many tokens, until enough slots are done or one has filled the window."""
        debias = self._decoding.debias
        whole = state.streams
        near = lambda kept: kept._replace(
            beam_keys=kept.beam_keys[..., :window], beam_values=kept.beam_values[..., :window, :]
        )
        state = state._replace(streams=tuple(each._replace(kept=self._by_layer(near, each.kept)) for each in whole))

        def hear(stream, ids, search, before):
            """Reads what was said behind one of the prompts; returns the logits of the next token."""
            mix = NextToken(stream.lengths, search.row_of[:, :, :window], before, writes=self._apart)
            logits, kept = self._model.next_token(params, ids, mix, stream.kept)
            if not mix.writes:
                kept = self._by_layer(lambda kept, new: kept.say(*new, before), stream.kept, kept)
            return logits, stream._replace(kept=kept)

        def say(carry):
            state, times = carry
            before, search = state.search.said, self._choose(state.search, state.logits)
            ids = jnp.take_along_axis(search.tokens, before[:, None, None], axis=2)[..., 0]
            heard = [hear(stream, ids, search, before) for stream in state.streams]
            logits = [logits for logits, _ in heard]
            if logits[1:] and not debias.labels:
                logits[0] = contrast(logits[0], logits[1:], debias)
            return _State(search, tuple(stream for _, stream in heard), logits[0]), times + 1

        def wanted(carry):
            search, times = carry[0].search, carry[1]
            room = jnp.max(jnp.where(search.done, 0, search.said)) < window
            return (jnp.sum(search.done) < enough) & room & (times < most)

        state, _ = jax.lax.while_loop(wanted, say, (state, 0))
        put_back = lambda old, new: jax.lax.dynamic_update_slice(old, new, [0] * old.ndim)
        streams = tuple(
            new._replace(kept=jax.tree.map(put_back, old.kept, new.kept))
            for old, new in zip(whole, state.streams, strict=True)
        )
        return state._replace(streams=streams)


def _pictures(prompt):
    """Returns how many pictures a prompt has."""
    return 0 if prompt.image is None else 1 if prompt.image.ndim == 3 else len(prompt.image)
