"""Checkpoints in, checkpoints out: beside `transformers`, with models drawn here and small enough to compare whole."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from napo_jax import export_pretrained, hub_files, load_pretrained, tensor_files, weights
from napo_jax.models import IMAGE_SLOT, Llava, LlavaConfig
from napo_jax.models.clip import ClipConfig
from napo_jax.models.llama import LlamaConfig

VOCAB = 100  # the words that mean something; transformers' model has 28 rows more

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "rms_norm_eps": 1e-4,
    "rope_theta": 5000.0,
    "max_position_embeddings": 256,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}


def draw(kv_heads=2, dtype=torch.float32, seed=0):
    """Returns a LLaVA of transformers with every weight, bias and norm well away from 0, 1 and each other."""
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT, num_key_value_heads=kv_heads),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=VOCAB,
        image_seq_length=16,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        spread = 1.5 / weight.shape[-1] ** 0.5 if weight.ndim > 1 else 0.3
        weight.data = center + spread * torch.randn_like(weight)
    return model.to(dtype)


@pytest.fixture(scope="module")
def net():
    return draw()


@pytest.fixture(scope="module")
def saved(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    net.save_pretrained(folder)
    return folder


def same_logits(net, model, params):
    """Tells whether both give the same logits to 1e-4 of their scale; the image comes first, then later."""
    rng = np.random.default_rng(1)
    ids = rng.integers(3, VOCAB, (2, 24))
    ids[0, :16] = ids[1, 5:21] = IMAGE_SLOT
    images = rng.normal(size=(2, 28, 28, 3)).astype(np.float32)
    with torch.no_grad():
        expected = net(
            input_ids=torch.from_numpy(np.where(ids == IMAGE_SLOT, net.config.image_token_index, ids)),
            pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2).copy()),
        ).logits.numpy()[..., :VOCAB]
    got = np.asarray(model.logits(params, jnp.asarray(ids, jnp.int32), jnp.asarray(images)))
    assert got.shape == expected.shape
    return np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def same_trees(one, other):
    equal = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b)), one, other)
    return jax.tree.all(equal)


# Names by hand, and not by the table under test: from what transformers has in memory to each layout on disk.
ON_DISK = {
    "llava-hf": [
        ("model.language_model.", "language_model.model."),
        ("lm_head", "language_model.lm_head"),
        ("model.multi_modal_projector", "multi_modal_projector"),
        ("model.vision_tower.", "vision_tower."),
    ],
    "transformers": [],
    "llava": [
        ("model.multi_modal_projector.linear_1", "model.mm_projector.0"),
        ("model.multi_modal_projector.linear_2", "model.mm_projector.2"),
        ("model.vision_tower.", "model.vision_tower.vision_tower."),
        ("model.language_model.", "model."),
    ],
}
TOWER_AT = {
    "llava-hf": "vision_tower.",
    "transformers": "model.vision_tower.",
    "llava": "model.vision_tower.vision_tower.",
}


def rename(tensors, layout, back=False):
    def one(name):
        for old, new in ON_DISK[layout]:
            old, new = (new, old) if back else (old, new)
            if name.startswith(old):
                return name.replace(old, new, 1)
        return name

    return {one(name): tensor for name, tensor in tensors.items()}


def original_config(vocab=VOCAB):
    return TEXT | {
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "model_type": "llava",
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }


def write(folder, tensors, config, shards=1):
    """Writes a checkpoint with the safetensors library."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if shards == 1:
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        safetensors.torch.save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def contiguous(net):
    return {name: tensor.contiguous() for name, tensor in net.state_dict().items()}


# In.


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_logits_are_those_of_transformers(tmp_path, kv_heads):
    net = draw(kv_heads)
    net.save_pretrained(tmp_path)
    model, params = load_pretrained(tmp_path, jnp.float32)
    assert model.config.text.kv_heads == kv_heads
    assert same_logits(net, model, params)
    swapped = jax.tree.map(lambda x: x, params)
    attention = swapped["language"]["layers"]["attention"]
    attention["query"]["kernel"] = attention["query"]["kernel"][::-1]
    assert not same_logits(net, model, swapped)  # layers in the wrong order do show


