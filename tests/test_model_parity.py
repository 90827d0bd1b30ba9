"""Every block and the whole model against `transformers`, live, on weights far from zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from quick import quick_jit
from torch_llava import array, clip_layer_params, llama_layer_params, params_of, tiny_config, torch_llava, torch_logits
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from napo_jax.models import IMAGE_SLOT, Llava, LlavaConfig
from napo_jax.models.clip import ClipLayer, ClipTower
from napo_jax.models.layout import Layout, rope_tables, rotate
from napo_jax.models.llama import Attention, DecoderLayer, Mlp, RmsNorm
from napo_jax.models.mixing import WholeGroups
from napo_jax.models.network import Projector

logits = quick_jit(Llava.logits, static_argnums=0)


def close(got, want, tolerance):
    """Compares on the scale of the wanted array: a tolerance in units of its largest entry."""
    got, want = np.asarray(got), np.asarray(want.detach() if isinstance(want, torch.Tensor) else want)
    assert got.shape == want.shape
    assert np.max(np.abs(got - want)) <= tolerance * np.max(np.abs(want))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def decoder_inputs(config, positions):
    """Returns our tables and mix, and torch's causal mask, for one sequence."""
    tokens = len(positions)
    tables = rope_tables(jnp.asarray(positions)[None], config.head_width, config.rope_theta)
    lengths = jnp.full((1, 1), tokens, jnp.int32), jnp.zeros((1, 0), jnp.int32)
    mask = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)[None, None]
    return (tables, WholeGroups(*lengths, None, Layout(tokens), "xla")), mask


@pytest.fixture(scope="module", params=[4, 2], ids=["mha", "gqa"])
def pair(request):
    config = tiny_config(kv_heads=request.param)
    return config, torch_llava(config, seed=request.param)


def test_rotary_embedding(pair):
    config, model = pair[0].text, pair[1].model.language_model
    positions = np.arange(7, 19)
    x = noise(1, 12, config.heads, config.head_width)
    cos, sin = LlamaRotaryEmbedding(model.config)(torch.zeros(1), torch.from_numpy(positions)[None])
    half = config.head_width // 2
    turned = torch.from_numpy(np.concatenate([-x[..., half:], x[..., :half]], axis=-1))
    want = torch.from_numpy(x) * cos[:, :, None] + turned * sin[:, :, None]
    close(rotate(jnp.asarray(x), rope_tables(jnp.asarray(positions)[None], config.head_width, 10000.0)), want, 1e-5)


def test_attention_with_rope(pair):
    config, model = pair[0].text, pair[1].model.language_model
    x, positions = noise(1, 12, config.width), np.arange(12)
    layer = model.layers[1]
    inputs, mask = decoder_inputs(config, positions)
    embedded = model.rotary_emb(torch.zeros(1), torch.from_numpy(positions)[None])
    want, _ = layer.self_attn(torch.from_numpy(x), position_embeddings=embedded, attention_mask=mask)
    got, _ = Attention(config).apply({"params": llama_layer_params(layer)["attention"]}, x, *inputs)
    close(got, want, 1e-5)


def test_mlp_and_norm(pair):
    config, layer = pair[0].text, pair[1].model.language_model.layers[0]
    x, params = noise(2, 5, config.width), llama_layer_params(layer)
    close(Mlp(config).apply({"params": params["mlp"]}, x), layer.mlp(torch.from_numpy(x)), 1e-5)
    small = 0.01 * x  # so that epsilon matters
    want = layer.input_layernorm(torch.from_numpy(small))
    close(RmsNorm(config.norm_eps).apply({"params": params["attention_norm"]}, small), want, 1e-5)
    wrong = RmsNorm(1e-5).apply({"params": params["attention_norm"]}, small)
    assert np.max(np.abs(wrong - want.detach().numpy())) > 1e-2  # an epsilon from elsewhere shows


def test_decoder_layer(pair):
    config, model = pair[0].text, pair[1].model.language_model
    x, positions = noise(1, 9, config.width), np.arange(9)
    inputs, mask = decoder_inputs(config, positions)
    embedded = model.rotary_emb(torch.zeros(1), torch.from_numpy(positions)[None])
    want = model.layers[2](torch.from_numpy(x), position_embeddings=embedded, attention_mask=mask)
    got, _ = DecoderLayer(config).apply({"params": llama_layer_params(model.layers[2])}, x, *inputs)
    close(got, want[0] if isinstance(want, tuple) else want, 1e-5)


def test_clip_layer(pair):
    config, tower = pair[0].vision, pair[1].model.vision_tower
    layer = getattr(tower, "vision_model", tower).encoder.layers[1]
    x = noise(2, config.image_tokens + 1, config.width)
    want = layer(torch.from_numpy(x), attention_mask=None)
    got = ClipLayer(config).apply({"params": clip_layer_params(layer)}, x)
    close(got, want[0] if isinstance(want, tuple) else want, 1e-5)


