"""A reward head's leaves, and its file beside the weights of its model: `torch.nn.Linear(D, 1)`'s weight and bias.

`napo_jax.weights` reads that file by its table of keys, as strictly as all others.
"""

import numpy as np

from napo_jax import tensor_files

FILE = "reward_head.safetensors"  # no name that a loader of the model beside it would take for its own
_TENSORS = {"reward/kernel": "weight", "reward/bias": "bias"}


def is_reward_head(path) -> bool:
    """Tells whether a leaf belongs to a reward head."""
    return path in _TENSORS


def write_head(folder, leaves):
    """Writes the reward head among {path: leaf} into a folder, in the dtype it has; nothing where there is none."""
    leaves = {path: np.asarray(leaf) for path, leaf in leaves.items() if is_reward_head(path)}
    head = {_TENSORS[path]: np.ascontiguousarray(leaf.T) for path, leaf in leaves.items()}
    if head:
        specs = {name: (tensor.dtype, tensor.shape) for name, tensor in head.items()}
        tensor_files.write_tensors(folder / FILE, specs, head.values())
