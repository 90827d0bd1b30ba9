"""How well a text fits a picture, by a whole CLIP checkpoint: both towers to their ends, and the projections."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from napo_jax import hub_files, tensor_files
from napo_jax.data.images import normalise
from napo_jax.data.prompts import load_tokenizer
from napo_jax.models.clip import ClipConfig, ClipLayer, LayerNorm

# Our name of a layer's part -> that of the checkpoint.
_LAYER = {
    "attention_norm": "layer_norm1",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_IGNORED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids", "logit_scale")
_BATCH = 64  # texts computed at a time


class _Tower(NamedTuple):
    """The shape of a tower's layers, as `ClipLayer` reads it."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    norm_eps: float


@dataclasses.dataclass(frozen=True)
class ClipPair:
    """A CLIP model; its parameters are a plain dict."""

    vision: ClipConfig
    text: _Tower
    params: dict
    tokenizer: object
    tokens: int  # the most of a text, its first and last one included

    def images(self, pictures) -> np.ndarray:
        """Returns the embeddings of pictures uint8[B, I, I, 3], as unit vectors float32[B, D]."""
        return np.asarray(_embed_pictures(self.vision, self.params["vision"], pictures))

    def texts(self, texts) -> np.ndarray:
        """Returns the embeddings of texts, as unit vectors float32[N, D]; a long text is cut."""
        texts = list(texts)
        ids = self.tokenizer(texts, truncation=True, max_length=self.tokens).input_ids if texts else []
        found = []
        for start in range(0, len(ids), _BATCH):
            some = ids[start : start + _BATCH]
            padded, ends = np.zeros((_BATCH, self.tokens), np.int32), np.zeros(_BATCH, np.int32)
            for row, each in enumerate(some):
                padded[row, : len(each)], ends[row] = each, len(each) - 1
            found.append(np.asarray(_embed_texts(self.text, self.params["text"], padded, ends))[: len(some)])
        return np.concatenate(found) if found else np.zeros((0, self.params["text"]["projection"].shape[1]), np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _embed_pictures(config, params, pictures):
    size, side = config.patch_size, config.image_size // config.patch_size
    patches = normalise(pictures).reshape(-1, side, size, side, size, 3).transpose(0, 1, 3, 2, 4, 5)
    x = patches.reshape(-1, side * side, size * size * 3) @ params["patch"]
    first = jnp.broadcast_to(params["class"], (x.shape[0], 1, x.shape[-1]))
    x = jnp.concatenate([first, x], axis=1) + params["positions"][None]
    x = _norm(config, params["pre_norm"], x)
    return _unit(_norm(config, params["norm"], _layers(config, params["layers"], x)[:, 0]) @ params["projection"])


@functools.partial(jax.jit, static_argnums=0)
def _embed_texts(config, params, ids, ends):
    x = params["tokens"][ids] + params["positions"][None, : ids.shape[1]]
    x = _layers(config, params["layers"], x, causal=True)
    x = jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0]  # what comes behind the end is not seen from there
    return _unit(_norm(config, params["norm"], x) @ params["projection"])


def _layers(config, params, x, causal=False):
    layer = ClipLayer(config, causal=causal)
    return jax.lax.scan(lambda x, one: (layer.apply({"params": one}, x), None), x, params)[0]


def _norm(config, params, x):
    squeezed = x[:, None] if x.ndim == 2 else x
    return LayerNorm(config.norm_eps).apply({"params": params}, squeezed).reshape(x.shape)


def _unit(x):
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))


def load_clip(path) -> ClipPair:
    """Loads a CLIP checkpoint, such as openai/clip-vit-large-patch14-336, in float32; raises one line if it is none.

    Args:
      path: a folder with config.json, safetensors and a tokenizer, local or gs://.
    """
    folder = epath.Path(path)
    config = hub_files.read_json(folder / "config.json")
    if config.get("model_type") != "clip":
        raise ValueError(f"{folder}/config.json is of the type {config.get('model_type')!r}; expected that of a CLIP")
    vision, text = _shape(folder, config, "vision"), _shape(folder, config, "text")
    tensors = dict(entry for file in tensor_files.weight_files(folder) for entry in tensor_files.read_header(file))
    read = _Reader(folder, tensors)
    patch = read("vision_model.embeddings.patch_embedding.weight")
    params = {
        "vision": {
            "patch": patch.transpose(2, 3, 1, 0).reshape(-1, patch.shape[0]),
            "class": read("vision_model.embeddings.class_embedding"),
            "positions": read("vision_model.embeddings.position_embedding.weight"),
            "pre_norm": read.norm("vision_model.pre_layrnorm"),  # CLIP's own spelling
            "layers": read.layers("vision_model", vision["num_hidden_layers"]),
            "norm": read.norm("vision_model.post_layernorm"),
            "projection": read("visual_projection.weight").T,
        },
        "text": {
            "tokens": read("text_model.embeddings.token_embedding.weight"),
            "positions": read("text_model.embeddings.position_embedding.weight"),
            "layers": read.layers("text_model", text["num_hidden_layers"]),
            "norm": read.norm("text_model.final_layer_norm"),
            "projection": read("text_projection.weight").T,
        },
    }
    if unknown := sorted(tensors.keys() - read.seen - set(_IGNORED)):
        raise ValueError(f"{folder} has tensors that no CLIP has, such as {', '.join(unknown[:3])}")
    return ClipPair(
        ClipConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            **_tower(vision)._asdict(),
        ),
        _tower(text),
        jax.device_put(params),
        load_tokenizer(folder),
        text["max_position_embeddings"],
    )


# What `transformers` takes where config.json is silent.
_SILENT = {
    "vision": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
    },
    "text": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
    },
}


def _shape(folder, config, part):
    shape = _SILENT[part] | {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"} | (config.get(f"{part}_config") or {})
    if (act := shape["hidden_act"]) != "quick_gelu":
        raise ValueError(f"{folder}/config.json: {part}_config.hidden_act: expected 'quick_gelu', got {act!r}")
    return shape


def _tower(shape):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
    return _Tower(*(shape[name] for name in names))


class _Reader:
    """Reads tensors by name, and knows which."""

    def __init__(self, folder, tensors):
        self._folder, self._tensors, self.seen = folder, tensors, set()

    def __call__(self, name):
        if name not in self._tensors:
            raise ValueError(f"{self._folder} has no tensor {name}; expected a whole CLIP, with both towers")
        self.seen.add(name)
        return self._tensors[name].read().astype(np.float32)

    def norm(self, name):
        return {"scale": self(f"{name}.weight"), "bias": self(f"{name}.bias")}

    def dense(self, name):
        return {"kernel": self(f"{name}.weight").T, "bias": self(f"{name}.bias")}

    def layers(self, tower, count):
        """Reads all layers of a tower, one behind the other in each leaf."""
        one = lambda number: {
            ours: (self.norm if ours.endswith("norm") else self.dense)(f"{tower}.encoder.layers.{number}.{theirs}")
            for ours, theirs in _LAYER.items()
        }
        return jax.tree.map(lambda *leaves: np.stack(leaves), *map(one, range(count)))