def test_the_tree_is_that_of_init(saved):
    model, params = load_pretrained(saved, jnp.float16)
    expected = jax.eval_shape(Llava(model.config).init, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    assert jax.tree.leaves(params)[0].dtype == jnp.float16


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("infix", ["", "vision_model."])
@pytest.mark.parametrize("layout", list(ON_DISK))
def test_every_layout_gives_the_same_parameters(net, saved, tmp_path, layout, infix, shards):
    tensors = rename(contiguous(net), layout)
    tower = TOWER_AT[layout]
    tensors = {name.replace(tower, tower + infix, 1): tensor for name, tensor in tensors.items()}
    config = net.config.to_dict()
    if layout == "llava":
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:VOCAB].clone()
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:VOCAB].clone()
        config = original_config() | {"vision_config": VISION}
    # What old versions saved beside the weights.
    tensors[tower + infix + "embeddings.position_ids"] = torch.arange(17)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    model, params = load_pretrained(write(tmp_path / "x", tensors, config, shards), jnp.float32)
    expected_model, expected = load_pretrained(saved, jnp.float32)
    assert model == expected_model
    assert same_trees(params, expected)


@pytest.mark.parametrize("whole", [False, True])
def test_the_original_layout_takes_its_tower_from_a_clip_checkpoint(net, saved, tmp_path, whole):
    tensors = rename(contiguous(net), "llava")
    tower = {name[len(TOWER_AT["llava"]) :]: t for name, t in tensors.items() if name.startswith(TOWER_AT["llava"])}
    tensors = {name: t for name, t in tensors.items() if not name.startswith(TOWER_AT["llava"])}
    tensors = {
        n: t[:VOCAB].clone() if n in ("model.embed_tokens.weight", "lm_head.weight") else t for n, t in tensors.items()
    }
    config = VISION | {"model_type": "clip_vision_model"}
    if whole:  # text tower and projections, as openai has it
        tower = {f"vision_model.{name}": tensor for name, tensor in tower.items()}
        tower |= {"text_model.embeddings.token_embedding.weight": torch.ones(3, 4), "logit_scale": torch.ones(())}
        tower |= {"visual_projection.weight": torch.ones(3, 4), "text_projection.weight": torch.ones(3, 4)}
        config = {"model_type": "clip", "vision_config": config, "text_config": {"hidden_size": 4}}
    write(tmp_path / "clip", tower, config)
    write(tmp_path / "llava", tensors, original_config())
    model, params = load_pretrained(tmp_path / "llava", jnp.float32, vision_tower=tmp_path / "clip")
    expected_model, expected = load_pretrained(saved, jnp.float32)
    assert model == expected_model
    assert same_trees(params, expected)
    config = original_config() | {"vision_config": VISION}  # the tower's shape alone does not help
    write(tmp_path / "llava", tensors, config)
    with pytest.raises(ValueError, match=r"model\.vision_tower\.vision_tower\.vision_model.*give its folder as vision"):
        load_pretrained(tmp_path / "llava")
    with pytest.raises(ValueError, match="has a vision tower of its own"):
        load_pretrained(saved, vision_tower=tmp_path / "clip")


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_dtypes_convert_on_the_way(tmp_path, stored, wanted):
    net = draw(dtype=stored)
    net.save_pretrained(tmp_path)
    model, params = load_pretrained(tmp_path, wanted)
    assert (model.config.dtype, model.config.param_dtype) == (wanted, wanted)
    torch_dtype = {jnp.float16: torch.float16, jnp.bfloat16: torch.bfloat16, jnp.float32: torch.float32}[wanted]
    for got, name in (
        (params["language"]["head"].T, "lm_head.weight"),
        (params["vision"]["layers"]["up"]["kernel"][1].T, "model.vision_tower.encoder.layers.1.mlp.fc1.weight"),
    ):
        expected = net.state_dict()[name][: len(got)].to(torch_dtype).float().numpy()
        assert got.dtype == wanted
        np.testing.assert_array_equal(np.asarray(got.astype(jnp.float32)), expected)


