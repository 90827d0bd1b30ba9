"""A tiny `transformers` LLaVA with weights far from zero, and its weights as a parameter tree, mapped by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from napo_jax.models import IMAGE_SLOT, LlavaConfig
from napo_jax.models.clip import ClipConfig
from napo_jax.models.llama import LlamaConfig

torch.set_grad_enabled(True)


def tiny_config(kv_heads=4, **options):
    """Returns a LlavaConfig whose every size differs from the others, so that no axis can be mistaken for another."""
    text = LlamaConfig(
        vocab_size=113, width=48, mlp_width=104, layers=3, heads=4, kv_heads=kv_heads, norm_eps=1e-3, max_positions=256
    )
    vision = ClipConfig(image_size=28, patch_size=7, width=40, mlp_width=72, layers=4, heads=5, norm_eps=1e-4)
    return LlavaConfig(text=text, vision=vision, **options)


def torch_llava(config, seed=0):
    """Returns the `transformers` model of a config; the image token's id is the first one past the vocabulary."""
    text, vision = config.text, config.vision
    llava = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            vocab_size=text.vocab_size + 1,
            hidden_size=text.width,
            intermediate_size=text.mlp_width,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            num_key_value_heads=text.kv_heads,
            rms_norm_eps=text.norm_eps,
            max_position_embeddings=text.max_positions,
            tie_word_embeddings=False,
        ),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=vision.width,
            intermediate_size=vision.mlp_width,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            layer_norm_eps=vision.norm_eps,
        ),
        image_token_index=text.vocab_size,
        image_seq_length=vision.image_tokens,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(llava).eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight") or "layernorm.weight" in name or "layrnorm.weight" in name:
                weight.normal_(1.0, 0.3)
            elif weight.ndim == 1 or "embed" in name:
                weight.normal_(0.0, 0.5)
            else:
                weight.normal_(0.0, 1.5 * weight[0].numel() ** -0.5)
    return model


def array(tensor):
    """Returns a tensor as a JAX array."""
    return jnp.asarray(tensor.detach().numpy())


def params_of(model):
    """Returns the model's weights as the parameter tree of `Llava`."""
    dense = lambda layer: (
        {"kernel": array(layer.weight.T)} | ({} if layer.bias is None else {"bias": array(layer.bias)})
    )
    norm = lambda layer: {"scale": array(layer.weight), "bias": array(layer.bias)}
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    llava = model.model
    vision = getattr(llava.vision_tower, "vision_model", llava.vision_tower)
    patch = vision.embeddings.patch_embedding.weight.permute(2, 3, 1, 0)
    clip_layers = [clip_layer_params(layer) for layer in vision.encoder.layers]
    return {
        "vision": {
            "class_embedding": array(vision.embeddings.class_embedding),
            "position_embedding": array(vision.embeddings.position_embedding.weight),
            "patch": {"kernel": array(patch.reshape(-1, patch.shape[-1]))},
            "pre_norm": norm(vision.pre_layrnorm),
            "layers": stack(clip_layers[:-1]),
            "unused": {"layer": clip_layers[-1], "post_norm": norm(vision.post_layernorm)},
        },
        "projector": {
            "up": dense(llava.multi_modal_projector.linear_1),
            "down": dense(llava.multi_modal_projector.linear_2),
        },
        "language": {
            "embedding": array(llava.language_model.embed_tokens.weight[:-1]),
            "head": array(model.lm_head.weight[:-1].T),
            "norm": {"scale": array(llava.language_model.norm.weight)},
            "layers": stack([llama_layer_params(layer) for layer in llava.language_model.layers]),
        },
    }


def clip_layer_params(layer):
    """Returns one CLIP layer's weights."""
    dense = lambda layer: {"kernel": array(layer.weight.T), "bias": array(layer.bias)}
    return {
        "attention_norm": {"scale": array(layer.layer_norm1.weight), "bias": array(layer.layer_norm1.bias)},
        "query": dense(layer.self_attn.q_proj),
        "key": dense(layer.self_attn.k_proj),
        "value": dense(layer.self_attn.v_proj),
        "out": dense(layer.self_attn.out_proj),
        "mlp_norm": {"scale": array(layer.layer_norm2.weight), "bias": array(layer.layer_norm2.bias)},
        "up": dense(layer.mlp.fc1),
        "down": dense(layer.mlp.fc2),
    }


def llama_layer_params(layer):
    """Returns one decoder layer's weights."""
    kernel = lambda layer: {"kernel": array(layer.weight.T)}
    return {
        "attention_norm": {"scale": array(layer.input_layernorm.weight)},
        "attention": {
            "query": kernel(layer.self_attn.q_proj),
            "key": kernel(layer.self_attn.k_proj),
            "value": kernel(layer.self_attn.v_proj),
            "out": kernel(layer.self_attn.o_proj),
        },
        "mlp_norm": {"scale": array(layer.post_attention_layernorm.weight)},
        "mlp": {
            "gate": kernel(layer.mlp.gate_proj),
            "up": kernel(layer.mlp.up_proj),
            "down": kernel(layer.mlp.down_proj),
        },
    }


def torch_logits(model, ids, images, image_token):
    """Runs the torch model on int[B, S] with IMAGE_SLOT and float[B, I, I, 3]; returns float32[B, S, V] of words."""
    ids = np.where(np.asarray(ids) == IMAGE_SLOT, image_token, np.asarray(ids))
    pixels = torch.from_numpy(np.array(images).transpose(0, 3, 1, 2))
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(ids).long(), pixel_values=pixels, attention_mask=torch.ones(ids.shape))
    return out.logits[..., :-1].numpy()
