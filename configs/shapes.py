"""NaPO on the small world's base model. Its values stand in the package, which can run without this folder."""

from napo_jax.world.configs import cure as get_config

__all__ = ["get_config"]
