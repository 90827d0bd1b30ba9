"""A model over many groups, batch by batch: what the reference and evaluations need of it."""

import collections
import dataclasses

import jax
import jax.numpy as jnp

from napo_jax.data.loader import on_devices
from napo_jax.score import score
from napo_jax.sharding import over_rows, replicated


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Some batches, for a `Loader`, which asks an order for no more than this."""

    batch_size: int
    batches: list  # of (bucket, groups)

    def __getitem__(self, step):
        """Returns the bucket of a batch, and its groups."""
        return self.batches[step]


def make_scorer(dataset, objective, model, cells, mesh=None, reference=False, kl_to=None):
    """Makes a function that computes log-probs of groups.

    Args:
      dataset: `Dataset` of the objective's cells.
      objective: `Objective`.
      model: `Llava`.
      cells: the C cells to return.
      mesh: made by `sharding.make_mesh`; None: one device.
      reference: whether it is the reference that scores them.
      kl_to: a pair of the `Llava` and the parameters of the reference; for an objective that `needs_kl`.

    Returns:
      scored(params, chosen, **options), which yields (ids int32[B], log-probs float32[B, C, K]) of each batch of a
      `Chosen` on every process; the K are `Objective.columns`. Parameters may be of a wider type than the one that
      computes.
      Options are those of `Loader`. The ids come back beside the values, since a mesh may not hold the rows of
      processes in the order of processes.
    """

    def compute(params, other, batch):
        params = jax.tree.map(lambda leaf: leaf.astype(model.config.dtype), params)
        pair = None if other is None else (kl_to[0], other)
        logps = score(model, params, batch, objective, reference=reference, kl_to=pair)
        return batch.ids, jnp.stack([jnp.stack(jax.tree.leaves(logps[cell]), axis=-1) for cell in cells], axis=1)

    compute = jax.jit(compute, out_shardings=None if mesh is None else replicated(mesh))

    def dispatch(params, batch):
        other = None if kl_to is None else kl_to[1]
        if mesh is None:
            return compute(params, other, batch)
        with jax.set_mesh(mesh):
            return compute(params, other, batch)

    def scored(params, chosen, **options):
        batches = dataset.loader(chosen, **options)(0, len(chosen.batches))
        late = collections.deque()  # fetched one behind, so that the device does not wait
        for batch in on_devices(batches, None if mesh is None else over_rows(mesh)):
            late.append(dispatch(params, batch))
            if len(late) > 1:
                yield jax.device_get(late.popleft())
        yield from map(jax.device_get, late)

    return scored
