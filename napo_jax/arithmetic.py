"""The arithmetic that a step needs: what the share of a device's peak (MFU) is measured by.

Needed is not done: neither padding of attention, nor what is computed again to save memory, nor the further forward
pass of several micro-batches earns anything. Products of matrices are counted, and nothing else.
"""

from collections.abc import Iterable
from typing import NamedTuple

from napo_jax.data.buckets import Bucket
from napo_jax.models import LlavaConfig


class _Product(NamedTuple):
    """One product of the forward pass."""

    leaf: str | None  # path of its weights; None where both sides are activations
    multiplies: float  # multiply-adds of one group


def step_flops(
    config: LlavaConfig, bucket: Bucket, groups: int, cell_image, *, trained: Iterable[str], reference: bool = False
) -> float:
    """Counts the multiply-adds of one step over all devices, times two.

    The forward pass counts once. The backward pass counts a product once for its weights if they train, and once for
    each side that is an activation with something that trains behind it.

    Args:
      config: the model's `LlavaConfig`.
      bucket: the lengths of the batch.
      groups: how many groups the batch has, over all devices.
      cell_image: for each cell, the index of its image variant; `Objective.cell_image`.
      trained: paths of the leaves that train.
      reference: whether the reference runs along: a forward pass more of all that training changes.

    Returns:
      float; the operations.
    """
    trained = {path for path in trained if not (config.freeze_vision and path.startswith("vision/"))}
    total, behind = 0.0, False  # behind: whether something that trains comes before
    for stage in _forward(config, bucket, cell_image):
        for leaf, multiplies in stage:
            trains = leaf in trained
            passes = 1 + trains + (2 if leaf is None else 1) * behind
            if reference and (behind or trains) and not (leaf or "").endswith(("/lora_a", "/lora_b")):
                passes += 1
            total += passes * multiplies
        behind = behind or any(product.leaf in trained for product in stage)
    return 2.0 * groups * total


def attention_flops(config: LlavaConfig, bucket: Bucket, groups: int, cell_image) -> float:
    """Counts the part of the decoder's attention in one forward pass over all devices, without its projections."""
    return 2.0 * groups * config.text.layers * _attention(config.text, bucket, cell_image)


def _forward(config, bucket, cell_image):
    """Yields the forward pass of one group in its order: lists of products with the same input."""
    text, vision = config.text, config.vision
    images = (max(cell_image) + 1) * bucket.pictures
    patches = vision.image_tokens

    def vector(*paths):
        return [_Product(path, 0) for path in paths]

    def dense(path, tokens, inputs, outputs, *, bias):
        product = [_Product(f"{path}/kernel", tokens * inputs * outputs)]
        return product + vector(f"{path}/bias") if bias else product

    yield dense("vision/patch", images * patches, 3 * vision.patch_size**2, vision.width, bias=False)
    yield vector("vision/class_embedding", "vision/position_embedding", "vision/pre_norm/scale", "vision/pre_norm/bias")
    tokens, width = images * (patches + 1), vision.width
    for _ in range(vision.layers - 1):
        of = lambda name, *shape: dense(f"vision/layers/{name}", tokens, *shape, bias=True)
        yield vector("vision/layers/attention_norm/scale", "vision/layers/attention_norm/bias")
        yield [*of("query", width, width), *of("key", width, width), *of("value", width, width)]
        yield [_Product(None, 2 * tokens * (patches + 1) * width)]
        yield of("out", width, width)
        yield vector("vision/layers/mlp_norm/scale", "vision/layers/mlp_norm/bias")
        yield of("up", width, vision.mlp_width)
        yield of("down", vision.mlp_width, width)

    yield dense("projector/up", images * patches, vision.width, text.width, bias=True)
    yield dense("projector/down", images * patches, text.width, text.width, bias=True)

    yield vector("language/embedding")
    attention, width = _attention(text, bucket, cell_image), text.width
    for _ in range(text.layers):
        yield vector("language/layers/attention_norm/scale")
        shapes = {
            "query": (width, text.heads * text.head_width),
            "key": (width, text.kv_heads * text.head_width),
            "value": (width, text.kv_heads * text.head_width),
        }
        yield from _linear(config.lora, "attention", shapes, bucket.tokens)
        yield [_Product(None, attention)]
        yield from _linear(config.lora, "attention", {"out": shapes["query"][::-1]}, bucket.tokens)
        yield vector("language/layers/mlp_norm/scale")
        shapes = {"gate": (width, text.mlp_width), "up": (width, text.mlp_width)}
        yield from _linear(config.lora, "mlp", shapes, bucket.tokens)
        yield from _linear(config.lora, "mlp", {"down": (text.mlp_width, width)}, bucket.tokens)
    yield vector("language/norm/scale")
    yield [_Product("language/head", bucket.answers * width * text.vocab_size)]


def _linear(lora, module, shapes, tokens):
    """Yields the products of a decoder layer's matrices with one input, and those of their adapters."""
    path = f"language/layers/{module}"
    adapted = {name: shape for name, shape in shapes.items() if lora.rank and name in lora.targets}
    yield [
        *(_Product(f"{path}/{name}/kernel", tokens * inputs * outputs) for name, (inputs, outputs) in shapes.items()),
        *(_Product(f"{path}/{name}/lora_a", tokens * inputs * lora.rank) for name, (inputs, _) in adapted.items()),
    ]
    if adapted:
        yield [_Product(f"{path}/{name}/lora_b", tokens * lora.rank * outs) for name, (_, outs) in adapted.items()]


def _attention(text, bucket, cell_image):
    """Counts the multiply-adds of one layer's attention: two products over all pairs of a query and a key that it sees.

    The packed places are taken to divide evenly among the streams; causal attention is half of a square.
    """
    images, cells = max(cell_image) + 1, len(cell_image)
    prefix, answer = (bucket.tokens - bucket.answers) / images, bucket.answers / cells
    pairs = images * prefix**2 / 2 + cells * answer * (prefix + answer / 2)
    return 2 * text.heads * text.head_width * pairs
