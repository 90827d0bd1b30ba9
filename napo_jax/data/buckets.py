"""Length buckets: the handful of shapes that XLA compiles, chosen from the data's own lengths.

A group's tokens lie packed one behind the other, so that what counts for a bucket is their total and not the longest of
four answers: padding every answer to the longest of its group would alone be 15 to 20% of all tokens on a mix like
RLAIF-V's, however many buckets there are. The padded lengths P and T are for attention only.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """The static lengths of a batch; what its groups fill of them is in their lengths."""

    tokens: int  # U, packed tokens of a group: all prefixes and all answers
    prefix: int  # P, tokens that attention gives to each prefix
    answer: int  # T, tokens that attention gives to each answer
    answers: int  # A, packed tokens of all answers of a group
    # The most pictures of a group. Not in what is printed, by which a run knows its data again: it follows from them.
    pictures: int = dataclasses.field(default=1, repr=False)


def choose_buckets(
    prefix_lengths, answer_lengths, prefixes=1, *, pictures=None, count=8, multiple=16, attention_multiple=128
):
    """Chooses the buckets with the least padding that hold all groups.

    Args:
      prefix_lengths: int[N], tokens of each group's prefix, all image tokens included.
      answer_lengths: int[N, C], tokens of its answers.
      prefixes: M, how many image variants repeat the prefix.
      pictures: int[N], how many each group has; None: one each.
      count: the most buckets to choose.
      multiple: U and A are multiples of this.
      attention_multiple: attention's tokens M P + C T are a multiple of this; 128 is what TPU kernels need.

    Returns:
      tuple of Bucket, ascending by tokens.
      int[N], the bucket of each group: the smallest by tokens.
    """
    if len(prefix_lengths) == 0:
        raise ValueError("there is no group to choose buckets for")
    if count < 1 or multiple < 1 or attention_multiple < 1:
        raise ValueError(
            f"count, multiple and attention_multiple must be at least 1, got {count, multiple, attention_multiple}"
        )
    answers = answer_lengths.sum(axis=1)
    steps = -(-(prefixes * prefix_lengths + answers) // multiple)
    sizes, frequency = np.unique(steps, return_counts=True)
    bounds = sizes[_cheapest_bounds(sizes, frequency, count)]
    bucket_of = np.searchsorted(bounds, steps)
    cells = answer_lengths.shape[1]
    answer_step = attention_multiple // math.gcd(attention_multiple, cells)
    prefix_step = attention_multiple // math.gcd(attention_multiple, prefixes)
    up = lambda value, step: int(-(-value // step) * step)
    buckets = []
    for i, bound in enumerate(bounds):
        members = bucket_of == i
        buckets.append(
            Bucket(
                tokens=int(bound) * multiple,
                prefix=up(prefix_lengths[members].max(), prefix_step),
                answer=up(answer_lengths[members].max(), answer_step),
                answers=up(answers[members].max(), multiple),
                pictures=1 if pictures is None else int(pictures[members].max()),
            )
        )
    return tuple(_widen(buckets)), bucket_of


def _widen(buckets):
    """Makes every bucket hold what the ones before it hold, so that a group may always move up."""
    widest = buckets[0]
    for bucket in buckets:
        widest = Bucket(*map(max, dataclasses.astuple(widest), dataclasses.astuple(bucket)))
        yield widest


def _cheapest_bounds(sizes, frequency, count):
    """Returns indices of at most `count` sizes, the last one among them, that minimise the sum of everyone's bound.

    Exact, by dynamic programming over the sorted sizes: cost[k, j] is that of the j smallest in k buckets.
    """
    n, below = len(sizes), np.concatenate([[0], np.cumsum(frequency)])
    count = min(count, n)
    cost = np.full(n + 1, np.inf)
    cost[0] = 0
    choices = []
    for _ in range(count):
        # [j, i]: the last bucket reaches from size i to size j - 1.
        each = cost[None, :-1] + sizes[:, None] * (below[1:, None] - below[None, :-1]).astype(float)
        each = np.where(np.tri(n, dtype=bool), each, np.inf)
        choices.append(each.argmin(axis=1))
        cost = np.concatenate([[np.inf], each.min(axis=1)])
    bounds, end = [], n
    for choice in reversed(choices):
        bounds.append(end - 1)
        end = choice[end - 1]
    return np.array(bounds[::-1])


def padding_share(buckets, bucket_of, prefix_lengths, answer_lengths, prefixes=1):
    """Returns the share of computed tokens that are padding, if every group goes to its bucket."""
    computed = np.array([bucket.tokens for bucket in buckets])[bucket_of].sum()
    return 1 - float((prefixes * prefix_lengths + answer_lengths.sum(axis=1)).sum() / computed)
