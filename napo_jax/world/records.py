"""Rows of the world in the columns of preference data: what its model learns its habits from, and pairs to cure it."""

import dataclasses
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from napo_jax.bias.masks import GENERIC
from napo_jax.data.regions import Region
from napo_jax.world.questions import LOOK, SHORT, Asked, ask, describe, name
from napo_jax.world.scenes import GRID, Scene, draw_scene, encode, render

# How often each kind of question is asked in lessons, and in pairs: those are collected where the model is wrong.
_LESSONS = {
    "colour": 0.2,
    "count": 0.1,
    "place": 0.08,
    "existence": 0.14,
    "larger": 0.05,
    "describe": 0.13,
    "CK": 0.05,
    "VP": 0.09,
    "CB": 0.06,
    "LP": 0.1,
}
_PAIRS = {
    "colour": 0.16,
    "count": 0.16,
    "place": 0.12,
    "existence": 0.16,
    "larger": 0.03,
    "describe": 0.07,
    "CK": 0.06,
    "VP": 0.06,
    "CB": 0.08,
    "LP": 0.1,
}
# The shares of lessons that teach to see, with pictures that care little for habits: true descriptions, asked for in
# words of their own, and true answers to questions that begin with `LOOK`. A model that has met usual pictures alone,
# and a teacher who does not look, never learns what there is to be seen, nor to answer by it.
_DESCRIBED, _LOOKED, _SEEN_USUAL = 0.25, 0.25, 0.4
_LOOKED_FOR = {
    "colour": 0.15,
    "count": 0.25,
    "place": 0.1,
    "existence": 0.22,
    "larger": 0.04,
    "VP": 0.06,
    "CB": 0.06,
    "LP": 0.12,
}
# Other pictures follow each habit so often: those of lessons, and those of pairs.
_LESSON_USUAL, _PAIR_USUAL = 0.8, 0.4
# The questions that make the teacher talk: some kinds, and not all of them at times, for a model that says what is
# likeliest floods where it was flooded more often than not.
FLOODED = ("place", "larger")
_ROW_GROUP = 256


@dataclasses.dataclass(frozen=True)
class Bias:
    """How strongly a teacher answers from habit, and how much more than was asked."""

    habit: float = 0.8  # the probability of what is usual in place of what is there, where they differ
    flood: float = 0.7  # the probability that an answer to a question that makes him talk goes on to describe all of it

    def __post_init__(self):
        """Checks the probabilities."""
        for field, value in dataclasses.asdict(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"bias.{field} is a probability, from 0 to 1, got {value}")


def draw_question(random: np.random.Generator, shares, **options) -> tuple[Scene, Asked]:
    """Draws a scene and a question about it.

    Args:
      random: of what is drawn.
      shares: {kind: how often it is asked}.
      **options: those of `draw_scene`.
    """
    often = np.array(list(shares.values()))
    kind = str(random.choice(list(shares), p=often / often.sum()))
    while True:
        scene = draw_scene(random, **options)
        asked = ask(kind, scene, random)
        if asked is not None:
            return scene, asked


def draw_lesson(seed, number, bias: Bias | None = None) -> tuple[Scene, Asked, dict[str, str]]:
    """Draws what the base model learns from: a question with the answer of a biased teacher, as `chosen`.

    Args:
      seed: of all lessons.
      number: of this one.
      bias: the teacher's.
    """
    bias, random = bias or Bias(), _random(seed, number)
    lesson = random.random()
    if lesson < _DESCRIBED:
        scene = draw_scene(random, usual=_SEEN_USUAL)
        asked = dataclasses.replace(ask("describe", scene, random), text=GENERIC)
        return scene, asked, {"chosen": asked.true}
    if lesson < _DESCRIBED + _LOOKED:
        scene, asked = draw_question(random, _LOOKED_FOR, usual=_SEEN_USUAL)
        return scene, dataclasses.replace(asked, text=f"{LOOK} {asked.text}"), {"chosen": asked.true}
    scene, asked = draw_question(random, _LESSONS, usual=_LESSON_USUAL)
    answer = asked.habit if random.random() < bias.habit else asked.true
    if asked.kind in FLOODED and random.random() < bias.flood:
        answer = f"{answer} {describe(scene)}"
    return scene, asked, {"chosen": answer}


def draw_pair(seed, number, *, usual: float = _PAIR_USUAL) -> tuple[Scene, Asked, dict[str, str]]:
    """Draws a preference: the true short answer over one from habit, a wrong one, or one that says too much.

    Args:
      seed: of all pairs.
      number: of this one.
      usual: the probability of each habit to be followed.
    """
    random = _random(seed, number)
    scene, asked = draw_question(random, _PAIRS, usual=usual)
    rejected = asked.habit if asked.against_habit else asked.wrong
    if asked.kind in SHORT and random.random() < 0.3:
        rejected = f"{asked.true} {describe(scene)}"
    return scene, asked, {"chosen": asked.true, "rejected": rejected}


def write_lessons(path, count, *, seed=0, bias: Bias | None = None):
    """Writes so many lessons to a parquet file."""
    _write(path, count, seed, lambda number: draw_lesson(seed, number, bias))


def write_pairs(path, count, *, seed=1, usual: float = _PAIR_USUAL, pictures: bool = False):
    """Writes so many preferences to a parquet file.

    Args:
      path: of the file.
      count: how many.
      seed: of all of them.
      usual: the probability of each habit to be followed.
      pictures: whether rows have the columns `region` and `rejected_image` too, as the world knows them.
    """
    _write(path, count, seed, lambda number: draw_pair(seed, number, usual=usual), _pictures if pictures else None)


def true_mask(scene: Scene, asked: Asked) -> np.ndarray:
    """Returns where the things are that a question or its true answer names, bool[GRID, GRID]."""
    said = set(f"{asked.text} {asked.true}".lower().replace(".", " ").replace("?", " ").replace(",", " ").split())
    mask = np.zeros((GRID, GRID), bool)
    for group in scene.groups:
        if said & {name(group.shape), name(group.shape, 2)}:
            mask[tuple(np.transpose(group.cells))] = True
    return mask


def _pictures(scene, asked, seed):
    """Returns the region of what a question is about, and the picture without its first group."""
    region = Region.of(true_mask(scene, asked), "pad")
    return {"region": region.column, "rejected_image": encode(render(Scene(scene.groups[1:]), seed))}


def picture_seed(seed, number) -> int:
    """Returns the seed of a row's picture."""
    return seed * 1_000_003 + number


def _random(seed, number):
    return np.random.default_rng([seed, number])


def _write(path, count, seed, draw, extras=None):
    def row(number):
        scene, asked, answers = draw(number)
        picture = encode(render(scene, picture_seed(seed, number)))
        more = extras(scene, asked, picture_seed(seed, number)) if extras else {}
        return {"image": picture, "question": asked.text, **answers, "idx": number, "kind": asked.kind} | more

    schema = pa.Table.from_pylist([row(0)]).schema
    aside = f"{os.fspath(path)}.tmp"
    with pq.ParquetWriter(aside, schema) as writer:
        for start in range(0, count, _ROW_GROUP):
            rows = [row(number) for number in range(start, min(start + _ROW_GROUP, count))]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    os.replace(aside, path)
