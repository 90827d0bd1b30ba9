"""How good some answers about a picture are, as numbers: by CLIP, or by a reward model that `napo_jax.train` made."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from napo_jax.config import Config, ModelConfig
from napo_jax.data.images import decode, fit, normalise
from napo_jax.data.prompts import Prompter, PromptError
from napo_jax.model_source import absolute, find_model, load_leaves
from napo_jax.models import Groups, Llava
from napo_jax.models.clip_pair import load_clip
from napo_jax.optim import unflatten
from napo_jax.sharding import make_mesh, over_rows

_ROUND = 32  # tokens are padded to multiples of this, so that few shapes are compiled
_READS = ("template", "image_rule", "exif")  # the fields of a run's data that decide what its model has learnt to read


class Asked(NamedTuple):
    """A row that can be scored."""

    picture: np.ndarray  # uint8[I, I, 3]
    answers: list  # of texts, or of their tokens
    prefix: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """How long it is, to compute rows of like lengths together."""
        return len(self.prefix) + max(map(len, self.answers)) if self.prefix else 0


class ByClip:
    """CLIP: 100 times the cosine of an answer's and the picture's features."""

    column, gap, least = "clip_scores", 2.0, 0.0  # CLIP-DPO has a gap of 2, and does not say where it cuts

    def __init__(self, config: Config, path, *, with_question: bool, batch: int):
        """Loads it.

        Args:
          config: whose pictures are read.
          path: a folder of a whole CLIP checkpoint.
          with_question: whether it reads the question before each answer.
          batch: rows that are scored at a time.
        """
        self._clip, self._exif, self.batch = load_clip(path), config.data.exif, batch
        self._with_question = with_question
        self.settings = {"clip": str(absolute(path)), "with_question": with_question, "exif": config.data.exif}

    def __str__(self):
        """Names it."""
        return f"clip     {self.settings['clip']}"

    def ask(self, record, texts) -> Asked | str:
        """Returns what is to be scored of a `Record`."""
        # As CLIP was trained: the middle of the picture.
        picture = fit(decode(record.image, exif=self._exif), self._clip.vision.image_size, "crop")
        return Asked(picture, [f"{record.question} {text}" if self._with_question else text for text in texts])

    def scores(self, rows) -> list[list[float]]:
        """Returns the scores of the answers of at most a batch of rows."""
        pictures = np.zeros((self.batch, *rows[0].picture.shape), np.uint8)
        pictures[: len(rows)] = [asked.picture for asked in rows]
        seen = self._clip.images(pictures)
        read = iter(self._clip.texts([text for asked in rows for text in asked.answers]))
        return [[float(100 * next(read) @ seen[row]) for _ in asked.answers] for row, asked in enumerate(rows)]


class ByReward:
    """A reward model; all answers to a question are read under one prefix."""

    column, gap, least = "reward_scores", 0.0, None  # rewards are held near 0, and have no scale of their own

    def __init__(self, config: Config, path, *, batch: int):
        """Looks at it, and loads no weights yet; raises one line if it is none, or would read otherwise than it learnt.

        Args:
          config: how rows are read, and how the model computes.
          path: the workdir of a run, or a folder that was exported of one.
          batch: rows that are scored at a time on each device of mesh.data x mesh.fsdp.
        """
        self._source, self._config = find_model(ModelConfig(path=path)), config
        if not self._source.rewards:
            raise ValueError(f"{path} is no reward model: train one with configs/reward7b.py, for example")
        data, shape = config.data, self._source.shape
        for name in _READS if self._source.runs else ():
            learnt = self._source.runs[-1].config["data"][name]
            if learnt != getattr(data, name):
                raise ValueError(f"{path} was trained with data.{name} {learnt}, and not {getattr(data, name)}")
        self._prompter = Prompter(self._source.tokenizer, data.template, shape.vision.image_tokens)
        self._room = min(data.max_tokens, shape.text.max_positions)
        self._mesh = make_mesh(config.mesh, jax.local_devices())
        self.batch = batch * self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        self.settings = {"reward": str(self._source), "source": self._source.fingerprint, "dtype": config.model.dtype}
        self.settings |= {"tokenizer": self._prompter.fingerprint, "max_tokens": data.max_tokens}
        self.settings |= {"image_rule": data.image_rule, "exif": data.exif}

    def __str__(self):
        """Names it."""
        return f"reward   {self._source}"

    def ask(self, record, texts) -> Asked | str:
        """Returns what is to be scored of a `Record`, or why nothing is."""
        data = self._config.data
        picture = fit(decode(record.image, exif=data.exif), self._source.shape.vision.image_size, data.image_rule)
        try:
            prefix, answers = self._prompter.prefix(record.question), self._prompter.answers(texts)
            if wrong := [answer for answer in answers if isinstance(answer, PromptError)]:
                raise wrong[0]
        except PromptError as error:
            return error.reason
        if (room := self._room - len(prefix)) < 1:
            return "prefix_too_long"
        return Asked(picture, [answer[:room] for answer in answers], tuple(prefix))  # cut as in training

    def scores(self, rows) -> list[list[float]]:
        """Returns the rewards of the answers of at most a batch of rows."""
        longest = lambda lengths: -(-max(lengths) // _ROUND) * _ROUND
        cells = max(len(asked.answers) for asked in rows)
        prefix = np.zeros((self.batch, 1, longest(len(asked.prefix) for asked in rows)), np.int32)
        answers = np.zeros(
            (self.batch, cells, longest(len(answer) for asked in rows for answer in asked.answers)), np.int32
        )
        images = np.zeros((self.batch, 1, *rows[0].picture.shape), np.uint8)
        prefix_lengths, answer_lengths = np.ones((self.batch, 1), np.int32), np.zeros((self.batch, cells), np.int32)
        for i, asked in enumerate(rows):
            images[i, 0] = asked.picture
            prefix[i, 0, : len(asked.prefix)], prefix_lengths[i] = asked.prefix, len(asked.prefix)
            for c, answer in enumerate(asked.answers):
                answers[i, c, : len(answer)], answer_lengths[i, c] = answer, len(answer)
        groups = Groups(images, prefix, prefix_lengths, answers, answer_lengths)
        with jax.set_mesh(self._mesh):
            found = _rewards(*self._loaded, jax.device_put(groups, over_rows(self._mesh)))
        found = np.asarray(found, np.float64)
        if not np.isfinite(found[: len(rows)]).all():
            raise ValueError(f"{self._source} gives rewards that are no numbers: look at its weights")
        return [found[i, : len(asked.answers)].tolist() for i, asked in enumerate(rows)]

    @functools.cached_property
    def _loaded(self):
        dtype = jnp.dtype(self._config.model.dtype)
        computes = {"dtype": dtype, "param_dtype": dtype, "attention": self._config.model.attention}
        model = Llava(dataclasses.replace(self._source.shape, **computes, remat="none", reward_head=True))
        return model, unflatten(load_leaves(self._source, model, self._mesh))


@functools.partial(jax.jit, static_argnums=0)
def _rewards(model, params, groups):
    groups = groups._replace(images=normalise(groups.images))
    return model.rewards(params, groups, (0,) * groups.answer_ids.shape[1])
