"""How the next token is chosen: greedily, drawn, or by beam search with the semantics of `transformers`."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from napo_jax.debias import Debias

_NEVER = -1e9  # a score that nothing comes down to


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are decoded."""

    # Beams that are followed; 1 is greedy, or drawn.
    beams: int = 1
    # The most tokens of an answer, its end included.
    max_tokens: int = 1024
    # Above 0, tokens are drawn from the distribution at this temperature; with several beams, without replacement.
    temperature: float = 0.0
    # Draw from this many likeliest tokens (0: all), and from the likeliest that add up to this probability.
    top_k: int = 0
    top_p: float = 1.0
    # A finished answer's log-prob is divided by its length to this power.
    length_penalty: float = 1.0
    # Whether a search ends as soon as there are as many finished answers as beams.
    early_stopping: bool = False
    # Of what is drawn.
    seed: int = 0
    # Whether what is said is held against what the model says without the picture.
    debias: Debias = dataclasses.field(default_factory=Debias)

    def __post_init__(self):
        """Checks the numbers."""
        if self.beams < 1 or self.max_tokens < 1:
            raise ValueError(f"beams and max_tokens must be at least 1, got {self.beams} and {self.max_tokens}")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "temperature and top_k must not be negative and top_p in (0, 1], got "
                f"{self.temperature}, {self.top_k} and {self.top_p}"
            )
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise ValueError("top_k and top_p need a temperature above 0: without one nothing is drawn")


class Search(NamedTuple):
    """How far the answers of S prompts are, N beams each, T tokens at most."""

    said: jax.Array  # int32[S], tokens of each running beam
    tokens: jax.Array  # int32[S, N, T], of running beams
    scores: jax.Array  # float32[S, N], their log-probs
    row_of: jax.Array  # int32[S, N, T], the row in which each beam's keys of a time are kept
    finished: jax.Array  # int32[S, N, T], the best finished answers
    finished_lengths: jax.Array  # int32[S, N]
    finished_scores: jax.Array  # float32[S, N], length penalty included
    is_finished: jax.Array  # bool[S, N]
    done: jax.Array  # bool[S]: nothing more will change
    seeds: jax.Array  # uint32[S], what is drawn for a prompt comes from here


def begin(slots, decoding: Decoding) -> Search:
    """Returns a search of S slots that all are done: there is nothing in them yet."""
    beams, tokens = decoding.beams, decoding.max_tokens
    many = lambda value, dtype: jnp.full((slots, beams), value, dtype)
    words = jnp.zeros((slots, beams, tokens), jnp.int32)
    none = jnp.zeros(slots, jnp.int32)
    # One beam is likelier than none, so that the first step does not choose the same token once for every beam.
    scores = many(_NEVER, jnp.float32).at[:, 0].set(0.0)
    return Search(
        none,
        words,
        scores,
        words,
        words,
        many(0, jnp.int32),
        many(_NEVER, jnp.float32),
        many(False, bool),
        jnp.ones(slots, bool),
        jnp.zeros(slots, jnp.uint32),
    )


def choose(search: Search, logits, decoding: Decoding, eos: int) -> Search:
    """Chooses the next token of every beam; slots that are done stay as they are.

    Args:
      search: `Search`.
      logits: float32[S, N, V], of the next token.
      decoding: `Decoding`.
      eos: the token that ends an answer.

    Returns:
      `Search`, one token further.
    """
    base = jax.random.key(decoding.seed)
    keys = jax.vmap(lambda seed, said: jax.random.fold_in(jax.random.fold_in(base, seed), said))(
        search.seeds, search.said
    )
    step = _one_answer if decoding.beams == 1 else _beams
    after = jax.vmap(lambda *row: step(*row, decoding, eos))(search, logits, keys)
    keep = lambda old, new: jnp.where(search.done.reshape(-1, *[1] * (new.ndim - 1)), old, new)
    return jax.tree.map(keep, search, after)


def best(search: Search):
    """Returns the best answer of each slot, int32[S, T], its length, int32[S], and its score, float32[S]."""
    return search.finished[:, 0], search.finished_lengths[:, 0], search.finished_scores[:, 0]


