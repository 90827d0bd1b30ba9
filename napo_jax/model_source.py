"""Where a model comes from: a Hugging Face folder, or, to try things out, a tiny random one."""

import dataclasses

from etils import epath

from napo_jax import hub_files
from napo_jax.config import ModelConfig
from napo_jax.data.byte_tokenizer import BYTE_VOCABULARY, byte_tokenizer
from napo_jax.data.prompts import load_tokenizer
from napo_jax.models import LlavaConfig


def describe_model(config: ModelConfig):
    """Returns the LlavaConfig of the model that a config names, and its tokenizer; reads no weights."""
    if config.path is None:
        tiny = LlavaConfig.tiny()
        # Bytes make long prompts: the system text alone is 140 tokens.
        text = dataclasses.replace(tiny.text, vocab_size=BYTE_VOCABULARY, max_positions=2048)
        return dataclasses.replace(tiny, text=text), byte_tokenizer()
    shape, _ = hub_files.read_config(epath.Path(config.path))
    return shape, load_tokenizer(config.path)
