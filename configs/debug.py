"""A tiny random model on made-up records: to see that everything runs, in seconds."""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.methods import napo
from napo_jax.optim import OptimizerConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(dtype="float32", remat="none"),
        data=DataConfig(batch_size=8, buckets=2, attention_multiple=8, threads=2),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(steps=20, log_every=1, checkpoint_every=10),
        objective=napo(),
    )
