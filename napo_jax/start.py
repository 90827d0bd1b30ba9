"""What a training starts with: the model, its trained and frozen leaves, the first state, and where each array lies.

Everything can be had as shapes alone, for devices that are not there.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from napo_jax.config import Config
from napo_jax.model_source import load_leaves
from napo_jax.models import Llava
from napo_jax.optim import flatten, split_trained
from napo_jax.sharding import replicated, shard_params
from napo_jax.step import init_state


class Parts(NamedTuple):
    """The leaves of a run, arrays or shapes."""

    trained: dict  # {path: leaf} as the optimizer holds them
    frozen: dict  # {path: leaf} of the type that computes
    whole: list[str]  # paths of small leaves that could not be cut and lie on every device


def make_model(config: Config, shape) -> Llava:
    """Returns the model of a shape, as a config wants it computed."""
    model = Llava(
        dataclasses.replace(
            shape,
            dtype=jnp.dtype(config.model.dtype),
            attention=config.model.attention,
            remat=config.model.remat,
            # As the optimizer holds them: rounded to what computes only where they are frozen.
            param_dtype=jnp.dtype(config.optimizer.param_dtype),
            lora=config.lora,
            reward_head=config.objective.needs_rewards,
        )
    )
    # A tower that is to train must be in the gradient, and one that is not costs a backward pass for nothing.
    trained, _ = split_trained(flatten(jax.eval_shape(model.init, jax.random.key(0))), config.optimizer)
    frozen = not any(path.startswith("vision/") for path in trained)
    return Llava(dataclasses.replace(model.config, freeze_vision=frozen))


def load_parts(config: Config, source, model: Llava, mesh) -> Parts:
    """Loads the weights of a run's model and draws its adapters and reward head, if it has any.

    Args:
      config: the `Config`.
      source: the `model_source.Source` of the weights.
      model: made by `make_model`.
      mesh: made by `sharding.make_mesh`.
    """
    shapes = abstract_parts(config, model, mesh)
    # What is frozen is never there in a wider type: that could be all of the model.
    dtypes = {path: leaf.dtype for path, leaf in (shapes.trained | shapes.frozen).items()}
    leaves = load_leaves(source, model, mesh, dtypes)
    place = {path: leaf.sharding for path, leaf in shapes.trained.items() if path not in leaves}
    if place:
        draw = lambda key: {path: leaf for path, leaf in flatten(model.init(key)).items() if path in place}
        leaves |= jax.jit(draw, out_shardings=place)(jax.random.key(config.train.seed))
    trained, frozen = split_trained(leaves, config.optimizer)
    return Parts(trained, frozen, shapes.whole)


def abstract_parts(config: Config, model: Llava, mesh) -> Parts:
    """Returns the shapes of what `load_parts` returns, with their places."""
    leaves = flatten(jax.eval_shape(model.init, jax.random.key(0)))
    shardings, whole = shard_params(leaves, mesh)
    placed = lambda path, dtype: jax.ShapeDtypeStruct(leaves[path].shape, dtype, sharding=shardings[path])
    trained, frozen = split_trained(leaves, config.optimizer)
    return Parts(
        {path: placed(path, model.config.param_dtype) for path in trained},
        {path: placed(path, model.config.dtype) for path in frozen},
        whole,
    )


def first_state(trained, optimizer, mesh):
    """Returns what makes the first state of the trained leaves, which it may consume, and the state's shapes.

    What the optimizer keeps of a leaf in its shape lies where the leaf does, and all else on every device.

    Args:
      trained: {path: leaf}, arrays or shapes with shardings.
      optimizer: an optax transformation.
      mesh: made by `sharding.make_mesh`.
    """
    begin = lambda leaves: init_state(leaves, optimizer)
    where = {path: leaf.sharding for path, leaf in trained.items()}

    def place(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        alike = names and leaf.shape == trained[names[-1]].shape
        sharding = where[names[-1]] if alike else replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = jax.tree_util.tree_map_with_path(place, jax.eval_shape(begin, trained))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return jax.jit(begin, out_shardings=shardings, donate_argnums=0), shapes
