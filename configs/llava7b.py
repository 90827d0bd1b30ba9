"""NaPO on LLaVA-1.5-7B, as the paper trains it."""

from napo_jax.config import Config, DataConfig, ModelConfig
from napo_jax.objective import napo


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(path="llava-v1.5-7b"),
        data=DataConfig(path=("RLAIF-V-Bias/*.parquet",), batch_size=32),
        objective=napo(beta=0.1),
    )
