"""Commands in processes of their own that import nothing: each is forked from one that has imported all, and no more.

That one has touched no device yet, so that what it forks is a process like any other, with devices of its own.
"""

import functools
import importlib
import itertools
import multiprocessing
import os
import signal
import sys
from pathlib import Path

# Started by the first command of a test process, and ended with it; what it is to import no test has to wait for twice.
_READY = multiprocessing.get_context("forkserver")
_READY.set_forkserver_preload(
    ["napo_jax.train", "napo_jax.build_bias", "orbax.checkpoint", "transformers.tokenization_utils_tokenizers"]
)
_NUMBERS = itertools.count()


class Forked:
    """A command under way; a `subprocess.Popen` of as much as tests need.

    It ends without what Python does at exit, which those that have met others need.
    """

    def __init__(self, command, argv, folder, *, devices=1, at_step=None):
        """Starts a command.

        Args:
          command: the name of its module.
          argv: its words.
          folder: where what it prints is kept.
          devices: of the CPU.
          at_step: (number, signal): it gets the signal when that step of a training is on its way.
        """
        path = Path(folder) / f"forked{next(_NUMBERS)}"
        self._files = [path.with_suffix(f".{kind}") for kind in ("out", "err")]
        order = (command, list(map(str, argv)), list(map(str, self._files)), devices, at_step)
        self._process = _READY.Process(target=_be, args=order, daemon=True)
        self._process.start()

    @property
    def returncode(self):
        """Its exit status, negative for a signal; None before."""
        return self._process.exitcode

    poll = lambda self: self.returncode

    def send_signal(self, number):
        """Sends a signal."""
        os.kill(self._process.pid, number)

    def kill(self):
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)

    def said(self) -> str:
        """What it has printed up to now."""
        return self._files[0].read_text() if self._files[0].exists() else ""

    def communicate(self, timeout=None):
        """Waits for its end; returns what it printed and what it complained of."""
        self._process.join(timeout)
        assert self.returncode is not None, f"it has not ended after {timeout} s: {self._files[1].read_text()[-3000:]}"
        return tuple(file.read_text() if file.exists() else "" for file in self._files)


def _be(command, argv, files, devices, at_step):
    """Is the command."""
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream.fileno())
    sys.stdout.reconfigure(line_buffering=True)
    import jax

    from napo_jax.command import exit_with_one_line

    jax.config.update("jax_num_cpu_devices", devices)
    if at_step:
        _signal_at_step(*at_step)
    main = importlib.import_module(f"napo_jax.{command}").main
    exit_with_one_line(functools.partial(main, argv))


def _signal_at_step(at, number):
    from napo_jax.journal import Journal

    step = Journal.step

    def signalled(self, now, *args, **kwargs):
        step(self, now, *args, **kwargs)
        if now == at:
            os.kill(os.getpid(), number)

    Journal.step = signalled
