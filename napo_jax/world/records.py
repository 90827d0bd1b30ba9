"""Rows of the world in the columns of preference data: what its model learns its habits from, and pairs to cure it."""

import dataclasses
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from napo_jax.world.questions import SHORT, Asked, ask, describe
from napo_jax.world.scenes import Scene, draw_scene, encode, render

# How often each kind of question is asked.
_SHARES = {
    "colour": 0.26,
    "count": 0.12,
    "place": 0.1,
    "existence": 0.12,
    "larger": 0.06,
    "describe": 0.12,
    "CK": 0.04,
    "VP": 0.04,
    "CB": 0.05,
    "LP": 0.09,
}
_ROW_GROUP = 256


@dataclasses.dataclass(frozen=True)
class Bias:
    """How strongly a teacher answers from habit, and how much more than was asked."""

    habit: float = 0.8  # the probability of what is usual in place of what is there, where they differ
    flood: float = 0.35  # the probability that a short answer is followed by a description of all the picture


def draw_question(random: np.random.Generator, *, first: bool | None = None) -> tuple[Scene, Asked]:
    """Draws a scene and a question about it; `first` as for `draw_scene`."""
    kind = str(random.choice(list(_SHARES), p=list(_SHARES.values())))
    while True:
        scene = draw_scene(random, first=first)
        asked = ask(kind, scene, random)
        if asked is not None:
            return scene, asked


def write_lessons(path, count, *, seed=0, bias: Bias | None = None):
    """Writes what the base model learns from: questions with the answers of a biased teacher, as `chosen`.

    Args:
      path: of a parquet file.
      count: of rows.
      seed: of all that is drawn.
      bias: the teacher's.
    """
    bias = bias or Bias()

    def row(number):
        random = _random(seed, number)
        scene, asked = draw_question(random)
        answer = asked.habit if random.random() < bias.habit else asked.true
        if asked.kind in SHORT and random.random() < bias.flood:
            answer = f"{answer} {describe(scene)}"
        return _row(number, scene, asked, {"chosen": answer}, seed)

    _write(path, count, row)


def write_pairs(path, count, *, seed=1, unusual: float = 0.5):
    """Writes preference data: the true short answer against one from habit, a wrong one, or one that says too much.

    Args:
      path: of a parquet file.
      count: of rows.
      seed: of all that is drawn.
      unusual: the share of pictures whose first group has an unusual colour.
    """

    def row(number):
        random = _random(seed, number)
        scene, asked = draw_question(random, first=bool(random.random() >= unusual))
        rejected = asked.habit if asked.against_habit else asked.wrong
        if asked.kind in SHORT and random.random() < 0.3:
            rejected = f"{asked.true} {describe(scene)}"
        return _row(number, scene, asked, {"chosen": asked.true, "rejected": rejected}, seed)

    _write(path, count, row)


def _random(seed, number):
    return np.random.default_rng([seed, number])


def _row(number, scene, asked, answers, seed):
    picture = encode(render(scene, seed=seed * 1_000_003 + number))
    return {"image": picture, "question": asked.text, **answers, "idx": number, "kind": asked.kind}


def _write(path, count, row):
    schema = pa.Table.from_pylist([row(0)]).schema
    aside = f"{os.fspath(path)}.tmp"
    with pq.ParquetWriter(aside, schema) as writer:
        for start in range(0, count, _ROW_GROUP):
            rows = [row(number) for number in range(start, min(start + _ROW_GROUP, count))]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    os.replace(aside, path)
