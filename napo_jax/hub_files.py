"""The files around the weights of a Hugging Face checkpoint: config, tokenizer, processor, chat template.

Configs are read by explicit code and not by `transformers`, which would import torch where there is one. Where a file
is silent, the defaults are those of `transformers`; a test compares the two.
"""

import json
import os
import reprlib
import tempfile

import jax.numpy as jnp
from etils import epath

from napo_jax.models import LlavaConfig
from napo_jax.models.clip import ClipConfig
from napo_jax.models.llama import LlamaConfig

_MOST = 2**31  # and beyond of what a config counts
# Our field -> the field in a config.json and what `transformers` takes where a file has none.
_TEXT_FIELDS = {
    "vocab_size": ("vocab_size", 32000),
    "width": ("hidden_size", 4096),
    "mlp_width": ("intermediate_size", 11008),
    "layers": ("num_hidden_layers", 32),
    "heads": ("num_attention_heads", 32),
    "kv_heads": ("num_key_value_heads", None),  # as many as heads
    "norm_eps": ("rms_norm_eps", 1e-6),
    "rope_theta": ("rope_theta", 10000.0),
    "max_positions": ("max_position_embeddings", 2048),
}
_VISION_FIELDS = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 32),
    "width": ("hidden_size", 768),
    "mlp_width": ("intermediate_size", 3072),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "norm_eps": ("layer_norm_eps", 1e-5),
}
# What `Llava` computes and no field of ours can change: read, it must be so; written, it is stated.
_TEXT_FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_VISION_FIXED = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "num_channels": 3}
_LLAVA_FIXED = {
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}
_ORIGINAL_FIXED = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_patch_merge_type": "flat",
}

