"""MIA-DPO on LLaVA-1.5-7B: DPO with up to five pictures. The numbers are those of the published script."""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.methods import mia_dpo
from napo_jax.models.lora import LoraConfig
from napo_jax.optim import OptimizerConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(path="llava-v1.5-7b", size="7b"),
        data=DataConfig(path=("composed/*.parquet",), batch_size=64, pictures=5, max_tokens=4096),
        lora=LoraConfig(rank=128, alpha=256.0),
        optimizer=OptimizerConfig(learning_rate=5e-5, schedule="linear", warmup=0.1, weight_decay=0.0),
        train=TrainConfig(epochs=1.0, accumulate=8, reference="adapters_off"),
        objective=mia_dpo(beta=0.1),
    )
