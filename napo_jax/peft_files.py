"""Adapters in PEFT's format, for the LLaVA of `transformers`: adapter_config.json and adapter_model.safetensors."""

import numpy as np

from napo_jax import hub_files, tensor_files
from napo_jax.models import LlavaConfig
from napo_jax.models.lora import is_adapter
from napo_jax.reward_head import is_reward_head, write_head
from napo_jax.weights import new_folder, tensor_name

_FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}
_PROJECTOR = tuple(f"projector/{layer}/{name}" for layer in ("up", "down") for name in ("kernel", "bias"))


def write_adapters(leaves, config: LlavaConfig, path, *, base=None):
    """Writes what a run with adapters has trained; `peft.PeftModel.from_pretrained(model, path)` loads it.

    A projector that trained in full goes along as one of `modules_to_save`, and a reward head in a file of its own. The
    folder appears when it is whole.

    Args:
      leaves: {path: leaf} of what has trained, each saved in the dtype it has.
      config: the `LlavaConfig` with their `lora`.
      path: the folder to make; one that holds something is refused.
      base: what adapter_config.json names as the model that they go over; None names none.
    """
    adapters = [path for path in leaves if is_adapter(path)]
    projector = [path for path in leaves if path in _PROJECTOR]
    if not adapters:
        raise ValueError("there are no LoRA adapters: export the weights as a whole")
    if others := sorted(path for path in set(leaves) - {*adapters, *projector} if not is_reward_head(path)):
        raise ValueError(
            f"{others[0]} has trained beside the adapters, one of {len(others)} leaves, and PEFT's files have no place "
            "for it: export the weights as a whole"
        )
    if projector and len(projector) < len(_PROJECTOR):
        raise ValueError(
            f"of the projector only {', '.join(projector)} has trained, and PEFT's files hold all or none: export "
            "the weights as a whole"
        )
    tensors = dict(_tensors({path: leaves[path] for path in (*adapters, *projector)}))
    with new_folder(path) as folder:
        hub_files.write_json(folder / "adapter_config.json", _peft_config(adapters, bool(projector), config.lora, base))
        specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        tensor_files.write_tensors(folder / "adapter_model.safetensors", specs, tensors.values())
        write_head(folder, leaves)


def _tensors(leaves):
    """Yields (name, numpy array), as torch has them."""
    for path, leaf in leaves.items():
        for layer, part in enumerate(leaf if "/layers/" in path else [leaf]):
            if is_adapter(path):
                matrix, factor = path.rsplit("/", 1)
                name = f"{_module(matrix, layer)}.{_FACTORS[factor]}.weight"
            else:
                name = tensor_name(path, layer, "transformers")
            yield f"base_model.model.{name}", np.ascontiguousarray(np.asarray(part).T)


def _module(matrix, layer):
    """Returns the name of a module, of a matrix such as language/layers/mlp/up."""
    return tensor_name(f"{matrix}/kernel", layer, "transformers").removesuffix(".weight")


def _peft_config(adapters, projector, lora, base):
    """Returns the fields of a `peft.LoraConfig` that are not its defaults, and those that others read."""
    matrices = sorted({path.rpartition("/")[0] for path in adapters})
    # Whole names: the vision tower has a q_proj too.
    modules = [_module(matrix, r"\d+").replace(".", r"\.") for matrix in matrices]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {
            "base_model_class": "LlavaForConditionalGeneration",
            "parent_library": "transformers.models.llava.modeling_llava",
        },
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": "|".join(modules),
        "modules_to_save": ["multi_modal_projector"] if projector else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
