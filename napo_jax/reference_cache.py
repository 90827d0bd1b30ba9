"""Reference log-probs on disk: one folder for all that decides them, and in it parquet pieces of a few hundred rows.

A value is never looked for outside the folder of its settings, and every piece repeats them. So nothing stale is read,
and what another model, prompt, picture or data set gave lies elsewhere.
"""

import dataclasses
import functools
import hashlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from napo_jax.data.corruptions import BATCH_DEPENDENT
from napo_jax.data.loader import Pictures
from napo_jax.sharding import replicated
from napo_jax.term import split_cell

_FORMAT = 1  # of the pieces, and of the computation behind them; another number makes all anew
_NOTHING_DRAWN = frozenset({"clean", "black", "white", "mean", "rejected_image"})  # image variants that no seed decides


def check_cacheable(objective):
    """Raises a ValueError if an objective has no reference, or one that cannot be computed beforehand."""
    if not objective.reference_cells:
        raise ValueError("no term of the objective reads a reference: there is nothing to cache")
    if terms := [term.name for term in objective.terms if term.needs_kl]:
        raise ValueError(
            f"the term {', '.join(terms)} reads the reference's whole distributions, which are not kept: let the "
            "reference run along, live (train.reference live, or adapters_off)"
        )
    if cells := [cell for cell in objective.reference_cells if split_cell(cell)[1] in BATCH_DEPENDENT]:
        raise ValueError(
            f"the picture of {', '.join(cells)} changes with the rest of its batch, so its reference cannot be "
            "computed beforehand: let the reference run along, live"
        )


def cache_settings(dataset, objective, config, weights) -> dict:
    """Returns all that decides the reference's log-probs.

    How the work is done does not: mesh, batch size, buckets, attention backend and recomputation change the last
    digits at most.

    Args:
      dataset: `Dataset`.
      objective: `Objective`.
      config: the reference's `LlavaConfig`.
      weights: the `weights_digest` of its parameters.

    Returns:
      a dict for JSON.
    """
    shape = dataclasses.asdict(config) | {"dtype": jnp.dtype(config.dtype).name}
    for name in ("param_dtype", "attention", "remat", "logits_chunk", "freeze_vision"):
        del shape[name]
    pictures = Pictures(dataset.vision.image_size, dataset.config.image_rule, dataset.config.exif)
    variants = {split_cell(cell)[1] for cell in objective.reference_cells}
    return {
        "format": _FORMAT,
        "weights": weights,
        "model": shape,
        "groups": dataset.table.fingerprint,  # of records, tokenizer, template, image tokens and `GroupRules`
        "pictures": dataclasses.asdict(pictures),
        "seed": None if variants <= _NOTHING_DRAWN else dataset.config.seed,
        "cells": list(objective.reference_cells),
    }


def weights_digest(params, mesh=None) -> str:
    """Digests every bit of a parameter tree where it lies, the same on any mesh, in 32 hex digits.

    Each leaf becomes four sums, modulo 2^32, of a hash of each element's bits and place. Such sums are exact in any
    order, so that no leaf has to be gathered, on a device or on the host.

    Args:
      params: a tree of arrays.
      mesh: the mesh that they lie on, if any.
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    names = sorted(leaves)
    sums = _all_hash_sums([leaves[name] for name in names], None if mesh is None else replicated(mesh))
    types = [(name, leaves[name].shape, jnp.dtype(leaves[name].dtype).name) for name in names]
    return hashlib.blake2b(repr((types, np.asarray(sums).tolist())).encode(), digest_size=16).hexdigest()


@functools.partial(jax.jit, static_argnames="sharding")
def _all_hash_sums(leaves, sharding):
    """Returns uint32[leaves, 4]."""
    sums = jnp.stack([_hash_sums(leaf) for leaf in leaves])
    return sums if sharding is None else jax.lax.with_sharding_constraint(sums, sharding)


@jax.jit  # traced once for all leaves of a shape
def _hash_sums(x):
    """Returns uint32[4]."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    hashes = tuple(_mix(bits ^ _mix(place * np.uint32(4) + np.uint32(lane))) for lane in range(4))
    # All four in one reduction: as several, XLA on CPU stores what they share, four times the leaf.
    add = lambda one, other: tuple(a + b for a, b in zip(one, other, strict=True))
    return jnp.stack(jax.lax.reduce(hashes, (np.uint32(0),) * 4, add, range(x.ndim)))


def _mix(x):
    """Scrambles uint32, one to one: the last step of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


class Pieces:
    """The pieces under one key: rows of a record's key and its log-probs, in any order."""

    def __init__(self, root, settings: dict, cells, columns=("sum", "mean")):
        """Takes the folder of all caches, local or gs://, `cache_settings`, C cells and K columns; touches no file."""
        self._settings = json.dumps(settings, sort_keys=True).encode()
        self.folder = epath.Path(root).expanduser() / hashlib.blake2b(self._settings, digest_size=16).hexdigest()
        self._shape = len(cells), len(columns)
        self._columns = [f"{cell}/{column}" for cell in cells for column in columns]

    def read(self):
        """Yields the keys of each piece, str[R], and its log-probs, float32[R, C, K]."""
        for file in sorted(self.folder.glob("*.parquet")) if self.folder.exists() else ():
            try:
                table = pq.read_table(pa.BufferReader(file.read_bytes()))
            except pa.ArrowInvalid as error:
                raise ValueError(f"{file} is damaged ({error}); delete it, and its rows are computed again") from None
            if (table.schema.metadata or {}).get(b"settings") != self._settings:
                raise ValueError(f"{file} holds values of other settings than its folder stands for; delete it")
            values = np.stack([table[column].to_numpy() for column in self._columns], axis=1)
            yield np.array(table["key"].to_pylist()), values.reshape(len(table), *self._shape)

    def write(self, keys, values):
        """Writes a piece aside and renames it, so that nobody ever reads a part.

        Args:
          keys: str[R].
          values: float32[R, C, K].
        """
        arrays = [pa.array(keys, pa.string()), *(pa.array(column) for column in values.reshape(len(keys), -1).T)]
        table = pa.table(arrays, names=["key", *self._columns]).replace_schema_metadata({"settings": self._settings})
        self.folder.mkdir(parents=True, exist_ok=True)
        # Named by its rows: two runs that compute the same ones at a time write the same file.
        name = hashlib.blake2b("".join(keys).encode(), digest_size=16).hexdigest()
        aside = self.folder / f"{name}.{os.uname().nodename}.{os.getpid()}.tmp"
        with aside.open("wb") as file:
            pq.write_table(table, file)
        aside.replace(self.folder / f"{name}.parquet")
