"""Prints how far loading a checkpoint raises this process's memory: `memory_probe.py FOLDER [--naive]`.

A process of its own, for a peak cannot be taken back. VmHWM is read and not `ru_maxrss`, which a child inherits from
its parent. With `--naive`, the file is loaded whole and then converted, as the test's wrong variant.
"""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import safetensors.numpy

from napo_jax import load_pretrained


def memory(field):
    """Returns a field of /proc/self/status in bytes."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    jax.block_until_ready(jnp.zeros(8) + 1)  # what JAX itself takes is not the checkpoint's
    before = memory("VmRSS")
    if "--naive" in sys.argv:
        params = {k: jnp.asarray(v) for k, v in safetensors.numpy.load_file(folder / "model.safetensors").items()}
    else:
        _, params = load_pretrained(folder, jnp.bfloat16)
    jax.block_until_ready(params)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps({"rise": memory("VmHWM") - before, "held": held}))
