"""Low-rank adapters beside the decoder's matrices: y = x W + (alpha / rank) dropout(x) A B."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

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
        if type(self.rank) is not int or self.rank < 0 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "lora: rank must be a whole number and not negative, alpha positive and dropout in [0, 1), got "
                f"{self.rank}, {self.alpha} and {self.dropout}"
            )
        if isinstance(self.targets, str):
            raise ValueError(f"lora.targets must be several names, got {self.targets!r}")
        if unknown := sorted(set(self.targets) - set(TARGETS)):
            raise ValueError(f"lora.targets {unknown} are no matrices of the decoder; those are {', '.join(TARGETS)}")
        if self.rank and not self.targets:
            raise ValueError("lora.targets is empty: name a matrix, or set lora.rank to 0")

    @property
    def scale(self) -> float:
        """The factor on what the adapters add."""
        return self.alpha / self.rank


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
        x, lora = x.astype(self.dtype), self.lora
        y = x @ kernel.astype(self.dtype)
        if lora.rank and self.name in lora.targets:
            # As PEFT draws them: A uniform within 1 / sqrt(D) and B 0, so that the model begins as it was.
            uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            a = self.param("lora_a", uniform, (shape[0], lora.rank), self.param_dtype)
            b = self.param("lora_b", nn.initializers.zeros, (lora.rank, shape[1]), self.param_dtype)
            x = nn.Dropout(lora.dropout, deterministic=not self.has_rng("dropout"))(x)
            # Two thin products: neither A B nor a gradient of its size is ever there.
            thin = x @ a.astype(self.dtype) * lora.scale
            y += thin @ b.astype(self.dtype)
        return checkpoint_name(y, self.name)  # adapter and all, for what decides which products are stored


def merge_adapters(leaves, lora: LoraConfig):
    """Adds adapters to their matrices, and takes them out.

    In the dict itself, one matrix after the other: there is no room for a second decoder.

    Args:
      leaves: {path: leaf}, of which the adapters and their matrices change. A matrix keeps its dtype and its place.
      lora: what the adapters were trained with.
    """
    for path in [path for path in leaves if path.endswith("/lora_a")]:
        module = path.removesuffix("/lora_a")
        kernel, a, b = (leaves.pop(f"{module}/{name}") for name in ("kernel", "lora_a", "lora_b"))
        add = jax.jit(_add_product, out_shardings=kernel.sharding)
        leaves[f"{module}/kernel"] = add(kernel, a, b, lora.scale)


def _add_product(kernel, a, b, scale):
    """Maps W [L, D, F], A [L, D, rank] and B [L, rank, F] to W + scale A B, a layer at a time in float32."""

    def one(layer):
        w, a, b = (leaf.astype(jnp.float32) for leaf in layer)
        # "highest": TPUs and GPUs would round the factors otherwise.
        return (w + scale * jnp.matmul(a, b, precision="highest")).astype(kernel.dtype)

    return jax.lax.map(one, (kernel, a, b))


def is_adapter(path) -> bool:
    """Tells whether a leaf belongs to an adapter."""
    return path.endswith(("/lora_a", "/lora_b"))
