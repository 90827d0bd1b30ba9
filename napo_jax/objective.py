"""Objectives: which answers are compared under which images, by which loss, and with what weight.

A `Term` is one preference: a loss from `napo_jax.losses`, its cells, its options and its weight. An `Objective` is some
of them: it knows which cells the model has to score, and turns their log-probs into a scalar loss and metrics. A new
method is one loss function and one `Term`.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from napo_jax.losses import batch_mean, dpo_loss, napo_loss, term_weights
from napo_jax.losses.inputs import log_ratio, prepare

_CELL = re.compile(r"[a-z][a-z0-9_]*(@[a-z][a-z0-9_]*)?")

# What an objective can hand to a loss. A loss gets those that its signature names; its other parameters are options.
_PROVIDED = (
    "policy_chosen_logps",
    "policy_rejected_logps",
    "reference_chosen_logps",
    "reference_rejected_logps",
    "noise_margin",
    "where",
    "axis_name",
)


class Logps(NamedTuple):
    """Log-probs of one cell for a batch: summed and averaged over the answer's tokens, float[B] each."""

    sum: jax.Array
    mean: jax.Array


def split_cell(cell: str) -> tuple[str, str]:
    """Splits a cell into its answer and its image variant: "chosen@crop" is ("chosen", "crop")."""
    answer, _, image = cell.partition("@")
    return answer, image or "clean"