# Renders the prompt `llava_v1`. Content may be a string, in which the caller has written <image>, or a list of parts,
# whose pictures come first, as in training. There is no BOS: whoever tokenises the text adds it.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}{{ render(messages[0]['content']) }}
{%- else -%}
{{ 'A chat between a curious human and an artificial intelligence assistant. ' }}
{{- "The assistant gives helpful, detailed, and polite answers to the human's questions." }}
{%- endif -%}
{{ ' ' }}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'USER: ' + render(message['content']) + ' ' }}
{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' + render(message['content']) + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def padded_rows(vocab_size):
    """Returns the rows of embedding and head in the llava-hf layout: room for <image> and <pad>, a multiple of 64."""
    return -(-(vocab_size + 2) // 64) * 64


def read_json(file):
    """Reads a JSON object; a file that is missing or is something else raises one line."""
    if not file.exists():
        raise ValueError(f"{file} does not exist; expected it in the folder of a Hugging Face checkpoint")
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, expected an object")
    return content


def read_config(folder, vision_tower=None, **options):
    """Reads config.json of either layout.

    Args:
      folder: epath.Path of the checkpoint.
      vision_tower: epath.Path of the CLIP checkpoint that holds the tower, or None.
      **options: the fields of `LlavaConfig` that say how to compute.

    Returns:
      The LlavaConfig, with the vocabulary that has a meaning, and the rows that embedding and head have in the files.
    """
    whole = read_json(folder / "config.json")
    original = any(key.startswith("mm_") for key in whole)
    # The original layout is a LLaMA config with `mm_` fields; its vocabulary has no row for the image.
    text = whole | {"model_type": "llama"} if original else _object_in(whole, "text_config", folder)
    vision = _object_in(whole, "vision_config", folder)
    if vision_tower is not None:
        vision = read_json(vision_tower / "config.json")
        vision = _object_in(vision, "vision_config", vision_tower) or vision
    if not vision:  # no word on the tower means LLaVA-1.5's, openai/clip-vit-large-patch14-336
        vision = _vision_fields(ClipConfig())
    text = dict(_TEXT_FIELDS.values()) | text
    vision = dict(_VISION_FIELDS.values()) | vision

    ropes = [_object_in(text, name, folder) for name in ("rope_parameters", "rope_scaling")]  # of versions 5 and 4
    rope_types = [rope.get("rope_type", rope.get("type", "default")) for rope in ropes]
    text["num_key_value_heads"] = text["num_key_value_heads"] or text["num_attention_heads"]
    text["rope_theta"] = ropes[0].get("rope_theta", text["rope_theta"])
    _check_numbers(folder, "text_config.", text, _TEXT_FIELDS)
    _check_numbers(folder, "vision_config.", vision, _VISION_FIELDS)
    head_width = text["hidden_size"] // text["num_attention_heads"]
    checks = [("text_config.", _TEXT_FIXED, text), ("vision_config.", _VISION_FIXED, vision)]
    if original:
        projector = {"mm_projector_type": "linear"}  # what the original code takes where a file has none
        checks += [("", _ORIGINAL_FIXED | {"mm_hidden_size": vision["hidden_size"]}, projector | whole)]
    else:
        checks += [("", _LLAVA_FIXED, whole)]
    checks += [
        ("text_config.", {"head_dim": head_width}, {"head_dim": text.get("head_dim") or head_width}),
        *(("text_config.", {"rope_type": "default"}, {"rope_type": rope_type}) for rope_type in rope_types),
    ]
    wrong = [
        f"{prefix}{name}: expected {want!r}, got {found[name]!r}"
        for prefix, fixed, found in checks
        for name, want in fixed.items()
        if name in found and found[name] != want
    ]
    if wrong:
        raise ValueError(f"{folder}/config.json describes a model that this code cannot compute: " + "; ".join(wrong))

    rows = text["vocab_size"]
    vocab_size = rows if original else whole.get("image_token_index", 32000)
    _check_numbers(folder, "", {"image_token_index": vocab_size}, {"": ("image_token_index", 32000)})
    if not vocab_size <= rows <= padded_rows(vocab_size):
        raise ValueError(
            f"{folder}/config.json: expected image_token_index to follow the vocabulary, so for {vocab_size} a "
            f"vocab_size of {vocab_size} to {padded_rows(vocab_size)}, got {rows}"
        )
    text["vocab_size"] = vocab_size
    text = LlamaConfig(**{ours: text[name] for ours, (name, _) in _TEXT_FIELDS.items()})
    vision = ClipConfig(**{ours: vision[name] for ours, (name, _) in _VISION_FIELDS.items()})
    return LlavaConfig(text=text, vision=vision, **options), rows


def _object_in(whole, name, folder):
    """Returns the object in a config.json that has a name, an empty one if it is not there."""
    found = whole.get(name) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{folder}/config.json: {name} is a JSON {type(found).__name__}, expected an object")
    return found


def _check_numbers(folder, prefix, found, fields):
    """Raises if a field that is read is not a number above 0, or not a whole one where that is due."""
    for name, usual in fields.values():
        kinds = (int, float) if isinstance(usual, float) else (int,)
        if type(found[name]) not in kinds or not 0 < found[name] < _MOST:
            wanted = "number" if float in kinds else "whole number"
            got = reprlib.repr(found[name])
            raise ValueError(f"{folder}/config.json: {prefix}{name} is {got}, expected a {wanted} above 0")


def _vision_fields(vision):
    return _VISION_FIXED | {name: getattr(vision, ours) for ours, (name, _) in _VISION_FIELDS.items()}


def write_files(folder, config, layout, dtype, tokenizer=None):
    """Writes everything but the weights.

    Args:
      folder: epath.Path of the new checkpoint.
      config: the LlavaConfig.
      layout: "llava-hf" or "llava".
      dtype: of the weights.
      tokenizer: a folder, or a tokenizer of `transformers`; None writes no tokenizer, and BOS 1 and EOS 2 as Llama has.
    """
    bos, eos = (1, 2) if tokenizer is None else _write_tokenizer(folder, tokenizer, config.text.vocab_size, layout)
    text = _TEXT_FIXED | {name: getattr(config.text, ours) for ours, (name, _) in _TEXT_FIELDS.items()}
    text |= {"bos_token_id": bos, "eos_token_id": eos}
    vision = _vision_fields(config.vision)
    if layout == "llava-hf":
        pad = config.text.vocab_size + 1
        whole = _LLAVA_FIXED | {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "text_config": text | {"vocab_size": padded_rows(config.text.vocab_size)},
            "image_token_index": config.text.vocab_size,
            "image_seq_length": config.vision.image_tokens,
        }
        _write_processor(folder, config.vision)
    else:
        pad = 0  # <unk>, with which the original code pads
        whole = text | _ORIGINAL_FIXED
        whole |= {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava_llama",
            "image_aspect_ratio": "pad",
            "mm_hidden_size": config.vision.width,
            # The original code builds the tower by this name, then takes its weights from this checkpoint. It does not
            # look at `vision_config`, which stands here for `read_config`.
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            "unfreeze_mm_vision_tower": True,
        }
    whole |= {"vision_config": vision, "pad_token_id": pad, "torch_dtype": jnp.dtype(dtype).name}
    write_json(folder / "config.json", whole)
    write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad})


