"""Visual debiasing while an answer is decoded: what the model says with the picture, held against what it says without.

Both ways are those of arXiv 2403.05262, and need no training. Visual debias decoding (VDD) contrasts the logits of
every token. Post-hoc debiasing is for closed questions: it divides the probabilities of the labels, such as yes and no,
by those that they have without the picture.
"""

import dataclasses
import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from napo_jax.fields import check_fields
from napo_jax.models import IMAGE_SLOT

_LEAST = 1e-4  # added to what labels have without the picture, which may be nothing


@dataclasses.dataclass(frozen=True)
class Debias:
    """Whether and how an answer is held against what is said without the picture."""

    # How the picture is taken away: "none" leaves its place out, "unk" puts the token <unk> there, "both" takes the
    # mean of both logits. "off" holds the answer against nothing.
    picture: Literal["off", "none", "unk", "both"] = "off"
    # VDD: logits are (1 + strength) times those with the picture, minus strength times those without.
    strength: float = 1.0
    # VDD: a token is never said that has less than this share of the likeliest one's probability, picture seen.
    plausible: float = 0.1
    # Post-hoc debiasing, in place of VDD: for each label, the tokens that an answer with it may begin with.
    labels: Annotated[tuple[tuple[int, ...], ...], tyro.conf.Suppress] = ()
    # "divide" the labels' probabilities by those without the picture, or "subtract" these.
    rule: Literal["divide", "subtract"] = "divide"

    def __post_init__(self):
        """Checks the fields' types and choices, and the numbers."""
        check_fields(self, "debias")
        if self.strength < 0 or not 0 < self.plausible <= 1:
            raise ValueError(
                "debias.strength must not be negative and debias.plausible in (0, 1], got "
                f"{self.strength} and {self.plausible}"
            )
        if self.labels and self.picture == "off":
            raise ValueError("debias.labels need what is said without the picture: set debias.picture")
        if self.labels and (len(self.labels) < 2 or not all(self.labels)):
            raise ValueError(f"debias.labels must be two at least, with a token each, got {self.labels}")
        if len({token for label in self.labels for token in label}) < sum(map(len, self.labels)):
            raise ValueError(f"debias.labels share a token: {self.labels}")


def without_picture(ids, debias: Debias, unk=0) -> list[np.ndarray]:
    """Returns the prompts int32[P] that a prompt is held against; those of a prompt without a picture are the same."""
    slots = ids == IMAGE_SLOT
    dropped = ids[~slots]
    # One token stands for the whole picture.
    replaced = np.insert(dropped, np.argmax(slots), np.int32(unk)) if slots.any() else dropped
    return {"off": [], "none": [dropped], "unk": [replaced], "both": [dropped, replaced]}[debias.picture]


def contrast(logits, without, debias: Debias) -> jax.Array:
    """Returns the logits of VDD.

    Args:
      logits: float32[..., V], with the picture.
      without: a list of the same, without.
      debias: `Debias`.

    Returns:
      float32[..., V]; -inf for what is not plausible, also for a prompt without a picture, whose logits stay.
    """
    contrasted = (1 + debias.strength) * logits - debias.strength * sum(without) / len(without)
    least = jnp.max(logits, axis=-1, keepdims=True) + math.log(debias.plausible)
    return jnp.where(logits < least, -jnp.inf, contrasted)


def calibrate(logits, without, debias: Debias, pictured=True) -> jax.Array:
    """Returns the logits of a closed answer's first token, its labels calibrated.

    A label has the probability of all its tokens together, and shares what it comes to among them as before.

    Args:
      logits: float32[..., V], with the picture.
      without: a list of the same, without.
      debias: `Debias`.
      pictured: bool[...] or bool, false for a prompt that has no picture: its labels stay as they are.

    Returns:
      float32[..., V]; -inf for what begins no label.
    """
    of_labels = lambda values: jnp.stack(
        [jax.nn.logsumexp(values[..., jnp.array(label)], axis=-1) for label in debias.labels], axis=-1
    )
    seen = of_labels(logits)
    naive = jax.nn.softmax(seen, axis=-1)
    blind = jax.nn.softmax(of_labels(sum(without) / len(without)), axis=-1) + _LEAST
    if debias.rule == "divide":
        fair = naive / blind
    else:
        fair = naive - blind
        fair -= jnp.min(fair, axis=-1, keepdims=True)  # which is largest is what counts
    whole = jnp.sum(fair, axis=-1, keepdims=True)
    differ = whole > 0  # subtracted, labels may all be alike
    pictured = jnp.broadcast_to(pictured, whole.shape[:-1])[..., None] & differ
    fair = jnp.log(jnp.where(pictured, fair / jnp.where(differ, whole, 1), naive))
    out = jnp.full(logits.shape, -jnp.inf)
    for i, label in enumerate(debias.labels):
        tokens = jnp.array(label)
        out = out.at[..., tokens].set(logits[..., tokens] - seen[..., i, None] + fair[..., i, None])
    return out
