"""One preference of an objective: a loss from `napo_jax.losses`, the cells that it compares, its options and weight.

A new method is one loss function and one `Term`.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from napo_jax.logps import DetailedLogps, Edited, Logps
from napo_jax.losses.inputs import check_where, log_ratio, prepare

# A loss that names one of these is held against another cell.
_OF_OTHERS = {"policy_rejected_logps", "rejected_kl", "rejected_rewards"}

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_CELL = re.compile(rf"{_NAME.pattern}(@{_NAME.pattern})?")

# What an objective can hand to a loss. A loss gets those that its signature names; its other parameters are options.
_PROVIDED = (
    "policy_chosen_logps",
    "policy_rejected_logps",
    "reference_chosen_logps",
    "reference_rejected_logps",
    "chosen_kl",
    "rejected_kl",
    "chosen_rewards",
    "rejected_rewards",
    "noise_margin",
    "where",
    "axis_name",
)


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
    # Cell to prefer it to; a tuple of them for a loss over many cells; none for a loss of one.
    other: str | tuple[str, ...] | None = None
    # A fixed factor, or "dynamic": the share of this term's margin in those of all dynamic terms (`term_weights`).
    weight: float | Literal["dynamic"] = 1.0
    # Which log-probs the loss reads: summed over the answer's tokens, or their mean.
    logps: Literal["sum", "mean"] = "sum"
    # How many times more a token counts, in `logps`, in the spans where the two answers differ (`data.edits`): CHiP's
    # segment weight with means, RLHF-V's dense DPO with sums.
    edited: float = 0.0
    # Which margin q is measured on, for a loss that measures one.
    margin: Literal["sum", "mean"] = "sum"
    # Keyword options of the loss, such as {"beta": 0.1}. A term holds them as sorted pairs, so that terms compare and
    # hash by value; `dict(term.options)` is the mapping again.
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        """Checks the term, by running its loss on shapes, so that a mistake fails here and not in a traced step."""
        frozen = lambda value: tuple(value) if isinstance(value, list) else value
        object.__setattr__(self, "other", frozen(self.other))
        options = {name: frozen(value) for name, value in dict(self.options).items()}
        object.__setattr__(self, "options", tuple(sorted(options.items())))

        if not _NAME.fullmatch(self.name):
            self._refuse(f"a name must be a lower-case word, got {self.name!r}")
        for cell in self.cells:
            if not _CELL.fullmatch(cell):
                self._refuse(f"{cell!r} is no cell; write an answer, or answer@image")
            if cell.endswith("@clean"):
                self._refuse(f"write {split_cell(cell)[0]!r} for {cell!r}")
        if len(set(self.cells)) < len(self.cells):
            self._refuse(f"its cells must differ, got {self.cells}")
        for field in ("logps", "margin"):
            if getattr(self, field) not in Logps._fields:
                self._refuse(f"{field} must be 'sum' or 'mean', got {getattr(self, field)!r}")
        if self.weight == "dynamic":
            if not isinstance(self.other, str) or self.logps != "sum":
                self._refuse("a dynamic weight needs the summed margin of two cells")
        elif not isinstance(self.weight, int | float) or not math.isfinite(self.weight):
            self._refuse(f"weight must be a finite number or 'dynamic', got {self.weight!r}")
        if not isinstance(self.edited, int | float) or not 0 <= self.edited < math.inf:
            self._refuse(f"edited must be a finite number, 0 or more, got {self.edited!r}")
        self._check_signature()
        if self.edited and self.needs_rewards:
            self._refuse("edited weighs log-probs, and its loss reads rewards")
        self._try_on_shapes()

    def _check_signature(self):
        parameters = inspect.signature(self.loss).parameters
        loss = getattr(self.loss, "__name__", repr(self.loss))
        for parameter in parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                self._refuse(f"{loss} must name all it takes, got the parameter {parameter}")
        known = sorted(set(parameters) - set(_PROVIDED))
        for option in dict(self.options):
            if option not in known:
                self._refuse(f"{loss} has no option {option!r}; it has {known}")
        for option in known:
            if parameters[option].default is inspect.Parameter.empty and option not in dict(self.options):
                self._refuse(f"{loss} needs the option {option!r}")
        if bool(_OF_OTHERS & set(parameters)) != (self.other is not None):
            need = "another cell" if self.other is None else "no other cell"
            self._refuse(f"{loss} takes {need}, got other={self.other!r}")

    def _try_on_shapes(self):
        each = jax.ShapeDtypeStruct((2,), jnp.float32)
        logps = dict.fromkeys(self.cells, DetailedLogps(each, each, Edited(each, each, each), each, each))
        try:
            hash(self)
            jax.eval_shape(lambda policy, reference: evaluate_term(self, policy, reference, None, None), logps, logps)
        except (TypeError, ValueError, KeyError, IndexError) as error:
            self._refuse(f"its loss does not take these cells and options: {error}")

    def _refuse(self, reason):
        raise ValueError(f"term {self.name!r}: {reason}") from None

    @property
    def others(self) -> tuple[str, ...]:
        """The cells that the preferred one is held against."""
        if self.other is None:
            return ()
        return (self.other,) if isinstance(self.other, str) else self.other

    @property
    def cells(self) -> tuple[str, ...]:
        """All its cells, the preferred one first."""
        return (self.preferred, *self.others)

    @property
    def inputs(self) -> frozenset[str]:
        """What the objective hands to its loss: all that the signature names and the options do not make needless."""
        named = set(_PROVIDED) & set(inspect.signature(self.loss).parameters)
        return frozenset(named - {"noise_margin"} if dict(self.options).get("q") is not None else named)

    @property
    def needs_reference(self) -> bool:
        """Whether its loss reads the reference."""
        return self.needs_kl or any(name.startswith("reference_") for name in self.inputs)

    @property
    def needs_kl(self) -> bool:
        """Whether its loss reads how far the policy's distributions are from the reference's, token by token."""
        return bool({"chosen_kl", "rejected_kl"} & self.inputs)

    @property
    def needs_rewards(self) -> bool:
        """Whether its loss reads what the reward head gives the answers; its margin is then one of rewards."""
        return bool({"chosen_rewards", "rejected_rewards"} & self.inputs)

    @property
    def needs_logps(self) -> bool:
        """Whether log-probs are read, by its loss or for its margin."""
        read = any(name.endswith("_logps") or name == "noise_margin" for name in self.inputs)
        return read or not self.needs_rewards


class Outcome(NamedTuple):
    """What one term makes of a batch."""

    where: jax.Array  # bool[B]
    q: jax.Array  # float32[]
    examples: dict[str, jax.Array]  # float32[B] each, 0 where invalid: the loss and what is reported beside it


def evaluate_term(term: Term, policy, reference, where, axis_name) -> Outcome:
    """Runs a term's loss on its cells."""
    shape = jnp.shape(any_of(policy[term.preferred]))
    valid = jnp.ones(shape, bool)
    for cell in term.cells if where is not None else ():
        valid &= check_where(where[cell], shape, f"policy[{cell!r}]")
    sources = {"policy": policy} | ({"reference": reference} if term.needs_reference else {})

    def read(kind, edited=0.0):
        """Returns {role: the log-probs of the term's cells, float32[B] each}."""
        named = {}
        for role, source in sources.items():
            for cell in term.cells:
                logps = source[cell]
                if edited:
                    if getattr(logps, "edited", None) is None:
                        raise ValueError(f"{role}[{cell!r}] does not tell the part of edited spans: use DetailedLogps")
                    logps = logps.weighing_edits(edited)
                named[f"{role}[{cell!r}] {kind}"] = logps[Logps._fields.index(kind)]
        arrays, _ = prepare(valid, named)
        count = len(term.cells)
        return {role: arrays[i * count : (i + 1) * count] for i, role in enumerate(sources)}

    def of_policy(field, what):
        """Returns one field of the policy's detailed log-probs, of the term's cells."""
        named = {f"policy[{cell!r}] {field}": getattr(policy[cell], field, None) for cell in term.cells}
        if any(value is None for value in named.values()):
            raise ValueError(f"term {term.name!r} reads {what}, and no {field} is given")
        return prepare(valid, named)[0]

    def margin(logps):
        """Returns the detached margin of the preferred cell to the nearest other one, float32[B]."""
        h = logps["policy"]
        if "reference" in logps:
            h = [log_ratio(*pair) for pair in zip(h, logps["reference"], strict=True)]
        preferred, *others = jax.lax.stop_gradient(h)
        return preferred - jnp.max(jnp.stack(others), axis=0) if others else preferred

    logps = read(term.logps, term.edited) if term.needs_logps else {}
    provided = {"where": valid, "axis_name": axis_name}
    one_or_all = lambda others: others[0] if isinstance(term.other, str) else others
    for role, (preferred, *others) in logps.items():
        provided[f"{role}_chosen_logps"] = preferred
        provided[f"{role}_rejected_logps"] = one_or_all(others)
    if term.needs_kl:
        preferred, *others = of_policy("kl", "how far the policy is from the reference")
        provided |= {"chosen_kl": preferred, "rejected_kl": one_or_all(others)}
    given = of_policy("reward", "what a reward head gives the answers") if term.needs_rewards else None
    if given is not None:
        preferred, *others = given
        provided |= {"chosen_rewards": preferred, "rejected_rewards": one_or_all(others)}
    if "noise_margin" in term.inputs:
        provided["noise_margin"] = margin(read(term.margin))
    losses, stats = term.loss(**{name: provided[name] for name in term.inputs}, **dict(term.options))
    if jnp.shape(losses) != shape:
        raise ValueError(f"losses have shape {jnp.shape(losses)}, expected one for each example, {shape}")
    if term.weight == "dynamic" and not {"chosen_rewards", "rejected_rewards"} <= set(stats):
        raise ValueError(f"a dynamic weight needs chosen_rewards and rejected_rewards, got the stats {sorted(stats)}")

    loss_margin = margin(logps if given is None else {"policy": given})
    examples = {"loss": losses, "margin": loss_margin, "accuracy": (loss_margin > 0).astype(loss_margin.dtype)}
    for stat, name in (("chosen_rewards", "chosen_reward"), ("mean_rewards", "mean_reward")):
        if stat in stats:
            examples[name] = stats[stat]
    if "rejected_rewards" in stats:
        rejected = stats["rejected_rewards"]
        examples["rejected_reward"] = rejected if isinstance(term.other, str) else jnp.max(rejected, axis=0)
    return Outcome(valid, jnp.mean(jnp.asarray(stats.get("q", 0.0), losses.dtype)), examples)


def any_of(logps):
    """Returns one of the arrays that there are of a cell."""
    return next(value for value in logps if value is not None)
