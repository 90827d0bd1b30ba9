"""Where a model comes from: a Hugging Face folder, the workdir of an earlier run, or a random one to try things out.

A workdir stands for the model that its run has trained: the leaves of its last checkpoint over those that the run
itself began with, adapters merged.
"""

import dataclasses
import json
from typing import NamedTuple

import jax
from etils import epath

from napo_jax import hub_files
from napo_jax.checkpoint import Checkpoints
from napo_jax.config import ModelConfig
from napo_jax.data.byte_tokenizer import BYTE_VOCABULARY, byte_tokenizer
from napo_jax.data.prompts import load_tokenizer
from napo_jax.models import Llava, LlavaConfig
from napo_jax.models.lora import LoraConfig, merge_adapters
from napo_jax.optim import flatten, unflatten
from napo_jax.sharding import shard_params
from napo_jax.weights import load_pretrained


class Source(NamedTuple):
    """A model before any of its weights are read."""

    folder: epath.Path | None  # of Hugging Face; None for a random model
    seed: int  # of the random model
    size: str  # of the random model
    runs: tuple[epath.Path, ...]  # workdirs whose trained leaves go over it, the first one first
    path: str | None  # as the config names it

    def __str__(self):
        """Says in a few words where it comes from."""
        base = f"{self.folder}" if self.folder else f"{self.size} and random"
        steps = [f"step {_checkpoints(run).latest()} of {run}" for run in self.runs]
        return " with ".join([base, *steps])

    @property
    def shape(self) -> LlavaConfig:
        """The model's `LlavaConfig`; reads no weights."""
        return hub_files.read_config(self.folder)[0] if self.folder else random_shape(self.size)

    @property
    def tokenizer(self):
        """The model's tokenizer."""
        return load_tokenizer(str(self.folder)) if self.folder else byte_tokenizer()


def find_model(config: ModelConfig, seed: int = 0) -> Source:
    """Finds out what a config's model is; raises one line if it is none."""
    runs, path = [], config.path
    size = config.size
    while path is not None and (epath.Path(path) / "checkpoints").is_dir():
        run = epath.Path(path)
        if run in runs:
            raise ValueError(f"{run} says that it began with itself: its config.json was changed")
        if _checkpoints(run).latest() is None:
            raise ValueError(f"the run in {run} has no checkpoint yet, so it has no model")
        runs.append(run)
        before = _config_of(run)
        path, seed, size = before["model"]["path"], before["train"]["seed"], before["model"]["size"]
    source = Source(
        None if path is None else epath.Path(path), seed, size or "tiny", tuple(reversed(runs)), config.path
    )
    if source.folder is not None and config.size is not None:
        text, wanted = source.shape.text, random_shape(config.size).text
        if (text.width, text.layers) != (wanted.width, wanted.layers):
            raise ValueError(
                f"model.size is {config.size} and {config.path} has {text.layers} layers of width {text.width}: leave "
                "model.size out, or name another folder"
            )
    return source


def random_shape(size) -> LlavaConfig:
    """Returns the LlavaConfig of a model without a folder: "tiny", "7b" or "13b"."""
    if size == "tiny":
        tiny = LlavaConfig.tiny()
        # Bytes make long prompts: the system text alone is 140 tokens.
        text = dataclasses.replace(tiny.text, vocab_size=BYTE_VOCABULARY, max_positions=2048)
        return dataclasses.replace(tiny, text=text)
    return {"7b": LlavaConfig.llava7b, "13b": LlavaConfig.llava13b}[size]()


def load_leaves(source: Source, model: Llava, mesh):
    """Loads a model's parameters, each leaf to its place on the mesh, without adapters.

    Args:
      source: what `find_model` found.
      model: the `Llava` to load them for.
      mesh: made by `sharding.make_mesh`.

    Returns:
      {path: leaf} of the model's `param_dtype`.
    """
    model = model.without_adapters
    place = lambda shapes: unflatten(shard_params(flatten(shapes), mesh)[0])
    if source.folder is None:
        key = jax.random.key(source.seed)
        shardings = place(jax.eval_shape(model.init, key))
        leaves = flatten(jax.jit(model.init, out_shardings=shardings)(key))
    else:
        computes = {field: getattr(model.config, field) for field in ("dtype", "param_dtype", "attention", "remat")}
        leaves = flatten(load_pretrained(source.folder, shardings=place, **computes)[1])
    for run in source.runs:
        leaves = _over(leaves, run, mesh)
    return leaves


def _over(leaves, run, mesh):
    """Returns a model's leaves with those that a run has trained in their place."""
    checkpoints = _checkpoints(run)
    step = checkpoints.latest()
    saved = checkpoints.shapes(step, "params")
    shardings, _ = shard_params(saved, mesh)
    like = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path]) for path, x in saved.items()}
    trained = checkpoints.restore(step, {"params": like}, partial=True)[0]["params"]
    lora = LoraConfig(**{k: tuple(v) if k == "targets" else v for k, v in _config_of(run)["lora"].items()})
    cast = lambda path, leaf: leaf.astype(leaves[path].dtype) if path in leaves else leaf
    # On the mesh: what is added to a matrix lies where the matrix does.
    with jax.set_mesh(mesh):
        return merge_adapters(leaves | {path: cast(path, leaf) for path, leaf in trained.items()}, lora)


def _config_of(run):
    return json.loads((run / "config.json").read_text())


def _checkpoints(run):
    return Checkpoints(run / "checkpoints")
