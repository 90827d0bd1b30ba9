"""The time of steps that a process takes for itself, and which process of several holds up the others by it.

All processes end a step together, so the slowest decides its time and a clock shows nothing. What a process takes for
itself is the time in which it neither gives work to its devices nor waits for them: for the most part, its data's.
"""

import contextlib
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

_SLOW, _TIMES = 0.05, 3.0  # seconds of a step, and against the next slowest process, from which on it is told


class OwnTime:
    """Counts the seconds."""

    def __init__(self, clock=time.monotonic):
        """Takes a clock in seconds, which runs from now on."""
        self._clock, self._since, self._shared = clock, clock(), 0
        self._seconds, self._steps = 0.0, 0

    @contextlib.contextmanager
    def shared(self):
        """Stops counting inside a `with`: what happens there takes its time on all processes."""
        if not self._shared:
            self._seconds += self._clock() - self._since
        self._shared += 1
        try:
            yield
        finally:
            self._shared -= 1
            self._since = self._clock()

    def step(self):
        """Counts a step."""
        self._steps += 1

    def compare(self) -> str | None:
        """Returns a line about a process that holds up the others since the last call, None if none does.

        All processes call it together, where they wait for each other anyway.
        """
        with self.shared():
            mine, self._seconds, self._steps = self._seconds / max(1, self._steps), 0.0, 0
            if jax.process_count() == 1:
                return None
            return slowest(multihost_utils.process_allgather(np.float32(mine)).tolist())


def slowest(seconds) -> str | None:
    """Says which process takes much longer than all others, from the seconds of a step that each takes for itself.

    Examples:
      >>> print(slowest([0.01, 0.4, 0.02]))
      slow     process 1 takes 0.40 s of each step for itself, the next slowest 0.02 s: see to its data and its
      machine
      >>> slowest([0.4, 0.4, 0.4])
      >>> slowest([0.01, 0.04, 0.0])
    """
    *_, second, most = sorted(seconds)
    if most < _SLOW or most < _TIMES * second:
        return None
    return (
        f"slow     process {seconds.index(most)} takes {most:.2f} s of each step for itself, the next slowest "
        f"{second:.2f} s: see to its data and its machine"
    )
