"""Robust DPO on LLaVA-1.5-7B: the original pair, where one preference in ten is taken to be wrong.

All else is as in dpo7b.py.
"""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.methods import robust_dpo
from napo_jax.optim import OptimizerConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(path="llava-v1.5-7b", size="7b"),
        data=DataConfig(path=("RLAIF-V-Bias/*.parquet",), batch_size=32),
        optimizer=OptimizerConfig(learning_rate=5e-7, schedule="cosine", warmup=0.1, weight_decay=0.01),
        train=TrainConfig(epochs=4.0),
        objective=robust_dpo(beta=0.1, flip_rate=0.1),
    )
