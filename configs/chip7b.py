"""CHiP on LLaVA-1.5-7B: answers, edited spans, tokens and picture; the reference runs along, for its distributions.

The numbers are those of the published script for LLaVA-1.6-7B, and the weights those of the paper.
"""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.methods import chip
from napo_jax.optim import OptimizerConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(path="llava-v1.5-7b", size="7b"),
        data=DataConfig(path=("RLHF-V/*.parquet",), batch_size=32),
        optimizer=OptimizerConfig(learning_rate=5e-7, schedule="cosine", warmup=0.03, weight_decay=0.0, clip_norm=20.0),
        # Beside the reference there is little room: as many micro-batches as published.
        train=TrainConfig(epochs=1.0, accumulate=8, reference="live"),
        objective=chip(beta=0.5),
    )
