"""The reference's log-probs: computed once over the mesh, kept on disk, and attached to batches by their records."""

import dataclasses
import functools
import time
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from napo_jax.data.groups import record_seed
from napo_jax.data.order import NO_GROUP
from napo_jax.reference_cache import Pieces, cache_settings, check_cacheable, weights_digest
from napo_jax.scorer import Chosen, make_scorer
from napo_jax.sharding import ROWS

PIECE_ROWS = 512  # rows of a file, and the most that a kill loses
CHECKED_ROWS = 4  # of those on disk, computed again when they are opened
# How far a log-prob may then be from the one on disk, a token. The batch is another one, so that sums are rounded
# otherwise; another model or prompt is off by far more.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


class Progress(NamedTuple):
    """How far the computation is."""

    done: int  # rows
    total: int
    rows_per_second: float
    seconds_left: float  # by tokens, as long rows come last

    def __str__(self):
        minutes, seconds = divmod(round(self.seconds_left), 60)
        left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"
        return f"reference: {self.done} of {self.total} rows, {self.rows_per_second:.1f} rows/s, {left}"


class CachedReference:
    """The reference's log-probs of all groups of a dataset, in memory.

    Attributes:
      folder: where they are kept.
      deviation: the largest difference, a token, between values on disk and the same ones computed now; None if none
        were on disk.
    """

    def __init__(self, dataset, objective, folder):
        """Makes one that knows no values yet."""
        table, cells = dataset.table, objective.reference_cells
        self.folder, self.deviation = folder, None
        self._objective, self._cells, self._numbers = objective, cells, table.records
        self._columns = objective.columns(reference=True)
        self._seeds = np.array([record_seed(key, dataset.config.seed) for key in table.keys])
        # By content: a record that is there twice has one row.
        self._keys, self._row_of = np.unique(np.array(table.keys), return_inverse=True)
        self._values = np.zeros((len(self._keys), len(cells), len(self._columns)), np.float32)
        self._known = np.zeros(len(self._keys), bool)

    def attach(self, batch):
        """Returns a batch with the reference's log-probs of its rows, zeros for those that only fill it.

        Args:
          batch: `Batch` of the dataset that the cache was opened with; numpy arrays, before `on_devices`.
        """
        there = batch.ids != NO_GROUP
        groups = self._groups(batch.ids)
        strange = there & ((self._numbers[groups] != batch.ids) | (self._seeds[groups] != batch.seeds))
        if strange.any():
            raise ValueError(
                f"record {batch.ids[strange][0]} of a batch is not the one whose reference is in {self.folder}: the "
                "batch is of another dataset, or of another data.seed"
            )
        return dataclasses.replace(batch, reference=self.logps(batch.ids))

    def logps(self, ids):
        """Returns {cell: Logps of float32[B]} of records by number, int32[B]; zeros for NO_GROUP."""
        values = self._values[self._row_of[self._groups(ids)]]
        values = np.where((ids != NO_GROUP)[:, None, None], values, np.float32(0))
        of_cell = lambda c: self._objective.from_columns(values[:, c], reference=True)
        return {cell: of_cell(c) for c, cell in enumerate(self._cells)}

    def _groups(self, ids):
        """Returns the group of each record number, int[B]; of a number that has none, some group."""
        return np.minimum(np.searchsorted(self._numbers, ids), len(self._numbers) - 1)

    def _read(self, pieces):
        """Takes in what is on disk. The first process reads for all: no two can find different pieces there."""
        for keys, values in pieces.read() if jax.process_index() == 0 else ():
            rows = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            if (self._keys[rows] != keys).any():
                raise ValueError(f"{self.folder} holds rows that are not of this dataset; delete it")
            self._values[rows], self._known[rows] = values, True
        self._values, self._known = map(np.array, multihost_utils.broadcast_one_to_all((self._values, self._known)))

    def _check(self, dataset, scored, batch_size, dtype):
        """Computes a few known rows again; returns the largest difference, a token, or raises if it is too large.

        They come from all over the dataset into one batch of the largest bucket: that is one program to compile, and
        not the company that they were computed in.
        """
        known = np.flatnonzero(self._known[self._row_of])
        some = np.unique(known[np.linspace(0, len(known) - 1, CHECKED_ROWS).round().astype(int)])
        filled = np.full(-(-len(some) // batch_size) * batch_size, NO_GROUP, np.int32)
        filled[: len(some)] = some
        batches = [(len(dataset.buckets) - 1, groups) for groups in filled.reshape(-1, batch_size)]
        columns = [dataset.table.rules.cells.index(cell) for cell in self._cells]
        worst = 0.0
        for ids, online in scored(Chosen(batch_size, batches), workers=0):
            ids, online = ids[ids != NO_GROUP], online[ids != NO_GROUP]
            groups = self._groups(ids)
            tokens = dataset.table.answer_lengths[groups][:, columns]
            cached = self._values[self._row_of[groups]]
            summed = np.array([column.endswith("sum") for column in self._columns])
            difference = np.abs(online - cached) / np.where(summed, tokens[..., None], 1)
            if not difference.max() <= TOLERANCES[dtype]:  # nor is NaN
                row, cell, kind = np.unravel_index(np.argmax(np.nan_to_num(difference, nan=np.inf)), difference.shape)
                raise ValueError(
                    f"{self.folder} holds another reference: {self._cells[cell]} of record {ids[row]} has the "
                    f"{self._columns[kind]} {cached[row, cell, kind]:.6g} there and {online[row, cell, kind]:.6g} now, "
                    f"which may differ by {TOLERANCES[dtype]:g} a token; delete the folder to compute it anew"
                )
            worst = max(worst, float(difference.max()))
        return worst

    def _complete(self, dataset, scored, batch_size, pieces, progress):
        """Computes the batches that miss a row, in the order of an uninterrupted call, and writes those rows."""
        order = dataset.order(held_out=None, batch_size=batch_size, shuffle=False, keep_rest=True)
        known, row_of = self._known, self._row_of
        missing = [
            (bucket, groups)
            for bucket, groups in map(order.__getitem__, range(order.steps_per_epoch))
            if not known[row_of[groups[groups != NO_GROUP]]].all()
        ]
        if not missing:
            return
        tokens = np.cumsum([dataset.buckets[bucket].tokens for bucket, _ in missing])
        start, before = time.monotonic(), known[row_of].sum()
        unwritten = []
        for i, (ids, values) in enumerate(scored(Chosen(batch_size, missing))):
            ids, values = ids[ids != NO_GROUP], values[ids != NO_GROUP]
            if not np.isfinite(values).all():
                row, cell, kind = np.argwhere(~np.isfinite(values))[0]
                raise ValueError(
                    f"the reference gives {self._cells[cell]} of record {ids[row]} the {self._columns[kind]} log-prob "
                    f"{values[row, cell, kind]}: look at its weights and at that record"
                )
            rows, first = np.unique(row_of[self._groups(ids)], return_index=True)
            new = ~known[rows]
            rows, first = rows[new], first[new]
            self._values[rows], known[rows] = values[first], True
            if jax.process_index() == 0:
                unwritten.extend(rows)
                while len(unwritten) >= PIECE_ROWS or (unwritten and i == len(missing) - 1):
                    piece = unwritten[:PIECE_ROWS]
                    pieces.write(self._keys[piece].tolist(), self._values[piece])
                    del unwritten[:PIECE_ROWS]
            if progress is not None:
                seconds, done = time.monotonic() - start, int(known[row_of].sum())
                left = seconds * (tokens[-1] - tokens[i]) / tokens[i]
                progress(Progress(done, len(row_of), (done - before) / seconds, float(left)))


def open_reference(root, dataset, objective, model, params, *, mesh=None, batch_size=None, progress=None):
    """Returns the reference's log-probs of a dataset, and computes those that are not on disk yet.

    A call that was killed has lost one piece at most, and the same call goes on behind the others. Some rows that are
    on disk are computed again; a ValueError says so if they differ. Only the first of several processes reads and
    writes, so the folder need not be one that all of them see.

    Args:
      root: a folder for caches, local or gs://; values of other models and settings lie in it side by side.
      dataset: `Dataset`.
      objective: `Objective`, whose `reference_cells` are computed.
      model: `Llava`.
      params: the reference's parameter tree, on the mesh if there is one.
      mesh: made by `sharding.make_mesh`, to cut batches over; needed with several processes.
      batch_size: groups computed at a time, over all devices; None for the config's.
      progress: called with a `Progress` after each batch.

    Returns:
      `CachedReference`.
    """
    check_cacheable(objective)
    batch_size = batch_size or dataset.config.batch_size
    shards = 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in ROWS]))
    if batch_size % shards:
        raise ValueError(f"a batch of {batch_size} groups for the reference does not divide among {shards} devices")
    if mesh is None and jax.process_count() > 1:
        raise ValueError("several processes compute a reference together over a mesh, and none is given")
    cells = objective.reference_cells
    settings = cache_settings(dataset, objective, model.config, weights_digest(params, mesh))
    pieces = Pieces(root, settings, cells, objective.columns(reference=True))
    reference = CachedReference(dataset, objective, pieces.folder)
    reference._read(pieces)
    scored = functools.partial(make_scorer(dataset, objective, model, cells, mesh, reference=True), params)
    if reference._known.any():
        reference.deviation = reference._check(dataset, scored, batch_size, settings["model"]["dtype"])
    reference._complete(dataset, scored, batch_size, pieces, progress)
    return reference
