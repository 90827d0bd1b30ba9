"""Where a model comes from: a Hugging Face folder, the workdir of an earlier run, or a random one to try things out.

A workdir stands for the model that its run has trained: the leaves of its last checkpoint over those that the run
itself began with, adapters merged.
"""

import dataclasses
import hashlib
import json
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from napo_jax import hub_files
from napo_jax.checkpoint import Checkpoints
from napo_jax.config import ModelConfig
from napo_jax.data.byte_tokenizer import BYTE_VOCABULARY, byte_tokenizer
from napo_jax.data.prompts import load_tokenizer
from napo_jax.evals.answers import misfit
from napo_jax.models import Llava, LlavaConfig
from napo_jax.models.lora import LoraConfig, merge_adapters
from napo_jax.optim import flatten, unflatten
from napo_jax.reward_head import FILE, is_reward_head
from napo_jax.sharding import shard_params
from napo_jax.weights import load_pretrained
from napo_jax.world.language import world_tokenizer
from napo_jax.world.model import world_model

_TEXT = (str, type(None))
_OF_A_RUN = {"model": {"path": _TEXT, "size": _TEXT}, "train": {"seed": int}, "lora": dict}  # what is read of a config
_SAMPLES, _SAMPLE_BYTES = 16, 4096  # that are read of a file of weights to tell it from others


class Run(NamedTuple):
    """A checkpoint of an earlier run."""

    workdir: epath.Path
    step: int

    def __str__(self):
        """Names it."""
        return f"step {self.step} of {self.workdir}"

    @property
    def config(self) -> dict:
        """The run's config, as config.json has it."""
        return json.loads((self.workdir / "config.json").read_text())

    @property
    def lora(self) -> LoraConfig:
        """The kind of its adapters."""
        lora = self.config["lora"]
        return LoraConfig(**lora | {"targets": tuple(lora["targets"])})


