"""NaPO on LLaVA-1.5-13B, as the paper trains it: one epoch."""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.methods import napo
from napo_jax.optim import OptimizerConfig
from napo_jax.sharding import MeshConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(path="llava-v1.5-13b", size="13b"),
        data=DataConfig(path=("RLAIF-V-Bias/*.parquet",), batch_size=32),
        optimizer=OptimizerConfig(learning_rate=5e-7, schedule="cosine", warmup=0.1, weight_decay=0.01),
        # 32 groups on 64 chips: two of them share a row.
        mesh=MeshConfig(fsdp=-1, tensor=2),
        train=TrainConfig(epochs=1.0),
        objective=napo(beta=0.1),
    )