def test_projector(pair):
    config, model = pair
    x = 2 * noise(2, 16, config.vision.width)
    projector = model.model.multi_modal_projector
    params = params_of(model)["projector"]
    got = Projector(config.text.width, jnp.float32, jnp.float32).apply({"params": params}, x)
    close(got, projector(torch.from_numpy(x)), 1e-5)
    tanh_gelu = jax.nn.gelu(x @ params["up"]["kernel"] + params["up"]["bias"][None, None], approximate=True)
    wrong = tanh_gelu @ params["down"]["kernel"] + params["down"]["bias"][None, None]
    assert np.max(np.abs(got - wrong)) > 1e-4  # the other GELU shows


def test_tower_is_the_layer_before_the_last_without_the_class_token(pair):
    config, model = pair
    images = noise(3, 28, 28, 3)
    tower = model.model.vision_tower
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2))
    states = tower(pixels, output_hidden_states=True).hidden_states
    assert len(states) == config.vision.layers + 1
    got = ClipTower(config.vision).apply({"params": params_of(model)["vision"]}, images)
    close(got, states[-2][:, 1:], 1e-4)
    assert np.max(np.abs(got - states[-1][:, 1:].detach().numpy())) > 0.1


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 9], ids=["image first", "after one word", "image later"])
def test_whole_logits(pair, seed, start):
    config, _ = pair
    model = torch_llava(config, seed)
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, config.text.vocab_size, (2, 34))
    ids[:, start : start + config.vision.image_tokens] = IMAGE_SLOT
    images = noise(2, 28, 28, 3, seed=seed)
    want = torch_logits(model, ids, images, config.text.vocab_size)
    got = logits(Llava(config), params_of(model), jnp.asarray(ids), jnp.asarray(images))
    assert got.dtype == jnp.float32
    close(got, want, 1e-4)


def test_a_batch_of_unequal_lengths(pair):
    """Right padding comes after what it could disturb, so it changes nothing before it."""
    config, model = pair
    rng = np.random.default_rng(5)
    ids = rng.integers(1, config.text.vocab_size, (3, 40))
    ids[:, 2 : 2 + config.vision.image_tokens] = IMAGE_SLOT
    images = noise(3, 28, 28, 3, seed=5)
    got = logits(Llava(config), params_of(model), jnp.asarray(ids), jnp.asarray(images))
    for row, length in enumerate((23, 31, 40)):
        want = torch_logits(model, ids[row : row + 1, :length], images[row : row + 1], config.text.vocab_size)
        close(got[row : row + 1, :length], want, 1e-4)


def test_a_wrong_layer_shows(pair):
    """The wrong twin: exchanging two layers, or the halves of a rotary pair, must break the comparison above."""
    config, model = pair
    ids = np.random.default_rng(6).integers(1, config.text.vocab_size, (1, 30))
    ids[:, 1 : 1 + config.vision.image_tokens] = IMAGE_SLOT
    images = noise(1, 28, 28, 3, seed=6)
    want = torch_logits(model, ids, images, config.text.vocab_size)
    params = params_of(model)
    swapped = jax.tree.map(lambda x: x[np.array([1, 0, 2])], params["language"]["layers"])
    spoilt = {**params, "language": {**params["language"], "layers": swapped}}
    with pytest.raises(AssertionError):
        close(logits(Llava(config), spoilt, jnp.asarray(ids), jnp.asarray(images)), want, 1e-2)
    vision = jax.tree.map(lambda x: x[np.array([1, 0, 2])], params["vision"]["layers"])
    spoilt = {**params, "vision": {**params["vision"], "layers": vision}}
    with pytest.raises(AssertionError):
        close(logits(Llava(config), spoilt, jnp.asarray(ids), jnp.asarray(images)), want, 1e-2)


def test_bfloat16_is_near_and_its_logits_are_float32(pair):
    config, model = pair
    half = tiny_config(config.text.kv_heads, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    ids = np.random.default_rng(7).integers(1, config.text.vocab_size, (1, 30))
    ids[:, 1 : 1 + config.vision.image_tokens] = IMAGE_SLOT
    images = noise(1, 28, 28, 3, seed=7)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(model))
    got = logits(Llava(half), params, jnp.asarray(ids), jnp.asarray(images))
    assert got.dtype == jnp.float32
    close(got, torch_logits(model, ids, images, config.text.vocab_size), 0.1)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        # Vicuna 6,738,415,616 + CLIP ViT-L/14-336 303,507,456 + projector 20,979,712
        (LlavaConfig.llava7b(), 7_062_902_784),
        (LlavaConfig.llava13b(), 13_015_864_320 + 303_507_456 + 31_467_520),
    ],
    ids=["7b", "13b"],
)
def test_parameter_counts(config, count):
    shapes = jax.eval_shape(Llava(config).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_parameters_are_plain_dicts_with_the_shapes_of_the_checkpoint(pair):
    config, model = pair
    params = jax.eval_shape(Llava(config).init, jax.random.key(0))
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(params) == shapes(params_of(model))
    assert {type(node) for node in (params, params["vision"], params["language"]["layers"])} == {dict}
    assert array(model.lm_head.weight).shape[0] == config.text.vocab_size + 1