def write_json(file, content):
    """Writes a JSON object."""
    file.write_text(json.dumps(content, indent=2) + "\n")


def _write_processor(folder, vision):
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "LlavaImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_pad": True,  # to a square: the original code does, the published llava-hf config forgets it
            "do_resize": True,
            "size": {"shortest_edge": vision.image_size},
            "resample": 3,  # bicubic
            "do_center_crop": True,
            "crop_size": {"height": vision.image_size, "width": vision.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": 1,  # the class token, which "default" then drops
            "vision_feature_select_strategy": "default",
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def copy_tokenizer(folder, into):
    """Copies the files of a tokenizer, and code or weights none, from a checkpoint's folder to a local one."""
    for file in epath.Path(folder).iterdir():
        if file.suffix in (".json", ".model", ".txt", ".jinja"):
            file.copy(epath.Path(into) / file.name)
    # Beside a model's config of type llava, `transformers` 5 takes another class than the tokenizer's own and loses the
    # space that stands before the first word.
    settings, config = (epath.Path(into) / name for name in ("tokenizer_config.json", "config.json"))
    if settings.exists() and config.exists() and "tokenizer_class" in read_json(epath.Path(folder) / settings.name):
        config.unlink()


def _write_tokenizer(folder, tokenizer, vocab_size, layout):
    """Writes the tokenizer's files and returns its BOS and EOS ids; llava-hf gets <image>, <pad> and the template."""
    from transformers import AddedToken, AutoTokenizer

    # A copy, for what is added below must not reach the caller's object.
    with tempfile.TemporaryDirectory() as given, tempfile.TemporaryDirectory() as stage:
        if isinstance(tokenizer, str | os.PathLike):
            copy_tokenizer(tokenizer, given)
        else:
            tokenizer.save_pretrained(given)
        # A batch that generates must end in its prompts. Set here, for a side set later is not saved.
        side = {"padding_side": "left"} if layout == "llava-hf" else {}
        copy = AutoTokenizer.from_pretrained(given, **side)
        if layout == "llava-hf":
            added = {"<image>": vocab_size, "<pad>": vocab_size + 1}
            copy.add_tokens([AddedToken(token, special=True, normalized=False) for token in added], special_tokens=True)
            got = {token: copy.convert_tokens_to_ids(token) for token in added}
            if got != added:
                raise ValueError(
                    f"the tokenizer does not fit the model's vocabulary of {vocab_size}: expected {added}, got {got}"
                )
            copy.pad_token = "<pad>"
            copy.chat_template = CHAT_TEMPLATE
        copy.save_pretrained(stage)
        for file in epath.Path(stage).iterdir():
            file.copy(folder / file.name)
        if layout == "llava" and (sentences := epath.Path(given) / "tokenizer.model").exists():
            sentences.copy(folder / sentences.name, overwrite=True)  # the original code reads no other
        return copy.bos_token_id, copy.eos_token_id
