"""KTO's value of both answers of the original pair on LLaVA-1.5-7B.

All else is as in dpo7b.py; the paper's numbers are for text alone.
"""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.methods import kto_pair
from napo_jax.optim import OptimizerConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(path="llava-v1.5-7b", size="7b"),
        data=DataConfig(path=("RLAIF-V-Bias/*.parquet",), batch_size=32),
        optimizer=OptimizerConfig(learning_rate=5e-7, schedule="cosine", warmup=0.1, weight_decay=0.01),
        train=TrainConfig(epochs=4.0),
        objective=kto_pair(beta=0.1),
    )
