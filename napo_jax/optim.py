"""AdamW on the leaves that train: schedule, decay, clipping."""

import dataclasses
import re
from typing import Literal

import jax.numpy as jnp
import optax
from flax import traverse_util

from napo_jax.factored import scale_by_factored_adam
from napo_jax.fields import check_fields
from napo_jax.models.lora import is_adapter
from napo_jax.reward_head import is_reward_head


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How the trained leaves move."""

    # At its peak.
    learning_rate: float = 5e-7
    # After the warmup: "cosine" or "linear" down to 0 at the last step, or "constant".
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    # The share of all steps in which the learning rate rises from 0.
    warmup: float = 0.1
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    # The largest norm of a step's gradient; None: any, as in the published training. A batch's groups are of like
    # lengths: a loss that sums over tokens has larger gradients where answers are long, and clipping weakens those.
    clip_norm: float | None = None
    # Which leaves train: a regular expression on paths such as language/layers/mlp/up/kernel. None: the decoder and the
    # projector, or, with LoRA, the adapters alone; and a reward head.
    trainable: str | None = None
    # Which of them the weight decay leaves alone.
    no_decay: str = r".*/(scale|bias)"
    # Type of the trained parameters that the optimizer holds. With bfloat16, small steps are lost in rounding.
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    # Type of AdamW's first moment; the second is float32 always.
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    # The second moment: "full", a number for each parameter, or "factored", for each row and each column of a matrix.
    second_moment: Literal["full", "factored"] = "full"

    def __post_init__(self):
        """Checks the fields' types and choices, and the numbers."""
        check_fields(self, "optimizer")
        if self.learning_rate <= 0 or not 0 <= self.warmup < 1 or self.weight_decay < 0:
            raise ValueError(
                "optimizer: learning_rate must be positive, warmup in [0, 1) and weight_decay not negative, got "
                f"{self.learning_rate}, {self.warmup} and {self.weight_decay}"
            )
        for name in ("trainable", "no_decay"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                raise ValueError(f"optimizer.{name} is no regular expression: {error}") from None


def flatten(params):
    """Turns a tree of parameters into {path: leaf}, paths joined by slashes."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(*parts):
    """Turns {path: leaf} dicts, taken together, into the tree."""
    return traverse_util.unflatten_dict({path: leaf for part in parts for path, leaf in part.items()}, sep="/")


def split_trained(leaves, config: OptimizerConfig):
    """Splits {path: leaf} into those that train and those that do not.

    Raises if none trains, if an adapter or a reward head does not, or if the matrix beside an adapter does too.
    """
    adapters, head = [path for path in leaves if is_adapter(path)], [path for path in leaves if is_reward_head(path)]
    rule = config.trainable or (r".*/lora_[ab]" if adapters else r"(language|projector)/.*")
    if head and config.trainable is None:
        # Rewards go through no vocabulary: its projection would do nothing but decay.
        rule = rf"(?!language/head$)({rule})|reward/.*"
    trained = {path: leaf for path, leaf in leaves.items() if re.fullmatch(rule, path)}
    if not trained:
        raise ValueError(f"optimizer.trainable {rule!r} matches no leaf, such as {next(iter(leaves))}")
    if left_out := [path for path in head if path not in trained]:
        raise ValueError(f"optimizer.trainable {rule!r} leaves out {left_out[0]}: add |reward/.* to train the head")
    for path in adapters:
        if path not in trained:
            raise ValueError(f"optimizer.trainable {rule!r} leaves out {path}: both factors of an adapter train")
        if (matrix := path.rpartition("/")[0] + "/kernel") in trained:
            raise ValueError(f"optimizer.trainable {rule!r} trains {matrix} beside its adapter: train one of them")
    return trained, {path: leaf for path, leaf in leaves.items() if path not in trained}


def learning_rates(config: OptimizerConfig, steps: int):
    """Returns the schedule: a step's number, from 0, to its learning rate. The first of a warmup is 0."""
    peak, warmup = config.learning_rate, round(config.warmup * steps)
    rise = optax.linear_schedule(0.0, peak, max(warmup, 1))
    fall = {
        "cosine": optax.cosine_decay_schedule(peak, max(steps - warmup, 1)),
        "linear": optax.linear_schedule(peak, 0.0, max(steps - warmup, 1)),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    return optax.join_schedules([rise, fall], [warmup]) if warmup else fall


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns AdamW for {path: leaf} trees of trained parameters."""
    decays = lambda params: {path: not re.fullmatch(config.no_decay, path) for path in params}
    moments = {"b1": config.b1, "b2": config.b2, "eps": config.eps, "mu_dtype": jnp.dtype(config.moment_dtype)}
    scale = {"full": optax.scale_by_adam, "factored": scale_by_factored_adam}[config.second_moment]
    adamw = optax.chain(
        scale(**moments),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(learning_rates(config, steps)),
    )
    if config.clip_norm is not None:
        adamw = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    # A second moment of bfloat16 would stand still: a step changes it by less than the last bit.
    wide = lambda leaves: {path: leaf.astype(jnp.float32) for path, leaf in leaves.items()}
    return optax.GradientTransformation(
        lambda params: adamw.init(wide(params)),
        lambda gradients, state, params: adamw.update(wide(gradients), state, wide(params)),
    )
