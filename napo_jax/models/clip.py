"""The CLIP vision tower of LLaVA: features of the layer before the last."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from napo_jax.sharding import keep_rows


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


class LayerNorm(nn.Module):
    """Layer norm with float32 statistics, the variance from the centred values."""

    eps: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps float[B, N, D] to the same."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        wide = wide * scale.astype(jnp.float32)[None, None] + bias.astype(jnp.float32)[None, None]
        return wide.astype(self.dtype)


class ClipLayer(nn.Module):
    """A pre-norm transformer layer with the quick GELU; every token sees all others, or those before it alone."""

    config: ClipConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    causal: bool = False

    @nn.compact
    def __call__(self, x):
        """Maps float[B, N + 1, D] to the same."""
        config, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        split = lambda y: y.reshape(*y.shape[:2], config.heads, config.width // config.heads)
        h = LayerNorm(config.norm_eps, **types, name="attention_norm")(x)
        q, k, v = (split(nn.Dense(config.width, **types, name=name)(h)) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqhk,bshk->bhqs", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
        if self.causal:
            places = jnp.arange(x.shape[1])
            scores = jnp.where(places[None, None, :, None] >= places[None, None, None], scores, -jnp.inf)
        p = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        h = jnp.einsum("bhqs,bshk->bqhk", p, v).reshape(x.shape)
        x = x + nn.Dense(config.width, **types, name="out")(h)
        h = LayerNorm(config.norm_eps, **types, name="mlp_norm")(x)
        h = nn.Dense(config.mlp_width, **types, name="up")(h)
        return keep_rows(x + nn.Dense(config.width, **types, name="down")(h * jax.nn.sigmoid(1.702 * h)))


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
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        side = config.image_size // size
        if images.shape[1:] != (config.image_size, config.image_size, 3):
            expected = ("B", config.image_size, config.image_size, 3)
            raise ValueError(f"images have shape {images.shape}, expected {expected}")
        patches = images.reshape(-1, side, size, side, size, 3).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(-1, side * side, size * size * 3).astype(self.dtype)
        x = nn.Dense(config.width, use_bias=False, **types, name="patch")(patches)
        normal = nn.initializers.normal(0.02)
        first = self.param("class_embedding", normal, (config.width,), self.param_dtype).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, config.width)), x], axis=1)
        position = self.param("position_embedding", normal, (config.image_tokens + 1, config.width), self.param_dtype)
        x = keep_rows(LayerNorm(config.norm_eps, **types, name="pre_norm")(x + position.astype(self.dtype)[None]))
        x, _ = nn.scan(
            lambda layer, carry, _: (layer(carry), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.layers - 1,
        )(ClipLayer(config, **types, name="layers"), x, None)
        if self.is_initializing():
            _Unused(config, **types, name="unused")(x)
        return x[:, 1:]


class _Unused(nn.Module):
    config: ClipConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = ClipLayer(self.config, **types, name="layer")(x)
        return LayerNorm(self.config.norm_eps, **types, name="post_norm")(x)
