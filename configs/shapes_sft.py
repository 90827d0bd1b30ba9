"""The small world's base model, habits and all. Its values stand in the package, which can run without this folder."""

from napo_jax.world.configs import lessons as get_config

__all__ = ["get_config"]
