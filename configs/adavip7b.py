"""AdaViP on LLaVA-1.5-7B: one softmax over the other answer and the other picture.

Its numbers are not published: these are NaPO's.
"""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.methods import adavip
from napo_jax.optim import OptimizerConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(path="llava-v1.5-7b", size="7b"),
        data=DataConfig(path=("AdaViP/*.parquet",), batch_size=32),
        optimizer=OptimizerConfig(learning_rate=5e-7, schedule="cosine", warmup=0.1, weight_decay=0.01),
        train=TrainConfig(epochs=4.0),
        objective=adavip(beta=0.1),
    )
