"""What a run says of itself: metrics.jsonl, a line on the console, and TensorBoard or W&B where they are asked for.

With several processes, the first one writes and the others do nothing.
"""

import datetime
import importlib
import json
import math
import re
import shutil
import sys
import time
import uuid

import jax
from etils import epath

from napo_jax.storage import naming

_PUT_EVERY = 60  # seconds between two uploads of metrics.jsonl, where files cannot be appended to

# The name of a device -> the most bfloat16 operations it does in a second, dense.
_PEAKS = (
    (r"TPU v4", 275e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6 lite|TPU v6e", 918e12),
    (r"NVIDIA A100\b.*", 312e12),
    (r"NVIDIA H100 \d+GB HBM3", 989e12),  # not the slower PCIe and NVL cards
)


class Late:
    """Metrics, read one step late: the device has the next step to do while those of the last one are fetched.

    A line that is not written when a checkpoint is saved is never written if the run then ends: `flush` first.
    """

    def __init__(self):
        self._pending = None

    def push(self, step, metrics):
        """Takes a step's metrics, {name: array[]}, and returns what `flush` would have before."""
        for array in metrics.values():
            array.copy_to_host_async()  # it begins when the step is done, whenever that is
        previous = self.flush()
        self._pending = (step, metrics)
        return previous

    def flush(self):
        """Waits for the metrics that were pushed last: (step, {name: float}), or None if they were taken already."""
        if self._pending is None:
            return None
        (step, metrics), self._pending = self._pending, None
        return step, {name: float(value) for name, value in jax.device_get(metrics).items()}


class MetricsWriter:
    """Writes metrics.jsonl: one JSON object a line, `{"step": 3, "loss": 0.69, ...}`.

    JSON knows neither NaN nor infinity, so such a value is null, which every reader takes for a missing number, and
    the line says in `not_finite` what it was: `{"step": 3, "loss": null, "not_finite": {"loss": "inf"}}`.
    """

    def __init__(self, folder, step=0, *, name="metrics.jsonl", also=(), clock=time.monotonic):
        """Opens the file of a run that goes on from a step, so that each step will be in it once.

        Lines of later steps are dropped, and so is a last line that was cut short.

        Args:
          folder: local or gs://. On gs:// the file appears once a minute and at `flush`.
          step: int, steps done; 0 for a run that begins.
          name: of the file.
          also: functions of (step, {name: float}) to call with all that is written, such as `to_tensorboard(folder)`.
          clock: returns seconds.
        """
        self.dropped = 0  # lines
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._path, self._also, self._clock = epath.Path(folder) / name, tuple(also), clock
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines, self.dropped = _lines_until(self._path, step)
        # Written aside first: a run that is killed here has the old file.
        aside = self._path.with_name(self._path.name + ".new")
        aside.write_text("".join(lines))
        aside.replace(self._path)
        # Objects on gs:// cannot be appended to, so the lines are kept and written together.
        self._lines = lines if "://" in str(self._path) else None
        self._file = self._path.open("a") if self._lines is None else None
        self._put = clock()

    def write(self, step, metrics):
        """Appends a line of {name: float}; where files can be appended to, it is in the file when this returns."""
        if not self._writes:
            return
        odd = {name: str(value) for name, value in metrics.items() if not math.isfinite(value)}
        values = {name: None if name in odd else value for name, value in metrics.items()}
        line = json.dumps({"step": step} | values | ({"not_finite": odd} if odd else {}), allow_nan=False) + "\n"
        if self._file is not None:
            with naming(self._path):
                self._file.write(line)
                self._file.flush()
        else:
            self._lines.append(line)
            if self._clock() - self._put >= _PUT_EVERY:
                self.flush()
        for write in self._also:
            write(step, metrics)

    def flush(self):
        """Makes sure that all lines are in the file. Call it before a checkpoint is saved."""
        if self._writes and self._lines is not None:
            self._path.write_text("".join(self._lines))
            self._put = self._clock()

    def close(self):
        """Flushes and closes the file."""
        self.flush()
        if self._writes and self._file is not None:
            self._file.close()


def _lines_until(path, step):
    """Returns the lines of a file up to a step, and how many others there were."""
    kept, dropped = [], 0
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # only the last one can be cut short by a kill
                raise ValueError(f"line {number} of {path} is not an object with a step; move the file away") from None
            keep = False
        if keep:
            kept.append(line + "\n")
        else:
            dropped += 1
    return kept, dropped


class Pace:
    """How fast steps go, measured from the arrival of one step's metrics to that of the next.

    The first step of a run, and whatever `interrupted` tells of, is in none of the numbers.
    """

    def __init__(self, *, peak=None, clock=time.monotonic):
        """Takes the operations per second that all devices together can do (`peak_flops`), and a clock in seconds."""
        self._peak, self._clock, self._last = peak, clock, None
        self._reset()

    def _reset(self):
        self._steps, self._seconds, self._examples, self._tokens, self._flops = 0, 0.0, 0, 0, 0.0

    def done(self, *, examples, tokens, flops=math.nan):
        """Counts a step whose metrics have arrived: its examples, tokens and arithmetic, over all devices."""
        now = self._clock()
        if self._last is not None:
            self._steps += 1
            self._seconds += now - self._last
            self._examples += examples
            self._tokens += tokens
            self._flops += flops
        self._last = now

    def interrupted(self):
        """Tells that something else than steps took time, such as a compilation: the step that is under way is void."""
        self._last = None

    def rates(self):
        """Returns the rates since the last call, {name: float}; empty if no step could be measured.

        `mfu` is among them if the arithmetic of the steps and the peak of the devices are known.
        """
        found = {}
        if self._steps and self._seconds > 0:
            found = {
                "seconds_per_step": self._seconds / self._steps,
                "examples_per_second": self._examples / self._seconds,
                "tokens_per_second": self._tokens / self._seconds,
            }
            if self._peak is not None and math.isfinite(self._flops):
                found["mfu"] = self._flops / self._seconds / self._peak
        self._reset()
        return found


def peak_flops(devices=None):
    """Returns the bfloat16 operations per second that devices (default: all) do at most together, None if not known."""
    peaks = []
    for device in jax.devices() if devices is None else devices:
        known = [peak for name, peak in _PEAKS if re.fullmatch(name, device.device_kind)]
        if not known:
            return None
        peaks.append(known[0])
    return float(sum(peaks))


def progress_line(step, total, metrics, rates):
    """Says where a run is.

    Args:
      step: int, steps done.
      total: int, steps in all.
      metrics: {name: float} of the step; its loss and the margin of each term are shown.
      rates: what `Pace.rates` returned.

    Returns:
      str, one line.

    Examples:
      >>> rates = {"seconds_per_step": 1.6, "examples_per_second": 20.0, "tokens_per_second": 61440.0, "mfu": 0.413}
      >>> metrics = {"loss": 0.69314, "preference/margin": 0.0521, "vision_bias/margin": -1.5}
      >>> print(progress_line(120, 10392, metrics, rates))
      step 120/10392  20.0 examples/s  61.4k tokens/s  MFU 41.3%  ETA 4:33:55  loss 0.6931  margins preference +0.052
      vision_bias -1.500
    """
    parts = [f"step {step}/{total}"]
    if rates:
        parts.append(f"{_short(rates['examples_per_second'])} examples/s")
        parts.append(f"{_short(rates['tokens_per_second'])} tokens/s")
        if "mfu" in rates:
            parts.append(f"MFU {rates['mfu']:.1%}")
        parts.append(f"ETA {datetime.timedelta(seconds=round((total - step) * rates['seconds_per_step']))}")
    parts.append(f"loss {metrics['loss']:.4f}")
    margins = {name.removesuffix("/margin"): value for name, value in metrics.items() if name.endswith("/margin")}
    if margins:
        parts.append("margins " + " ".join(f"{term} {value:+.3f}" for term, value in margins.items()))
    return "  ".join(parts)


def _short(number):
    """Writes a rate with three digits or so."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}"


class Console:
    """Prints a run's progress: on a terminal one line that is redrawn, elsewhere a line each time."""

    def __init__(self, stream=None):
        """Takes a text stream; None for the standard output."""
        self._stream = sys.stdout if stream is None else stream
        self._writes = jax.process_index() == 0
        self._redraws, self._drawn = self._stream.isatty(), False

    def progress(self, line):
        """Shows the newest progress in place of the last."""
        if self._writes and self._redraws:
            # One that wraps could not be redrawn. The cursor goes home, and what is left of the old line is erased.
            self._stream.write("\r" + line[: shutil.get_terminal_size().columns - 1] + "\x1b[K")
            self._stream.flush()
            self._drawn = True
        else:
            self.note(line)

    def note(self, line):
        """Prints a line that stays."""
        self.close()
        if self._writes:
            self._stream.write(line + "\n")
            self._stream.flush()

    def close(self):
        """Leaves the progress where it is."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = False


def to_tensorboard(folder):
    """Returns a function of (step, {name: float}) that writes TensorBoard's events under a folder."""
    if jax.process_index() != 0:
        return lambda step, metrics: None
    writer = _import("tensorboard.summary").Writer(str(folder))

    def write(step, metrics):
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def to_wandb(folder, config, project="napo-jax"):
    """Returns a function of (step, {name: float}) that logs to W&B; a run that goes on in its folder is the same run.

    Args:
      folder: local or gs://; it keeps the run's id in `wandb_id`.
      config: a dict for JSON.
      project: W&B's name for a set of runs.
    """
    if jax.process_index() != 0:
        return lambda step, metrics: None
    wandb, file = _import("wandb"), epath.Path(folder) / "wandb_id"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex)
    where = {} if "://" in str(folder) else {"dir": str(folder)}
    run = wandb.init(project=project, id=file.read_text(), resume="allow", config=config, **where)
    # Steps are a column: W&B's own counter refuses those that a resumed run does again.
    run.define_metric("*", step_metric="step")
    return lambda step, metrics: run.log({"step": step} | metrics)


def _import(module):
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise ValueError(f"{package} is not installed: pip install 'napo-jax[logging]', or do not log to it") from None
