"""The modules of LLaVA-1.5: CLIP features through a projector into the decoder's stream."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from napo_jax.models.attention import BACKENDS
from napo_jax.models.clip import ClipConfig, ClipTower
from napo_jax.models.layout import Layout
from napo_jax.models.llama import REMAT_POLICIES, Llama, LlamaConfig
from napo_jax.models.lora import LoraConfig
from napo_jax.models.mixing import Prompts, WholeGroups
from napo_jax.sharding import keep_rows

# Stands in token ids for one image token each; a picture takes `ClipConfig.image_tokens` of them.
IMAGE_SLOT = -200


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """Shape of the model and how to compute it."""

    text: LlamaConfig = dataclasses.field(default_factory=LlamaConfig)
    vision: ClipConfig = dataclasses.field(default_factory=ClipConfig)
    # Type of activations and matrix products. Softmax, norm statistics, logits and log-probs are float32 always.
    dtype: Any = jnp.float32
    # Type of the parameters.
    param_dtype: Any = jnp.float32
    # "auto", "xla", "cudnn" (NVIDIA GPU) or "splash" (TPU); see `napo_jax.models.attention`.
    attention: str = "auto"
    # What the decoder stores for the backward pass: "none" recomputes nothing, "dots" a little, "full" each layer.
    remat: str = "full"
    # Answer tokens whose logits are held at a time.
    logits_chunk: int = 64
    # Whether the vision tower is left out of the gradient, as LLaVA-1.5 and NaPO have it.
    freeze_vision: bool = True
    # Low-rank adapters in the decoder.
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    # Whether a reward head stands beside the vocabulary's: from an answer's last hidden state to a number.
    reward_head: bool = False

    def __post_init__(self):
        """Checks the names and the chunk."""
        if self.logits_chunk < 1:
            raise ValueError(f"logits_chunk must be at least 1, got {self.logits_chunk}")
        if self.attention not in BACKENDS:
            raise ValueError(f"attention must be one of {BACKENDS}, got {self.attention!r}")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat must be one of {tuple(REMAT_POLICIES)}, got {self.remat!r}")

    @classmethod
    def llava7b(cls, **options):
        """Returns LLaVA-1.5-7B."""
        return cls(**options)

    @classmethod
    def llava13b(cls, **options):
        """Returns LLaVA-1.5-13B."""
        return cls(text=LlamaConfig(width=5120, mlp_width=13824, layers=40, heads=40, kv_heads=40), **options)

    @classmethod
    def tiny(cls, **options):
        """Returns a model of the same kind that trains on a laptop: 16 image tokens, about 0.2M parameters."""
        text = LlamaConfig(vocab_size=256, width=64, mlp_width=160, layers=2, heads=4, kv_heads=4, max_positions=512)
        vision = ClipConfig(image_size=32, patch_size=8, width=48, mlp_width=96, layers=3, heads=4)
        return cls(text=text, vision=vision, **options)


class Projector(nn.Module):
    """From the features of a picture's patches to the decoder's width."""

    width: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, features):
        """Maps float[..., N, W] to float[..., N, D]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = nn.gelu(nn.Dense(self.width, **types, name="up")(features), approximate=False)
        return nn.Dense(self.width, **types, name="down")(h)


class Network(nn.Module):
    """The modules and their names in the parameter tree; `Llava` has the functions that others call."""

    config: LlavaConfig

    def setup(self):
        """Names the modules."""
        config, types = self.config, {"dtype": self.config.dtype, "param_dtype": self.config.param_dtype}
        self.vision = ClipTower(config.vision, **types)
        self.projector = Projector(config.text.width, **types)
        self.language = Llama(config.text, config.lora, config.remat, **types)

    def __call__(self, images, prefix_ids, prefix_lengths, answer_ids, answer_lengths, cell_image, gates=None):
        """Returns hidden states float[B, M, P, D] and float[B, C, T, D]."""
        layout = Layout(prefix_ids.shape[2], answer_ids.shape[2], prefix_ids.shape[1], cell_image)
        self._check_positions(layout.prefix_tokens + layout.answer_tokens)
        prefix = self._embed_prefixes(images, prefix_ids, prefix_lengths, gates)
        embeddings = layout.join(prefix, self.language.embed(answer_ids))
        mix = WholeGroups(prefix_lengths, answer_lengths, None, layout, self.config.attention)
        with jax.named_scope("language"):
            return layout.split(self.language(embeddings, layout.positions(prefix_lengths), mix)[0])

    def packed(self, images, prefix_ids, prefix_lengths, answer_ids, answer_lengths, order):
        """Returns hidden states float[B, U, D] in an order."""
        slots = prefix_ids == IMAGE_SLOT
        features, whole = self._features(images, slots, prefix_lengths)
        features = jnp.where(whole[..., None, None], features, jnp.nan)
        ids = order.pack(order.layout.join(jnp.where(slots, 0, prefix_ids), answer_ids))
        embeddings = order.fill_slots(self.language.embed(ids), features, slots)
        # Lengths are held against the order, and not the places that attention has for them.
        positions = order.pack(order.layout.positions(prefix_lengths))
        mix = WholeGroups(prefix_lengths, answer_lengths, order, order.layout, self.config.attention)
        with jax.named_scope("language"):
            return self.language(embeddings, positions, mix)[0]

    def prompts(self, images, ids, lengths):
        """Returns the logits behind each prompt, float32[B, V], and what is kept of it."""
        self._check_positions(ids.shape[1])
        if images is None:
            slots = (ids == IMAGE_SLOT)[..., None]
            embeddings = jnp.where(slots, jnp.nan, self.language.embed(jnp.where(slots[..., 0], 0, ids)))
        else:
            embeddings = self._embed_prefixes(images[:, None], ids[:, None], lengths[:, None])[:, 0]
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        with jax.named_scope("language"):
            hidden, kept = self.language(embeddings, positions, Prompts(lengths, self.config.attention))
        alone = hidden.shape[1] == 1  # where there is that of the last token and no other
        last = jnp.zeros_like(lengths) if alone else lengths - 1
        last = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return self.language.logits(last), kept

    def next_token(self, ids, mix, kept):
        """Returns the logits behind a token of each beam, float32[S, N, V], and what `mix` keeps."""
        positions = jnp.broadcast_to((mix.prompt_lengths + mix.said)[:, None], ids.shape)
        hidden, kept = self.language(self.language.embed(ids), positions, mix, kept)
        return self.language.logits(hidden), kept

    def _check_positions(self, tokens):
        if tokens > self.config.text.max_positions:
            raise ValueError(f"{tokens} tokens exceed the model's {self.config.text.max_positions} positions")

    def _embed_prefixes(self, images, ids, lengths, gates=None):
        """Returns the embeddings of prefixes, float[B, M, P, D], image tokens in their slots."""
        slots = ids == IMAGE_SLOT
        features, whole = self._features(images, slots, lengths)
        if gates is not None:
            mean = jnp.mean(features, axis=2, keepdims=True)
            features = mean + gates[..., None].astype(features.dtype) * (features - mean)
        words = self.language.embed(jnp.where(slots, 0, ids))
        which = jnp.clip(jnp.cumsum(slots, axis=-1) - 1, 0, features.shape[2] - 1)  # image token that fills a slot
        pictures = jnp.take_along_axis(features, which[..., None], axis=2)
        pictures = jnp.where(whole[..., None, None], pictures, jnp.nan)
        return jnp.where(slots[..., None], pictures, words)

    def _features(self, images, slots, prefix_lengths):
        """Returns the image tokens of each prefix, float[B, M, N, D], and whether they have their slots, bool[B, M]."""
        with jax.named_scope("vision"):
            features = self.vision(images.reshape(-1, *images.shape[-3:]))
            if self.config.freeze_vision:
                features = jax.lax.stop_gradient(features)
        with jax.named_scope("projector"):
            features = self.projector(features)
            features = keep_rows(features.reshape(*slots.shape[:2], -1, features.shape[-1]))
        # A picture with some of its tokens cut off trains on in silence elsewhere. What is compiled cannot raise, so a
        # prefix whose slots are neither all nor none of a picture's tokens comes out as NaN.
        count = jnp.sum(slots & (jnp.arange(slots.shape[2])[None, None] < prefix_lengths[..., None]), axis=-1)
        each = self.config.vision.image_tokens
        if features.shape[2] == each:
            return features, (count == 0) | (count == each)
        return features, (count % each == 0) & (count <= features.shape[2])  # pictures at the end may have no slots
