"""Attention over the streams of a `Layout`: one function, three backends, the same numbers.

* "xla": plain matrix products, any device and shape. Scores of an answer against its prefix and against itself are two
  products and one softmax, so prefix keys are never copied per cell.
* "cudnn": flash attention on an NVIDIA GPU, float16 or bfloat16.
* "splash": the Pallas flash kernel of JAX for TPU. The mask of the layout is static, so blocks that nobody may see,
  such as one answer's keys for another's queries, are not computed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

BACKENDS = ("auto", "xla", "cudnn", "splash")
_SPLASH_BLOCK = 128


def attend(q, k, v, layout, prefix_lengths, answer_lengths, backend="auto"):
    """Computes softmax attention of each stream over what it may see.

    Args:
      q: float[B, S, H, K], queries.
      k: float[B, S, G, K], keys; H is a multiple of G.
      v: float[B, S, G, K], values.
      layout: how S divides into prefixes and answers.
      prefix_lengths: int32[B, M], at least 1 each.
      answer_lengths: int32[B, C].
      backend: "auto", "xla", "cudnn" or "splash".

    Returns:
      float[B, S, H, K]; whatever stands at padding is of no use.
    """
    backend = resolve_backend(backend, q, k, layout)
    return _BACKENDS[backend](q, k, v, layout, prefix_lengths, answer_lengths)


def resolve_backend(backend, q, k, layout):
    """Returns the backend to use; raises if the one asked for cannot do this shape, dtype or device."""
    if backend not in BACKENDS:
        raise ValueError(f"attention backend must be one of {BACKENDS}, got {backend!r}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide among {k.shape[2]} key-value heads")
    platform = jax.default_backend()
    if backend == "auto":
        for candidate, platforms in (("cudnn", ("gpu", "cuda")), ("splash", ("tpu",))):
            if platform in platforms and _obstacle(candidate, platform, q, layout) is None:
                return candidate
        return "xla"
    if (obstacle := _obstacle(backend, platform, q, layout)) is not None:
        raise ValueError(f"attention backend {backend!r} {obstacle}; use 'xla' or 'auto'")
    return backend


def _obstacle(backend, platform, q, layout):
    """Returns why a backend cannot do this, or None. Splash compiles ahead of time for a TPU that is not there."""
    if backend == "cudnn":
        if platform not in ("gpu", "cuda"):
            return f"needs an NVIDIA GPU, and this is {platform}"
        if q.dtype not in (jnp.float16, jnp.bfloat16):
            return f"needs float16 or bfloat16, got {q.dtype}"
        if q.shape[-1] > 128 or q.shape[-1] % 8:
            return f"needs heads of a width up to 128 and divisible by 8, got {q.shape[-1]}"
    if backend == "splash":
        if q.shape[-1] % 128:
            return f"needs heads of a width divisible by 128, got {q.shape[-1]}"
        if layout.tokens % _SPLASH_BLOCK:
            return f"needs a number of tokens divisible by {_SPLASH_BLOCK}, got {layout.tokens}"
    return None


def _xla(q, k, v, layout, prefix_lengths, answer_lengths):
    del answer_lengths  # padding comes last in an answer, so causality hides it
    heads, groups, width = q.shape[2], k.shape[2], q.shape[3]
    q = q * np.float32(width**-0.5).astype(q.dtype)
    q = q.reshape(*q.shape[:2], groups, heads // groups, width)
    (q_prefix, q_answer), (k_prefix, k_answer), (v_prefix, v_answer) = (layout.split(x) for x in (q, k, v))

    # Heads go in front of tokens, so that no array of scores is ever transposed.
    q_prefix = jnp.einsum("bmpgrk->bmgrpk", q_prefix)
    k_prefix, v_prefix = (jnp.einsum("bmsgk->bmgsk", x) for x in (k_prefix, v_prefix))
    scores = _scores("bmgrpk,bmgsk->bmgrps", q_prefix, k_prefix, np.tri(layout.prefix_tokens, dtype=bool))
    out_prefix = _attention_over([(scores, "bmgrps,bmgsk->bmgrpk", v_prefix)])
    out_prefix = jnp.einsum("bmgrpk->bmpgrk", out_prefix)
    if not layout.cells:
        return out_prefix.reshape(q.shape[0], layout.tokens, heads, width)

    k_answer, v_answer = (jnp.einsum("bcugk->bgcuk", x) for x in (k_answer, v_answer))
    outs = {}
    # The cells of one image meet its keys in one product, and its keys are never copied per cell.
    for image in sorted(set(layout.cell_image)):
        cells = np.array([cell for cell, its_image in enumerate(layout.cell_image) if its_image == image])
        queries = jnp.einsum("bctgrk->bgrctk", q_answer[:, cells])
        seen = (jnp.arange(layout.prefix_tokens)[None] < prefix_lengths[:, image, None])[:, None, None, None, None]
        on_prefix = _scores("bgrctk,bgsk->bgrcts", queries, k_prefix[:, image], seen)
        on_itself = _scores(
            "bgrctk,bgcuk->bgrctu", queries, k_answer[:, :, cells], np.tri(layout.answer_tokens, dtype=bool)
        )
        out = _attention_over(
            [
                (on_prefix, "bgrcts,bgsk->bgrctk", v_prefix[:, image]),
                (on_itself, "bgrctu,bgcuk->bgrctk", v_answer[:, :, cells]),
            ]
        )
        outs |= dict(zip(cells, jnp.einsum("bgrctk->cbtgrk", out), strict=True))
    out_answer = jnp.stack([outs[cell] for cell in range(layout.cells)], axis=1)
    out = layout.join(out_prefix, out_answer)
    return out.reshape(*out.shape[:2], heads, width)


def _scores(product, q, k, visible):
    """Returns float32 scores, the lowest number where the key is not visible."""
    scores = jnp.einsum(product, q, k, preferred_element_type=jnp.float32)
    visible = visible.reshape((1,) * (scores.ndim - visible.ndim) + visible.shape)
    return jnp.where(visible, scores, jnp.finfo(jnp.float32).min)


def _attention_over(parts):
    """Softmax over the last axes of several parts (scores, product with the values, values) taken together.

    The parts are not concatenated, and the sum divides the small result and not the probabilities.
    """
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [s.max(axis=-1, keepdims=True) for s, _, _ in parts]))
    out = total = 0.0
    for scores, product, values in parts:
        weights = jnp.exp(scores - top)
        total += weights.sum(axis=-1, keepdims=True)
        out += jnp.einsum(product, weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return (out / total).astype(parts[0][2].dtype)


def _cudnn(q, k, v, layout, prefix_lengths, answer_lengths, implementation="cudnn"):
    del answer_lengths
    flash = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    fold = lambda x: x.reshape(-1, *x.shape[2:])  # one batch axis, as the kernel wants it
    (q_prefix, q_answer), (k_prefix, k_answer), (v_prefix, v_answer) = (layout.split(x) for x in (q, k, v))
    out_prefix = flash(*map(fold, (q_prefix, k_prefix, v_prefix)), is_causal=True).reshape(q_prefix.shape)
    out_answer = jnp.zeros_like(q_answer)
    if layout.cells:
        keys, values = (
            jnp.concatenate([layout.of_cells(prefix), answer], axis=2)
            for prefix, answer in ((k_prefix, k_answer), (v_prefix, v_answer))
        )
        seen = jnp.arange(layout.prefix_tokens)[None, None] < layout.of_cells(prefix_lengths)[:, :, None]
        seen = jnp.broadcast_to(seen[:, :, None], (*q_answer.shape[:3], layout.prefix_tokens))
        own = jnp.broadcast_to(
            np.tri(layout.answer_tokens, dtype=bool)[None, None], (*q_answer.shape[:3], q_answer.shape[2])
        )
        mask = fold(jnp.concatenate([seen, own], axis=-1))[:, None]
        out_answer = flash(*map(fold, (q_answer, keys, values)), mask=mask).reshape(q_answer.shape)
    return layout.join(out_prefix, out_answer)


def _splash(q, k, v, layout, prefix_lengths, answer_lengths, interpret=False):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    heads, groups = q.shape[2], k.shape[2]
    block = max(size for size in (128, 256, 384, 512) if layout.tokens % size == 0)
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.NumpyMask(layout.mask())] * (heads // groups))
    sizes = splash_attention_kernel.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block),
        **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"), block),
    )
    kernel = splash_attention_kernel.make_splash_mqa_single_device(mask, block_sizes=sizes, interpret=interpret)
    # Padding gets another segment than the tokens: no token sees it, and it sees itself, so no row is empty.
    segment = layout.valid(prefix_lengths, answer_lengths).astype(jnp.int32)

    def one_group(q, k, v, segment):
        ids = splash_attention_kernel.SegmentIds(segment, segment)
        return jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=ids))(q, k, v)

    q = q * np.float32(q.shape[-1] ** -0.5).astype(q.dtype)
    q = q.reshape(*q.shape[:2], groups, heads // groups, q.shape[-1]).transpose(0, 2, 3, 1, 4)  # [B, G, R, S, K]
    out = jax.vmap(one_group)(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), segment)
    return out.transpose(0, 3, 1, 2, 4).reshape(out.shape[0], layout.tokens, heads, out.shape[-1]).astype(v.dtype)


_BACKENDS = {"xla": _xla, "cudnn": _cudnn, "splash": _splash}
