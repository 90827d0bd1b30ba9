"""NaPO on LLaVA-1.5-7B with low-rank adapters on all matrices of the decoder; a single device of 40 GB is enough.

The reference is the same model with its adapters off. To train the projector in full beside them:
`--optimizer.trainable '.*/lora_[ab]|projector/.*'`.
"""

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.methods import napo
from napo_jax.models.lora import LoraConfig
from napo_jax.optim import OptimizerConfig


def get_config():
    """Returns the config."""
    return Config(
        model=ModelConfig(path="llava-v1.5-7b", size="7b"),
        data=DataConfig(path=("RLAIF-V-Bias/*.parquet",), batch_size=32),
        # The adapters of mDPO's published training, and its learning rate: NaPO's is for whole matrices.
        lora=LoraConfig(rank=64, alpha=128.0, dropout=0.05),
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup=0.1, weight_decay=0.01),
        train=TrainConfig(epochs=4.0, accumulate=8, reference="adapters_off"),
        objective=napo(beta=0.1),
    )