def test_leaves_land_where_their_sharding_says(saved):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    _, expected = load_pretrained(saved, jnp.float32)

    def rule(leaf):
        """Shards the last axis over both mesh axes or one, layers over `model` where it must."""
        last = leaf.shape[-1]
        spec = PartitionSpec(*(None,) * (len(leaf.shape) - 1), ("data", "model") if last % 8 == 0 else None)
        if leaf.ndim == 3 and leaf.shape[0] == 2:
            spec = PartitionSpec("model", "data", None)
        return NamedSharding(mesh, spec)

    wanted = jax.tree.map(rule, expected)
    _, params = load_pretrained(saved, jnp.float32, shardings=lambda shapes: jax.tree.map(rule, shapes))
    assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, params, wanted))
    kernel = params["language"]["layers"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, 16, 96)}
    assert same_trees(params, expected)
    _, params = load_pretrained(saved, jnp.float32, shardings=wanted)  # a tree does as well
    assert same_trees(params, expected)

    _, params = load_pretrained(saved, jnp.float32, mesh)
    assert all(leaf.sharding == NamedSharding(mesh, PartitionSpec()) for leaf in jax.tree.leaves(params))
    assert same_trees(params, expected)


@pytest.mark.parametrize("replicated", [False, True])
def test_parameters_may_be_donated(saved, replicated):
    """On CPU the arrays lie in memory that numpy made, several of them in the same: XLA must not write into it."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)) if replicated else None
    _, expected = load_pretrained(saved, jnp.float32)
    expected = jax.tree.map(lambda x: np.asarray(x) + np.float32(2), expected)
    _, params = load_pretrained(saved, jnp.float32, mesh)
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params = add(add(params))
    close = jax.tree.map(lambda a, b: all(np.allclose(s.data, b) for s in a.addressable_shards), params, expected)
    assert jax.tree.all(close)


@pytest.mark.parametrize(("naive", "layers"), [(False, 18), (True, 4)])
def test_loading_holds_little_more_than_the_checkpoint(tmp_path, naive, layers):
    """Peak memory stays under 1.3 times a checkpoint of 2 GB; reading a (smaller) file whole takes more."""
    config = LlavaConfig(
        text=LlamaConfig(width=2048, mlp_width=5504, layers=layers, heads=16, kv_heads=16),
        vision=ClipConfig(width=256, mlp_width=1024, layers=4, heads=4),
        param_dtype=jnp.bfloat16,
    )
    hub_files.write_files(epath.Path(tmp_path), config, "llava", jnp.bfloat16)
    leaves = weights._leaves(weights._shapes(config), config, "llava", config.text.vocab_size)
    specs = {name: (leaf.dtype, leaf.tensor_shape) for leaf in leaves for name in leaf.names}
    file = epath.Path(tmp_path) / "model.safetensors"
    tensor_files.write_tensors(file, specs, ())
    size = file.stat().length + sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in specs.values())
    with open(file, "r+b") as f:
        f.truncate(size)  # zeros, which take no room on the disk
    assert naive or 2.0e9 < size < 2.2e9
    probe = Path(__file__).parent / "memory_probe.py"
    command = [sys.executable, str(probe), str(tmp_path), *["--naive"] * naive]
    done = subprocess.run(command, capture_output=True, text=True, cwd=probe.parent.parent)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    print(f"{got['rise'] / size:.3f} times the file of {size} bytes")
    assert got["held"] == pytest.approx(size, rel=1e-3)  # nothing is lazy
    assert (got["rise"] <= 1.3 * size) == (not naive)


# Strictness.


def test_unknown_missing_and_misshaped_tensors_are_all_named(net, tmp_path):
    tensors = rename(contiguous(net), "llava-hf")
    tensors["language_model.model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    del tensors["multi_modal_projector.linear_1.bias"]
    tensors["vision_tower.post_layernorm.weight"] = torch.ones(31)
    tensors["language_model.model.norm.weight"] = torch.ones(64, dtype=torch.int8)
    with pytest.raises(ValueError, match="does not hold this model's weights") as error:
        load_pretrained(write(tmp_path / "x", tensors, net.config.to_dict()))
    for line in (
        "language_model.model.layers.0.self_attn.q_proj.bias: expected no such tensor, got F32 [64]",
        "multi_modal_projector.linear_1.bias: expected [64], got none",
        "vision_tower.vision_model.post_layernorm.weight: expected F16/BF16/F32 [32], got F32 [31]",
        "language_model.model.norm.weight: expected F16/BF16/F32 [64], got I8 [64]",
    ):
        assert line in str(error.value)
    assert "more" not in str(error.value)


def test_a_long_list_of_wrong_tensors_is_cut(net, tmp_path):
    tensors = {name: tensor for name, tensor in contiguous(net).items() if "encoder" not in name}
    with pytest.raises(ValueError, match="and 40 more"):
        load_pretrained(write(tmp_path / "x", tensors, net.config.to_dict()))


def test_tensors_of_no_layout_raise(net, tmp_path):
    tensors = {f"transformer.{name}": tensor for name, tensor in contiguous(net).items()}
    with pytest.raises(ValueError, match=r"no layout known here.*language_model\.model\.embed_tokens"):
        load_pretrained(write(tmp_path / "x", tensors, net.config.to_dict()))


def test_a_tensor_in_two_files_raises(net, tmp_path):
    folder = write(tmp_path / "x", contiguous(net), net.config.to_dict())
    safetensors.torch.save_file({"lm_head.weight": torch.ones(128, 64)}, folder / "other.safetensors")
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight stands in .*first\.safetensors and in .*other\.safetensors"):
        load_pretrained(folder)


def test_files_that_are_not_what_they_should_be_raise_one_line(net, tmp_path):
    def message(folder):
        with pytest.raises(ValueError, match=r"\A.+\Z") as error:  # one line
            load_pretrained(folder)
        return str(error.value)

    assert "nowhere is not a folder" in message(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no weights" in message(tmp_path / "empty")
    folder = write(tmp_path / "x", contiguous(net), net.config.to_dict(), shards=3)
    file = folder / "part-1.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    assert "part-1.safetensors is cut short or damaged" in message(folder)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "part-1.safetensors is not a safetensors file" in message(folder)
    file.unlink()
    assert "names files that are not there: part-1.safetensors" in message(folder)
    file.write_bytes(content)
    index = folder / "model.safetensors.index.json"
    listed = index.read_text()
    index.write_text('{"weight_map": ["part-1.safetensors"]}')
    assert "index.json has no weight_map of tensors to their files; fetch it again" in message(folder)
    index.write_text(listed)
    for content in ("{", '{"a":' * 100_000):
        (folder / "config.json").write_text(content)
        assert "config.json is not JSON" in message(folder)
    for content in ("null", "[]", "3", "NaN"):
        (folder / "config.json").write_text(content)
        assert "config.json holds a JSON " in message(folder)
    (folder / "config.json").unlink()
    assert "config.json does not exist" in message(folder)


def test_bin_files_get_a_command_that_works(net, saved, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(net.config.to_dict()))
    tensors = rename(contiguous(net), "llava-hf")
    for i, half in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        torch.save({name: tensors[name] for name in half}, tmp_path / f"pytorch_model-{i}.bin")
    torch.save({"multi_modal_projector.linear_1.bias": torch.ones(64)}, tmp_path / "mm_projector.bin")  # a copy
    with pytest.raises(ValueError, match="which are pickles") as error:
        load_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    command = shlex.split(str(error.value).split("convert them once: ")[1])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert same_trees(load_pretrained(tmp_path, jnp.float32)[1], load_pretrained(saved, jnp.float32)[1])


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "text_config",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type: expected 'default', got 'linear'",
        ),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0}},
            "rope_type: expected 'default', got 'llama3'",
        ),
        ("text_config", {"attention_bias": True}, "attention_bias: expected False, got True"),
        ("text_config", {"mlp_bias": True}, "mlp_bias: expected False, got True"),
        ("text_config", {"head_dim": 32}, "head_dim: expected 16, got 32"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ("text_config", {"model_type": "mistral"}, "model_type: expected 'llama', got 'mistral'"),
        ("text_config", {"tie_word_embeddings": True}, "tie_word_embeddings: expected False, got True"),
        (None, {"tie_word_embeddings": True}, "tie_word_embeddings: expected False, got True"),
        (None, {"vision_feature_layer": -1}, "vision_feature_layer: expected -2, got -1"),
        (None, {"vision_feature_select_strategy": "full"}, "select_strategy: expected 'default', got 'full'"),
        (None, {"projector_hidden_act": "relu"}, "projector_hidden_act: expected 'gelu', got 'relu'"),
        (None, {"multimodal_projector_bias": False}, "multimodal_projector_bias: expected True, got False"),
        (None, {"image_token_index": 5}, "expected image_token_index to follow the vocabulary"),
        ("vision_config", {"hidden_act": "gelu"}, "hidden_act: expected 'quick_gelu', got 'gelu'"),
        ("vision_config", {"model_type": "siglip_vision_model"}, "expected 'clip_vision_model'"),
        (None, {"text_config": [1]}, "config.json: text_config is a JSON list, expected an object"),
        (None, {"vision_config": "x"}, "config.json: vision_config is a JSON str, expected an object"),
        (None, {"image_token_index": "x"}, "config.json: image_token_index is 'x', expected a whole number above 0"),
        ("text_config", {"num_attention_heads": 0}, "text_config.num_attention_heads is 0, expected a whole number"),
        ("text_config", {"hidden_size": 64.5}, "text_config.hidden_size is 64.5, expected a whole number above 0"),
        ("text_config", {"rms_norm_eps": "tiny"}, "text_config.rms_norm_eps is 'tiny', expected a number above 0"),
        ("text_config", {"rope_parameters": 3}, "config.json: rope_parameters is a JSON int, expected an object"),
        ("vision_config", {"patch_size": None}, "vision_config.patch_size is None, expected a whole number above 0"),
    ],
)
def test_a_config_of_another_model_raises(saved, tmp_path, part, change, message):
    shutil.copytree(saved, tmp_path / "x")
    config = json.loads((saved / "config.json").read_text())
    (config[part] if part else config).update(change)
    (tmp_path / "x/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type: expected 'mlp2x_gelu', got 'linear'"),
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer: expected -2, got -1"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature: expected 'patch', got 'cls_patch'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end: expected False, got True"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type: expected 'flat'"),
        ({"mm_hidden_size": 768}, "mm_hidden_size: expected 1024, got 768"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: expected 'default', got 'dynamic'"),
    ],
)
def test_an_original_config_of_another_model_raises(tmp_path, change, message):
    config = original_config() | {"mm_hidden_size": 1024} | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        hub_files.read_config(epath.Path(tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        # As published for llava-hf/llava-1.5-7b-hf: most of the shape is left to the defaults.
        {
            "model_type": "llava",
            "image_token_index": 32000,
            "text_config": {
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "rms_norm_eps": 1e-05,
                "torch_dtype": "float16",
                "vocab_size": 32064,
            },
            "vision_config": {
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "model_type": "clip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
            },
        },
        {"model_type": "llava"},
        {"model_type": "llava", "text_config": {"rope_theta": 7.0}, "vision_config": {"hidden_size": 96}},
        {"model_type": "llava", "text_config": {"num_attention_heads": 16, "rope_parameters": {"rope_theta": 9.0}}},
    ],
)
def test_what_a_config_leaves_out_is_what_transformers_fills_in(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    got, rows = hub_files.read_config(epath.Path(tmp_path))
    filled = transformers.LlavaConfig.from_dict(config)
    text, vision = filled.text_config, filled.vision_config
    assert rows == text.vocab_size
    assert got.text == LlamaConfig(
        vocab_size=filled.image_token_index,
        width=text.hidden_size,
        mlp_width=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        norm_eps=text.rms_norm_eps,
        rope_theta=text.rope_parameters.get("rope_theta", 10000.0),
        max_positions=text.max_position_embeddings,
    )
    assert got.vision == ClipConfig(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        width=vision.hidden_size,
        mlp_width=vision.intermediate_size,
        layers=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        norm_eps=vision.layer_norm_eps,
    )


def test_the_published_configs_are_our_7b_and_13b(tmp_path):
    flat = original_config(32000) | {"mm_hidden_size": 1024, "hidden_size": 4096, "intermediate_size": 11008}
    flat |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 32)
    flat |= {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "rope_theta": 10000.0, "rope_scaling": None}
    large = {"hidden_size": 5120, "intermediate_size": 13824}
    large |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 40)
    for config, expected in ((flat, LlavaConfig.llava7b()), (flat | large, LlavaConfig.llava13b())):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert hub_files.read_config(epath.Path(tmp_path)) == (expected, 32000)
    assert hub_files.padded_rows(32000) == 32064


# Out.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
def test_the_round_trip_is_bit_equal(tmp_path, dtype, max_shard_bytes):
    net = draw(dtype={jnp.bfloat16: torch.bfloat16, jnp.float32: torch.float32}[dtype])
    net.save_pretrained(tmp_path / "in")
    model, params = load_pretrained(tmp_path / "in", dtype)
    export_pretrained(model, params, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    got = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.stat().st_size < max_shard_bytes + 10_000
        got |= safetensors.torch.load_file(file)
    expected = rename(contiguous(net), "llava-hf")
    expected = {name.replace("vision_tower.", "vision_tower.vision_model.", 1): t for name, t in expected.items()}
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        real = VOCAB if "embed_tokens" in name or "lm_head" in name else len(tensor)
        assert got[name].shape == tensor.shape
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name][:real], tensor[:real]), name
        if real < len(tensor):  # rows that transformers drew at random become the mean of the real ones
            mean = tensor[:real].float().mean(0)
            rounding = float(jnp.finfo(dtype).eps)
            assert torch.allclose(got[name][real:].float(), mean[None], rtol=rounding, atol=1e-6)
    assert same_trees(load_pretrained(tmp_path / "out", dtype)[1], params)


def test_transformers_loads_the_llava_hf_export(net, saved, tmp_path):
    model, params = load_pretrained(saved, jnp.float32)
    export_pretrained(model, params, tmp_path / "out", max_shard_bytes=100_000)
    loaded, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), report
    assert loaded.dtype == torch.float32
    assert loaded.config.image_token_index == VOCAB
    assert (loaded.generation_config.eos_token_id, loaded.generation_config.pad_token_id) == (2, VOCAB + 1)
    assert same_logits(loaded.eval(), model, params)


def test_the_llava_export_is_the_original_layout(saved, tmp_path):
    """Its tensors, renamed by hand, fill a transformers model without padding rows, and give the same logits."""
    model, params = load_pretrained(saved, jnp.float32)
    export_pretrained(model, params, tmp_path / "out", "llava")
    tensors = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    assert "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight" in tensors
    tensors = {name.replace("vision_model.", ""): tensor for name, tensor in tensors.items()}
    tensors = rename(tensors, "llava", back=True)
    config = json.loads((tmp_path / "out/config.json").read_text())
    expected = original_config() | {"model_type": "llava_llama", "vocab_size": VOCAB, "hidden_act": "silu"}
    assert expected.items() <= config.items()
    bare = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT | {"num_key_value_heads": 2}),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=VOCAB - 1,
    )
    bare.text_config.vocab_size = VOCAB
    loaded = transformers.LlavaForConditionalGeneration(bare).eval()
    loaded.load_state_dict(tensors, strict=True)
    assert same_logits(loaded, model, params)
    reloaded_model, reloaded = load_pretrained(tmp_path / "out", jnp.float32)
    assert reloaded_model == model
    assert same_trees(reloaded, params)


def test_sharded_parameters_export_as_they_are(saved, tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def rule(leaf):
        axis = next((i for i, size in enumerate(leaf.shape) if size % 8 == 0), None)
        return NamedSharding(mesh, PartitionSpec(*("data" if i == axis else None for i in range(leaf.ndim))))

    model, params = load_pretrained(saved, jnp.float32, shardings=lambda shapes: jax.tree.map(rule, shapes))
    export_pretrained(model, params, tmp_path / "out")
    assert same_trees(load_pretrained(tmp_path / "out", jnp.float32)[1], params)


def test_a_bad_export_is_refused_and_a_killed_one_leaves_no_folder(saved, tmp_path, monkeypatch):
    model, params = load_pretrained(saved)
    with pytest.raises(ValueError, match="layout must be one of"):
        export_pretrained(model, params, tmp_path / "x", "transformers")
    with pytest.raises(ValueError, match="exists; expected a path"):
        export_pretrained(model, params, tmp_path.parent)
    adapted = params | {"lora": {"down": jnp.zeros(3)}}
    with pytest.raises(ValueError, match="lora/down: expected no such leaf"):
        export_pretrained(model, adapted, tmp_path / "x")
    other = params | {"projector": jax.tree.map(lambda x: x[:-1], params["projector"])}
    with pytest.raises(ValueError, match=r"projector/up/bias: expected \(64,\), got \(63,\)"):
        export_pretrained(model, other, tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "write_tensors", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_pretrained(model, params, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    export_pretrained(model, params, tmp_path / "x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


# The files beside the weights.


@pytest.fixture(scope="module")
def tokenizer():
    """Returns a tokenizer of 100 words, with BOS and EOS where Llama has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<unk>", "<s>", "</s>", "USER", "ASSISTANT", ":", "what", "?", *(f"w{i}" for i in range(VOCAB - 8))]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("as_folder", [False, True])
