"""Trains: `python -m napo_jax.train --config configs/debug.py`, with `--workdir runs/a` to keep it elsewhere.

The same command, given again, goes on from the last checkpoint of its workdir.
"""

import dataclasses
import functools
import json
import math
import time

import jax

from napo_jax.arithmetic import step_flops
from napo_jax.checkpoint import Checkpoints
from napo_jax.command import exit_with_one_line
from napo_jax.config import Config, ModelConfig, config_name, parse
from napo_jax.data.dataset import open_dataset
from napo_jax.data.loader import on_devices
from napo_jax.data.prompts import Prompter
from napo_jax.data.records import find_files
from napo_jax.evaluation import HeldOut
from napo_jax.journal import TERMINATED, Journal, StoppedError, exit_when_stopped
from napo_jax.metrics import Console, peak_flops
from napo_jax.mixed_reference import MixedReference
from napo_jax.model_source import absolute, find_model, is_workdir, load_leaves
from napo_jax.models import Llava
from napo_jax.models.llava import without_missing_adapters
from napo_jax.models.lora import LoraConfig, is_adapter
from napo_jax.optim import learning_rates, make_optimizer, unflatten
from napo_jax.preemption import StopSignal
from napo_jax.processes import together
from napo_jax.reference import open_reference
from napo_jax.report import write_report
from napo_jax.sharding import ROWS, make_mesh, over_rows
from napo_jax.start import first_state, load_parts, make_model
from napo_jax.step import Frozen, make_train_step
from napo_jax.versions import versions


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's own options."""

    # Where the run is kept: config.json, metrics.jsonl, held_out.jsonl, checkpoints/ and report.html. Local or gs://.
    # None: runs/ and the name of the config file.
    workdir: str | None = None
    # Whether it is an error to be alone. Either way it finds out where it runs, and with which others.
    distributed: bool = False


