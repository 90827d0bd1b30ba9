"""Batches in the order of steps: pictures decoded by Grain's threads or worker processes, ahead of the devices.

The position is one number, the step. `Order` makes a batch from it alone, so that a run goes on at the same batch on
any number of processes, threads and workers.
"""

import collections
import dataclasses
import hashlib

import grain
import jax
import numpy as np
from absl import flags

from napo_jax.data import images
from napo_jax.data.buckets import Bucket
from napo_jax.data.order import NO_GROUP
from napo_jax.data.records import DataError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B groups of one bucket; numpy arrays of this process's rows, or JAX arrays of all rows."""

    images: np.ndarray  # uint8[B, I, I, 3]; in a bucket of groups with several pictures, uint8[B, n, I, I, 3]
    prefix_ids: np.ndarray  # int32[B, P], with IMAGE_SLOT where image tokens go
    prefix_lengths: np.ndarray  # int32[B]
    answer_ids: np.ndarray  # int32[B, C, T]
    answer_lengths: np.ndarray  # int32[B, C]
    seeds: np.ndarray  # uint32[B], the record's own: what is random about it comes from here, in every epoch the same
    ids: np.ndarray  # int32[B], the record's number; NO_GROUP where a row only fills the batch
    bucket: Bucket = dataclasses.field(metadata={"static": True})
    # {cell: Logps of float32[B]}, the reference's, where they were computed before; see `napo_jax.reference`.
    reference: dict | None = None
    # What the image variants of the objective need besides the picture.
    rejected_images: np.ndarray | None = None  # uint8[B, I, I, 3]
    masks: np.ndarray | None = None  # bool[B, side, side], the records' regions
    # Which tokens lie in spans where an answer differs from its counterpart, if the objective weighs them.
    edited: np.ndarray | None = None  # bool[B, C, T]

    @property
    def valid(self):
        """Which rows are groups and not filling, bool[B]."""
        return self.ids != NO_GROUP


@dataclasses.dataclass(frozen=True)
class Pictures:
    """How a record's picture becomes pixels."""

    size: int = 336
    rule: str = "pad"  # "pad" to a square, or "crop" the centre; see `napo_jax.data.images`
    exif: bool = False  # whether to turn it as its camera says

    def __call__(self, data):
        """Maps an encoded picture to uint8[size, size, 3]."""
        return images.fit(images.decode(data, exif=self.exif), self.size, self.rule)


class Loader:
    """The batches of an order, from any step on."""

    def __init__(
        self, records, table, buckets, order, pictures, *, extras=(), seed=0, rows=None, threads=4, workers=0, ahead=4
    ):
        """Makes a loader; nothing is read yet.

        Args:
          records: random access to `Record`s by number.
          table: the `GroupTable` of these records.
          buckets: tuple of Bucket that `order` indexes.
          order: the `Order` of the table's groups.
          pictures: `Pictures`.
          extras: those of `sources.EXTRAS` that a batch has too.
          seed: what the records' own seeds are made with.
          rows: (first, last) of the batch rows that this process loads; None for an even share by its JAX index.
          threads: batches decoded at a time, in each process that decodes.
          workers: processes to decode in; 0 decodes in this one. Pillow lets go of Python's lock, so threads are
            enough until one interpreter cannot keep up.
          ahead: batches kept ready, in each process that decodes.
        """
        self.order = order
        self.rows = rows or process_rows(order.batch_size)
        self._steps = _Steps(records, table, buckets, order, pictures, tuple(extras), seed, self.rows)
        self._read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, ahead))
        self._workers = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)

    @property
    def fingerprint(self):
        """A digest of all that decides what is in the batch of a step."""
        return self._steps.fingerprint

    def __call__(self, start=0, stop=None):
        """Returns the batches of the steps from start up to stop (None: without end), a `Batches`."""
        return Batches(self, start, stop)

    def _open(self, start, stop):
        """Yields Grain's elements."""
        steps = dataclasses.replace(self._steps, start=start, stop=stop)
        data = grain.MapDataset.source(steps).to_iter_dataset(self._read)
        if self._workers.num_workers:
            # Grain reads a flag before it starts its workers, and this program may not be one that parses absl's.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            data = data.mp_prefetch(self._workers)
        return iter(data)


