"""The small world's runs: how its base model learns its habits, and how NaPO takes them away again.

They stand in the package, and not in configs/, so that the demo runs where only the package is installed.
"""

from pathlib import Path

from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.losses import sft_loss
from napo_jax.methods import napo
from napo_jax.objective import Objective
from napo_jax.optim import OptimizerConfig
from napo_jax.term import Term

BASE = Path(__file__).parent / "base"  # the base model and the pairs with its biased answers, as they are shipped
BETA = 1.0  # how far NaPO lets the model go; answers of five words tell less than those that 0.1 is the custom for
PAIRS, PAIRS_COUNT, PAIRS_SEED = "pairs.parquet", 4000, 1


def lessons() -> Config:
    """Returns how the base model is made: from nothing, on the answers of a biased teacher."""
    return Config(
        model=ModelConfig(size="shapes", dtype="float32", remat="none"),
        data=DataConfig(
            path=("shapes/lessons.parquet",), batch_size=64, max_tokens=256, buckets=6, attention_multiple=8
        ),
        # All of it trains: nothing was there before. Gradients are not clipped: batches are of like lengths, so that
        # those of long answers would shrink, and the model would learn to be brief.
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.05, weight_decay=0.01, trainable=r"(?!vision/unused).*"),
        train=TrainConfig(steps=4000, log_every=50, checkpoint_every=500),
        objective=Objective((Term("lessons", sft_loss, "chosen"),)),
    )


def cure() -> Config:
    """Returns NaPO on the base model."""
    return Config(
        model=ModelConfig(path=str(BASE), dtype="float32", remat="none"),
        data=DataConfig(
            path=(str(BASE / PAIRS),), batch_size=32, max_tokens=256, buckets=2, attention_multiple=8, held_out=64
        ),
        optimizer=OptimizerConfig(learning_rate=2e-4, schedule="cosine", warmup=0.1, weight_decay=0.01),
        train=TrainConfig(steps=120, log_every=5, evaluate_every=30, checkpoint_every=120),
        # Equal weights. Dynamic ones follow the margins, and descriptions are so easily told from short answers here
        # that their pair would take three quarters of it, and the preference, which keeps what was right, a sixth.
        objective=napo(beta=BETA, weight=1.0),
    )
