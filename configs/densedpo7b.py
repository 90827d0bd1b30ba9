"""Dense DPO on LLaVA-1.5-7B: tokens of the spans where a correction differs from the answer count five times.

The optimizer's numbers are those of CHiP's published script, which weighs spans of the same data.
"""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.methods import dense_dpo
from napo_jax.optim import OptimizerConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(path="llava-v1.5-7b", size="7b"),
        data=DataConfig(path=("RLHF-V/*.parquet",), batch_size=32),
        optimizer=OptimizerConfig(learning_rate=5e-7, schedule="cosine", warmup=0.03, weight_decay=0.0, clip_norm=20.0),
        train=TrainConfig(epochs=3.0, accumulate=4),
        objective=dense_dpo(beta=0.1, edited=4.0),
    )