def test_the_processor_loads_and_pads_pictures(saved, tmp_path, tokenizer, as_folder):
    model, params = load_pretrained(saved, jnp.float32)
    given = tokenizer
    if as_folder:
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        given = tmp_path / "tokenizer"
    export_pretrained(model, params, tmp_path / "out", tokenizer=given)
    assert len(tokenizer) == VOCAB  # the caller's own is as it was
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.convert_tokens_to_ids(["<image>", "<pad>"]) == [VOCAB, VOCAB + 1]
    assert (loaded.pad_token_id, loaded.padding_side) == (VOCAB + 1, "left")
    pictures = transformers.LlavaImageProcessorPil.from_pretrained(tmp_path / "out")
    assert pictures.do_pad is True
    wide = np.random.default_rng(0).integers(0, 255, (20, 45, 3), dtype=np.uint8)
    padded = np.full((45, 45, 3), (122, 116, 104), np.uint8)
    padded[12:32] = wide
    padded = np.asarray(Image.fromarray(padded).resize((28, 28), Image.Resampling.BICUBIC)) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = (padded - np.array(mean)[None, None]) / np.array(std)[None, None]
    got = pictures(Image.fromarray(wide), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(got, expected, atol=1e-5)

    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert (processor.patch_size, processor.num_additional_image_tokens) == (7, 1)
    assert processor.vision_feature_select_strategy == "default"
    assert processor.image_processor.do_pad is True
    both = processor(images=Image.fromarray(wide), text="USER: <image>\nwhat? ASSISTANT:", return_tensors="np")
    assert (both["input_ids"] == VOCAB).sum() == 16
    assert both["input_ids"][0, 0] == 1


HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


@pytest.mark.parametrize("of", ["tokenizer", "processor"])
def test_the_chat_template_renders_llava_v1(saved, tmp_path, tokenizer, of):
    model, params = load_pretrained(saved, jnp.float32)
    export_pretrained(model, params, tmp_path / "out", tokenizer=tokenizer)
    auto = transformers.AutoTokenizer if of == "tokenizer" else transformers.AutoProcessor
    renderer = auto.from_pretrained(tmp_path / "out")

    def render(*messages, ask=True):
        messages = [{"role": role, "content": content} for role, content in messages]
        return renderer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)

    parts = [{"type": "text", "text": "what?"}, {"type": "image"}]
    expected = f"{HUMAN} USER: <image>\nwhat? ASSISTANT:"
    assert render(("user", "<image>\nwhat?")) == expected
    assert render(("user", parts)) == expected
    assert render(("user", "what?"), ("assistant", "w1"), ask=False) == f"{HUMAN} USER: what? ASSISTANT: w1</s>"
    turns = ("user", parts), ("assistant", [{"type": "text", "text": "w1"}]), ("user", " w2\n")
    assert render(*turns) == f"{HUMAN} USER: <image>\nwhat? ASSISTANT: w1</s>USER:  w2\n ASSISTANT:"
    assert render(("system", "Be brief."), ("user", "what?")) == "Be brief. USER: what? ASSISTANT:"


def test_the_original_layout_takes_the_tokenizer_unchanged(saved, tmp_path, tokenizer):
    model, params = load_pretrained(saved, jnp.float32)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer/tokenizer.model").write_bytes(b"sentences")
    export_pretrained(model, params, tmp_path / "out", "llava", tokenizer=tmp_path / "tokenizer")
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"sentences"
    assert len(transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")) == VOCAB


def test_a_tokenizer_of_another_size_is_refused(saved, tmp_path, tokenizer):
    model, params = load_pretrained(saved, jnp.float32)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    longer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    longer.add_tokens(["another"])
    with pytest.raises(ValueError, match="does not fit the model's vocabulary of 100"):
        export_pretrained(model, params, tmp_path / "out", tokenizer=longer)
    assert not (tmp_path / "out").exists()
