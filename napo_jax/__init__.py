"""Noise-aware multimodal preference optimisation as pure functions over parameter pytrees.

``from napo_jax import napo_loss`` imports jax and nothing heavy.
"""

from napo_jax.losses import dpo_loss, napo_loss, noise_coefficient
from napo_jax.objective import Objective, Term

__version__ = "0.1.0"

__all__ = ["Objective", "Term", "dpo_loss", "napo_loss", "noise_coefficient"]
