"""The shape of the world's model."""

from napo_jax.models import LlavaConfig
from napo_jax.models.clip import ClipConfig
from napo_jax.models.llama import LlamaConfig
from napo_jax.world.language import vocabulary
from napo_jax.world.scenes import CELL, SIZE


def world_model() -> LlavaConfig:
    """Returns a LLaVA of about a million parameters that sees each cell of the world's grid as one token."""
    text = LlamaConfig(
        vocab_size=len(vocabulary()), width=128, mlp_width=384, layers=4, heads=4, kv_heads=4, max_positions=512
    )
    vision = ClipConfig(image_size=SIZE, patch_size=CELL, width=96, mlp_width=256, layers=3, heads=4)
    return LlavaConfig(text=text, vision=vision)
