"""MRPO on LLaVA-1.5-7B: DPO against two references. The numbers are those of the published script, for a text model."""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.methods import dpo
from napo_jax.mixed_reference import Mixing
from napo_jax.models.lora import LoraConfig
from napo_jax.optim import OptimizerConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(path="llava-v1.5-7b", size="7b"),
        data=DataConfig(path=("RLAIF-V/*.parquet",), batch_size=8),
        lora=LoraConfig(rank=64, alpha=128.0, dropout=0.05, targets=("query", "value")),
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup=0.1, weight_decay=0.0),
        train=TrainConfig(epochs=1.0, second=Mixing(path="llava-v1.6-vicuna-7b")),
        objective=dpo(beta=0.1),
    )
