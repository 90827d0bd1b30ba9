"""Checkpoints: the trained state, the place in the data and the config, in one save that is there whole or not at all.

Orbax writes a save aside and renames it when it is whole (on gs:// its last file marks it), so a run that is killed at
any moment goes on from the save before. A save holds sums of its files (`checksums`), which tell it from one that a
disk has damaged since (`damage`). Leaves are kept under names such as `opt_state/0/mu/projector/up/kernel` and not as
instances of classes: what was saved outlives the classes of the optimizer, and may be read in part.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import sys
import threading
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from napo_jax.checksums import FOLDER, SumsSave, seal
from napo_jax.damage import find_damage, saves_set_aside, set_aside
from napo_jax.storage import find_refusal

# Bytes of an array that are written, and so read, as one. Orbax's own choice is what a device holds of it: of what few
# devices saved, each of many would read the whole arrays to take its part of them, all at the same time.
CHUNK = 4 << 20


class Checkpoints:
    """The saves of a run: a folder with one folder for each step.

    Nothing is created or removed before the first `save`, so the saves of a run that still trains may be read. With
    several processes, the folder is one that all of them share, and every process calls every method.
    """

    def __init__(self, folder, *, keep_last=3, keep_best=1, best_metric=None, best_mode: Literal["min", "max"] = "min"):
        """Names a folder and what is kept there.

        Args:
          folder: local or gs://; it need not exist.
          keep_last: how many of the latest saves are kept, at least 1.
          keep_best: how many of the best are kept besides. Saves without the metric never are among them.
          best_metric: the name of the metric that tells which are best; None keeps the latest only.
          best_mode: whether "min" or "max" of it is best.
        """
        if keep_last < 1 or keep_best < 0 or best_mode not in ("min", "max"):
            raise ValueError(
                "keep_last must be at least 1, keep_best not negative and best_mode 'min' or 'max', got "
                f"{keep_last}, {keep_best} and {best_mode!r}"
            )
        folder = os.fspath(folder)
        self.folder = epath.Path(folder if "://" in folder else os.path.abspath(folder))  # Orbax writes to no other
        self._keep_last, self._keep_best = keep_last, keep_best
        self._best_metric, self._best_mode = best_metric, best_mode

    def save(self, step, state, extra, metrics=None):
        """Saves a step; returns when the state is copied off the devices, and writes while the run goes on.

        A save that is still being written is waited for first. So is what went wrong with it raised here, or in `wait`.
        A step that was just saved is not saved again.

        Args:
          step: int, larger than all that are saved.
          state: a pytree of arrays. Its buffers may be donated as soon as this returns.
          extra: a dict for JSON: the place in the data, the config.
          metrics: {name: float} that this step is judged by, or None.
        """
        with self._plainly():  # the first time, this makes the folder
            latest = self._manager.latest_step()
        if step == latest:
            return
        if latest is not None and step < latest:
            raise ValueError(
                f"{self.folder} holds step {latest}, so step {step} is not saved there; use another folder"
            )
        if metrics and self._best_metric and self._best_metric not in metrics:
            raise ValueError(f"the best checkpoint is told by {self._best_metric!r}; the metrics are {sorted(metrics)}")
        sums = SumsSave(functools.partial(setattr, self, "_under_way"))
        named = _by_name(state)
        arrays = ocp.args.PyTreeSave(named, dict.fromkeys(named, ocp.SaveArgs(chunk_byte_size=CHUNK)))
        items = {"state": arrays, "extra": ocp.args.JsonSave(extra), FOLDER: sums}
        with self._plainly():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics or {}, force=True)

    def wait(self):
        """Waits until the last save is whole; raises what went wrong with it."""
        if "_manager" in self.__dict__:
            with self._plainly():
                self._manager.wait_until_finished()

    def close(self):
        """Waits, and ends the threads that save."""
        if "_manager" in self.__dict__:
            with self._plainly():
                self._manager.close()
            del self._manager

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def steps(self) -> list[int]:
        """Returns the steps of all saves that are whole, in order."""
        return sorted(ocp.utils.checkpoint_steps(self.folder))

    def latest(self) -> int | None:
        """Waits for a save that is being written, and returns the latest step, or None if there is none."""
        self.wait()
        latest = max(self.steps(), default=None)
        if jax.process_count() > 1:
            seen = multihost_utils.process_allgather(np.int32(-1 if latest is None else latest))
            if len(set(seen.tolist())) > 1:
                raise ValueError(
                    f"processes find different checkpoints in {self.folder}: its latest step is {seen.tolist()} for "
                    "one after the other (-1: none); it must be a folder that they share"
                )
        return latest

    def recover(self, note) -> int | None:
        """Returns the latest step whose files are as they were written, or None if nothing was ever saved.

        A save that is damaged is set aside under another name. All processes call this and come to the same; each
        reads its share of the files. Raises if saves were set aside and none is left to go on from.

        Args:
          note: called with a line for each save that is damaged, or has no sums to tell.
        """
        while (step := self.latest()) is not None:
            save = self.folder / str(step)
            if (damage := find_damage(save)) is None:
                if not (save / FOLDER).is_dir():
                    note(f"unknown  step {step} was saved without sums of its files: used as it is")
                return step
            note(f"damaged  the checkpoint of step {step}: {damage}; set aside as {set_aside(save)}")
        if aside := saves_set_aside(self.folder):
            raise ValueError(
                f"{self.folder} has no checkpoint left to go on from, and {len(aside)} damaged ones, such as "
                f"{aside[-1].name}: put a copy of one there under its number, or begin anew in another workdir"
            )
        return None

    def check(self, step, *, together=None):
        """Raises if a save is damaged, for those who read the saves of another run.

        Args:
          step: one of `steps()`.
          together: as for `damage.find_damage`.
        """
        if damage := find_damage(self.folder / str(step), together=together):
            others = [other for other in self.steps() if other != step]
            raise ValueError(
                f"the checkpoint of step {step} in {self.folder} is damaged, {damage}: give the command that trained "
                f"it again, which sets it aside and goes on from the one before (others there: {others or 'none'})"
            )

    def best(self) -> int | None:
        """Waits likewise, and returns the best step that is kept, or None if no save has the metric."""
        self.wait()
        reader, found = ocp.JsonCheckpointHandler(filename="metrics"), {}
        for step in self.steps():
            metrics = self.folder / str(step) / "metrics"
            found[step] = self._quality(reader.restore(metrics) if metrics.exists() else None)
        found = {step: quality for step, quality in found.items() if quality > -math.inf}
        return max(found, key=lambda step: (found[step], step), default=None)

    def restore(self, step, like, *, partial=False):
        """Reads a save, onto any devices.

        Args:
          step: one of `steps()`.
          like: a pytree as it was saved, or only its upper part with `partial`, of arrays or `ShapeDtypeStruct`s. Their
            shardings say where the leaves go, and need not be those of the run that saved.
          partial: whether the save may hold leaves that `like` has not; they are not read.

        Returns:
          the state, of the structure of `like`, and the `extra` that was saved with it. Raises one line with the name
          of a leaf that is missing, left over, or of another shape or dtype.
        """
        path, steps = self.folder / str(step), self.steps()
        if step not in steps:
            raise ValueError(f"{self.folder} holds no step {step}; it holds {steps or 'none'}")
        wanted = _by_name(like)
        _check_leaves(path, wanted, partial)
        leaves = {
            name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
            for name, leaf in wanted.items()
        }
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(item=wanted, restore_args=leaves, partial_restore=True),
            extra=ocp.args.JsonRestore(),
        )
        found = self._reader.restore(path, args=items)
        return jax.tree.unflatten(jax.tree.structure(like), [found.state[name] for name in wanted]), found.extra

    def shapes(self, step, part) -> dict:
        """Returns {path: anything with a shape and a dtype} of the leaves that a save holds under a name."""
        saved = ocp.PyTreeCheckpointHandler().metadata(self.folder / str(step) / "state").tree
        return {name.removeprefix(f"{part}/"): leaf for name, leaf in saved.items() if name.startswith(f"{part}/")}

    @functools.cached_property
    def _manager(self):
        """What saves and removes. Made by the first save: it clears away what a killed run left half-written."""
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            preservation_policy=_Keep(self._keep_last, self._keep_best, self._quality),
            best_fn=self._quality if self._best_metric else None,  # metrics are written where it is given
            # Called on the first process, when the files are written and the save has not got its name yet.
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=lambda: seal(self._under_way), barrier_sync_fn=_meet
            ),
        )
        return ocp.CheckpointManager(self.folder, options=options)

    @functools.cached_property
    def _reader(self):
        return ocp.Checkpointer(ocp.CompositeCheckpointHandler())

    @contextlib.contextmanager
    def _plainly(self):
        """Raises what the disk refuses as the OSError that it is: Orbax and TensorStore have words of their own."""
        try:
            yield
        except Exception as error:
            if (refusal := find_refusal(error)) is None:
                raise
            where = refusal.path or os.fspath(self.folder)
            raise OSError(refusal.number, os.strerror(refusal.number), where) from error

    def _quality(self, metrics):
        """Returns a number that is larger for better metrics; NaN and none at all are worst."""
        value = (metrics or {}).get(self._best_metric, math.nan)
        if math.isnan(value):
            return -math.inf
        return value if self._best_mode == "max" else -value


def _meet(*, key, timeout_ms):
    """Waits for the other processes, as Orbax does between the parts of a save, unless this one has failed.

    Orbax would have it wait, with its error on its way, where the others never come: ten minutes, all of them.
    """
    if threading.current_thread() is threading.main_thread() or sys.exc_info()[1] is None:
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _is_news(record):
    """Tells whether Orbax's log says what is not raised, and told, anyway: tracebacks of a disk that refuses are."""
    return not (record.exc_info and find_refusal(record.exc_info[1]))


