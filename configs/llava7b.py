"""NaPO on LLaVA-1.5-7B, as the paper trains it: decoder and projector in full, the vision tower frozen."""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.methods import napo
from napo_jax.optim import OptimizerConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(path="llava-v1.5-7b", size="7b"),
        data=DataConfig(path=("RLAIF-V-Bias/*.parquet",), batch_size=32),
        optimizer=OptimizerConfig(learning_rate=5e-7, schedule="cosine", warmup=0.1, weight_decay=0.01),
        train=TrainConfig(epochs=4.0),
        # DPO on the original pair; NaPO on the language-biased answer, by the mean margin with alpha 0.5, and on the
        # vision-biased one, by the summed margin with alpha 0.01. Weights follow the margins.
        objective=napo(beta=0.1),
    )
