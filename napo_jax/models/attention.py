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
from jax.sharding import PartitionSpec

from napo_jax.sharding import ROWS, inside_mesh

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
      backend: "auto", "xla", "cudnn" or "splash". "auto" goes by JAX's default backend, so ahead of time, for a device
        that is not there, name the one you want.

    Returns:
      float[B, S, H, K]; whatever stands at padding is of no use. Only reverse-mode derivatives are defined.
    """
    backend = resolve_backend(backend, q, k, layout)
    run = lambda *arrays: _BACKENDS[backend](*arrays[:3], layout, *arrays[3:])
    if backend == "splash" and inside_mesh():
        # jit cannot divide a Pallas kernel among devices; rows and heads are independent, so each does its own.
        by_head, by_row = PartitionSpec(ROWS, None, "tensor"), PartitionSpec(ROWS)
        specs = (by_head, by_head, by_head, by_row, by_row)
        run = jax.shard_map(run, in_specs=specs, out_specs=by_head, check_vma=False)
    return run(q, k, v, prefix_lengths, answer_lengths)


def resolve_backend(backend, q, k, layout):
    """Returns the backend to use; raises if the one asked for cannot do this shape, dtype or device."""
    if backend not in BACKENDS:
        raise ValueError(f"attention backend must be one of {BACKENDS}, got {backend!r}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide among {k.shape[2]} key-value heads")
    platform = jax.default_backend()
    if backend == "auto":
        for candidate, platforms in (("cudnn", ("gpu", "cuda")), ("splash", ("tpu",))):
            alone = candidate != "splash" or jax.device_count() == 1 or inside_mesh()
            if platform in platforms and alone and _obstacle(candidate, platform, q, layout) is None:
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
        if layout.cells and (layout.answer_tokens % 2 or layout.prefix_tokens % 2):
            return f"needs even lengths for its mask, got {layout.prefix_tokens} and {layout.answer_tokens} tokens"
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
    batch, _, heads, width = q.shape
    groups = k.shape[2]
    q = (q * np.float32(width**-0.5).astype(q.dtype)).reshape(batch, -1, groups, heads // groups, width)
    (q_prefix, q_answer), (k_prefix, k_answer), (v_prefix, v_answer) = (layout.split(x) for x in (q, k, v))
    # Heads go in front of tokens, so that no array of scores is ever transposed: [B, M or C, G, R, tokens, K] for
    # queries, and the same without R for keys and values.
    q_prefix, q_answer = (x.transpose(0, 1, 3, 4, 2, 5) for x in (q_prefix, q_answer))
    k_prefix, v_prefix = (x.transpose(0, 1, 3, 2, 4) for x in (k_prefix, v_prefix))
    k_answer, v_answer = (x.transpose(0, 1, 3, 2, 4) for x in (k_answer, v_answer))

    out_prefix = []
    for start, stop in _query_blocks(layout.prefix_tokens):
        causal = np.arange(start, stop)[:, None] >= np.arange(stop)[None]
        part = (k_prefix[:, :, :, :stop], v_prefix[:, :, :, :stop], causal)
        out_prefix.append(_attention_over(q_prefix[:, :, :, :, start:stop], [part]))
    out_prefix = jnp.concatenate(out_prefix, axis=4)

    out_answer = [None] * layout.cells
    own_causal = np.tri(layout.answer_tokens, dtype=bool)
    # The cells of one image meet its keys in one product, and its keys are never copied per cell.
    for image in sorted(set(layout.cell_image)):
        cells = [cell for cell, its_image in enumerate(layout.cell_image) if its_image == image]
        queries, keys, values = (jnp.stack([x[:, c] for c in cells], axis=2) for x in (q_answer, k_answer, v_answer))
        seen = (jnp.arange(layout.prefix_tokens)[None] < prefix_lengths[:, image, None])[:, None, None, None, None]
        on_prefix = (k_prefix[:, image], v_prefix[:, image], seen)
        out = _attention_over(queries, [on_prefix, (keys, values, own_causal)])  # [B, G, C, R, T, K]
        for i, cell in enumerate(cells):
            out_answer[cell] = out[:, :, i]
    out_answer = jnp.stack(out_answer, axis=1) if layout.cells else q_answer
    out = layout.join(*(x.transpose(0, 1, 4, 2, 3, 5) for x in (out_prefix, out_answer)))
    return out.reshape(batch, layout.tokens, heads, width)


def _query_blocks(tokens):
    """Splits a long causal square into four bands of queries; each leaves out the keys that none of it may see."""
    size = -(-tokens // 4) if tokens >= 256 else max(tokens, 1)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _attention_over(q, parts):
    """Softmax attention over several parts (keys, values, visible) taken together.

    Keys [..., S, K] may have fewer leading axes than the queries [..., R, T, K]: the further ones then count as more
    queries. The parts are not concatenated, and their sum divides the small result and not the weights.
    """
    scores = []
    for keys, _, visible in parts:
        score = _per_key(q, keys, _dot_keys)
        visible = visible.reshape((1,) * (score.ndim - visible.ndim) + visible.shape)
        scores.append(jnp.where(visible, score, jnp.finfo(jnp.float32).min))
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [score.max(axis=-1, keepdims=True) for score in scores]))
    out = total = 0.0
    for score, (_, values, _) in zip(scores, parts, strict=True):
        weights = jnp.exp(score - top)
        total += weights.sum(axis=-1, keepdims=True)
        out += _per_key(weights.astype(values.dtype), values, _mix_values)
    return (out / total).astype(q.dtype)


def _per_key(x, keys, product):
    """Applies a product of [N, Q, .] and [N, S, K], folding the axes around it; returns float32."""
    lead = keys.shape[:-2]
    out = product(x.reshape(np.prod(lead, dtype=int), -1, x.shape[-1]), keys.reshape(-1, *keys.shape[-2:]))
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _batched(x, y, contract):
    """Multiplies [N, ., .] by [N, ., .] over one axis each, with a float32 result."""
    return jax.lax.dot_general(x, y, ((contract[:1], contract[1:]), ((0,), (0,))), preferred_element_type=jnp.float32)


# The two products and their derivatives, with the large array (of queries by keys) in its stored order in each: left to
# itself, the derivative by keys or values transposes it first, which costs more than the product.


@jax.custom_vjp
def _dot_keys(q, k):
    """Maps [N, Q, K] and [N, S, K] to scores [N, Q, S]."""
    return _batched(q, k, (2, 2))


def _dot_keys_backward(residuals, slope):
    q, k = residuals
    slope = slope.astype(q.dtype)
    d_k = jnp.swapaxes(_batched(q, slope, (1, 1)), 1, 2)
    return _batched(slope, k, (2, 1)).astype(q.dtype), d_k.astype(k.dtype)


_dot_keys.defvjp(lambda q, k: (_dot_keys(q, k), (q, k)), _dot_keys_backward)


@jax.custom_vjp
def _mix_values(weights, v):
    """Maps [N, Q, S] and [N, S, K] to [N, Q, K]."""
    return _batched(weights, v, (2, 1))


def _mix_values_backward(residuals, slope):
    weights, v = residuals
    slope = slope.astype(v.dtype)
    d_v = jnp.swapaxes(_batched(slope, weights, (1, 1)), 1, 2)
    return _batched(slope, v, (2, 2)).astype(weights.dtype), d_v.astype(v.dtype)


_mix_values.defvjp(lambda weights, v: (_mix_values(weights, v), (weights, v)), _mix_values_backward)


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
