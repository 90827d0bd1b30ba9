"""What a model makes of the groups held out: each term's margin and accuracy, and whether the picture matters to it."""

import dataclasses
import functools

import jax
import numpy as np

from napo_jax.data.order import NO_GROUP
from napo_jax.losses import reward_loss, simpo_loss
from napo_jax.objective import Objective
from napo_jax.scorer import Chosen, make_scorer
from napo_jax.term import Term, split_cell

ABLATED = "image_ablated"  # the term's name in metrics
_NO_PICTURE = "black"


def with_ablation(objective: Objective) -> Objective:
    """Adds a term that weighs nothing: the preferred answer with its picture against the same without."""
    answer = split_cell(objective.terms[0].preferred)[0]
    # Its loss reads no reference, so that its margin is the policy's own: the log-prob that the picture adds, or the
    # reward where that is all that trains.
    loss = simpo_loss if objective.needs_logps else reward_loss
    ablated = Term(ABLATED, loss, answer, f"{answer}@{_NO_PICTURE}", weight=0.0)
    return dataclasses.replace(objective, terms=(*objective.terms, ablated), noise_scope="batch")


class HeldOut:
    """The groups that are held out of training, and the way to evaluate them."""

    def __init__(self, dataset, objective, model, reference=None, *, mesh=None, batch_size=None):
        """Takes what training takes.

        Args:
          dataset: `Dataset` with groups held out.
          objective: `Objective` that is trained.
          model: `Llava`.
          reference: the `CachedReference` of the dataset; or a pair of the `Llava` and the parameters that run as
            reference, which are scored once; or None if the objective reads none.
          mesh: made by `sharding.make_mesh`.
          batch_size: groups scored at a time, over all devices; None for the config's.
        """
        self._objective = with_ablation(objective)
        self._dataset = dataset.under(self._objective)
        batch_size = batch_size or dataset.config.batch_size
        order = self._dataset.order(held_out=True, shuffle=False, keep_rest=True, batch_size=batch_size)
        self._chosen = Chosen(order.batch_size, [order[step] for step in range(order.steps_per_epoch)])
        kl_to = reference if objective.needs_kl else None
        self._scored = make_scorer(self._dataset, self._objective, model, self._objective.cells, mesh, kl_to=kl_to)
        self._reference = reference
        if isinstance(reference, tuple):
            scorer = make_scorer(
                self._dataset, self._objective, reference[0], objective.reference_cells, mesh, reference=True
            )
            _, self._reference = self._collect(scorer, reference[1], objective.reference_cells, reference=True)
        self._evaluate = jax.jit(self._objective)

    @property
    def metrics(self) -> list[str]:
        """The names of what an evaluation measures."""
        logps = dict.fromkeys(self._objective.cells, self._objective.logps_like(jax.ShapeDtypeStruct((1,), np.float32)))
        return sorted(jax.eval_shape(self._objective, logps, logps)[1])

    def __call__(self, params):
        """Evaluates a parameter tree.

        Returns:
          {name: float}, the objective's metrics over all groups as one batch; `image_ablated/margin` is the mean
          log-prob, or reward, that the picture adds to the preferred answer, `image_ablated/accuracy` how often it adds
          any.
        """
        ids, policy = self._collect(self._scored, params, self._objective.cells)
        reference = self._reference
        if reference is not None and not isinstance(reference, dict):
            reference = reference.logps(ids)
        _, metrics = self._evaluate(policy, reference)
        return {name: float(value) for name, value in jax.device_get(metrics).items()}

    def _collect(self, scored, params, cells, reference=False):
        """Returns the record numbers of all groups held out, int32[N], and {cell: Logps of float32[N]}."""
        ids, values = zip(*scored(params, self._chosen), strict=True)
        ids, values = np.concatenate(ids), np.concatenate(values)
        ids, values = ids[ids != NO_GROUP], values[ids != NO_GROUP]
        columns = functools.partial(self._objective.from_columns, reference=reference)
        return ids, {cell: columns(values[:, c]) for c, cell in enumerate(cells)}