@dataclasses.dataclass(frozen=True)
class Term:
    """One preference of an objective.

    The preferred cell plays the part that a loss calls "chosen" and the other cell the one it calls "rejected".
    """

    # First part of its metrics' names.
    name: str
    # A function of `napo_jax.losses`, or one like them: it returns (losses float32[B], stats).
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    # Cell to prefer: an answer, on the clean image ("chosen") or on a variant of it ("chosen@crop").
    preferred: str
    # Cell to prefer it to; several for a loss over many cells; none for a loss of one.
    other: str | tuple[str, ...] | None = None
    # A fixed factor, or "dynamic": the share of this term's margin in those of all dynamic terms (`term_weights`).
    weight: float | Literal["dynamic"] = 1.0
    # Which log-probs the loss reads: summed over the answer's tokens, or their mean.
    logps: Literal["sum", "mean"] = "sum"
    # Which margin q is measured on, for a loss that has a q.
    margin: Literal["sum", "mean"] = "sum"
    # Keyword options of the loss, such as {"beta": 0.1}; kept as sorted pairs so that terms compare and hash by value.
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        """Checks the term against its loss's signature, so that a typo fails here and not in a traced step."""
        object.__setattr__(self, "options", tuple(sorted(dict(self.options).items())))
        for cell in self.cells:
            if not _CELL.fullmatch(cell):
                raise ValueError(f"term {self.name!r}: {cell!r} is no cell; write an answer, or answer@image")
        for field in ("logps", "margin"):
            if getattr(self, field) not in Logps._fields:
                raise ValueError(f"term {self.name!r}: {field} must be 'sum' or 'mean', got {getattr(self, field)!r}")
        if isinstance(self.weight, str) and self.weight != "dynamic":
            raise ValueError(f"term {self.name!r}: weight must be a number or 'dynamic', got {self.weight!r}")

        parameters = inspect.signature(self.loss).parameters
        known = sorted(set(parameters) - set(_PROVIDED))
        for option in dict(self.options):
            if option not in known:
                raise ValueError(f"term {self.name!r}: {self._loss_name} has no option {option!r}; it has {known}")
        for option in known:
            if parameters[option].default is inspect.Parameter.empty and option not in dict(self.options):
                raise ValueError(f"term {self.name!r}: {self._loss_name} needs the option {option!r}")
        if ("policy_rejected_logps" in parameters) != (self.other is not None):
            need = "another cell" if self.other is None else "no other cell"
            raise ValueError(f"term {self.name!r}: {self._loss_name} takes {need}, got other={self.other!r}")
        if self.weight == "dynamic" and not isinstance(self.other, str):
            raise ValueError(f"term {self.name!r}: a dynamic weight needs the margin of two cells")

    @property
    def _loss_name(self) -> str:
        return getattr(self.loss, "__name__", repr(self.loss))

    @property
    def others(self) -> tuple[str, ...]:
        """The cells that the preferred one is held against."""
        if self.other is None:
            return ()
        return (self.other,) if isinstance(self.other, str) else tuple(self.other)

    @property
    def cells(self) -> tuple[str, ...]:
        """All its cells, the preferred one first."""
        return (self.preferred, *self.others)

    @property
    def needs_reference(self) -> bool:
        """Whether its loss reads the reference's log-probs."""
        return any(name.startswith("reference_") for name in inspect.signature(self.loss).parameters)


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
    def needs_reference(self) -> bool:
        """Whether any term reads the reference's log-probs."""
        return any(term.needs_reference for term in self.terms)

    def __call__(self, policy, reference=None, *, where=None, axis_name=None):
        """Turns log-probs of cells into a loss and metrics.

        Args:
          policy: {cell: (sum, mean)}, the policy's log-probs: float[B] each, or float[A, B] for A micro-batches.
          reference: {cell: (sum, mean)}, the reference's; None if no term needs it.
          where: {cell: bool[B]} or None; valid cells. A term averages over the examples whose cells are all valid.
            The others do nothing, whatever they hold.
          axis_name: mapped axis or axes of the devices that share the batch, inside `shard_map` or `pmap`.

        Returns:
          loss: float32[], the same on all devices.
          metrics: {name: float32[]}, detached: `loss`, and for each term `<term>/loss`, `/margin` (preferred minus
            other, without beta), `/accuracy` (share of positive margins), `/q` (0, as for DPO, where the loss has
            none), `/weight`, `/valid` (share of valid examples), and `/chosen_reward` and `/rejected_reward` where the
            loss has rewards. Against several other cells, the margin is the one to the nearest of them.
        """
        if reference is None and self.needs_reference:
            raise ValueError(f"terms {[t.name for t in self.terms if t.needs_reference]} need reference log-probs")
        for what, given in (("policy", policy), ("reference", reference), ("where", where)):
            if given is not None and (missing := [cell for cell in self.cells if cell not in given]):
                raise ValueError(f"{what} lacks the cells {missing}; it has {list(given)}")
        ndim = jnp.ndim(policy[self.cells[0]][0])
        if ndim not in (1, 2):
            raise ValueError(f"log-probs must be [B] or [A, B], got {ndim} dimensions")
        if self.noise_scope == "batch" or ndim == 1:
            return self._loss_and_metrics(policy, reference, where, axis_name)
        each = jax.vmap(lambda p, r, w: self._loss_and_metrics(p, r, w, axis_name))(policy, reference, where)
        return jax.tree.map(lambda values: jnp.mean(values, axis=0), each)

    def _loss_and_metrics(self, policy, reference, where, axis_name):
        outcomes = {term.name: _evaluate(term, policy, reference, where, axis_name) for term in self.terms}
        weights = self._weights(outcomes, axis_name)
        loss, metrics = 0.0, {}
        for name, outcome in outcomes.items():
            mean_loss = batch_mean(outcome.losses, outcome.where, axis_name)
            loss = loss + weights[name].astype(mean_loss.dtype) * mean_loss
            means = {"loss": mean_loss} | {
                key: batch_mean(value, outcome.where, axis_name) for key, value in outcome.metrics.items()
            }
            means |= {
                "q": outcome.q,
                "weight": weights[name],
                "valid": batch_mean(outcome.where.astype(jnp.float32), None, axis_name),
            }
            metrics |= {f"{name}/{key}": value for key, value in means.items()}
        return loss, jax.lax.stop_gradient({"loss": loss, **metrics})

    def _weights(self, outcomes, axis_name):
        """Returns {term name: float32[]}, with gamma where the weight is dynamic."""
        weights = {t.name: jnp.asarray(t.weight, jnp.float32) for t in self.terms if t.weight != "dynamic"}
        dynamic = [term.name for term in self.terms if term.weight == "dynamic"]
        if dynamic:
            gamma = term_weights(
                jnp.stack([outcomes[name].reward_margin for name in dynamic]),
                where=jnp.stack([outcomes[name].where for name in dynamic]),
                axis_name=axis_name,
            )
            weights |= dict(zip(dynamic, gamma, strict=True))
        return weights