class Source(NamedTuple):
    """A model before any of its weights are read."""

    folder: epath.Path | None  # of Hugging Face; None for a random model
    seed: int  # of the random model
    size: str  # of the random model
    runs: tuple[Run, ...]  # whose trained leaves go over it, the first one first
    path: str | None  # as the config names it

    def __str__(self):
        """Says in a few words where it comes from."""
        return " with ".join([f"{self.folder}" if self.folder else f"{self.size} and random", *map(str, self.runs)])

    @property
    def fingerprint(self) -> str:
        """32 hex digits that tell models apart; reads a little of each file of weights.

        The same weights in another layout have another one: `weights_digest` is the digest of what they are.
        """
        digest = hashlib.blake2b(repr((self.seed, self.size)).encode() if self.folder is None else b"", digest_size=16)
        for file in sorted(self.folder.glob("*.safetensors"), key=os.fspath) if self.folder else ():
            digest.update(f"{file.name} {file.stat().length}".encode())
            with file.open("rb") as f:
                for part in range(_SAMPLES):  # trained further, weights differ everywhere
                    f.seek(file.stat().length * part // _SAMPLES)
                    digest.update(f.read(_SAMPLE_BYTES))
        for run in self.runs:
            digest.update(f"{run.step} {json.dumps(run.config, sort_keys=True)}".encode())
        return digest.hexdigest()

    @property
    def rewards(self) -> bool:
        """Whether it is a reward model: one that gives numbers to answers, and has not learnt to say any."""
        if self.runs:
            saved = _checkpoints(self.runs[-1].workdir).shapes(self.runs[-1].step, "params")
            return any(map(is_reward_head, saved))
        return self.folder is not None and (self.folder / FILE).exists()

    @property
    def shape(self) -> LlavaConfig:
        """The model's `LlavaConfig`; reads no weights."""
        return hub_files.read_config(self.folder)[0] if self.folder else random_shape(self.size)

    @property
    def tokenizer(self):
        """The model's tokenizer."""
        if self.folder:
            return load_tokenizer(str(self.folder))
        return world_tokenizer() if self.size == "shapes" else byte_tokenizer()


def absolute(path) -> epath.Path:
    """Returns a path that means the same wherever it is read, local or gs://."""
    return epath.Path(path if "://" in str(path) else os.path.abspath(path))


def is_workdir(path) -> bool:
    """Tells whether a path is the workdir of a run that has begun to save."""
    return (epath.Path(path) / "checkpoints").is_dir()


def find_model(config: ModelConfig, seed: int = 0, step: int | None = None) -> Source:
    """Finds out what a config's model is; raises one line if it is none.

    Args:
      config: the `ModelConfig`.
      seed: of the random model, if it is one.
      step: of the run, if it is one; None for the last that is saved.
    """
    runs, path = [], config.path
    size = config.size
    while path is not None and is_workdir(path):
        workdir = absolute(path)
        if any(workdir == run.workdir for run in runs):
            raise ValueError(f"{workdir} says that it began with itself: its config.json was changed")
        saved = _checkpoints(workdir)
        latest = saved.latest()
        if latest is None:
            raise ValueError(f"the run in {workdir} has no checkpoint yet, so it has no model")
        if step is not None and step not in saved.steps():
            raise ValueError(f"the run in {workdir} has no checkpoint of step {step}; it has {saved.steps()}")
        runs.append(Run(workdir, latest if step is None else step))
        before = runs[-1].config
        if wrong := misfit(before, _OF_A_RUN):
            raise ValueError(f"{workdir}/config.json {wrong}: it is not as the run has written it")
        step = before.get("source_step")
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
    """Returns the LlavaConfig of a model without a folder: "tiny", "shapes" (of the world), "7b" or "13b"."""
    if size == "shapes":
        return world_model()
    if size == "tiny":
        tiny = LlavaConfig.tiny()
        # Bytes make long prompts: the system text alone is 140 tokens.
        text = dataclasses.replace(tiny.text, vocab_size=BYTE_VOCABULARY, max_positions=2048)
        return dataclasses.replace(tiny, text=text)
    return {"7b": LlavaConfig.llava7b, "13b": LlavaConfig.llava13b}[size]()


def load_leaves(source: Source, model: Llava, mesh, dtypes=None):
    """Loads a model's parameters, each leaf to its place on the mesh, without adapters.

    A reward model's head comes along where the model is to have one, and is refused where it is not. One that begins
    has none yet.

    Args:
      source: what `find_model` found.
      model: the `Llava` to load them for.
      mesh: made by `sharding.make_mesh`.
      dtypes: {path: dtype} of leaves that are not to have the model's `param_dtype`.

    Returns:
      {path: leaf}.
    """
    if source.rewards and not model.config.reward_head:
        raise ValueError(
            f"{source} is a reward model: it gives numbers to answers, with build_ranked --reward, and says none itself"
        )
    takes_head = model.config.reward_head
    model, dtypes = Llava(dataclasses.replace(model.without_adapters.config, reward_head=False)), dtypes or {}
    place = lambda shapes: unflatten(shard_params(flatten(shapes), mesh)[0])
    if source.folder is None:
        # Drawn wide and rounded: numbers drawn in bfloat16 are others.
        wide, dtype = Llava(dataclasses.replace(model.config, param_dtype=jnp.float32)), model.config.param_dtype
        cast = lambda path, leaf: leaf.astype(dtypes.get(path, dtype))
        draw = lambda key: {path: cast(path, leaf) for path, leaf in flatten(wide.init(key)).items()}
        key = jax.random.key(source.seed)
        leaves = jax.jit(draw, out_shardings=shard_params(jax.eval_shape(draw, key), mesh)[0])(key)
    else:
        computes = {field: getattr(model.config, field) for field in ("dtype", "param_dtype", "attention", "remat")}
        computes["reward_head"] = takes_head and (source.folder / FILE).exists()
        leaves = flatten(load_pretrained(source.folder, shardings=place, dtypes=dtypes, **computes)[1])
    for run in source.runs:
        for path, leaf in load_trained(run, mesh):
            dtype = leaves[path].dtype if path in leaves else leaf.dtype
            if is_reward_head(path):
                dtype = dtypes.get(path, model.config.param_dtype)
            leaves[path] = leaf.astype(dtype)
        merge_adapters(leaves, run.lora)
    return leaves


def load_trained(run: Run, mesh):
    """Yields (path, leaf) of what a run has trained, each to its place on the mesh; one by one, as they may be wide."""
    checkpoints = _checkpoints(run.workdir)
    checkpoints.check(run.step, together=mesh.is_multi_process)
    saved = checkpoints.shapes(run.step, "params")
    shardings, _ = shard_params(saved, mesh)
    for path, leaf in saved.items():
        like = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
        restored, _ = checkpoints.restore(run.step, {"params": {path: like}}, partial=True)
        yield path, restored["params"][path]


def _checkpoints(workdir):
    return Checkpoints(workdir / "checkpoints")
