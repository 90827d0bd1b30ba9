"""Hugging Face checkpoints to parameters and back: one key table for both ways, strict in both."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from napo_jax import hub_files, tensor_files
from napo_jax.models.llava import Llava
from napo_jax.models.lora import LoraConfig, merge_adapters
from napo_jax.optim import flatten, unflatten
from napo_jax.reward_head import FILE, is_reward_head, write_head

# Path in the parameter tree (a regex) -> name in a file. The first word of a name is a part, which `_LAYOUTS` places;
# `*` is the layer; `kernel` and `scale` at the end are `weight` to torch.
_KEYS = (
    (r"language/embedding", r"text.embed_tokens.weight"),
    (r"language/head", r"head.weight"),
    (r"language/norm/scale", r"text.norm.scale"),
    (r"language/layers/attention_norm/scale", r"text.layers.*.input_layernorm.scale"),
    (r"language/layers/mlp_norm/scale", r"text.layers.*.post_attention_layernorm.scale"),
    # query, key, value and out, by their first letters
    (r"language/layers/attention/([qkvo])\w+/kernel", r"text.layers.*.self_attn.\1_proj.kernel"),
    (r"language/layers/mlp/(gate|up|down)/kernel", r"text.layers.*.mlp.\1_proj.kernel"),
    (r"projector/(up|down)/(kernel|bias)", r"\1.\2"),
    (r"reward/(kernel|bias)", r"reward.\1"),  # in a file of its own
    (r"vision/class_embedding", r"vision.embeddings.class_embedding"),
    (r"vision/position_embedding", r"vision.embeddings.position_embedding.weight"),
    (r"vision/patch/kernel", r"vision.embeddings.patch_embedding.kernel"),
    (r"vision/pre_norm/(scale|bias)", r"vision.pre_layrnorm.\1"),  # CLIP's own spelling
    (r"vision/(?:layers|unused/layer)/attention_norm/(scale|bias)", r"vision.encoder.layers.*.layer_norm1.\1"),
    (r"vision/(?:layers|unused/layer)/([qkv])\w+/(kernel|bias)", r"vision.encoder.layers.*.self_attn.\1_proj.\2"),
    (r"vision/(?:layers|unused/layer)/out/(kernel|bias)", r"vision.encoder.layers.*.self_attn.out_proj.\1"),
    (r"vision/(?:layers|unused/layer)/mlp_norm/(scale|bias)", r"vision.encoder.layers.*.layer_norm2.\1"),
    (r"vision/(?:layers|unused/layer)/up/(kernel|bias)", r"vision.encoder.layers.*.mlp.fc1.\1"),
    (r"vision/(?:layers|unused/layer)/down/(kernel|bias)", r"vision.encoder.layers.*.mlp.fc2.\1"),
    (r"vision/unused/post_norm/(scale|bias)", r"vision.post_layernorm.\1"),
)

# Where the parts stand. `vision_model.` is written where the layout has it and is optional where it is read.
_LAYOUTS = {
    "llava-hf": {  # huggingface.co/llava-hf, on disk
        "text": "language_model.model",
        "head": "language_model.lm_head",
        "up": "multi_modal_projector.linear_1",
        "down": "multi_modal_projector.linear_2",
        "vision": "vision_tower.vision_model",
        "reward": "reward_head",
    },
    "transformers": {  # a `state_dict()` of transformers 5
        "text": "model.language_model",
        "head": "lm_head",
        "up": "model.multi_modal_projector.linear_1",
        "down": "model.multi_modal_projector.linear_2",
        "vision": "model.vision_tower.vision_model",
        "reward": "reward_head",
    },
    "llava": {  # huggingface.co/liuhaotian, the original code
        "text": "model",
        "head": "lm_head",
        "up": "model.mm_projector.0",
        "down": "model.mm_projector.2",
        "vision": "model.vision_tower.vision_tower.vision_model",
        "reward": "reward_head",
    },
}
EXPORT_LAYOUTS = ("llava-hf", "llava")

_IGNORED = re.compile(r".*\.inv_freq|(.*\.)?position_ids")  # constants that old versions saved
_NOT_THE_TOWER = re.compile(r"text_model\..*|(text|visual)_projection\..*|logit_scale")  # the rest of a whole CLIP


def load_pretrained(path, dtype=jnp.bfloat16, mesh=None, *, shardings=None, dtypes=None, vision_tower=None, **options):
    """Loads a LLaVA-1.5 checkpoint in any of the three layouts: llava-hf, a transformers state dict, or the original.

    Each leaf goes from the file to its devices before the next is read, and a process holds no more of it than its
    devices do. Rows of padding behind the vocabulary are left out, for a softmax would count them.

    Args:
      path: a folder with config.json and safetensors, local or `gs://`.
      dtype: of the activations, and of the parameters unless `param_dtype` is given.
      mesh: where every leaf is replicated. None is the default device, uncommitted as if just computed.
      shardings: instead of that, a tree of shardings like the parameters, or a function that makes it of their
        shapes: `lambda shapes: jax.tree.map(..., shapes)`.
      dtypes: {path: dtype} of leaves that are not to have `param_dtype`, such as `language/head`.
      vision_tower: a folder with the CLIP checkpoint that holds the tower, for the original layout, which has none.
      **options: fields of `LlavaConfig` that say how to compute, such as `attention`, `remat` and `logits_chunk`; and
        `reward_head`, for a reward model with its head.

    Returns:
      The `Llava`, and its parameters as `Llava.init` would return them.
    """
    if options.get("lora", LoraConfig()).rank:
        raise ValueError("a checkpoint holds no LoRA adapters: load it without `lora`, and draw them beside it")
    folder, tower = epath.Path(path), None if vision_tower is None else epath.Path(vision_tower)
    tensors = _read_headers(folder)
    config, rows = hub_files.read_config(folder, tower, **{"dtype": dtype, "param_dtype": dtype} | options)
    layout = _find_layout(folder, tensors)
    if tower is not None:
        tensors |= _read_tower(folder, tower, tensors, layout)
    shapes = _shapes(config)
    dtypes = dtypes or {}
    leaves = [
        dataclasses.replace(leaf, dtype=np.dtype(dtypes.get(leaf.path, leaf.dtype)))
        for leaf in _leaves(shapes, config, layout, rows)
    ]
    if config.reward_head and (folder / FILE).exists():
        tensors |= {f"reward_head.{name}": tensor for name, tensor in tensor_files.read_header(folder / FILE)}
    _check(folder, leaves, tensors)

    if shardings is None:
        place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        shardings = [place] * len(leaves)
    else:
        shardings = shardings(shapes) if callable(shardings) else shardings
        shardings = jax.tree.leaves(jax.tree.map(lambda _, sharding: sharding, shapes, shardings))
    arrays = [_load_leaf(leaf, tensors, sharding) for leaf, sharding in zip(leaves, shardings, strict=True)]
    return Llava(config), jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def export_pretrained(model, params, path, layout="llava-hf", *, tokenizer=None, max_shard_bytes=5 * 10**9):
    """Writes a checkpoint that `transformers` ("llava-hf") or the original code ("llava") loads.

    "llava-hf" has rows for <image> and <pad> and then to a multiple of 64, each the mean of the real rows; it gets a
    processor that pads pictures to a square, and a chat template for `llava_v1`. "llava" has the real rows alone, and
    the tower, which its release leaves out. A reward head gets a file of its own. The folder appears when it is whole.

    Args:
      model: the `Llava`.
      params: its parameters, each saved in the dtype it has; LoRA adapters are added to their matrices.
      path: the folder to make; one that holds something is refused.
      layout: "llava-hf" or "llava".
      tokenizer: a folder, or a tokenizer of `transformers`, whose files are to go along.
      max_shard_bytes: the weights are split into files of at most this size, and an index.
    """
    if layout not in EXPORT_LAYOUTS:
        raise ValueError(f"layout must be one of {EXPORT_LAYOUTS}, got {layout!r}")
    check_new(path)
    arrays = _match(_shapes(model.config), params)
    if model.config.lora.rank:
        params = flatten(jax.tree.map(jnp.asarray, params))
        merge_adapters(params, model.config.lora)
        model, arrays = model.without_adapters, jax.tree.leaves(unflatten(params))
    config, shapes = model.config, _shapes(model.config)
    vocab_size = config.text.vocab_size
    rows = hub_files.padded_rows(vocab_size) if layout == "llava-hf" else vocab_size
    leaves = [
        dataclasses.replace(leaf, dtype=array.dtype)
        for leaf, array in zip(_leaves(shapes, config, layout, rows), arrays, strict=True)
    ]
    dtype = next(leaf.dtype for leaf in leaves if leaf.path == "language/embedding")
    with new_folder(path) as folder:
        hub_files.write_files(folder, config, layout, dtype, tokenizer)
        write_head(folder, {leaf.path: array for leaf, array in zip(leaves, arrays, strict=True)})
        model_own = [pair for pair in zip(leaves, arrays, strict=True) if not is_reward_head(pair[0].path)]
        _write_weights(folder, *zip(*model_own, strict=True), max_shard_bytes)


def check_new(path):
    """Raises one line if there is a file at a path, or a folder that holds something."""
    folder = epath.Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists; expected a path where a new folder can be made")


@contextlib.contextmanager
def new_folder(path):
    """Gives an empty folder to fill, which appears at its path when that is done."""
    check_new(path)
    folder = epath.Path(path)
    partial = folder.parent / f"{folder.name}.partial"
    if partial.exists():
        partial.rmtree()  # of an export that was killed
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)


# The key table, applied.


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf of the parameter tree and the tensors that it is made of."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    names: tuple[str, ...]  # one for each layer of a stacked leaf, else one
    tensor_shape: tuple[int, ...]  # of each tensor in the file

    @property
    def stacked(self):
        return "/layers/" in self.path


def _shapes(config):
    # The attention backend has no parameters, but some refuse the made-up shapes of an init.
    return jax.eval_shape(Llava(dataclasses.replace(config, attention="xla")).init, jax.random.key(0))


def _paths(tree):
    return ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _leaves(shapes, config, layout, rows):
    leaves = []
    for path, leaf in zip(_paths(shapes), jax.tree.leaves(shapes), strict=True):
        stacked = "/layers/" in path
        # Flax stacks all layers of the tower but its last, which stands alone.
        layers = range(leaf.shape[0]) if stacked else [config.vision.layers - 1]
        names = tuple(tensor_name(path, layer, layout) for layer in layers)
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = list(_to_torch(path, np.broadcast_to(np.float32(0), shape), config.vision.patch_size).shape)
        if path in ("language/embedding", "language/head"):
            shape[0] = rows
        leaves.append(_Leaf(path, leaf.shape, leaf.dtype, names, tuple(shape)))
    return leaves


def tensor_name(path, layer, layout):
    """Returns the name of one layer of a leaf in a layout."""
    pattern, template = next(row for row in _KEYS if re.fullmatch(row[0], path))
    part, _, rest = re.fullmatch(pattern, path).expand(template).replace("*", str(layer)).partition(".")
    return re.sub(r"(kernel|scale)$", "weight", f"{_LAYOUTS[layout][part]}.{rest}")


def _to_torch(path, x, patch_size):
    """Arranges one layer of a leaf as torch stores it; a view."""
    if path == "vision/patch/kernel":  # [I I 3, D] to [D, 3, I, I]
        return x.reshape(patch_size, patch_size, 3, -1).transpose(3, 2, 0, 1)
    return x.T if path.endswith(("kernel", "language/head")) else x


def _from_torch(path, x):
    """Undoes `_to_torch`."""
    if path == "vision/patch/kernel":
        return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])
    return x.T if path.endswith(("kernel", "language/head")) else x


# Reading.


def _bare(name):
    return name.replace("vision_model.", "", 1)


def _read_headers(folder):
    """Returns name -> tensor_files.Tensor of all tensors in a folder, names without `vision_model.`."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected that of a Hugging Face checkpoint")
    tensors = {}
    for file in tensor_files.weight_files(folder):
        for name, tensor in tensor_files.read_header(file):
            if tensors.setdefault(_bare(name), tensor) is not tensor:
                raise ValueError(f"{name} stands in {tensors[_bare(name)].file} and in {file}; expected it once")
    return tensors


