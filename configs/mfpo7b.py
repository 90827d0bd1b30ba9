"""MFPO on LLaVA-1.5-7B: text, picture and margin, over noise in key regions. `build_regions` marks them.

Its numbers are not published: these are those of mDPO, whose losses it has.
"""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.methods import mfpo
from napo_jax.models.lora import LoraConfig
from napo_jax.optim import OptimizerConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(path="llava-v1.5-7b", size="7b"),
        data=DataConfig(path=("RLHF-V-Regions/*.parquet",), batch_size=32),
        # mDPO's, as published for Bunny-3B: adapters of rank 64 on all matrices of the decoder.
        lora=LoraConfig(rank=64, alpha=128.0, dropout=0.05),
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup=0.1, weight_decay=0.05, b2=0.98),
        train=TrainConfig(epochs=3.0, accumulate=8, reference="adapters_off"),
        objective=mfpo(beta=0.1),
    )
