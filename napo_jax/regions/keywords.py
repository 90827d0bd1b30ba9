"""The keywords of an answer: which of the things that it names matter most, by MFPO's walk over a multipartite graph.

Candidates are the phrases of a text; those alike are a topic (Boudin 2018). Edges run between candidates of different
topics: phrases of one thing do not raise each other. A candidate's score is its share of the walk's steps.

MFPO (arXiv 2410.15334) gives the terms but neither its constants nor code. Of candidates i and j, with l the number of
words before them, here the edge from j to i weighs

    w_ji = (theta_ij + gamma * S_ij) * kappa_i,    theta_ij = sum of 1 / (1 + |l_i - l_j|^phi) over their occurrences,
                                                   kappa_i = exp(-lambda * l_i) at i's first occurrence,

and the first candidate of a topic further receives, times `promotion`, what the others of its topic receive. The decay
stands on the side that receives: a factor of the side that gives cancels where its edges are made to add up to one.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from napo_jax.fields import check_fields
from napo_jax.regions.chunks import Chunk, find_chunks

_DIGITS = 12  # What is equal but for the machine's rounding is equal, or another machine would rank otherwise.
_HEAD = 2  # "red car" and "red hat" are two things: what a thing is counts twice as much as how it is.


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The constants of the ranking. None is published: each default has its own reason."""

    # phi: how fast the bond between two phrases weakens with the words between them. 1 is Boudin's inverse distance.
    distance_power: float = 1.0
    # lambda, per word: what is named 50 words later counts 1/e as much. The first sentence says what a picture is of.
    decay: float = 0.02
    # gamma: with 1, phrases just too different for one topic are bound as two words in a row are: 1/2, both.
    similarity_weight: float = 1.0
    # From which similarity on, on average, two groups of phrases are one topic. "Dog" and "small dog" have 0.84, "red
    # car" and "blue car" 0.77; "dog" and "dog collar" 0.33, "red car" and "red hat" 0.2.
    topic_similarity: float = 0.5
    # How much of what the rest of a topic receives its first phrase receives as well. Boudin's best.
    promotion: float = 1.1
    # The share of steps that follow an edge; others go anywhere. As in PageRank, and in Boudin.
    damping: float = 0.85
    # K: how many keywords there are. RLAIF-V's and LLaVA's short answers name about as many things.
    count: int = 5

    def __post_init__(self):
        """Checks the numbers."""
        check_fields(self, "ranking")
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {value!r}")
        if self.damping >= 1:  # the walk would never go anywhere but along edges, and have no single answer
            raise ValueError(f"damping must be below 1, got {self.damping!r}")


class Keyword(NamedTuple):
    """One of the things that matter most.

    Attributes:
      text: as written where it is named first.
      start: of that place, in characters.
      end: of it, exclusive.
      score: its share of the walk, among all candidates of the text.
    """

    text: str
    start: int
    end: int
    score: float


def keywords(text: str, *, count: int | None = None, ranking: Ranking | None = None, find=find_chunks) -> list[Keyword]:
    """Returns the things of a text that matter most, best first; of two with one score, the earlier.

    A phrase that only says less, or more, of a thing that is there already, as "umbrella" of "red umbrella", is left
    out: it would point to the same region again.

    Args:
      text: an English answer or caption.
      count: the most that are returned, if not the ranking's.
      ranking: the constants, if not the defaults.
      find: what finds the things that a text names, as `find_chunks` does.

    >>> [keyword.text for keyword in keywords("A man rides a horse on the beach.", count=2)]
    ['horse', 'man']
    """
    ranking = ranking or Ranking()
    count = ranking.count if count is None else count
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    candidates = group_chunks(find(text))
    scores = score_candidates(candidates, ranking)
    taken = []
    for number in np.argsort(-np.round(scores, _DIGITS), kind="stable"):
        if len(taken) == count:
            break
        if not any(_says_again(candidates[number][0], candidates[other][0]) for other in taken):
            taken.append(number)
    firsts = [(candidates[number][0], float(scores[number])) for number in taken]
    return [Keyword(chunk.text, chunk.start, chunk.end, score) for chunk, score in firsts]


