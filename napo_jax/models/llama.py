"""The Llama decoder over the streams of a `Layout`."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from napo_jax.models.layout import rope_tables, rotate
from napo_jax.models.lora import TARGETS, Linear, LoraConfig
from napo_jax.sharding import gather_whole, keep_rows

# What the backward pass finds stored of each layer; the rest is computed again.
REMAT_POLICIES = {
    "none": None,  # everything is stored
    "dots": jax.checkpoint_policies.save_only_these_names(*TARGETS),  # results of matrix products with weights
    "mlp": jax.checkpoint_policies.save_only_these_names("gate", "up"),  # those of the two largest
    "full": jax.checkpoint_policies.nothing_saveable,  # the layer's input alone
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of the decoder; the defaults are Vicuna 7B v1.5."""

    vocab_size: int = 32000
    width: int = 4096
    mlp_width: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_positions: int = 4096

    def __post_init__(self):
        """Checks that heads divide."""
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"width {self.width}, heads {self.heads} and kv_heads {self.kv_heads} must divide in turn")

    @property
    def head_width(self) -> int:
        """The width of one head, K."""
        return self.width // self.heads


class RmsNorm(nn.Module):
    """Root-mean-square norm with float32 statistics."""

    eps: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps float[B, S, D] to the same."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(self.dtype) * scale.astype(self.dtype)[None, None]


class Attention(nn.Module):
    """Rotary self-attention; who sees whom is for `mix` to say, see `napo_jax.models.mixing`."""

    config: LlamaConfig
    lora: LoraConfig = LoraConfig()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, tables, mix, kept=None):
        """Maps float[B, S, D] to the same of those that ask, and returns what `mix` makes of what was kept."""
        config = self.config

        def project(tokens, heads, name):
            width = heads * config.head_width
            y = Linear(width, self.lora, self.dtype, self.param_dtype, name=name)(tokens)
            return y.reshape(*tokens.shape[:2], heads, config.head_width)

        asking = mix.asking(x)
        q = rotate(project(asking, config.heads, "query"), [mix.asking(table) for table in tables])
        k, v = rotate(project(x, config.kv_heads, "key"), tables), project(x, config.kv_heads, "value")
        out, kept = mix(q, k, v, kept)
        dense = Linear(config.width, self.lora, self.dtype, self.param_dtype, name="out")
        return dense(out.reshape(asking.shape)), kept


class Mlp(nn.Module):
    """The gated SiLU layer."""

    config: LlamaConfig
    lora: LoraConfig = LoraConfig()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps float[B, S, D] to the same."""
        dense = lambda width, name: Linear(width, self.lora, self.dtype, self.param_dtype, name=name)
        gate, up = dense(self.config.mlp_width, "gate")(x), dense(self.config.mlp_width, "up")(x)
        return dense(self.config.width, "down")(nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and around a residual."""

    config: LlamaConfig
    lora: LoraConfig = LoraConfig()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, tables, mix, kept=None):
        """Maps float[B, S, D] to the same of those that ask, and what was kept to what is kept then."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = RmsNorm(self.config.norm_eps, **types, name="attention_norm")(x)
        h, kept = Attention(self.config, self.lora, **types, name="attention")(h, tables, mix, kept)
        x = mix.asking(x) + h
        h = RmsNorm(self.config.norm_eps, **types, name="mlp_norm")(x)
        return keep_rows(x + Mlp(self.config, self.lora, **types, name="mlp")(h)), kept


class Llama(nn.Module):
    """The decoder from embeddings to normed hidden states, with the embedding and the head beside it."""

    config: LlamaConfig
    lora: LoraConfig = LoraConfig()
    remat: str = "full"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        """Declares the parameters."""
        config, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        normal = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", normal, (config.vocab_size, config.width), self.param_dtype)
        self.head = self.param("head", normal, (config.width, config.vocab_size), self.param_dtype)
        layer = DecoderLayer
        if REMAT_POLICIES[self.remat] is not None:
            # Scan itself keeps the recomputation apart from the forward pass, so no barrier is needed for that.
            layer = nn.remat(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=config.layers,
        )(config, self.lora, **types)
        self.norm = RmsNorm(config.norm_eps, **types)

    def embed(self, ids):
        """Looks up int32[...] as float[..., D]."""
        return keep_rows(gather_whole(self.embedding.astype(self.dtype))[ids])

    def __call__(self, embeddings, positions, mix, kept=None):
        """Runs all layers and the norm.

        Args:
          embeddings: float[B, S, D].
          positions: int32[B, S].
          mix: how tokens see each other; see `napo_jax.models.mixing`.
          kept: what `mix` reads, layers in front; or a list of it by layer, with parameters that are `layers_apart`; or
            None.

        Returns:
          hidden states float[B, S, D], with parameters that are apart only those that `mix.in_last_layer` asks for; and
          what `mix` keeps, layers in front or by layer.
        """
        tables = rope_tables(positions, self.config.head_width, self.config.rope_theta)
        apart = self.get_variable("params", "layers")
        run = partial(self._layers_apart, apart) if isinstance(apart, tuple) else self.layers
        x, kept = run(keep_rows(embeddings), tables, mix, kept)
        return keep_rows(self.norm(x)), kept

    def _layers_apart(self, layers, x, tables, mix, kept):
        """Runs the layers with parameters, and what was kept, of a layer each; see `layers_apart`."""
        layer = DecoderLayer(self.config, self.lora, self.dtype, self.param_dtype, parent=None)
        if kept is not None and not isinstance(kept, list):
            raise ValueError("with parameters that are apart, what is kept must be a list of it by layer")
        mixes = [mix] * (len(layers) - 1) + [mix.in_last_layer]
        after = []
        for params, mix_of_layer, of_layer in zip(layers, mixes, kept or [None] * len(layers), strict=True):
            x, of_layer = layer.apply({"params": params}, x, tables, mix_of_layer, of_layer)
            after.append(of_layer)
        return x, after

    def logits(self, hidden):
        """Maps float[..., D] to float32[..., V]."""
        return jnp.matmul(hidden, self.head.astype(self.dtype), preferred_element_type=jnp.float32)
