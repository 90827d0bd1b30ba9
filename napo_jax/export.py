"""Exports what a run has trained: `python -m napo_jax.export --workdir runs/a --output DIR`.

A Hugging Face folder of the whole model, LoRA adapters added to their matrices; or, with `--peft`, the adapters alone.
A reward model's head goes into a file of its own in either.
"""

import contextlib
import dataclasses
import tempfile
from typing import Literal

import jax
import jax.numpy as jnp

from napo_jax.command import exit_with_one_line, read_flags
from napo_jax.config import ModelConfig
from napo_jax.hub_files import copy_tokenizer
from napo_jax.model_source import find_model, is_workdir, load_leaves, load_trained
from napo_jax.models import Llava
from napo_jax.optim import unflatten
from napo_jax.peft_files import write_adapters
from napo_jax.reward_head import FILE
from napo_jax.sharding import MeshConfig, make_mesh
from napo_jax.weights import check_new, export_pretrained


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's options."""

    # The run, local or gs://.
    workdir: str | None = None
    # The folder to make, local or gs://.
    output: str | None = None
    # What is to load it: "llava-hf" for transformers, "llava" for the original code.
    layout: Literal["llava-hf", "llava"] = "llava-hf"
    # Write the adapters alone, and a projector that trained beside them, for the library of that name.
    peft: bool = False
    # The checkpoint; None: the last one.
    step: int | None = None
    # Type of the weights in the files.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


def export(options: Options) -> list[str]:
    """Writes the model, or the adapters, of a run.

    Returns:
      lines that say what was written.
    """
    workdir, output, dtype = options.workdir, options.output, jnp.dtype(options.dtype)
    if workdir is None or output is None:
        raise ValueError("say which run and where to: --workdir runs/a --output model, for example")
    if options.peft and options.layout != "llava-hf":
        raise ValueError(f"--peft writes for transformers alone: leave out --layout {options.layout}, or --peft")
    check_new(output)
    if not is_workdir(workdir):
        raise ValueError(f"{workdir} is no workdir of a run that has saved a checkpoint: there is nothing to export")
    source = find_model(ModelConfig(path=workdir), step=options.step)
    run, mesh = source.runs[-1], make_mesh(MeshConfig(fsdp=1), jax.devices("cpu")[:1])

    if options.peft:
        if not run.lora.rank:
            raise ValueError(f"the run in {workdir} has no LoRA adapters: leave out --peft to export its weights")
        leaves = {path: leaf.astype(dtype) for path, leaf in load_trained(run, mesh)}
        config, base = dataclasses.replace(source.shape, lora=run.lora), run.config["model"]["path"]
        write_adapters(leaves, config, output, base=base)
        lines = [f"{run} -> {output}: {options.dtype} adapters of rank {run.lora.rank} for peft", _base(source, base)]
        return lines + _head(source)

    model = Llava(dataclasses.replace(source.shape, dtype=dtype, param_dtype=dtype, reward_head=source.rewards))
    params = unflatten(load_leaves(source, model, mesh))
    with _tokenizer(source) as tokenizer:
        export_pretrained(model, params, output, options.layout, tokenizer=tokenizer)
    lines = [f"{source} -> {output}: {options.dtype} weights in the layout {options.layout}", *_head(source)]
    return lines if tokenizer else [*lines, "no tokenizer goes along: the random model's takes text as bytes"]


def _head(source):
    """Returns a line on the head of a reward model, if it is one."""
    said = f"its reward head is in {FILE}: the model gives numbers to answers, and has not learnt to say any"
    return [said] if source.rewards else []


def _base(source, base):
    """Returns a line on what the adapters go over."""
    if base is None:
        return "they go over a random model, which is in no file"
    if len(source.runs) > 1:
        return f"they go over the model of {source.runs[-2]}: export that too, and load them over it"
    return f"they go over {base}, in the layout llava-hf"


@contextlib.contextmanager
def _tokenizer(source):
    """Gives a local folder with the tokenizer's files, for `transformers` reads no bucket; None where it has none."""
    if source.folder is None and source.size != "shapes":
        yield None
        return
    with tempfile.TemporaryDirectory() as copy:
        if source.folder:
            copy_tokenizer(source.folder, copy)
        else:
            source.tokenizer.save_pretrained(copy)
        yield copy


def main(argv=None):
    """Runs the command."""
    options = read_flags(Options, argv, description=__doc__)
    # On the host: next to nothing is computed, and the accelerator may be in use by the run itself.
    jax.config.update("jax_platforms", "cpu")
    print("\n".join(export(options)))


if __name__ == "__main__":
    exit_with_one_line(main)
