"""Low-rank adapters beside the decoder's matrices: y = x W + (alpha / rank) dropout(x) A B."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

TARGETS = ("query", "key", "value", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which matrices of the decoder get adapters, and of which kind."""

    # Rank of the adapters; 0: there are none, and whole matrices train.
    rank: int = 0
    # What the adapters add is scaled by alpha / rank.
    alpha: float = 16.0
    # The share of an adapter's inputs that are dropped in training.
    dropout: float = 0.0
    # The matrices: query, key, value and out of the attention, gate, up and down of the MLP.
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        """Checks the numbers and the names."""
        if self.rank < 0 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "lora: rank must not be negative, alpha positive and dropout in [0, 1), got "
                f"{self.rank}, {self.alpha} and {self.dropout}"
            )
        if unknown := sorted(set(self.targets) - set(TARGETS)):
            raise ValueError(f"lora.targets {unknown} are no matrices of the decoder; those are {', '.join(TARGETS)}")
        if self.rank and not self.targets:
            raise ValueError("lora.targets is empty: name a matrix, or set lora.rank to 0")


class Linear(nn.Module):
    """A matrix product without bias, with an adapter where the config has one for its name."""

    features: int
    lora: LoraConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps float[..., D] to float[..., features]."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype)
        lora = self.lora
        if not lora.rank or self.name not in lora.targets:
            return y
        # As in the LoRA paper, one factor begins at 0: the model begins as it was.
        down = self.param("lora_a", nn.initializers.he_uniform(), (shape[0], lora.rank), self.param_dtype)
        up = self.param("lora_b", nn.initializers.zeros, (lora.rank, shape[1]), self.param_dtype)
        x = nn.Dropout(lora.dropout, deterministic=not self.has_rng("dropout"))(x)
        return y + (x @ down.astype(self.dtype)) @ up.astype(self.dtype) * jnp.asarray(
            lora.alpha / lora.rank, self.dtype
        )


def merge_adapters(leaves, lora: LoraConfig):
    """Adds adapters to their matrices.

    Args:
      leaves: {path: leaf}.
      lora: what they were trained with.

    Returns:
      {path: leaf} without adapters.
    """
    merged = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
    for path in leaves:
        if path.endswith("/lora_a"):
            module, matrix = path.removesuffix("/lora_a"), path.removesuffix("lora_a") + "kernel"
            down, up = (leaves[f"{module}/{name}"].astype(jnp.float32) for name in ("lora_a", "lora_b"))
            change = lora.alpha / lora.rank * (down @ up)
            merged[matrix] = (merged[matrix].astype(jnp.float32) + change).astype(merged[matrix].dtype)
    return merged


def is_adapter(path) -> bool:
    """Tells whether a leaf belongs to an adapter."""
    return path.endswith(("/lora_a", "/lora_b"))
