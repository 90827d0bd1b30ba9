"""CLIP-DPO on LLaVA-1.5-7B: DPO over drawn answers, ranked by CLIP. `build_difficulty` draws, `build_ranked` ranks.

Its numbers are not published: these are those of DPO beside NaPO.
"""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.methods import dpo
from napo_jax.optim import OptimizerConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(path="llava-v1.5-7b", size="7b"),
        data=DataConfig(
            path=("Ranked/*.parquet",), columns={"chosen": "fits", "rejected": "fits_least"}, batch_size=32
        ),
        optimizer=OptimizerConfig(learning_rate=5e-7, schedule="cosine", warmup=0.1, weight_decay=0.01),
        train=TrainConfig(epochs=1.0, accumulate=4),
        objective=dpo(beta=0.1),
    )
