"""Objectives: which answers are compared under which images, by which losses, and with what weight.

An `Objective` is some `Term`s: it knows which cells the model has to score, and turns their log-probs into a scalar
loss and metrics.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from napo_jax.logps import DetailedLogps, Edited, Logps
from napo_jax.losses import batch_mean, term_weights
from napo_jax.term import Term, any_of, evaluate_term, split_cell


@dataclasses.dataclass(frozen=True)
class Objective:
    """A weighted sum of terms, each averaged over its valid examples (Eq. 14 for NaPO).

    Examples:
      >>> from napo_jax.losses import anchor_loss, dpo_loss
      >>> mdpo = Objective((
      ...     Term("text", dpo_loss, "chosen", "rejected"),
      ...     Term("image", dpo_loss, "chosen", "chosen@crop"),
      ...     Term("anchor", anchor_loss, "chosen"),
      ... ))
      >>> mdpo.cells, mdpo.image_variants, mdpo.cell_image
      (('chosen', 'rejected', 'chosen@crop'), ('clean', 'crop'), (0, 0, 1))
    """

    terms: tuple[Term, ...]
    # Over what q and the dynamic weights are measured: all micro-batches of a step together ("batch"), or each one on
    # its own ("microbatch"), as the released code does. Both span all devices.
    noise_scope: Literal["batch", "microbatch"] = "batch"

    def __post_init__(self):
        """Checks that there are terms, and that their metrics can be told apart."""
        object.__setattr__(self, "terms", tuple(self.terms))
        if not self.terms:
            raise ValueError("an objective needs at least one term")
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"the terms of an objective need different names, got {names}")
        if self.noise_scope not in ("batch", "microbatch"):
            raise ValueError(f"noise_scope must be 'batch' or 'microbatch', got {self.noise_scope!r}")
        _ = self.counterparts  # raises if it cannot tell them

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells that the terms need, each once, in order of appearance."""
        return tuple(dict.fromkeys(cell for term in self.terms for cell in term.cells))

    @property
    def image_variants(self) -> tuple[str, ...]:
        """The image variants that the cells need, each once, in order of appearance."""
        return tuple(dict.fromkeys(split_cell(cell)[1] for cell in self.cells))

    @property
    def cell_image(self) -> tuple[int, ...]:
        """For each cell, the index of its image variant."""
        return tuple(self.image_variants.index(split_cell(cell)[1]) for cell in self.cells)

    @property
    def reference_cells(self) -> tuple[str, ...]:
        """The cells that the reference model has to score; none if no term reads a reference."""
        return tuple(dict.fromkeys(cell for term in self.terms if term.needs_reference for cell in term.cells))

    @property
    def counterparts(self) -> dict[str, str]:
        """{answer: the one that it is compared with}, of the answers whose edited spans a term weighs."""
        found = {}
        for term in self.terms:
            if not term.edited:
                continue
            answers = tuple(dict.fromkeys(split_cell(cell)[0] for cell in term.cells))
            if len(answers) != 2:
                raise ValueError(f"term {term.name!r}: edited spans are those of two answers, and it has {answers}")
            for one, other in (answers, answers[::-1]):
                if found.setdefault(one, other) != other:
                    raise ValueError(f"term {term.name!r}: {one!r} is edited against {found[one]!r} already")
        return found

    @property
    def needs_kl(self) -> bool:
        """Whether a term reads the reference's whole distributions, so that the reference has to run along."""
        return any(term.needs_kl for term in self.terms)

    @property
    def needs_rewards(self) -> bool:
        """Whether a term reads rewards, so that the model needs a reward head."""
        return any(term.needs_rewards for term in self.terms)

    @property
    def needs_logps(self) -> bool:
        """Whether a term reads log-probs, so that the model's words have to be computed."""
        return any(term.needs_logps for term in self.terms)

    def logps_like(self, value, *, reference=False) -> Logps | DetailedLogps:
        """Returns the log-probs that a cell has under this objective, the same value in all their places.

        Args:
          value: anything.
          reference: whether it is the reference that is scored.
        """
        edited = Edited(value, value, value) if self.counterparts else None
        kl = value if self.needs_kl and not reference else None
        reward = value if self.needs_rewards and not reference else None
        if edited is None and kl is None and reward is None:
            return Logps(value, value)
        logps = value if self.needs_logps else None
        return DetailedLogps(logps, logps, edited, kl, reward)

    def columns(self, *, reference=False) -> list[str]:
        """Returns the names of the K numbers of a cell's log-probs, such as "sum", in the order of their leaves."""
        paths, _ = jax.tree.flatten_with_path(self.logps_like(0, reference=reference))
        return [jax.tree_util.keystr(path, simple=True, separator="_") for path, _ in paths]

    def from_columns(self, values, *, reference=False) -> Logps | DetailedLogps:
        """Returns the log-probs of arrays float[..., K], one column for each of their leaves."""
        tree = jax.tree.structure(self.logps_like(0, reference=reference))
        return tree.unflatten([values[..., k] for k in range(values.shape[-1])])

    def __call__(self, policy, reference=None, *, where=None, axis_name=None):
        """Turns log-probs of cells into a loss and metrics.

        Args:
          policy: {cell: (sum, mean)}, the policy's log-probs: float[B] each, the whole batch, or float[A, B], the A
            micro-batches of a step. `DetailedLogps` where a term weighs edited spans, or reads the divergence or
            rewards.
          reference: {cell: (sum, mean)}, the reference's, of the cells in `reference_cells`; None if there are none.
          where: {cell: bool[B]} or None; valid cells. A term averages over the examples whose cells are all valid.
            The others do nothing, whatever they hold.
          axis_name: mapped axis or axes that the batch is split over, inside `shard_map` or `pmap`. Gradients of the
            loss by replicated parameters are summed by `shard_map` itself; under `pmap`, or with `check_vma=False`,
            take their `pmean`.

        Returns:
          loss: float32[], the same on all devices.
          metrics: {name: float32[]}, detached: `loss`, and for each term `<term>/loss`, `/margin` (preferred minus
            other, without beta), `/accuracy` (share of positive margins), `/q` (0, as for DPO, where the loss has
            none), `/weight`, `/valid` (share of valid examples), and `/chosen_reward` and `/rejected_reward` where the
            loss has rewards. Against several other cells, the margin is the one to the nearest of them; of a lone cell
            without a reference it is the log-prob itself. Of a loss that reads rewards it is the margin of rewards,
            and there is `/mean_reward`.
        """
        for what, given, cells in (
            ("policy", policy, self.cells),
            ("reference", reference or {}, self.reference_cells),
            ("where", where, self.cells),
        ):
            if given is not None and (missing := [cell for cell in cells if cell not in given]):
                raise ValueError(f"{what} lacks the cells {missing}; it has {list(given)}")
        ndim = jnp.ndim(any_of(policy[self.cells[0]]))
        if ndim not in (1, 2):
            raise ValueError(f"log-probs must be [B] or [A, B], got {ndim} dimensions")
        if self.noise_scope == "batch" or ndim == 1:
            shares, metrics = self._evaluate_terms(policy, reference, where, axis_name)
        else:
            only = lambda given, cells: None if given is None else {cell: given[cell] for cell in cells}
            shares, metrics = jax.vmap(lambda *batch: self._evaluate_terms(*batch, axis_name))(
                only(policy, self.cells), only(reference, self.reference_cells), only(where, self.cells)
            )
            # A micro-batch in which a term has no valid example says nothing of that term, so it is not averaged in.
            live = {name: values["valid"] > 0 for name, values in metrics.items()}
            shares = {name: batch_mean(share, live[name]) for name, share in shares.items()}
            metrics = {
                name: {key: batch_mean(value, None if key == "valid" else live[name]) for key, value in values.items()}
                for name, values in metrics.items()
            }
        loss = sum(shares.values())
        flat = {f"{name}/{key}": value for name, values in metrics.items() for key, value in values.items()}
        return loss, jax.lax.stop_gradient({"loss": loss, **flat})

    def _evaluate_terms(self, policy, reference, where, axis_name):
        """Returns {term: its share in the loss} and {term: {metric: float32[]}}."""
        outcomes = {term.name: evaluate_term(term, policy, reference, where, axis_name) for term in self.terms}
        weights = self._weights(outcomes, axis_name)
        shares, metrics = {}, {}
        for name, outcome in outcomes.items():
            means = {key: batch_mean(value, outcome.where, axis_name) for key, value in outcome.examples.items()}
            shares[name] = weights[name].astype(means["loss"].dtype) * means["loss"]
            valid = batch_mean(outcome.where.astype(jnp.float32), None, axis_name)
            metrics[name] = means | {"q": outcome.q, "weight": weights[name], "valid": valid}
        return shares, metrics

    def _weights(self, outcomes, axis_name):
        """Returns {term: float32[]}, with gamma where the weight is dynamic."""
        weights = {t.name: jnp.asarray(t.weight, jnp.float32) for t in self.terms if t.weight != "dynamic"}
        dynamic = [term.name for term in self.terms if term.weight == "dynamic"]
        if dynamic:
            rewards = [outcomes[name].examples for name in dynamic]
            # psi_sum of Eq. 2: the margin of rewards, so that terms of different beta compare.
            gamma = term_weights(
                jnp.stack([reward["chosen_reward"] - reward["rejected_reward"] for reward in rewards]),
                where=jnp.stack([outcomes[name].where for name in dynamic]),
                axis_name=axis_name,
            )
            weights |= dict(zip(dynamic, gamma, strict=True))
        return weights