class _Outcome(NamedTuple):
    """What one term makes of a batch, unreduced but for q."""

    losses: jax.Array  # float32[B], 0 where invalid
    where: jax.Array  # bool[B]
    reward_margin: jax.Array | None  # float32[B], what a dynamic weight is measured on: psi_sum of Eq. 2
    q: jax.Array  # float32[]
    metrics: dict[str, jax.Array]  # float32[B] each


def _evaluate(term: Term, policy, reference, where, axis_name) -> _Outcome:
    """Runs a term's loss on its cells."""
    valid = jnp.ones(jnp.shape(policy[term.preferred][0]), bool)
    for cell in term.cells if where is not None else ():
        valid &= where[cell]

    def read(source, kind):
        """Returns the log-probs of the term's cells, float32[B] each."""
        return prepare(valid, **{cell: getattr(Logps(*source[cell]), kind) for cell in term.cells})

    def margin(kind):
        """Returns the detached margin of the preferred cell to the nearest other one, float32[B]."""
        h = read(policy, kind)
        if reference is not None:
            h = [log_ratio(*pair) for pair in zip(h, read(reference, kind), strict=True)]
        preferred, *others = jax.lax.stop_gradient(h)
        return preferred - jnp.max(jnp.stack(others), axis=0) if others else preferred

    provided = {"where": valid, "axis_name": axis_name, "noise_margin": margin(term.margin)}
    for role, source in (("policy", policy), ("reference", reference)):
        if source is not None:
            preferred, *others = read(source, term.logps)
            provided[f"{role}_chosen_logps"] = preferred
            provided[f"{role}_rejected_logps"] = others[0] if isinstance(term.other, str) else others
    parameters = inspect.signature(term.loss).parameters
    losses, stats = term.loss(
        **{name: value for name, value in provided.items() if name in parameters}, **dict(term.options)
    )

    loss_margin = margin(term.logps)
    metrics = {"margin": loss_margin, "accuracy": (loss_margin > 0).astype(loss_margin.dtype)}
    if "chosen_rewards" in stats:
        metrics["chosen_reward"] = stats["chosen_rewards"]
    if "rejected_rewards" in stats:
        rejected = stats["rejected_rewards"]
        metrics["rejected_reward"] = rejected if isinstance(term.other, str) else jnp.max(rejected, axis=0)
    return _Outcome(
        losses=losses,
        where=valid,
        reward_margin=stats["chosen_rewards"] - stats["rejected_rewards"] if term.weight == "dynamic" else None,
        q=jnp.asarray(stats.get("q", 0.0), losses.dtype),
        metrics=metrics,
    )


def napo(beta: float = 0.1) -> Objective:
    """Returns NaPO as in the paper (Eq. 14).

    The original pair keeps DPO. The two biased answers take NaPO with q by the paper's rule: the language-biased one,
    made without the image, on the mean margin with alpha 0.5; the vision-biased one, made without the question, on the
    summed margin with alpha 0.01. All three have dynamic weights.
    """
    return Objective(
        (
            Term("preference", dpo_loss, "chosen", "rejected", weight="dynamic", options={"beta": beta}),
            *_bias_terms(beta, rule="paper", weight="dynamic"),
        )
    )


def napo_released(beta: float = 0.1) -> Objective:
    """Returns NaPO as the published code runs it: q by its own rule on each micro-batch, and all weights 1."""
    return Objective(
        (
            Term("preference", dpo_loss, "chosen", "rejected", options={"beta": beta}),
            *_bias_terms(beta, rule="released", weight=1.0),
        ),
        noise_scope="microbatch",
    )


def _bias_terms(beta, rule, weight):
    language = {"beta": beta, "alpha": 0.5, "rule": rule}
    vision = {"beta": beta, "alpha": 0.01, "rule": rule}
    return (
        Term("language_bias", napo_loss, "chosen", "question_only", weight, margin="mean", options=language),
        Term("vision_bias", napo_loss, "chosen", "image_only", weight, margin="sum", options=vision),
    )


def dpo(beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """Returns DPO on the original pair."""
    options = {"beta": beta, "label_smoothing": label_smoothing}
    return Objective((Term("preference", dpo_loss, "chosen", "rejected", options=options),))
