"""Noise-aware multimodal preference optimisation as pure functions over parameter pytrees.

``from napo_jax import napo_loss`` imports jax and nothing heavy.
"""

from napo_jax.losses import dpo_loss, napo_loss, noise_coefficient
from napo_jax.objective import Objective
from napo_jax.term import Term

__version__ = "0.1.0"

__all__ = [
    "Objective",
    "Term",
    "dpo_loss",
    "export_pretrained",
    "load_pretrained",
    "napo_loss",
    "noise_coefficient",
]


def __getattr__(name):
    """Imports what needs flax only when it is asked for (PEP 562)."""
    if name in ("load_pretrained", "export_pretrained"):
        from napo_jax import weights

        return getattr(weights, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
