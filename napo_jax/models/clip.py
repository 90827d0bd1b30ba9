"""The CLIP vision tower of LLaVA: features of the layer before the last."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Shape of the tower; the defaults are ViT-L/14 at 336 pixels."""

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    mlp_width: int = 4096
    layers: int = 24
    heads: int = 16
    norm_eps: float = 1e-5

    @property
    def image_tokens(self) -> int:
        """The number of patches, N: 576 for the default."""
        return (self.image_size // self.patch_size) ** 2


def _norm(config, name, dtype, param_dtype):
    return nn.LayerNorm(epsilon=config.norm_eps, dtype=dtype, param_dtype=param_dtype, name=name)


class ClipLayer(nn.Module):
    """A pre-norm transformer layer with full attention and the quick GELU."""

    config: ClipConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps float[B, N + 1, D] to the same."""
        config = self.config
        dense = lambda width, name: nn.Dense(width, dtype=self.dtype, param_dtype=self.param_dtype, name=name)  # noqa: E731
        h = _norm(config, "attention_norm", self.dtype, self.param_dtype)(x)
        split = lambda y: y.reshape(*y.shape[:2], config.heads, config.width // config.heads)  # noqa: E731
        q, k, v = (split(dense(config.width, name)(h)) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqhk,bshk->bhqs", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
        p = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        x = x + dense(config.width, "out")(jnp.einsum("bhqs,bshk->bqhk", p, v).reshape(x.shape))
        h = _norm(config, "mlp_norm", self.dtype, self.param_dtype)(x)
        h = dense(config.mlp_width, "up")(h)
        return x + dense(config.width, "down")(h * jax.nn.sigmoid(1.702 * h))


class ClipTower(nn.Module):
    """Patches, class token and all layers but the last.

    The last layer and the norm after it never touch the features. Their weights sit in every CLIP checkpoint, so they
    are parameters here too, under `unused`, and an export has them as they were.
    """

    config: ClipConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images):
        """Maps normalised images float32[B, I, I, 3] to features float[B, N, D]."""
        config, size = self.config, self.config.patch_size
        side = config.image_size // size
        if images.shape[1:] != (config.image_size, config.image_size, 3):
            raise ValueError(
                f"images have shape {images.shape}, expected [B, {config.image_size}, {config.image_size}, 3]"
            )
        patches = images.reshape(-1, side, size, side, size, 3).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(-1, side * side, size * size * 3).astype(self.dtype)
        normal = nn.initializers.normal(0.02)
        x = nn.Dense(config.width, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype, name="patch")(
            patches
        )
        first = self.param("class_embedding", normal, (config.width,), self.param_dtype).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, config.width)), x], axis=1)
        position = self.param("position_embedding", normal, (config.image_tokens + 1, config.width), self.param_dtype)
        x = x + position.astype(self.dtype)[None]
        x = _norm(config, "pre_norm", self.dtype, self.param_dtype)(x)
        layer = (config, self.dtype, self.param_dtype)
        x, _ = nn.scan(
            lambda module, carry, _: (module(carry), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.layers - 1,
        )(ClipLayer(*layer, name="layers"), x, None)
        if self.is_initializing():
            _Unused(*layer, name="unused")(x)
        return x[:, 1:]


class _Unused(nn.Module):
    config: ClipConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        x = ClipLayer(self.config, self.dtype, self.param_dtype, name="layer")(x)
        return _norm(self.config, "post_norm", self.dtype, self.param_dtype)(x)