def train(config: Config, workdir, console=None):
    """Runs a training to its last step, from its last checkpoint if there is one.

    Args:
      config: the `Config`.
      workdir: a folder of this run's own, local or gs://.
      console: a `Console`; None for one on the standard output.

    Returns:
      the metrics of the last step, {name: float}. Raises StoppedError if the run was asked to end, or its loss did.
    """
    console, workdir = console or Console(), absolute(workdir)
    # What can be wrong is looked for before what takes long: files, then devices, then all rows.
    begun = _begun(workdir)
    source = find_model(config.model, config.train.seed, begun.get("source_step"))
    if any(run.workdir == workdir for run in source.runs):
        raise ValueError(
            f"model.path is the run's own workdir, {workdir}; leave it out, and the run goes on from there"
        )
    settings = settings_of(config) | {"source_step": source.runs[-1].step if source.runs else None}
    _check_same(begun, settings, workdir)
    shape = source.shape
    if config.data.path is not None:
        find_files(config.data.path)
    mesh = make_mesh(config.mesh)
    _check_batch(config, mesh)

    # What is trained, and on what.
    dataset = open_dataset(config.data, config.objective, source.tokenizer, shape)
    steps = config.train.steps or max(1, round(config.train.epochs * dataset.training_order(1).steps_per_epoch))
    loader = dataset.loader(dataset.training_order(steps))
    model = make_model(config, shape)
    trained, frozen, whole = load_parts(config, source, model, mesh)
    optimizer = make_optimizer(config.optimizer, steps)
    console.note(f"workdir  {workdir}")
    for line in _report(config, source, dataset, steps, trained, frozen, whole):
        console.note(line)

    best = {"best_metric": config.train.best_metric, "best_mode": _better(config.train.best_metric)}
    keep = {"keep_last": config.train.keep, "keep_best": config.train.keep_best}
    checkpoints = Checkpoints(workdir / "checkpoints", **keep, **(best if config.train.keep_best else {}))
    latest = checkpoints.latest()
    if latest is not None and latest >= steps:
        console.note(f"{steps} steps are done: nothing to do")
        _write_page(workdir, console)  # a run that was killed as it ended has none
        return {}

    # The reference is the model as it was loaded: before anything of this run's own is restored.
    cached, live = _reference(config, dataset, model, trained, frozen, mesh, console)
    attach = cached.attach if cached else lambda batch: batch

    # The state: this run's own, or else the model as it was loaded.
    begin, shapes = first_state(trained, optimizer, mesh)
    start = 0
    if latest is None:
        state = begin(trained)
        del trained
        console.note(f"start    step 0 of {steps}, from {source}")
    else:
        del trained  # there is room for one of them
        state, extra = checkpoints.restore(latest, shapes)
        batches = loader()
        batches.set_state(extra["data"])
        start = batches.step
        console.note(f"start    goes on from step {start} of {checkpoints.folder}")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        for name, values in (("config.json", settings | {"steps": steps}), ("versions.json", versions())):
            aside = workdir / f"{name}.new"
            aside.write_text(json.dumps(values, indent=1))
            aside.replace(workdir / name)

    accumulate, seed = config.train.accumulate, config.train.seed
    step = make_train_step(model, config.objective, optimizer, accumulate=accumulate, mesh=mesh, seed=seed)
    rate_of = learning_rates(config.optimizer, steps)

    @functools.partial(jax.jit, donate_argnums=0)
    def step_of(state, frozen, batch):
        after, metrics = step(state, frozen, batch)
        return after, metrics | {"learning_rate": rate_of(state.step)}

    @functools.cache
    def flops(bucket):
        cells, groups = config.objective.cell_image, config.data.batch_size
        return step_flops(model.config, bucket, groups, cells, trained=state.params, reference=live is not None)

    held_out = None
    if config.data.held_out:
        reference = cached if live is None else (without_missing_adapters(model, live), unflatten(live, frozen))
        some = config.data.batch_size // config.train.accumulate  # as many as fit
        held_out = HeldOut(dataset, config.objective, model, reference, mesh=mesh, batch_size=some)
        if config.train.keep_best and config.train.best_metric not in held_out.metrics:
            raise ValueError(
                f"train.best_metric is {config.train.best_metric}; evaluations give {', '.join(held_out.metrics)}"
            )
    frozen = Frozen(frozen, live)
    records = dataset.table.records
    journal = Journal(
        config.train,
        workdir,
        start,
        steps,
        console,
        examples=config.data.batch_size,
        records_of=lambda number: records[loader.order[number - 1][1]].tolist(),
        last_good=checkpoints.latest,
        settings=settings,
        peak=peak_flops() if config.model.dtype == "bfloat16" else None,
    )

    def evaluate(number):
        journal.flush()
        measured = held_out(unflatten(state.params, frozen.params))
        journal.evaluation(number, measured)
        journal.interrupted()
        return measured

    def save(number, measured):
        journal.flush()  # what is not known to be good is not saved
        extra = {"data": {"step": number, "data": loader.fingerprint}, "config": settings}
        checkpoints.save(number, state, extra, measured)
        journal.interrupted()

    try:
        with StopSignal() as stop, jax.set_mesh(mesh):
            if held_out and start == 0:
                evaluate(0)
            seen = set()
            for number, batch in enumerate(on_devices(map(attach, loader(start, steps)), over_rows(mesh)), start + 1):
                if batch.bucket not in seen:  # it is compiled now
                    journal.interrupted()
                    seen.add(batch.bucket)
                state, metrics = step_of(state, frozen, batch)
                tokens = batch.bucket.tokens * config.data.batch_size
                journal.step(number, metrics, tokens=tokens, flops=flops(batch.bucket))
                last, asked = number == steps, stop.asked(number)
                measured = None
                if held_out and (last or number % config.train.evaluate_every == 0):
                    measured = evaluate(number)
                if last or asked or number % config.train.checkpoint_every == 0:
                    save(number, measured)
                if asked and not last:
                    raise StoppedError(
                        f"asked to stop: saved step {number}; the same command goes on from there", TERMINATED
                    )
    finally:
        try:
            journal.close()
        finally:
            checkpoints.close()
            _write_page(workdir, console)
    return journal.last


def _write_page(workdir, console):
    """Writes the run's report, on the first process."""
    if jax.process_index() > 0:
        return
    try:
        console.note(f"report   {write_report(workdir)}")
    except Exception as error:  # whatever it is, it must not change how the run has ended
        console.note(f"report   not written, {type(error).__name__}: {error}; see python -m napo_jax.report")


def _check_batch(config, mesh):
    """Raises if a batch does not divide into micro-batches on all devices."""
    rows, accumulate = math.prod(mesh.shape[axis] for axis in ROWS), config.train.accumulate
    if config.data.batch_size % (rows * accumulate):
        raise ValueError(
            f"data.batch_size {config.data.batch_size} does not divide into {accumulate} micro-batches on {rows} "
            "devices (mesh.data x mesh.fsdp)"
        )