def _find_layout(folder, tensors):
    witness = {tensor_name("language/embedding", 0, layout): layout for layout in _LAYOUTS}
    found = [layout for name, layout in witness.items() if name in tensors]
    if len(found) != 1:
        raise ValueError(
            f"{folder} is in no layout known here: expected one of {', '.join(witness)}, got {len(tensors)} tensors "
            f"such as {', '.join(sorted(tensors)[:3])}"
        )
    return found[0]


def _read_tower(folder, tower, tensors, layout):
    prefix = _bare(_LAYOUTS[layout]["vision"] + ".")
    if any(name.startswith(prefix) for name in tensors):
        raise ValueError(f"{folder} has a vision tower of its own; expected no vision_tower, got {tower}")
    return {prefix + name: t for name, t in _read_headers(tower).items() if not _NOT_THE_TOWER.fullmatch(name)}


def _check(folder, leaves, tensors):
    """Raises one ValueError for all tensors that are unknown, missing, or of another shape or kind."""
    expected = {_bare(name): (name, leaf.tensor_shape) for leaf in leaves for name in leaf.names}
    wrong = []
    for key in sorted(expected.keys() | tensors.keys()):
        name, shape = expected.get(key, (key, None))
        got = tensors.get(key)
        if shape is None and not _IGNORED.fullmatch(key):
            wrong.append(f"{name}: expected no such tensor, got {got.dtype} {list(got.shape)}")
        elif shape is not None and got is None:
            wrong.append(f"{name}: expected {list(shape)}, got none")
        elif shape is not None and (got.shape != shape or got.dtype not in tensor_files.DTYPES):
            wrong.append(
                f"{name}: expected {'/'.join(tensor_files.DTYPES)} {list(shape)}, got {got.dtype} {list(got.shape)}"
            )
    if wrong:
        hint = "; is the tower in a CLIP checkpoint of its own? Then give its folder as vision_tower"
        no_tower = all("vision_tower" in line and line.endswith("got none") for line in wrong)
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(
            f"{folder} does not hold this model's weights: " + "; ".join(wrong[:8]) + more + hint * no_tower
        )


