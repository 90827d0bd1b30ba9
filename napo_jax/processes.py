"""Joins the processes of a run, one for each host or more, before any device is touched."""

import os

import jax

_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join_processes():
    """Makes this process one of several.

    On a TPU pod, under Slurm and under Open MPI they find each other. Elsewhere three variables of the environment say
    where the first one listens (host:port), how many there are, and which one this is.
    """
    given = {name: os.environ[name] for name in _NAMES if name in os.environ}
    if not given:
        jax.distributed.initialize()
        return
    if missing := sorted(set(_NAMES) - set(given)):
        raise ValueError(f"{', '.join(given)} is set in the environment, and {', '.join(missing)} is not")
    address, *numbers = (given[name] for name in _NAMES)
    if not all(number.isdigit() for number in numbers):
        raise ValueError(f"{_NAMES[1]} and {_NAMES[2]} must be numbers, got {numbers[0]!r} and {numbers[1]!r}")
    jax.distributed.initialize(address, *map(int, numbers))