def _reference(config, dataset, model, trained, frozen, mesh, console):
    """Returns the `CachedReference`, or else the leaves that run along as reference; None for what is not used."""
    if not config.objective.reference_cells:
        return None, None
    dtype = model.config.dtype
    compute = jax.jit(lambda leaves: {path: leaf.astype(dtype) for path, leaf in leaves.items()})
    # Adapters begin at 0, so that without them it is the same model.
    base = {path: leaf for path, leaf in trained.items() if not is_adapter(path)}
    if config.train.reference == "cache":
        options = {"batch_size": config.data.batch_size // config.train.accumulate, "progress": _Sometimes(console)}
        kept = functools.partial(
            open_reference, dataset.cache / "reference", dataset, config.objective, mesh=mesh, **options
        )
        first = kept(model.without_adapters, unflatten(compute(base), frozen))
        return first if config.train.second.path is None else _mixed(config, dataset, first, kept, mesh), None
    return None, compute(trained if config.train.reference == "live" else base)


def _mixed(config, dataset, first, kept, mesh):
    """Returns the first reference with the second one mixed in."""
    mixing = config.train.second
    source = find_model(ModelConfig(path=mixing.path))
    model = make_model(dataclasses.replace(config, lora=LoraConfig()), source.shape)
    model = Llava(dataclasses.replace(model.config, param_dtype=model.config.dtype))  # it computes, and never trains
    prompter = Prompter(source.tokenizer, config.data.template, source.shape.vision.image_tokens)
    reads = prompter.fingerprint, source.shape.vision.image_size
    if reads != (dataset.prompter.fingerprint, dataset.vision.image_size):
        raise ValueError(f"train.second.path: {source} reads words or pictures otherwise than the trained model")
    return MixedReference(first, kept(model, unflatten(load_leaves(source, model, mesh))), mixing)


def _begun(workdir):
    """Returns what config.json of a run that has saved says; an empty dict of a run that begins."""
    file = workdir / "config.json"
    return json.loads(file.read_text()) if is_workdir(workdir) and file.exists() else {}


def _check_same(begun, settings, workdir):
    """Raises if a run would go on with another meaning of what it has saved."""
    for part, names in (
        ("model", ("path", "size")),
        ("lora", None),
        ("train", ("seed", "second")),
        ("objective", None),
    ):
        for name in (names or settings[part]) if begun else ():
            before, now = begun[part][name], settings[part][name]
            if before != now:
                raise ValueError(
                    f"the run in {workdir} began with {part}.{name} {before!r}, and not {now!r}: go on with the same, "
                    "or name another workdir"
                )


def _better(metric):
    """Tells whether less or more of a metric is better."""
    return "min" if metric.rpartition("/")[2] == "loss" else "max"


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
    held_out = f", {int(dataset.held_out.sum())} of them held out" if config.data.held_out else ""
    yield (
        f"data     {dataset.rows} rows, {len(dataset.table)} groups{held_out}, {len(dataset.buckets)} buckets, "
        f"padding {dataset.padding:.1%}"
    )
    if dataset.dropped:
        yield "         dropped: " + ", ".join(f"{reason} {count}" for reason, count in dataset.dropped.items())
    yield f"steps    {steps} of {config.data.batch_size} groups, {steps / dataset.order().steps_per_epoch:.2f} epochs"


def settings_of(config):
    """Returns a config as a dict for JSON; what is no plain value is written as it prints.

    The model's path is made absolute: a later run that begins with this one may be started elsewhere.
    """
    values = dataclasses.asdict(config)
    for part in (values["model"], values["train"]["second"]):
        if part["path"] is not None:
            part["path"] = str(absolute(part["path"]))
    return json.loads(json.dumps(values, default=lambda value: getattr(value, "__name__", str(value))))


def main(argv=None):
    """Runs the command."""
    config, options = parse(Options, argv, description=__doc__)
    workdir = options.workdir or f"runs/{config_name(argv)}"
    with together(insist=options.distributed, say=functools.partial(print, flush=True)), exit_when_stopped():
        train(config, workdir)


if __name__ == "__main__":
    exit_with_one_line(main)