def _load_leaf(leaf, tensors, sharding):
    """Reads a leaf layer by layer into the pieces that the local devices hold, and hands them over."""
    if sharding is None:
        indices = {None: (slice(None),) * len(leaf.shape)}
    else:
        indices = sharding.addressable_devices_indices_map(leaf.shape)
    # Devices that hold the same piece share it.
    ranges = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        for device, index in indices.items()
    }
    pieces = {key: _aligned_empty([stop - start for start, stop in key], leaf.dtype) for key in set(ranges.values())}
    for layer, name in enumerate(leaf.names):
        wanted = [(key, piece) for key, piece in pieces.items() if not leaf.stacked or layer in range(*key[0])]
        tensor = _from_torch(leaf.path, tensors[_bare(name)].read()) if wanted else None
        for key, piece in wanted:
            target = piece[layer - key[0][0]] if leaf.stacked else piece
            _copy(target, tensor[tuple(slice(*part) for part in (key[1:] if leaf.stacked else key))])
    arrays = [jax.device_put(pieces[key], device) for device, key in ranges.items()]
    return arrays[0] if sharding is None else jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _aligned_empty(shape, dtype):
    """Returns memory that JAX on CPU takes over as it is; what numpy allocates it would copy."""
    size, alignment = int(np.prod(shape)) * dtype.itemsize, 64
    memory = np.empty(size + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)


