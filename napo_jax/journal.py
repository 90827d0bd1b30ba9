"""What a training tells while it runs: metrics, taken in one step late, for files, the console and services."""

import contextlib
import json
import math
import os
import sys

import jax

from napo_jax.command import verdict
from napo_jax.metrics import Late, MetricsWriter, Pace, progress_line, to_tensorboard, to_wandb

TERMINATED = 143  # what a shell reports of a program that SIGTERM ended


class StoppedError(Exception):
    """A run that ended before its last step; the message says why and how to go on."""

    def __init__(self, message, status):
        """Takes the message and the exit status."""
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def exit_when_stopped():
    """Makes a StoppedError the end of a command: its reason on one line, and its exit status.

    All processes stop together. What a person can mend ends one of several at once, with a line of its own.
    """
    try:
        yield
    except StoppedError as reason:
        print(reason, file=sys.stderr)
        raise SystemExit(reason.status) from None
    except Exception as error:
        if jax.process_count() == 1 or (said := verdict(error)) is None:
            raise
        line, status = said
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(status)  # JAX would have it wait for the others, which wait for it


class Journal:
    """Takes in steps and evaluations.

    Attributes:
      last: {name: float}, the metrics of the latest step that was taken in.
    """

    def __init__(
        self, train, workdir, start, steps, console, own_time, *, examples, records_of, last_good, settings, peak=None
    ):
        """Opens the files of a run that goes on from a step.

        Args:
          train: `TrainConfig`.
          workdir: the run's folder.
          start: int, steps done.
          steps: int, steps in all.
          console: `Console`.
          own_time: the `OwnTime` that counts the steps.
          examples: groups a step, over all devices.
          records_of: step -> list of the record numbers of its batch.
          last_good: () -> the step of the latest checkpoint, or None.
          settings: the config as a dict for JSON, for W&B.
          peak: the operations per second that all devices together can do, if known.
        """
        self.last = {}
        self._workdir, self._steps, self._every, self._console = workdir, steps, train.log_every, console
        self._examples, self._records_of, self._last_good = examples, records_of, last_good
        self._late, self._pace, self._work, self._own_time = Late(), Pace(peak=peak), {}, own_time
        also = [to_tensorboard(workdir / "tensorboard")] if train.tensorboard else []
        also += [to_wandb(workdir, settings, train.wandb)] if train.wandb else []
        named = lambda write: lambda step, metrics: write(step, {f"held_out/{k}": v for k, v in metrics.items()})
        done = start or -1  # a run that begins has no line of step 0 yet
        self._writer = MetricsWriter(workdir, done, also=also)
        self._evaluations = MetricsWriter(workdir, done, name="held_out.jsonl", also=[named(write) for write in also])

    def step(self, number, metrics, *, tokens, flops):
        """Takes a step that is on its way, {name: array[]}, and writes the one before."""
        self._work[number] = {"tokens": tokens, "flops": flops}
        self._own_time.step()
        with self._own_time.shared():
            done = self._late.push(number, metrics)
        self._take(done)

    def flush(self):
        """Waits for the latest step and writes it; raises StoppedError if its loss is no number."""
        with self._own_time.shared():
            done = self._late.flush()
        self._take(done)
        self._writer.flush()
        self._evaluations.flush()

    def evaluation(self, number, metrics):
        """Writes what the groups held out gave after a step, {name: float}."""
        self._evaluations.write(number, metrics)
        margins = "  ".join(
            f"{k.removesuffix('/margin')} {v:+.3f}" for k, v in metrics.items() if k.endswith("/margin")
        )
        self._console.note(f"held out, step {number}: loss {metrics['loss']:.4f}  margins {margins}")

    def interrupted(self):
        """Tells that something else than steps took time."""
        self._pace.interrupted()

    def close(self):
        """Closes the files and leaves the console's line."""
        self._console.close()
        self._writer.close()
        self._evaluations.close()

    def _take(self, done):
        if done is None:
            return
        number, self.last = done
        self._pace.done(examples=self._examples, **self._work.pop(number))
        # A gradient that is no number makes parameters that are none, which the loss shows a step too late.
        for name in ("loss", "gradient_norm", "update_norm"):
            if not math.isfinite(self.last[name]):
                raise StoppedError(self._not_finite(number, name), 1)
        if number % self._every == 0 or number == self._steps:
            rates = self._pace.rates()
            self._writer.write(number, self.last | rates)
            self._console.progress(progress_line(number, self._steps, self.last, rates))

    def _not_finite(self, number, name):
        """Writes down the records of a step with a metric that is no number; returns what to say."""
        file = self._workdir / "not_finite.json"
        metrics = {name: str(value) for name, value in self.last.items()}
        if jax.process_index() == 0:
            file.write_text(json.dumps({"step": number, "records": self._records_of(number), "metrics": metrics}))
        good = self._last_good()
        return f"the {name} of step {number} is {self.last[name]}; its records are in {file}, and " + (
            "no checkpoint was saved yet" if good is None else f"the last good checkpoint is that of step {good}"
        )
