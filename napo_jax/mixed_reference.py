"""Two references as one (MRPO): both are kept, each on its own, and mixed where a batch gets them.

A mixture is a constant of its row, as each reference is, so that a training knows nothing of it.
"""

import dataclasses
from typing import Literal

import numpy as np

from napo_jax.logps import Logps
from napo_jax.losses import mixed_reference_logps
from napo_jax.term import split_cell


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How a second reference is mixed into the first."""

    # Where the second one comes from: a folder as Hugging Face has it, or the workdir of a run. None: there is none.
    path: str | None = None
    # Its weight, from 0 to 1, or what decides it in each row, by how far each reference holds the chosen answer from
    # the rejected one: "surer", the one that holds them farther apart weighs more; "released", the other one does, as
    # in the published code.
    weight: float | Literal["surer", "released"] = "surer"
    # The share of the first one's log-prob that the second one's may differ from it. Without `fixed_clip` it is divided
    # among the two answers, by their own log-probs, as in the paper.
    clip: float = 0.1
    fixed_clip: bool = False

    def __post_init__(self):
        """Checks the numbers."""
        if self.weight not in ("surer", "released") and not (
            isinstance(self.weight, int | float) and 0 <= self.weight <= 1
        ):
            raise ValueError(f"train.second.weight must be from 0 to 1, surer or released, got {self.weight}")
        if not 0 <= self.clip < 1:
            raise ValueError(f"train.second.clip must be at least 0 and below 1, got {self.clip}")


class MixedReference:
    """Two `CachedReference`s of one dataset, as one."""

    def __init__(self, first, second, mixing: Mixing):
        """Takes both, of the same dataset and cells."""
        self.first, self.second, self.mixing = first, second, mixing

    def attach(self, batch):
        """Returns a batch with the mixed log-probs of its rows; see `CachedReference.attach`."""
        self.second.attach(batch)  # raises if the batch is another dataset's
        batch = self.first.attach(batch)
        return dataclasses.replace(batch, reference=self.logps(batch.ids))

    def logps(self, ids):
        """Returns {cell: Logps of float32[B]} of records by number, int32[B]; zeros for NO_GROUP."""
        return mix(self.first.logps(ids), self.second.logps(ids), self.mixing)


def mix(first, second, mixing: Mixing):
    """Mixes {cell: Logps of float32[B]} of two references.

    The answers `chosen` and `rejected` under the clean picture decide the weights and clips of a row; other answers are
    clipped as rejected ones are. A mean is the mixed sum over the same tokens.
    """
    weight, clips = mixing.weight, (mixing.clip, mixing.clip)
    if isinstance(weight, str) or not mixing.fixed_clip:
        if missing := [name for name in ("chosen", "rejected") if name not in first]:
            raise ValueError(f"a mixture by chosen and rejected answers needs the cell {', '.join(missing)}")
        pairs = [(np.float64(side["chosen"].sum), np.float64(side["rejected"].sum)) for side in (first, second)]
        apart = [np.abs(chosen - rejected) for chosen, rejected in pairs]
        if isinstance(weight, str):
            weight = apart[weight == "surer"] / (sum(apart) + 1e-6)
        if not mixing.fixed_clip:
            sizes = [np.abs(one + other) / 2 for one, other in zip(*pairs, strict=True)]
            share = sizes[0] / np.maximum(sum(sizes), 1e-6)
            clips = mixing.clip * share, mixing.clip * (1 - share)
    mixed = {}
    for cell, one in first.items():
        clip = clips[split_cell(cell)[0] != "chosen"]
        total = np.asarray(
            mixed_reference_logps(
                one.sum, second[cell].sum, extra_weight=np.float32(weight), clip_range=np.float32(clip)
            )
        )
        tokens = one.sum / np.where(one.mean == 0, 1, one.mean)  # 0 / 1 where there are none
        mixed[cell] = Logps(total, total / np.where(tokens == 0, 1, tokens))
    return mixed
