"""A model asked all questions of a benchmark: resumed where it stopped, spread over processes, and complete or not there."""

import dataclasses
import json
import time

import jax
from etils import epath

from napo_jax.bias.masks import Asker, Recipe
from napo_jax.config import ModelConfig
from napo_jax.data.images import ImageError, decode
from napo_jax.data.prompts import Prompter
from napo_jax.data.records import Record
from napo_jax.evals.answers import fingerprint, write_row
from napo_jax.metrics import Console
from napo_jax.model_source import absolute, find_model
from napo_jax.pieces import BOOKS, Line, Pieces, read_manifest, write_durably, write_manifest
from napo_jax.sharding import make_mesh
from napo_jax.speaker import load_speaker, unknown_word

_WAIT = 2.0  # seconds between looks at what other processes have done


def answer(questions, options, console=None):
    """Asks a model the questions, and writes its answers when all are there.

    Args:
      questions: list of `Question`.
      options: `evaluate.AnswerOptions`.
      console: a `Console`; None for one on the standard output.
    """
    console, target = console or Console(), absolute(options.answers)
    books = epath.Path(f"{target}{BOOKS}")
    pictures = absolute(options.images or options.data)
    _check(questions, pictures)
    source = find_model(ModelConfig(path=options.checkpoint))
    prompter = Prompter(source.tokenizer, options.template, source.shape.vision.image_tokens)
    settings = {
        "model": str(source),
        "tokenizer": prompter.fingerprint,
        "questions": fingerprint(questions),
        "decoding": dataclasses.asdict(options.decoding),
        "template": options.template,
        "image_rule": options.image_rule,
    }
    manifest = read_manifest(books, settings)
    pieces, said = Pieces(books), {}
