"""A model that is ready to say something: its weights in one type, on devices of this process, and its tokenizer."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from napo_jax.decoding import Decoding
from napo_jax.generate import Generator
from napo_jax.model_source import Source, load_leaves
from napo_jax.models import Llava
from napo_jax.optim import unflatten
from napo_jax.reference_cache import weights_digest


class Speaker(NamedTuple):
    """A model, its weights and its tokenizer."""

    model: Llava
    params: dict
    tokenizer: object
    mesh: jax.sharding.Mesh

    @property
    def digest(self) -> str:
        """32 hex digits that stand for the weights."""
        return weights_digest(self.params, self.mesh)

    def generator(self, decoding: Decoding, *, room, slots=1) -> Generator:
        """Returns a `Generator`.

        Args:
          decoding: the `Decoding`.
          room: the most tokens of a prompt.
          slots: prompts that are answered at a time on each device of mesh.data x mesh.fsdp.
        """
        return Generator(
            self.model,
            self.params,
            decoding,
            eos=self.tokenizer.eos_token_id,
            unk=unknown_word(self.tokenizer),
            slots=slots * self.mesh.shape["data"] * self.mesh.shape["fsdp"],
            prompt_tokens=room,
            mesh=self.mesh,
        )

    def spell(self, ids) -> str:
        """Returns the text of an answer's tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def load_speaker(source: Source, mesh, *, dtype=None, attention="auto") -> Speaker:
    """Loads a model.

    Args:
      source: what `model_source.find_model` found.
      mesh: made by `sharding.make_mesh`.
      dtype: of weights and matrix products; None: float32 on a CPU, and bfloat16 elsewhere.
      attention: a name out of `models.attention.BACKENDS`.
    """
    dtype = jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    shape = dataclasses.replace(
        source.shape, dtype=dtype, param_dtype=dtype, attention=attention, remat="none", freeze_vision=True
    )
    model = Llava(shape)
    return Speaker(model, unflatten(load_leaves(source, model, mesh)), source.tokenizer, mesh)


def unknown_word(tokenizer) -> int:
    """Returns the token that stands for what has no word; 0, as in Llama's vocabulary, if there is none."""
    return 0 if tokenizer.unk_token_id is None else tokenizer.unk_token_id
