"""Plans steps for TPUs and prints JSON, a line each; a program of its own, because a process loads libtpu once."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from plan_configs import compile_config

from napo_jax import costs, plan
from napo_jax.chips import find_topology, planned_devices
from napo_jax.compiled import compile_step

TOPOLOGY = "v5e:2x2"
DEBUG = ["--config", "configs/debug.py", "--topology", TOPOLOGY, "--json", "--data.attention-multiple", "8"]
SHORT = ["--prefix-tokens", "24", "--answer-tokens", "8"]
TOO_MANY = ["--data.batch-size", "1048576", "--mesh.data", "2", "--mesh.fsdp", "2"]


def known(layers=5, rows=1024, width=512):
    """Counts what a loop over layers takes whose matrices are cut among four devices, and gathered one by one."""
    mesh = Mesh(np.array(planned_devices(find_topology(TOPOLOGY))), ("x",))
    of = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))

    def run(x, matrices):
        body = lambda x, matrix: (jax.lax.with_sharding_constraint(x @ matrix, of("x", None)), None)
        return jax.lax.scan(body, x, matrices)[0]

    lowered = jax.jit(run, out_shardings=of("x", None)).lower(
        jax.ShapeDtypeStruct((rows, width), jnp.bfloat16, sharding=of("x", None)),
        jax.ShapeDtypeStruct((layers, width, width), jnp.bfloat16, sharding=of(None, "x", None)),
    )
    program = compile_step(lowered).program
    return {"collectives": costs.collectives(program), "flops": sum(costs.matrix_flops(program).values())}


def main():
    """Prints the known program, a step that fits, one that does not, with and without recomputation, and others.

    These are a step on two slices, and that of a config with much in it: micro-batches, a reference that runs along,
    whole distributions, two pictures.
    """
    print(json.dumps(known()))
    plan.main([*DEBUG, *SHORT])
    plan.main([*DEBUG, *SHORT, *TOO_MANY])
    plan.main([*DEBUG, *SHORT, *TOO_MANY, "--model.remat", "full"])
    plan.main([*DEBUG, *SHORT, "--mesh.slices", "2", "--mesh.data", "2"])
    jax.config.update("jax_exec_time_optimization_effort", -1.0)  # compiled fast and not to be fast
    print(json.dumps(compile_config("configs/chip7b.py")))


if __name__ == "__main__":
    main()