def group_chunks(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Returns the candidates, in order of their first occurrence: each the chunks of one normal form."""
    groups = {}
    for chunk in chunks:
        groups.setdefault(chunk.normal, []).append(chunk)
    return list(groups.values())


def score_candidates(candidates: Sequence[Sequence[Chunk]], ranking: Ranking) -> np.ndarray:
    """Returns the score of each candidate, float64[N], which add up to one.

    Args:
      candidates: the occurrences of each, as from `group_chunks`.
      ranking: the constants.
    """
    number = len(candidates)
    if not number:
        return np.zeros(0)
    similarity = measure_similarity([candidate[0] for candidate in candidates])
    topics = find_topics(similarity, ranking.topic_similarity)
    weights = _weigh(candidates, similarity, topics, ranking)
    total = weights.sum(1, keepdims=True)
    # A candidate without an edge, as where all are one topic, lets the walk go anywhere.
    steps = np.divide(weights, total, out=np.full_like(weights, 1 / number), where=total > 0)
    # Texts are short: a solve is exact, and has no number of rounds to choose.
    system = np.eye(number) - ranking.damping * steps.T
    return np.linalg.solve(system, np.full(number, (1 - ranking.damping) / number))


def measure_similarity(chunks: Sequence[Chunk]) -> np.ndarray:
    """Returns float64[N, N]: the cosine of phrases' counts of three characters in a row, with the words' ends.

    Such counts need no vectors to be downloaded, know "sunflower" by "flower" and forgive a spelling. They do not know
    that a person is what a man is; the ranking then has two topics where there is one, and no edge is lost.
    """
    counts = [_count_trigrams(chunk) for chunk in chunks]
    columns = {gram: column for column, gram in enumerate(sorted(set().union(*counts)))}
    vectors = np.zeros((len(counts), len(columns)))
    for row, count in enumerate(counts):
        vectors[row, [columns[gram] for gram in count]] = list(count.values())
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.round(vectors @ vectors.T, _DIGITS)


def find_topics(similarity: np.ndarray, least: float) -> np.ndarray:
    """Returns int64[N], the topic of each: the two groups most alike on average are joined while they are so enough."""
    between = similarity.copy()
    np.fill_diagonal(between, -1.0)
    topics, sizes = np.arange(len(between)), np.ones(len(between))
    while len(between) > 1:
        one, other = sorted(np.unravel_index(between.argmax(), between.shape))
        if between[one, other] < least:
            break
        joined = (sizes[one] * between[one] + sizes[other] * between[other]) / (sizes[one] + sizes[other])
        between[one] = between[:, one] = np.round(joined, _DIGITS)
        between[other] = between[:, other] = between[one, one] = -1.0
        sizes[one] += sizes[other]
        topics[topics == other] = one
    return topics


def _weigh(candidates, similarity, topics, ranking):
    """Returns float64[N, N], the weight of the edge from each row to each column."""
    places = [np.array([chunk.place for chunk in candidate], float) for candidate in candidates]
    owner = np.repeat(np.arange(len(places)), [len(place) for place in places])
    flat = np.concatenate(places)
    near = 1 / (1 + np.abs(flat[:, None] - flat) ** ranking.distance_power)
    member = np.eye(len(places))[owner]
    bonds = member.T @ near @ member + ranking.similarity_weight * similarity
    bonds[topics[:, None] == topics] = 0
    weights = bonds * np.exp(-ranking.decay * np.array([place[0] for place in places]))
    for topic in np.unique(topics):
        first, *rest = np.flatnonzero(topics == topic)
        weights[:, first] += ranking.promotion * weights[:, rest].sum(1)
    return weights


def _count_trigrams(chunk):
    counts = collections.Counter()
    *others, head = chunk.normal.split()
    for word, times in [*((word, 1) for word in others), (head, _HEAD)]:
        padded = f" {word} "
        for start in range(len(padded) - 2):
            counts[padded[start : start + 3]] += times
    return counts


def _says_again(chunk, other):
    one, two = set(chunk.normal.split()), set(other.normal.split())
    return chunk.head == other.head and (one <= two or two <= one)
