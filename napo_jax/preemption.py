"""Whether a run was asked to end: by SIGTERM, or by what schedules its machines."""

import contextlib
import signal

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Hears SIGTERM inside a `with`, so that the step under way is finished and saved."""

    def __enter__(self):
        """Listens. With several processes JAX does, and carries what one of them hears to all."""
        self._got, self._before = False, None
        if jax.process_count() == 1:
            # Outside the main thread it is somebody else's program, which hears its signals itself.
            with contextlib.suppress(ValueError):
                self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *error):
        """Leaves SIGTERM as it was."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, *_):
        self._got = True

    def asked(self, step):
        """Tells whether to end after this step, the same on all processes; call it once a step."""
        return self._got if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)
