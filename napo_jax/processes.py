"""Several processes that run one program together, one for each host or more."""

import contextlib
import os
import sys
import traceback

import jax

from napo_jax.command import USER_ERRORS, one_line

_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@contextlib.contextmanager
def together():
    """Makes this process one of several for the time of a `with`; to be entered before any device is touched.

    On a TPU pod, under Slurm and under Open MPI they find each other. Elsewhere three variables of the environment say
    where the first one listens (host:port), how many there are, and which one this is.

    A process that fails ends at once. JAX would have it wait for the others, which wait for it in a collective; left
    alone, they find out and end too, so that all can be started again.
    """
    _join()
    try:
        yield
    except SystemExit:  # all of them end like this, in the same step
        raise
    except BaseException as error:
        if isinstance(error, USER_ERRORS):
            print(one_line(error), file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, USER_ERRORS) else 1)


def _join():
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
