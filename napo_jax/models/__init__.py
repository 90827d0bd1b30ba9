"""The LLaVA model in Flax Linen.

Axis letters, everywhere in this folder: B groups, M image variants, C cells, P prefix tokens, T answer tokens,
S = M P + C T all tokens of a group, N image tokens, D width, H heads, G key-value heads, R = H / G queries per key,
K width of a head, V vocabulary. Packed, a group has U places for tokens, A of them for those of its answers.
"""

from napo_jax.models.llava import Groups, Llava
from napo_jax.models.network import IMAGE_SLOT, LlavaConfig
from napo_jax.models.packing import Packing

__all__ = ["IMAGE_SLOT", "Groups", "Llava", "LlavaConfig", "Packing"]
