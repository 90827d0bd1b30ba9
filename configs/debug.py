"""A tiny random model on made-up records: to see that everything runs, in seconds."""

from napo_jax.config import Config, DataConfig, ModelConfig
from napo_jax.objective import napo


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(dtype="float32", remat="none"),
        data=DataConfig(batch_size=8, buckets=3, attention_multiple=8, threads=2),
        objective=napo(),
    )
