"""Shows what the trainer will see, and what it will not: `python -m napo_jax.preview --config configs/debug.py`."""

import dataclasses
import json

import numpy as np

from napo_jax.command import exit_with_one_line
from napo_jax.config import parse


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's own options."""

    # Print one JSON object instead of text.
    json: bool = False
    # Also write a page with sample groups to this file.
    html: str | None = None
    # How many groups the page shows: the first that training would see.
    groups: int = 6

    def __post_init__(self):
        """Checks the number."""
        if self.groups < 0:
            raise ValueError(f"groups must not be negative, got {self.groups}")


def summarise(dataset):
    """Returns what there is to know of a `Dataset` before training on it, as a dict for JSON."""
    table, order = dataset.table, dataset.order()
    prefixes = table.rules.prefixes
    totals = prefixes * table.prefix_lengths + table.answer_lengths.sum(axis=1)
    lengths = {"prefix": table.prefix_lengths}
    lengths |= dict(zip(table.rules.cells, table.answer_lengths.T, strict=True))
    steps = [order[step][0] for step in range(order.steps_per_epoch)]
    members = np.bincount(dataset.bucket_of, minlength=len(dataset.buckets))
    batches = np.bincount(steps, minlength=len(dataset.buckets))
    return {
        "rows": dataset.rows,
        "kept": len(table),
        "dropped": dataset.dropped,
        "notes": table.notes,
        "duplicate_rows": len(table) - len(set(table.keys)),
        "cells": list(table.rules.cells),
        "tokens": {name: _quantiles(values) for name, values in (lengths | {"group": totals}).items()},
        "histogram": _histogram(totals),
        "buckets": [
            dataclasses.asdict(bucket) | {"groups": int(count), "batches": int(turns)}
            for bucket, count, turns in zip(dataset.buckets, members, batches, strict=True)
        ],
        "padding": round(dataset.padding, 4),
        "batch_size": order.batch_size,
        "steps_per_epoch": order.steps_per_epoch,
        "held_out": int(dataset.held_out.sum()),
        "left_over_per_epoch": len(table) - int(dataset.held_out.sum()) - order.steps_per_epoch * order.batch_size,
        "fingerprint": dataset.loader(order, rows=(0, order.batch_size)).fingerprint,
        "pictures": {
            str(count): int(rows) for count, rows in zip(*np.unique(table.pictures, return_counts=True), strict=True)
        },
    }


def _quantiles(values):
    names = {"min": 0, "median": 0.5, "95%": 0.95, "max": 1}
    return {name: round(float(np.quantile(values, q))) for name, q in names.items()}


def _histogram(values, bins=12):
    """Returns [[first, last, count]] over equal ranges; the last one takes in the few that are far longer."""
    low, high = int(values.min()), int(values.max())
    width = -(-(int(np.quantile(values, 0.98)) - low + 1) // bins)
    place = np.minimum((values - low) // width, bins - 1)
    counts = np.bincount(place)
    ranges = [[low + i * width, low + (i + 1) * width - 1, int(count)] for i, count in enumerate(counts)]
    ranges[-1][1] = high
    return ranges


def as_text(summary):
    """Renders a summary for a terminal."""
    lines = [f"{summary['rows']} rows, {summary['kept']} kept, {summary['rows'] - summary['kept']} dropped"]
    lines += [f"  dropped  {count:>7}  {reason}" for reason, count in summary["dropped"].items()]
    lines += [f"  kept     {count:>7}  {note}" for note, count in summary["notes"].items()]
    if summary["duplicate_rows"]:
        lines.append(f"  kept     {summary['duplicate_rows']:>7}  repeat another row")
    if summary["pictures"].keys() != {"1"}:
        lines += ["", "pictures of a group"]
        lines += [f"  {count:<8} {rows:>7} groups" for count, rows in summary["pictures"].items()]
    lines += ["", f"{'tokens':<24}{'min':>7}{'median':>8}{'95%':>7}{'max':>7}"]
    for name, values in summary["tokens"].items():
        lines.append(f"  {name:<22}" + "".join(f"{v:>{w}}" for v, w in zip(values.values(), (7, 8, 7, 7), strict=True)))
    most = max(count for *_, count in summary["histogram"])
    lines += ["", "tokens of a group"]
    lines += [
        f"  {first:>6} to {last:<6} {count:>7} {'#' * -(-40 * count // most)}"
        for first, last, count in summary["histogram"]
    ]
    lines += ["", "buckets: tokens of a group, of them answers; prefix and answer are what attention alone pads to"]
    columns = ("tokens", "answers", "prefix", "answer", "groups", "batches")
    lines.append("  " + "".join(f"{name:>9}" for name in columns))
    lines += ["  " + "".join(f"{bucket[name]:>9}" for name in columns) for bucket in summary["buckets"]]
    lines += [
        "",
        f"padding {summary['padding']:.1%} of the computed tokens",
        f"{summary['steps_per_epoch']} steps of {summary['batch_size']} groups in an epoch, "
        f"{summary['left_over_per_epoch']} groups left over, other ones in each"
        + (f"; {summary['held_out']} held out" if summary["held_out"] else ""),
    ]
    return "\n".join(lines)


def main(argv=None):
    """Runs the command."""
    config, options = parse(Options, argv, description=__doc__)
    # Heavy imports wait until the command line is known to be right.
    from napo_jax.data.dataset import open_dataset
    from napo_jax.model_source import find_model

    source = find_model(config.model)
    dataset = open_dataset(config.data, config.objective, source.tokenizer, source.shape)
    summary = summarise(dataset)
    print(json.dumps(summary) if options.json else as_text(summary))
    if options.html:
        from napo_jax.preview_page import write_page

        write_page(options.html, dataset, summary, config.objective, options.groups)
        if not options.json:
            print(f"\nwrote {options.html}")


if __name__ == "__main__":
    exit_with_one_line(main)
