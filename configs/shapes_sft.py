"""The small world's base model, habits and all: from nothing, on the answers of a biased teacher."""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.losses import sft_loss
from napo_jax.objective import Objective, Term
from napo_jax.optim import OptimizerConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(size="shapes", dtype="float32", remat="none"),
        data=DataConfig(
            path=("shapes/lessons.parquet",), batch_size=64, max_tokens=256, buckets=4, attention_multiple=8
        ),
        # All of it trains: nothing was there before.
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup=0.05, weight_decay=0.01, clip_norm=1.0, trainable=r"(?!vision/unused).*"
        ),
        train=TrainConfig(steps=3000, log_every=50, checkpoint_every=500),
        objective=Objective((Term("lessons", sft_loss, "chosen"),)),
    )
