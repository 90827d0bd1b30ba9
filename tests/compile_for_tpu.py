"""Compiles the gradient of a small model for TPU v5e chips, and lays out a mesh over two slices of them.

A program of its own, because libtpu reads its environment once per process.
"""

import os
from functools import partial

# Without these, libtpu asks a metadata server that exists only in a cloud.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from napo_jax.models import Groups, Llava, LlavaConfig
from napo_jax.models.clip import ClipConfig
from napo_jax.models.llama import LlamaConfig
from napo_jax.optim import flatten, unflatten
from napo_jax.sharding import MeshConfig, make_mesh, over_rows, shard_params

CELL_IMAGE = (0, 0, 0, 0)


def placed(x, sharding):
    """Returns a shape with its place on the devices."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def main():
    """Prints `backend chips kernels` for splash and xla, on one chip and on four; then `slices` of a hybrid mesh."""
    jax.config.update("jax_exec_time_optimization_effort", -1.0)  # compiled fast and not to be fast
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    text = LlamaConfig(vocab_size=512, width=256, mlp_width=512, layers=2, heads=2, kv_heads=2)
    vision = ClipConfig(image_size=56, patch_size=14, width=64, mlp_width=128, layers=2, heads=2)
    groups = Groups(
        images=jax.ShapeDtypeStruct((2, 1, 56, 56, 3), jnp.float32),
        prefix_ids=jax.ShapeDtypeStruct((2, 1, 128), jnp.int32),
        prefix_lengths=jax.ShapeDtypeStruct((2, 1), jnp.int32),
        answer_ids=jax.ShapeDtypeStruct((2, 4, 64), jnp.int32),
        answer_lengths=jax.ShapeDtypeStruct((2, 4), jnp.int32),
    )
    for backend, shape in (("splash", (1, 1, 1)), ("splash", (1, 2, 2)), ("xla", (1, 1, 1))):
        mesh = make_mesh(MeshConfig(*shape), devices[: int(np.prod(shape))])
        model = Llava(LlavaConfig(text, vision, jnp.bfloat16, jnp.bfloat16, attention=backend))
        leaves = flatten(jax.eval_shape(model.init, jax.random.key(0)))
        params = unflatten(jax.tree.map(placed, leaves, shard_params(leaves, mesh)[0]))
        rows = jax.tree.map(partial(placed, sharding=over_rows(mesh)), groups)
        gradient = jax.grad(lambda params, groups, model=model: model.logps(params, groups, CELL_IMAGE).sum.sum())
        with jax.set_mesh(mesh):
            lowered = jax.jit(gradient).lower(params, rows)
        # Where no kernel is asked for, none will be there; that such a model compiles is seen in `plan_runs.py`.
        count = lowered.as_text().count("@tpu_custom_call")
        if backend == "splash":
            assert count, "a kernel has another name"
            count = lowered.compile().as_text().count('custom_call_target="tpu_custom_call"')
        print(backend, mesh.size, count)
    both = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), both)
    print("slices", *(sorted({device.slice_index for device in copy.flat}) for copy in mesh.devices))


if __name__ == "__main__":
    main()