def _warp(log_probs, decoding):
    """Applies temperature, top-k and top-p to log-probs or scores float32[..., V], as `transformers` does in turn."""
    scores = log_probs / decoding.temperature
    kept = 1 if decoding.beams == 1 else 2  # at least: a beam whose end is likely needs something else to go on with
    if decoding.top_k:
        least = jax.lax.top_k(scores, min(max(decoding.top_k, kept), scores.shape[-1]))[0][..., -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if decoding.top_p < 1:
        order = jnp.argsort(scores, axis=-1)  # ascending
        share = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1), axis=-1), axis=-1)
        out = (share <= 1 - decoding.top_p).at[..., -kept:].set(False)
        out = jnp.put_along_axis(jnp.zeros(scores.shape, bool), order, out, axis=-1, inplace=False)
        scores = jnp.where(out, -jnp.inf, scores)
    return scores


def _one_answer(search, logits, key, decoding, eos):
    """Chooses the next token of one slot with one beam."""
    log_probs = jax.nn.log_softmax(logits[0])
    if decoding.temperature:
        token = jax.random.categorical(key, _warp(logits[0], decoding)).astype(jnp.int32)
    else:
        token = jnp.argmax(logits[0]).astype(jnp.int32)  # log-probs may round two of them to one number
    tokens = search.tokens.at[0, search.said].set(token)
    score, said = search.scores.at[0].add(log_probs[token]), search.said + 1
    done = (token == eos) | (said >= decoding.max_tokens)
    return search._replace(
        said=said,
        tokens=tokens,
        scores=score,
        finished=tokens,
        finished_lengths=said[None],
        finished_scores=score,
        is_finished=done[None],
        done=done,
    )


def _beams(search, logits, key, decoding, eos):
    """Takes one step of a beam search in one slot."""
    beams, vocabulary = logits.shape
    log_probs = jax.nn.log_softmax(logits)
    if decoding.temperature:
        log_probs = _warp(log_probs, decoding)
    total = (log_probs + search.scores[:, None]).reshape(-1)
    # Twice as many as beams: so many go on even if every beam's best next token is its end.
    if decoding.temperature:  # the largest of sums with Gumbel noise are draws without replacement
        _, drawn = jax.lax.top_k(total + jax.random.gumbel(key, total.shape), 2 * beams)
        scores, order = jax.lax.top_k(total[drawn], 2 * beams)  # best first, as if they had not been drawn
        places = drawn[order]
    else:
        scores, places = jax.lax.top_k(total, 2 * beams)
    parents, next_tokens = places // vocabulary, (places % vocabulary).astype(jnp.int32)
    said = search.said + 1
    tokens = search.tokens[parents].at[:, search.said].set(next_tokens)
    ends = (next_tokens == eos) | (said >= decoding.max_tokens)

    running = scores + jnp.where(ends, _NEVER, 0.0)
    scores_on, on = jax.lax.top_k(running, beams)

    # Only what is among the best `beams` may finish: the others are there to go on from.
    finishes = ends & (jnp.arange(2 * beams) < beams)
    full = decoding.early_stopping & jnp.all(search.is_finished)
    penalised = scores / said.astype(jnp.float32) ** decoding.length_penalty
    penalised = penalised + jnp.where(finishes & ~full, 0.0, _NEVER)
    merged = jnp.concatenate([search.finished_scores, penalised])
    finished_scores, chosen = jax.lax.top_k(merged, beams)
    join = lambda old, new: jnp.concatenate([old, new])[chosen]
    is_finished = join(search.is_finished, finishes & ~full)
    after = search._replace(
        said=said,
        tokens=tokens[on],
        scores=scores_on,
        # Keys of this token are kept in the row that its beam has now, those of older ones where they are.
        row_of=search.row_of[parents[on]].at[:, search.said].set(jnp.arange(beams)),
        finished=join(search.finished, tokens),
        finished_lengths=join(search.finished_lengths, jnp.full(2 * beams, said)),
        finished_scores=finished_scores,
        is_finished=is_finished,
    )
    # A running beam's score now, by its length now, stands for the best that it can come to.
    hope = scores_on[0] / said.astype(jnp.float32) ** decoding.length_penalty
    worst = jnp.where(is_finished, jnp.min(finished_scores), _NEVER)
    stop = ~jnp.any(hope > worst) | jnp.all(ends) | (decoding.early_stopping & jnp.all(is_finished))
    return after._replace(done=stop)
