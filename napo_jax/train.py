"""Trains: `python -m napo_jax.train --config configs/debug.py --workdir runs/a`.

The same command, given again, goes on from the last checkpoint of its workdir.
"""

import dataclasses
import json
import math
import signal
import sys
import time

import jax
from etils import epath

from napo_jax.checkpoint import Checkpoints
from napo_jax.config import Config, exit_with_one_line, parse
from napo_jax.data.dataset import open_dataset
from napo_jax.data.loader import on_devices
from napo_jax.metrics import Console, Late, MetricsWriter, Pace, progress_line
from napo_jax.model_source import find_model
from napo_jax.models.lora import is_adapter
from napo_jax.optim import make_optimizer, unflatten
from napo_jax.reference import open_reference
from napo_jax.sharding import ROWS, make_mesh, over_rows
from napo_jax.start import first_state, load_parts, make_model
from napo_jax.step import Frozen, make_train_step

_INTERRUPTED = 143  # what a shell reports of a program that SIGTERM ended


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's own options."""

    # Where the run is kept: config.json, metrics.jsonl and checkpoints/. Local or gs://.
    workdir: str | None = None


class StoppedError(Exception):
    """A run that ended before its last step; the message says why and how to go on."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


def train(config: Config, workdir, console=None):
    """Runs a training to its last step, from its last checkpoint if there is one.

    Args:
      config: the `Config`.
      workdir: a folder of this run's own, local or gs://.
      console: a `Console`; None for one on the standard output.

    Returns:
      the metrics of the last step, {name: float}. Raises StoppedError if the run was asked to end, or its loss did.
    """
    console, workdir = console or Console(), epath.Path(workdir)
    mesh = make_mesh(config.mesh)
    rows = math.prod(mesh.shape[axis] for axis in ROWS)
    if config.data.batch_size % (rows * config.train.accumulate):
        raise ValueError(
            f"data.batch_size {config.data.batch_size} does not divide into {config.train.accumulate} micro-batches on "
            f"{rows} devices (mesh.data x mesh.fsdp)"
        )
    source = find_model(config.model, config.train.seed)
    dataset = open_dataset(config.data, config.objective, source.tokenizer, source.shape)
    loader = dataset.loader()
    steps = config.train.steps or max(1, round(config.train.epochs * loader.order.steps_per_epoch))

    model = make_model(config, source.shape)
    trained, frozen, whole = load_parts(config, source, model, mesh)
    optimizer = make_optimizer(config.optimizer, steps)
    for line in _report(config, source, dataset, steps, trained, frozen, whole):
        console.note(line)

    # The reference is the model as it was loaded: before anything of this run's own is restored.
    dtype = model.config.dtype
    compute = jax.jit(lambda leaves: {path: leaf.astype(dtype) for path, leaf in leaves.items()})
    # Adapters begin at 0, so that without them it is the same model.
    base = {path: leaf for path, leaf in trained.items() if not is_adapter(path)}
    attach, live = lambda batch: batch, None
    if config.objective.reference_cells and config.train.reference == "cache":
        cache, tree = dataset.cache / "reference", unflatten(compute(base), frozen)
        reference = open_reference(
            cache, dataset, config.objective, model.without_adapters, tree, mesh=mesh, progress=_Sometimes(console)
        )
        attach = reference.attach
        del tree
    elif config.objective.reference_cells:
        live = compute(trained if config.train.reference == "live" else base)
    del base

    begin, shapes = first_state(trained, optimizer, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", keep_last=config.train.keep)
    start = 0
    if (latest := checkpoints.latest()) is None:
        state = begin(trained)
        del trained
    else:
        del trained  # there is room for one of them
        state, extra = checkpoints.restore(latest, shapes)
        batches = loader()
        batches.set_state(extra["data"])
        start = batches.step
        console.note(f"goes on from step {start} of {checkpoints.folder}")
    if start >= steps:
        console.note(f"{steps} steps are done: nothing to do")
        return {}
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(json.dumps(_as_json(config), indent=1))

    step_of = jax.jit(
        make_train_step(
            model, config.objective, optimizer, accumulate=config.train.accumulate, mesh=mesh, seed=config.train.seed
        ),
        donate_argnums=0,
    )
    frozen = Frozen(frozen, live)
    writer, late, pace, stop = MetricsWriter(workdir, start), Late(), Pace(), _StopSignal()
    ids, seen, last = {}, set(), {}

    def finish(done):
        """Takes in a step's metrics once they are there; raises StoppedError where the loss is no number."""
        nonlocal last
        if done is None:
            return
        number, last = done
        records, tokens = ids.pop(number)
        pace.done(examples=config.data.batch_size, tokens=tokens)
        if not math.isfinite(last["loss"]):
            file = workdir / "not_finite.json"
            file.write_text(
                json.dumps({"step": number, "records": records, "metrics": {k: str(v) for k, v in last.items()}})
            )
            raise StoppedError(
                f"the loss of step {number} is {last['loss']}; its records are in {file}, and the last good checkpoint "
                f"is that of step {checkpoints.latest() or 0}",
                1,
            )
        if number % config.train.log_every == 0 or number == steps:
            rates = pace.rates()
            writer.write(number, last | rates)
            console.progress(progress_line(number, steps, last, rates))

    def save(number):
        finish(late.flush())  # what is not known to be good is not saved
        writer.flush()
        extra = {"data": {"step": number, "data": loader.fingerprint}, "config": _as_json(config)}
        checkpoints.save(number, state, extra)

    try:
        with stop, jax.set_mesh(mesh):
            for number, batch in enumerate(on_devices(map(attach, loader(start, steps)), over_rows(mesh)), start + 1):
                if batch.bucket not in seen:
                    pace.interrupted()
                    seen.add(batch.bucket)
                ids[number] = (
                    batch.ids.tolist() if batch.ids.is_fully_addressable else [],
                    batch.bucket.tokens * len(batch.ids),
                )
                state, metrics = step_of(state, frozen, batch)
                finish(late.push(number, metrics))
                asked = stop.asked(number)  # once a step: with several processes it is where they meet
                if number % config.train.checkpoint_every == 0 or number == steps or asked:
                    save(number)
                    pace.interrupted()
                if asked and number < steps:
                    raise StoppedError(
                        f"asked to stop: saved step {number}; the same command goes on from there", _INTERRUPTED
                    )
    finally:
        writer.close()
        console.close()
        checkpoints.close()
    return last


