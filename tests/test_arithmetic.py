"""The arithmetic of a step against the products that JAX writes down for it, one by one."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from napo_jax.arithmetic import attention_flops, step_flops
from napo_jax.data.buckets import Bucket
from napo_jax.models import Groups, Llava, LlavaConfig, Packing
from napo_jax.models.clip import ClipConfig, ClipTower
from napo_jax.models.llama import LlamaConfig
from napo_jax.models.lora import LoraConfig, is_adapter
from napo_jax.optim import flatten, unflatten

# No two sizes alike, so that none can stand for another.
TEXT = LlamaConfig(vocab_size=80, width=48, mlp_width=104, layers=3, heads=6, kv_heads=2)
VISION = ClipConfig(image_size=24, patch_size=8, width=32, mlp_width=72, layers=4, heads=4)
CONFIG = LlavaConfig(TEXT, VISION, remat="none", logits_chunk=256)
GROUPS, PREFIX, ANSWER = 2, 20, 12


def dots(function, *args):
    """Counts the operations of all matrix products that a function is traced to."""

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            times = equation.params["length"] if equation.primitive.name == "scan" else 1
            if equation.primitive.name == "dot_general":
                ((contracted, _), _) = equation.params["dimension_numbers"]
                sizes = equation.invars[0].aval.shape
                total += 2 * equation.outvars[0].aval.size * math.prod(sizes[axis] for axis in contracted)
            inner = [getattr(value, "jaxpr", value) for value in jax.tree.leaves(list(equation.params.values()))]
            total += times * sum(count(value) for value in inner if hasattr(value, "eqns"))
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)


def shapes(config, cell_image):
    """Returns the leaves of a model, a batch without padding, and its bucket."""
    of = lambda dtype, *shape: jax.ShapeDtypeStruct((GROUPS, *shape), dtype)
    images, cells = max(cell_image) + 1, len(cell_image)
    groups = Groups(
        of(jnp.float32, images, VISION.image_size, VISION.image_size, 3),
        of(jnp.int32, images, PREFIX),
        of(jnp.int32, images),
        of(jnp.int32, cells, ANSWER),
        of(jnp.int32, cells),
    )
    leaves = flatten(jax.eval_shape(Llava(config).init, jax.random.key(0)))
    tokens = images * PREFIX + cells * ANSWER
    return leaves, groups, Bucket(tokens, PREFIX, ANSWER, cells * ANSWER)


def traced(config, cell_image, trains):
    """Returns what JAX computes for a loss and its gradient, and what `step_flops` says is needed."""
    leaves, groups, bucket = shapes(config, cell_image)
    trained = {path: leaf for path, leaf in leaves.items() if trains(path)}
    frozen = {path: leaf for path, leaf in leaves.items() if not trains(path)}
    packing = Packing(bucket.tokens, bucket.answers)

    def loss(trained, frozen, groups):
        return Llava(config).logps(unflatten(trained, frozen), groups, cell_image, packing).sum.sum()

    done = dots(jax.value_and_grad(loss), trained, frozen, groups)
    return done, step_flops(config, bucket, GROUPS, cell_image, trained=trained)


def unseen(cell_image, passes):
    """Counts what plain attention computes of pairs that causality hides: half of each square."""
    pairs = (max(cell_image) + 1) * PREFIX**2 / 2 + len(cell_image) * ANSWER**2 / 2
    return passes * 2 * GROUPS * TEXT.layers * 2 * TEXT.width * pairs


def head(cell_image):
    """Counts the logits, which are computed again in every backward pass."""
    return 2 * GROUPS * len(cell_image) * ANSWER * TEXT.width * TEXT.vocab_size


@pytest.mark.parametrize("cell_image", [(0, 0, 0, 0), (0, 0, 1)])
def test_what_is_needed_to_train_decoder_and_projector(cell_image):
    done, needed = traced(CONFIG, cell_image, lambda path: not path.startswith("vision/"))
    assert needed == done - unseen(cell_image, 3) - head(cell_image)


def test_what_is_not_stored_is_computed_again():
    """Each way of rematerialisation adds the products of one layer after the other that it does not store."""
    trains = lambda path: not path.startswith("vision/")
    done = {
        remat: traced(dataclasses.replace(CONFIG, remat=remat), (0, 0), trains)[0]
        for remat in ("none", "dots", "mlp", "full")
    }
    product = 2 * GROUPS * (PREFIX + 2 * ANSWER) * TEXT.layers * TEXT.width  # for each feature that comes out
    attention = product * (2 * TEXT.width + 2 * TEXT.kv_heads * TEXT.head_width)
    assert done["none"] <= done["dots"]
    assert done["mlp"] - done["dots"] == attention
    assert done["full"] - done["mlp"] == product * 2 * TEXT.mlp_width


def test_adapters_need_no_gradient_of_the_matrices_nor_of_what_lies_before_them():
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=5, targets=("query", "value", "down")))
    done, needed = traced(config, (0, 0), is_adapter)
    # JAX differentiates all layers alike: the first by its input too, through three matrices and two adapters.
    tokens, heads = GROUPS * (PREFIX + 2 * ANSWER), TEXT.head_width * (TEXT.heads + 2 * TEXT.kv_heads)
    first = 2 * tokens * TEXT.width * (heads + 2 * 5)
    assert needed == done - unseen((0, 0), 3) - head((0, 0)) - first


def test_the_head_alone_needs_no_backward_pass_through_the_decoder():
    done, needed = traced(CONFIG, (0, 0), lambda path: path == "language/head")
    assert needed == done - unseen((0, 0), 1) - head((0, 0))


def test_a_frozen_tower_is_frozen_though_its_leaves_are_named():
    leaves, _, bucket = shapes(CONFIG, (0, 0))
    flops = lambda **options: (
        step_flops(dataclasses.replace(CONFIG, **options), bucket, GROUPS, (0, 0), trained=leaves)
        - step_flops(
            CONFIG, bucket, GROUPS, (0, 0), trained=[path for path in leaves if not path.startswith("vision/")]
        )
    )
    assert flops() == 0
    tower = dots(
        lambda params, images: ClipTower(VISION).apply({"params": params}, images),
        jax.eval_shape(lambda: Llava(CONFIG).init(jax.random.key(0))["vision"]),
        jax.ShapeDtypeStruct((GROUPS, VISION.image_size, VISION.image_size, 3), jnp.float32),
    )
    patches = 2 * GROUPS * VISION.image_tokens * 3 * VISION.patch_size**2 * VISION.width
    projector = 2 * GROUPS * VISION.image_tokens * VISION.width * TEXT.width  # by its input, which now trains too
    assert flops(freeze_vision=False) == 2 * tower - patches + projector


def test_a_reference_computes_again_what_training_changes():
    leaves, groups, bucket = shapes(CONFIG, (0, 0))
    trained = [path for path in leaves if not path.startswith("vision/")]
    forward = dots(
        lambda params, groups: Llava(CONFIG).logps(params, groups, (0, 0), Packing(bucket.tokens, bucket.answers)),
        unflatten(leaves),
        groups,
    )
    alone, along = (
        step_flops(CONFIG, bucket, GROUPS, (0, 0), trained=trained, reference=reference) for reference in (False, True)
    )
    nothing = step_flops(CONFIG, bucket, GROUPS, (0, 0), trained=[])
    assert nothing == forward - unseen((0, 0), 1)
    projector = 2 * GROUPS * VISION.image_tokens * (VISION.width + TEXT.width) * TEXT.width
    tokens = GROUPS * bucket.tokens
    matrices = TEXT.width * TEXT.head_width * 2 * (TEXT.heads + TEXT.kv_heads) + 3 * TEXT.width * TEXT.mlp_width
    attention = attention_flops(CONFIG, bucket, GROUPS, (0, 0))
    assert along - alone == projector + 2 * tokens * TEXT.layers * matrices + attention + head((0, 0))


def test_causal_attention_by_hand():
    """One prefix of 4 tokens, two answers of 2: 4 x 4 / 2 pairs, and 2 (2 x 4 + 2 x 2 / 2); two products of 48."""
    bucket = Bucket(tokens=8, prefix=4, answer=2, answers=4)
    assert attention_flops(CONFIG, bucket, 1, (0, 0)) == 2 * TEXT.layers * 2 * 48 * (8 + 2 * 10)


def test_padding_of_attention_earns_nothing():
    wide = Bucket(tokens=44, prefix=32, answer=16, answers=24)
    narrow = Bucket(tokens=44, prefix=20, answer=12, answers=24)
    flops = [step_flops(CONFIG, bucket, 1, (0, 0), trained=["language/head"]) for bucket in (wide, narrow)]
    assert flops[0] == flops[1]
