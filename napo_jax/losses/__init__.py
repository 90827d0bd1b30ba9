"""Preference losses on log-probabilities: elementwise, pure, and in need of nothing but jax.

Every loss takes the policy's log-probs of its answers and then the reference's, and returns ``(losses, stats)``: one
float32 loss per example, unreduced, and a dict of detached quantities worth logging. They share these rules:

* Arrays may have any shape as long as it is one shape. float16 and bfloat16 are computed in float32; float64 stays.
* Reference log-probs are constants: no gradient flows into them.
* ``where`` (bool, the same shape) names the valid examples. The others get loss 0 and gradient 0 whatever they hold,
  NaN and infinity included, and take no part in any batch statistic. The caller's mean divides by ``where.sum()``.
"""

from napo_jax.losses.cells import anchor_loss, sft_loss, single_sigmoid_loss, softmax_preference_loss
from napo_jax.losses.kto import kto_pair_loss
from napo_jax.losses.napo import napo_loss
from napo_jax.losses.pairs import dpo_loss, hinge_loss, ipo_loss, robust_dpo_loss, simpo_loss
from napo_jax.losses.references import mixed_reference_logps
from napo_jax.losses.reward import reward_loss
from napo_jax.losses.statistics import batch_mean, noise_coefficient, term_weights
from napo_jax.losses.token_kl import chip_released_loss, token_kl_loss

__all__ = [
    "anchor_loss",
    "batch_mean",
    "chip_released_loss",
    "dpo_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_pair_loss",
    "mixed_reference_logps",
    "napo_loss",
    "noise_coefficient",
    "reward_loss",
    "robust_dpo_loss",
    "sft_loss",
    "simpo_loss",
    "single_sigmoid_loss",
    "softmax_preference_loss",
    "term_weights",
    "token_kl_loss",
]
