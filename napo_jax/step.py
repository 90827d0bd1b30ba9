"""One training step, a pure function: (state, frozen, batch) -> (state, metrics)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from napo_jax.models.llava import without_missing_adapters
from napo_jax.optim import unflatten
from napo_jax.score import score, valid_cells
from napo_jax.sharding import ROWS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and all that a checkpoint keeps of the model."""

    step: jax.Array  # int32[], steps done
    params: dict[str, jax.Array]  # {path: leaf} of what trains
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a step reads and never changes. No gradient and no weight decay gets here."""

    params: dict[str, jax.Array]  # {path: leaf} of what does not train
    # {path: leaf} of the reference in place of the trained ones, if it runs along; without adapters to run it without.
    reference: dict[str, jax.Array] | None = None


def init_state(params, optimizer) -> TrainState:
    """Returns the state of a run that begins with these trained leaves."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_train_step(model, objective, optimizer, *, accumulate=1, mesh=None, seed=0):
    """Makes the step.

    The reference's log-probs are those that the batch carries or, where `Frozen.reference` is given, computed along:
    without adapters where it has none.

    What the batch as a whole decides, q and the dynamic weights, needs the log-probs of all of its rows at once. So
    with several micro-batches all are scored first, the objective is differentiated by their log-probs, and those
    derivatives are pulled back through one micro-batch after the other: a forward pass more, and no approximation.

    Args:
      model: `Llava`.
      objective: `Objective`.
      optimizer: an optax transformation of {path: leaf}.
      accumulate: A, micro-batches that a batch is computed in.
      mesh: made by `sharding.make_mesh`; the statistics then span its rows. None: one device.
      seed: of the dropout of adapters, with the step's number.

    Returns:
      train_step(state, frozen, batch) -> (TrainState, {name: float32[]}), to be jitted with `state` donated.
    """

    def whole_model(params, frozen):
        # Master parameters are cast where they lie, so that what is gathered from other devices is half as large.
        params = {path: leaf.astype(model.config.dtype) for path, leaf in params.items()}
        return without_missing_adapters(model, params), unflatten(params, frozen.params)

    def score_with(params, frozen, batch, dropout=None, reference=False):
        kl_to = None
        if objective.needs_kl and not reference:
            if frozen.reference is None:
                raise ValueError("the objective reads the reference's whole distributions, and none runs along")
            kl_to = whole_model(frozen.reference, frozen)
        runs, tree = whole_model(params, frozen)
        return score(runs, tree, batch, objective, reference=reference, dropout=dropout, kl_to=kl_to)

    def reference_of(frozen, batch):
        if frozen.reference is not None:
            return jax.lax.stop_gradient(score_with(frozen.reference, frozen, batch, reference=True))
        if objective.reference_cells and batch.reference is None:
            raise ValueError("the objective needs the reference's log-probs, and neither batch nor frozen has them")
        return batch.reference or {}

    def objective_of(logps, reference, where):
        return _over_mesh(objective, mesh)(logps, reference, where)

    def whole(params, frozen, batch, dropout):
        """Differentiates the loss of a batch that is computed at once."""
        reference, where = reference_of(frozen, batch), valid_cells(batch, objective)
        loss = lambda params: objective_of(score_with(params, frozen, batch, dropout), reference, where)
        return jax.grad(loss, has_aux=True)(params)

    def in_parts(params, frozen, batch, dropout):
        """Differentiates the same loss in A micro-batches."""
        parts = split_rows(batch, accumulate, 1 if mesh is None else _row_shards(mesh))
        # A micro-batch drops the same inputs in both of its forward passes.
        keys = None if dropout is None else jax.random.split(dropout, accumulate)
        scored = jax.lax.map(
            lambda part: (score_with(params, frozen, *part), reference_of(frozen, part[0])), (parts, keys)
        )
        logps, reference = jax.lax.stop_gradient(scored)
        where = jax.vmap(lambda part: valid_cells(part, objective))(parts)
        pulls, metrics = jax.grad(objective_of, has_aux=True)(logps, reference, where)

        def add(total, part_key_and_pull):
            part, key, pull = part_key_and_pull
            (gradient,) = jax.vjp(lambda params: score_with(params, frozen, part, key), params)[1](pull)
            return jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, gradient), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
        return jax.lax.scan(add, zeros, (parts, keys, pulls))[0], metrics

    def train_step(state, frozen, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step) if model.config.lora.dropout else None
        gradients, metrics = (whole if accumulate == 1 else in_parts)(state.params, frozen, batch, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norms = {"gradient_norm": optax.tree.norm(gradients), "update_norm": optax.tree.norm(updates)}
        return TrainState(state.step + 1, params, opt_state), metrics | norms

    return train_step


def _over_mesh(objective, mesh):
    """Returns the objective as a function of (logps, reference, where) whose means are over all rows of the mesh."""
    if mesh is None:
        return lambda logps, reference, where: objective(logps, reference, where=where)

    def run(logps, reference, where):
        rows = jax.tree.map(lambda x: PartitionSpec(*[None] * (x.ndim - 1), ROWS), (logps, reference, where))
        local = lambda logps, reference, where: objective(logps, reference, where=where, axis_name=ROWS)
        return jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=PartitionSpec())(logps, reference, where)

    return run


def _row_shards(mesh):
    return mesh.shape["data"] * mesh.shape["fsdp"]


def split_rows(batch, parts, shards):
    """Splits [B, ...] leaves into [A, B / A, ...], so that every device keeps its own rows."""

    def split(x):
        if x.shape[0] % (parts * shards):
            raise ValueError(f"a batch of {x.shape[0]} does not divide into {parts} micro-batches on {shards} devices")
        by_device = x.reshape(shards, parts, -1, *x.shape[1:])
        return by_device.swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])

    return jax.tree.map(split, batch)
