"""A reward model on LLaVA-1.5-7B, as LLaVA-RLHF trains one: a number for each answer, adapters and a head.

The paper's is of 13B (`--model.path llava-v1.5-13b --model.size 13b`) and stops at step 200. Its adapters' alpha is not
in the numbers at hand: it is the default here.
"""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.methods import reward
from napo_jax.models.lora import LoraConfig
from napo_jax.optim import OptimizerConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(path="llava-v1.5-7b", size="7b"),
        data=DataConfig(path=("pairs/*.parquet",), batch_size=32),
        lora=LoraConfig(rank=64),
        optimizer=OptimizerConfig(learning_rate=2e-5, schedule="constant", warmup=0.03, weight_decay=0.0),
        train=TrainConfig(epochs=1.0, accumulate=4),
        objective=reward(centring_weight=1e-3),
    )