class _StopSignal:
    """Whether the run was asked to end, by SIGTERM or by what schedules its machine."""

    def __enter__(self):
        self._got = False
        try:
            self._before = signal.signal(signal.SIGTERM, self._hear)
        except ValueError:  # not the main thread: somebody else's program, which hears its signals itself
            self._before = None
        return self

    def __exit__(self, *error):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, *_):
        self._got = True

    def asked(self, step):
        """Tells whether to end after this step; the same on all processes."""
        if jax.process_count() == 1:
            return self._got
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


class _Sometimes:
    """Shows a progress every few seconds, and its end."""

    def __init__(self, console, seconds=5.0):
        self._console, self._seconds, self._last = console, seconds, -math.inf

    def __call__(self, progress):
        if time.monotonic() - self._last >= self._seconds or progress.done == progress.total:
            self._last = time.monotonic()
            self._console.progress(str(progress))


def _report(config, source, dataset, steps, trained, frozen, whole):
    """Yields what a person wants to read before it starts."""
    size = lambda leaves: sum(leaf.size for leaf in leaves.values())
    yield f"model    {source}: {size(trained):,} parameters train, {size(frozen):,} do not"
    if whole:
        yield f"         held whole by every device: {', '.join(whole)}"
    yield f"devices  {jax.device_count()} {jax.devices()[0].device_kind}, mesh {config.mesh}"
    yield (
        f"data     {dataset.rows} rows, {len(dataset.table)} groups, {len(dataset.buckets)} buckets, "
        f"padding {dataset.padding:.1%}"
    )
    if dataset.dropped:
        yield "         dropped: " + ", ".join(f"{reason} {count}" for reason, count in dataset.dropped.items())
    yield f"steps    {steps} of {config.data.batch_size} groups, {steps / dataset.order().steps_per_epoch:.2f} epochs"


def _as_json(config):
    """Returns a config as a dict for JSON; what is no plain value is written as it prints."""
    return json.loads(
        json.dumps(dataclasses.asdict(config), default=lambda value: getattr(value, "__name__", str(value)))
    )


def main(argv=None):
    """Runs the command."""
    config, options = parse(Options, argv, description=__doc__)
    if options.workdir is None:
        raise ValueError("say where the run is kept: --workdir runs/a, for example")
    try:
        train(config, options.workdir)
    except StoppedError as reason:
        print(reason, file=sys.stderr)
        raise SystemExit(reason.status) from None


if __name__ == "__main__":
    exit_with_one_line(main)
