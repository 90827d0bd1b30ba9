"""Whether a run was asked to end: by SIGTERM, or by what schedules its machines."""

import contextlib
import signal

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Hears SIGTERM inside a `with`, so that the step under way is finished and saved.

    Attributes:
      got: whether this process has heard one.
    """

    def __init__(self, *, alone=None):
        """Makes one, for a process that ends by itself, or with the others; by default, as there are others."""
        self._alone = jax.process_count() == 1 if alone is None else alone

    def __enter__(self):
        """Listens. For processes that end together JAX does, and carries what one of them hears to all."""
        self.got, self._before = False, None
        if self._alone:
            # Outside the main thread it is somebody else's program, which hears its signals itself.
            with contextlib.suppress(ValueError):
                self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *error):
        """Leaves SIGTERM as it was."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, *_):
        self.got = True

    def asked(self, step):
        """Tells whether to end after this step, the same on all processes; call it once a step."""
        return self.got if self._alone else multihost_utils.reached_preemption_sync_point(step)
