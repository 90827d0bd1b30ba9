"""NaPO on LLaVA-1.5-7B as the published code runs it, which is not quite what the paper says."""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.methods import napo_released
from napo_jax.optim import OptimizerConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(path="llava-v1.5-7b", size="7b"),
        # Pictures are cropped to the centre in training, though the script asks for padding.
        data=DataConfig(path=("RLAIF-V-Bias/*.parquet",), batch_size=32, image_rule="crop"),
        optimizer=OptimizerConfig(learning_rate=5e-7, schedule="cosine", warmup=0.1, weight_decay=0.01),
        # 8 GPUs of one group, 4 times in a row: q is measured on 8 groups at a time.
        train=TrainConfig(epochs=4.0, accumulate=4),
        # q = 2 (1 - sigmoid(alpha margin)), the margin without beta; every term's weight is 1.
        objective=napo_released(beta=0.1),
    )