def _copy(target, source):
    """Copies and converts in strips, so that a transposition stays in the cache: less than half the time."""
    for start in range(0, source.shape[-1], 64):
        target[..., start : start + 64] = source[..., start : start + 64]


# Writing.


def _match(shapes, params):
    """Returns the leaves of `params`; raises if their paths or shapes are not the model's."""
    expected = dict(zip(_paths(shapes), (leaf.shape for leaf in jax.tree.leaves(shapes)), strict=True))
    got = dict(zip(_paths(params), (leaf.shape for leaf in jax.tree.leaves(params)), strict=True))
    wrong = [
        f"{path}: expected {expected.get(path, 'no such leaf')}, got {got.get(path, 'none')}"
        for path in sorted(expected.keys() | got.keys())
        if expected.get(path) != got.get(path)
    ]
    if wrong:
        raise ValueError(f"params are not this model's ({len(wrong)} leaves): " + "; ".join(wrong[:8]))
    arrays = jax.tree.leaves(params)
    if any(isinstance(array, jax.Array) and not array.is_fully_addressable for array in arrays):
        raise ValueError("params are spread over processes; expected all of them on this process's devices")
    return arrays


def _write_weights(folder, leaves, arrays, max_shard_bytes):
    """Writes safetensors, and their index if there are several; holds one tensor at a time."""
    shards, sizes = [[]], [0]
    for leaf, array in zip(leaves, arrays, strict=True):
        size = int(np.prod(leaf.tensor_shape)) * leaf.dtype.itemsize
        for layer, name in enumerate(leaf.names):
            if shards[-1] and sizes[-1] + size > max_shard_bytes:
                shards.append([])
                sizes.append(0)
            shards[-1].append((name, leaf, array, layer))
            sizes[-1] += size
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = ["model.safetensors"] if len(shards) == 1 else files
    for file, shard in zip(files, shards, strict=True):
        specs = {name: (leaf.dtype, leaf.tensor_shape) for name, leaf, _, _ in shard}
        tensor_files.write_tensors(folder / file, specs, (_tensor_of(*entry[1:]) for entry in shard))
    if len(files) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name, *_ in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        hub_files.write_json(folder / "model.safetensors.index.json", index)


def _tensor_of(leaf, array, layer):
    """Fetches one layer of a leaf and arranges it for torch, with rows of padding if the file has more."""
    # Of a copy, for a jax.Array keeps what it once gave to the host, which would pile up to a second model.
    part = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False) if leaf.stacked else jnp.copy(array)
    part = _to_torch(leaf.path, np.asarray(part), leaf.tensor_shape[-1])
    tensor = np.empty(leaf.tensor_shape, leaf.dtype)
    _copy(tensor[: len(part)], part)
    if len(part) < len(tensor):
        tensor[len(part) :] = part.mean(axis=0, dtype=np.float32)
    return tensor