logging.getLogger("absl").addFilter(_is_news)


@dataclasses.dataclass(frozen=True)
class _Keep:
    """Orbax's way to ask which saves are kept."""

    last: int
    best: int
    quality: Callable

    def should_preserve(self, checkpoints, *, context):
        """Returns a bool for each save, given in order of steps."""
        ranked = sorted((self.quality(checkpoint.metrics), checkpoint.step) for checkpoint in checkpoints)
        ranked = [step for quality, step in ranked if quality > -math.inf]
        best = ranked[max(0, len(ranked) - self.best) :]
        kept = {checkpoint.step for checkpoint in checkpoints[-self.last :]} | set(best)
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _by_name(tree):
    """Returns {name: leaf} of a pytree, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("two leaves of the state have one name; no key may look like a path of others")
    return named


def _check_leaves(path, wanted, partial):
    """Raises if a save does not hold the wanted leaves, or without `partial` others too."""
    saved = ocp.PyTreeCheckpointHandler().metadata(path / "state").tree
    advice = "go on with the model, the optimizer and the trained leaves that it was saved with, or use another folder"
    spell = lambda leaf: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
    for name, leaf in wanted.items():
        if getattr(leaf, "sharding", None) is None:
            raise ValueError(f"the leaf {name} to restore has no sharding; say where it goes")
        if name not in saved:
            raise ValueError(f"{path} holds no leaf {name}: {advice}")
        if spell(saved[name]) != spell(leaf):
            raise ValueError(f"{path} holds {name} as {spell(saved[name])}, and not as {spell(leaf)}: {advice}")
    if not partial and (more := sorted(set(saved) - set(wanted))):
        raise ValueError(f"{path} holds a leaf {more[0]} that is not wanted, one of {len(more)}: {advice}")
