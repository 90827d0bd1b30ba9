"""A tiny random model in files that has something to say: letters, other ones for other prompts, and an end."""

import jax
import jax.numpy as jnp

from napo_jax import export_pretrained
from napo_jax.data.byte_tokenizer import byte_tokenizer
from napo_jax.model_source import random_shape
from napo_jax.models import Llava


def write_speaking_model(folder):
    """Writes it as a Hugging Face folder, with a tokenizer of bytes, and returns the folder."""
    tokenizer = byte_tokenizer()
    model = Llava(random_shape("tiny"))
    params = model.init(jax.random.key(0))
    loudness = jnp.zeros(model.config.text.vocab_size)
    loudness = loudness.at[jnp.array(tokenizer(" abcdefghijklmnopqrstuvwxyz").input_ids[1:])].set(40.0)
    params["language"]["head"] *= loudness.at[tokenizer.eos_token_id].set(64.0)[None]
    params["projector"]["down"]["kernel"] *= 4  # so that pictures matter
    export_pretrained(model, params, folder)
    tokenizer.save_pretrained(folder)
    return folder
