"""POVID on LLaVA-1.5-7B: one sigmoid over an edited answer, and over what the model says to a noisy picture.

`build_bias --also noisy_image diffusion_pixels` makes the second one. The numbers are those of the published script but
for the batch, where it has one row, and the projector, which it moves too, at a learning rate of its own.
"""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.methods import povid
from napo_jax.models.lora import LoraConfig
from napo_jax.optim import OptimizerConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(path="llava-v1.5-7b", size="7b"),
        data=DataConfig(path=("POVID-Noisy/*.parquet",), columns={"noisy_image": "noisy_image"}, batch_size=16),
        lora=LoraConfig(rank=128, alpha=256.0, dropout=0.05),
        optimizer=OptimizerConfig(learning_rate=1e-7, schedule="cosine", warmup=0.03, weight_decay=0.0),
        train=TrainConfig(epochs=1.0, accumulate=2, reference="adapters_off"),
        objective=povid(beta=0.1),
    )
