"""Which groups make up the batch of step i: a pure function of a seed and i.

So a run that starts again needs nothing but its step, and any number of processes agree on every batch.
"""

import functools
import hashlib

import numpy as np

NO_GROUP = -1  # fills the last batch of an order that keeps its rest


class Order:
    """Batches drawn from one bucket at a time, shuffled over everything, in a new order each epoch.

    In an epoch every group comes at most once. Those that do not divide into whole batches are left out; they are drawn
    anew in each epoch from all groups alike, or else the longest would be left out every time. The groups of a bucket
    that are over when its batches are full move up into the next larger one. With `keep_rest` no group is left out, and
    the last batch is filled up with NO_GROUP.
    """

    def __init__(self, bucket_of, batch_size, *, seed=0, shuffle=True, keep_rest=False):
        """Takes int[N], the bucket of each group, NO_GROUP of those that are not drawn; raises if there are too few."""
        self.bucket_of = np.asarray(bucket_of, np.int32)
        self.batch_size, self.seed, self.shuffle, self.keep_rest = batch_size, seed, shuffle, keep_rest
        if batch_size < 1:
            raise ValueError(f"a batch needs at least one group, got a batch size of {batch_size}")
        count = int(np.sum(self.bucket_of != NO_GROUP))
        self.steps_per_epoch = -(-count // batch_size) if keep_rest else count // batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"{count} groups are too few for a batch of {batch_size}")

    @property
    def fingerprint(self):
        """A digest of all that decides which groups are in which batch."""
        parts = (self.bucket_of.tobytes(), self.batch_size, self.seed, self.shuffle, self.keep_rest)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def __getitem__(self, step):
        """Returns the bucket of a step's batch, and its groups, int32[batch_size]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        buckets, groups = self._epoch(epoch if self.shuffle else 0)
        return int(buckets[place]), groups[place]

    @functools.lru_cache(maxsize=2)  # noqa: B019  two epochs at a time: their border is crossed back and forth
    def _epoch(self, epoch):
        """Returns int32[steps], the bucket of each batch of an epoch, and int32[steps, batch_size], its groups."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        buckets, batches = [], []
        rest = np.zeros(0, np.int32)
        bucket_of = self.bucket_of
        if self.shuffle and not self.keep_rest:
            there = np.flatnonzero(bucket_of != NO_GROUP)
            out = random.choice(there, len(there) % self.batch_size, replace=False)
            bucket_of = np.where(np.isin(np.arange(len(bucket_of)), out), NO_GROUP, bucket_of)
        for bucket in range(self.bucket_of.max() + 1):
            members = np.concatenate([rest, np.flatnonzero(bucket_of == bucket).astype(np.int32)])
            if self.shuffle:
                random.shuffle(members)
            full = len(members) // self.batch_size
            batches.append(members[: full * self.batch_size].reshape(full, self.batch_size))
            buckets.append(np.full(full, bucket, np.int32))
            rest = members[full * self.batch_size :]
        if self.keep_rest and len(rest):
            batches.append(np.pad(rest, (0, self.batch_size - len(rest)), constant_values=NO_GROUP)[None])
            buckets.append(np.full(1, self.bucket_of.max(), np.int32))
        buckets, batches = np.concatenate(buckets), np.concatenate(batches)
        if self.shuffle:
            turn = random.permutation(len(batches))
            buckets, batches = buckets[turn], batches[turn]
        return buckets, batches


class Stages:
    """Orders one behind the other: each is gone through as often as the others before the next one begins.

    So a batch is of one stage alone. What does not fill a batch in a pass is left out of that pass, other groups each
    time, as in any order; none of it moves on to the next stage.
    """

    def __init__(self, orders, steps):
        """Takes the `Order` of each stage, of one batch size, and the steps of the whole run."""
        self.orders, self.steps, self.batch_size = tuple(orders), steps, orders[0].batch_size
        self.steps_per_epoch = sum(order.steps_per_epoch for order in orders)
        passes = np.cumsum([order.steps_per_epoch for order in orders]) / self.steps_per_epoch
        self.ends = np.rint(passes * steps).astype(int)  # the step behind each stage

    @property
    def fingerprint(self):
        """A digest of all that decides which groups are in which batch."""
        parts = (self.steps, *(order.fingerprint for order in self.orders))
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def __getitem__(self, step):
        """Returns the bucket of a step's batch, and its groups, int32[batch_size]; behind the end, the last stage's."""
        stage = min(int(np.searchsorted(self.ends, step, side="right")), len(self.orders) - 1)
        return self.orders[stage][step - (int(self.ends[stage - 1]) if stage else 0)]


def thirds(difficulty) -> np.ndarray:
    """Returns the third that each group falls into, int[N]: 0 for the easiest; of equal ones, the earlier is easier.

    Args:
      difficulty: float[N].
    """
    rank = np.argsort(np.argsort(difficulty, kind="stable"), kind="stable")
    return rank * 3 // len(difficulty)