class Batches:
    """An iterator of batches whose position can be saved and set."""

    def __init__(self, loader, start=0, stop=None):
        self._loader, self._stop, self._elements = loader, stop, None
        self.step = start

    def __iter__(self):
        return self

    def __next__(self):
        if self._elements is None:
            self._elements = self._loader._open(self.step, self._stop)
        element = next(self._elements)
        self.step += 1
        buckets = self._loader._steps.buckets
        return Batch(**element["arrays"], bucket=buckets[element["bucket"]])

    def get_state(self):
        """Returns the position as a small dict for JSON."""
        return {"step": self.step, "data": self._loader.fingerprint}

    def set_state(self, state):
        """Goes to a saved position; raises if it is of other data, settings or another seed."""
        if state["data"] != self._loader.fingerprint:
            raise ValueError(
                f"the saved position is of other data or settings (it says {state['data'][:12]}, this is "
                f"{self._loader.fingerprint[:12]}); go on with the same data, batch size and seed, or start anew"
            )
        self._elements, self.step = None, state["step"]


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Random access to the batches of the steps from `start` on: what Grain reads, here or in its workers."""

    records: object
    table: object
    buckets: tuple
    order: object
    pictures: object
    extras: tuple
    seed: int
    rows: tuple
    start: int = 0
    stop: int | None = None

    def __len__(self):
        # Epochs without end: Grain wants a length, and no run gets there.
        return max(0, (2**62 if self.stop is None else self.stop) - self.start)

    def __getitem__(self, i):
        bucket, groups = self.order[self.start + i]
        groups = groups[slice(*self.rows)]
        ours = self.buckets[bucket]
        return {
            "bucket": np.int32(bucket),
            "arrays": self.table.arrays(groups, ours, self.seed) | self._pictures(groups, ours.pictures),
        }

    def _pictures(self, groups, count):
        """Returns what a batch holds of pictures, so many of each group, and what goes with them."""
        size = self.pictures.size
        several = [count] if count > 1 else []
        out = {"images": np.zeros((len(groups), *several, size, size, 3), np.uint8)}
        if "rejected_image" in self.extras:
            out["rejected_images"] = np.zeros_like(out["images"])
        if "region" in self.extras:
            (frame,) = self.records.frames
            out["masks"] = np.zeros((len(groups), frame.side, frame.side), bool)
        for row, group in enumerate(groups):
            if group == NO_GROUP:
                continue
            number = int(self.table.records[group])
            if several:  # what a group has less of is black, and has no place in its prefix
                for place, data in enumerate(self.records.images(number)):
                    out["images"][row, place] = self._picture(number, data)
            else:
                out["images"][row] = self._picture(number, self.records.image(number))
            record = self.records[number] if len(out) > 1 else None
            if "rejected_images" in out:
                out["rejected_images"][row] = self._picture(number, record.rejected_image)
            if "masks" in out:
                out["masks"][row] = record.region.mask
        return out

    def _picture(self, number, data):
        try:
            return self.pictures(data)
        except images.ImageError as error:  # it was decoded once already, when the records were made
            raise DataError(f"the picture of record {number} has changed or its disk fails: {error}") from None

    @property
    def fingerprint(self):
        """A digest of the data and all settings that decide batches; `rows` and how they are read do not."""
        parts = (self.table.fingerprint, self.buckets, self.order.fingerprint, self.pictures, self.seed)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def process_rows(batch_size):
    """Returns (first, last) of the rows that this process loads of a batch that all processes divide evenly."""
    count, index = jax.process_count(), jax.process_index()
    if batch_size % count:
        raise ValueError(f"a batch of {batch_size} groups does not divide among {count} processes")
    return index * batch_size // count, (index + 1) * batch_size // count


def on_devices(batches, sharding=None, ahead=2):
    """Yields batches as JAX arrays, `ahead` of them on their way while one is used.

    Args:
      batches: an iterable of `Batch` with this process's rows.
      sharding: of the batch axis, over all processes; None puts them on the default device.
      ahead: batches on their way.
    """

    def put(x):
        if sharding is None:
            return jax.device_put(x)
        whole = jax.make_array_from_process_local_data(sharding, x)
        if len(whole) != len(x) * jax.process_count():  # processes would hold different rows for the same ones
            raise ValueError(f"the batch axis of {sharding} is not split over all {jax.process_count()} processes")
        return whole

    queue = collections.deque()
    for batch in batches:
        queue.append(jax.tree.map(put, batch))
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue
