"""Where answers look: the attention that their tokens pay to each token of their prefix, in every layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from napo_jax.models.attention import attend
from napo_jax.models.layout import Layout
from napo_jax.models.llava import check_groups
from napo_jax.models.mixing import Mix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Looking(Mix):
    """Every stream of a layout over what it may see; what is kept is where answers look."""

    prefix_lengths: jax.Array  # int32[B, M]
    answer_lengths: jax.Array  # int32[B, C]
    words: jax.Array  # float32[B, C, K, T], for each of K words its share in each answer token
    layout: Layout = dataclasses.field(metadata={"static": True})
    backend: str = dataclasses.field(metadata={"static": True})

    def __call__(self, q, k, v, kept):
        """Maps q float[B, S, H, K] and k, v float[B, S, G, K] to (float[B, S, H, K], float32[B, C, words, P])."""
        del kept
        out = attend(q, k, v, self.layout, self.prefix_lengths, self.answer_lengths, self.backend)
        return out, self._attention(q, k)

    def _attention(self, q, k):
        """Returns the attention of each word to each token of the prefix, its mean over heads."""
        layout = self.layout
        _, queries = layout.split(q)
        prefix, own = layout.split(k)
        queries = queries.reshape(*queries.shape[:3], k.shape[2], -1, q.shape[-1])
        queries = queries * np.float32(q.shape[-1] ** -0.5).astype(q.dtype)
        product = lambda keys: jnp.einsum("bctgrk,bcsgk->bctgrs", queries, keys, preferred_element_type=jnp.float32)
        there = jnp.arange(layout.prefix_tokens)[None, None] < layout.of_cells(self.prefix_lengths)[..., None]
        on_prefix = jnp.where(there[:, :, None, None, None], product(layout.of_cells(prefix)), -jnp.inf)
        causal = np.tri(layout.answer_tokens, dtype=bool)
        on_own = jnp.where(causal[None, None, :, None, None], product(own), -jnp.inf)
        weights = jax.nn.softmax(jnp.concatenate([on_prefix, on_own], axis=-1), axis=-1)
        weights = weights[..., : layout.prefix_tokens].mean(axis=(3, 4))  # [B, C, T, P]
        return jnp.einsum("bcwt,bctp->bcwp", self.words, weights)


def looks(model, params, groups, cell_image, words=None):
    """Computes where answers look.

    Args:
      model: `Llava`.
      params: its parameters.
      groups: `Groups`; an answer's tokens are those whose attention counts, so that </s> is left out of its length.
      cell_image: for each of the C cells, the index of the prefix that it continues.
      words: float32[B, C, K, T], for each of K words its share in each answer token, which add up to one; None: the
        whole answer as one.

    Returns:
      float32[L, B, C, K, P]: the attention of each layer to each token of the prefix, its mean over heads and over a
      word's tokens; without `words` float32[L, B, C, P]. What is missing to 1 went to the answer itself.
    """
    check_groups(groups, cell_image, model.config)
    if words is not None:
        return model._apply(params, *groups[:5], words, cell_image, method=_looks)
    said = jnp.arange(groups.answer_ids.shape[2])[None, None] < groups.answer_lengths[..., None]
    whole = said.astype(jnp.float32) / jnp.maximum(groups.answer_lengths, 1)[..., None].astype(jnp.float32)
    return model._apply(params, *groups[:5], whole[:, :, None], cell_image, method=_looks)[:, :, :, 0]


def _looks(network, images, prefix_ids, prefix_lengths, answer_ids, answer_lengths, words, cell_image):
    layout = Layout(prefix_ids.shape[2], answer_ids.shape[2], prefix_ids.shape[1], cell_image)
    network._check_positions(layout.prefix_tokens + layout.answer_tokens)
    prefix = network._embed_prefixes(images, prefix_ids, prefix_lengths)
    embeddings = layout.join(prefix, network.language.embed(answer_ids))
    mix = Looking(prefix_lengths, answer_lengths, words, layout, network.config.attention)
    with jax.named_scope("language"):
        return network.language(embeddings, layout.positions(prefix_lengths), mix)[1]
