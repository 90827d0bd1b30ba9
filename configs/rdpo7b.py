"""Re-Align's rDPO on LLaVA-1.5-7B: text, and the picture over a retrieved one.

The projector stays as it is; the published training moves it too, at a learning rate of its own.
"""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.methods import rdpo
from napo_jax.models.lora import LoraConfig
from napo_jax.optim import OptimizerConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(path="llava-v1.5-7b", size="7b"),
        data=DataConfig(path=("Re-Align/*.parquet",), batch_size=32),
        lora=LoraConfig(rank=128, alpha=256.0, dropout=0.05, targets=("query", "key", "value", "out")),
        # The script's learning rate; the paper's table has ten times as much.
        optimizer=OptimizerConfig(learning_rate=1e-6, schedule="cosine", warmup=0.03, weight_decay=0.0),
        train=TrainConfig(epochs=1.0, accumulate=8, reference="adapters_off"),
        objective=rdpo(beta=0.1),
    )
