"""Two runs of one benchmark beside each other, with intervals by bootstrap over what they were both asked."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

_NEEDED = ("benchmark", "prompts", "variant", "questions")
_SAME = (*_NEEDED, "judge", "synonyms", "similarity")  # numbers that differ in one of these do not compare
# These may differ, and then it is said.
_SETTINGS = ("model", "weights", "decoding", "dtype", "template", "image_rule", "language", "tagger")
# Numbers that are made of others: where they begin, and how much of each is added.
_MADE_OF = {"gap": (0, {"usual": 1, "changed": -1}), "AMBER": (50, {"CHAIR": -0.5, "f1": 0.5})}
_RESAMPLES = 2000
_AT_ONCE = 64  # resamples; bounds the memory
_PERCENTILES = (2.5, 97.5)
_MOST = 1e100  # less than any number of a result: sums and products of such are still numbers


def compare(first: Mapping[str, Any], second: Mapping[str, Any], *, resamples: int = _RESAMPLES, seed: int = 0) -> dict:
    """Compares the results of two runs, metric by metric.

    Instances are drawn again with replacement, the same ones for both runs, so that what makes an instance hard for
    both does not widen the interval of the difference. A resample in which a number is 0/0 is left out of that
    number's interval, and counted.

    Args:
      first: the result of a benchmark's `score`, with `benchmark` and the fingerprint of its `questions`.
      second: another of the same benchmark, prompts, variant, questions, judge and tables of words.
      resamples: how many.
      seed: of the drawing.

    Returns:
      A dict for JSON. Of each metric: each run's value with its 95% interval and its numerator and denominator (None
      of a number that is made of others), and the difference, second less first, with its own.

    Raises:
      ValueError: the two do not compare.
    """
    runs = (first, second)
    for run in runs:
        check(run)
    _check_alike(first, second)
    metrics = {name: [_read(run, name) for run in runs] for name in first["items"]}
    totals = _resample(metrics, resamples, seed)
    numbers = {name: _scaled(name, runs, arrays, totals.pop(name)) for name, arrays in metrics.items()}
    numbers |= {
        name: _made(name, runs, numbers)
        for name, (_, parts) in _MADE_OF.items()
        if parts.keys() <= numbers.keys() and all(name in run for run in runs)
    }
    return {
        **{field: first[field] for field in (*_SAME, "warning") if field in first},
        "differs": {f: [run.get(f) for run in (first, second)] for f in _SETTINGS if first.get(f) != second.get(f)},
        "resamples": resamples,
        "seed": seed,
        "metrics": {name: _summary(*number) for name, number in numbers.items()},
    }


def check(run: Mapping[str, Any], name="a result"):
    """Raises if a run's result is not one that `compare` can read.

    Args:
      run: the result.
      name: of the result, for the error.
    """
    again = "score its answers again"
    if missing := [field for field in (*_NEEDED, "items") if field not in run]:
        raise ValueError(f"{name} without {', '.join(missing)} cannot be compared; {again}")
    if not isinstance(run["items"], Mapping) or not run["items"]:
        raise ValueError(f"{name} has {reprlib.repr(run['items'])} as items, expected those of each number; {again}")
    for metric, items in run["items"].items():
        parts = list(items.values()) if isinstance(items, Mapping) else [items]
        if not parts or not all(map(_are_pairs, parts)) or len(set(map(len, parts))) > 1:
            raise ValueError(f"{name} has items of {metric} that are no pairs of numbers; {again}")
    for metric in (*run["items"], *(metric for metric in _MADE_OF if metric in run)):
        value = run.get(metric, "nothing")
        if value is not None and not _is_number(value) and value == value:
            raise ValueError(f"{name} has {reprlib.repr(value)} as {metric}, expected a number; {again}")


def _are_pairs(items):
    """Tells whether items are pairs of numbers, of which there is one."""
    is_pair = lambda item: isinstance(item, list | tuple) and len(item) == 2 and all(map(_is_number, item))
    return isinstance(items, list | tuple) and len(items) > 0 and all(map(is_pair, items))


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST < value < _MOST


def as_text(comparison: Mapping[str, Any], names=("A", "B")) -> str:
    """Renders a comparison for a terminal.

    Args:
      comparison: as `compare` returns it.
      names: of the two runs, such as the paths of their files.
    """
    asked = ", ".join(f"{field} {comparison[field]}" for field in ("benchmark", "prompts", "variant"))
    lines = [f"{asked}; 95% intervals over {comparison['resamples']} resamples"]
    lines += [f"{letter}: {name}" for letter, name in zip("AB", names, strict=True)]
    lines += [f"warning: {comparison['warning']}"] if "warning" in comparison else []
    lines += [f"{field}: A {first}, B {second}" for field, (first, second) in comparison["differs"].items()]
    rows = [("", "A", "B", "B - A", "of A", "of B")]
    for name, metric in comparison["metrics"].items():
        cells = [_cell(metric[run], ".2f") for run in ("first", "second")]
        counts = [metric[run]["counts"] for run in ("first", "second")]
        counts = ["" if pair is None else "{:g}/{:g}".format(*pair) for pair in counts]
        rows.append((name, *cells, _cell(metric["difference"], "+.2f"), *counts))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for name, metric in comparison["metrics"].items():
        if left_out := metric["difference"]["undefined"]:
            lines.append(f"{name}: 0/0 in {left_out} resamples, which its interval is without")
    return "\n".join(lines)


def _cell(number, form):
    low, high = number["interval"]
    return f"{number['value']:{form}} [{low:{form}}, {high:{form}}]"


def _check_alike(first, second):
    for field in _SAME:
        if first.get(field) != second.get(field):
            raise ValueError(
                f"the {field} of the two differ, {first.get(field)} and {second.get(field)}; no comparison"
            )
    if first["items"].keys() != second["items"].keys():
        raise ValueError("the two have different metrics; score both again with one version")


def _read(run, name):
    """Returns float64[P, N, 2]: numerator and denominator of N instances, in each part that a metric is the mean of."""
    items = run["items"][name]
    parts = list(items.values()) if isinstance(items, Mapping) else [items]
    return np.array(parts, float).reshape(len(parts), -1, 2)


def _resample(metrics, resamples, seed):
    """Returns {metric: float64[2, R, P, 2]}, the sums of each run over the instances drawn.

    Metrics of as many instances are drawn alike, since they are mostly about the same ones.
    """
    totals = {}
    for name, (first, second) in metrics.items():
        if first.shape != second.shape:
            raise ValueError(f"the two have different instances of {name}; score both again with one version")
        totals[name] = np.empty((2, resamples, len(first), 2))
    for count in {runs[0].shape[1] for runs in metrics.values()}:
        of_count = [name for name, runs in metrics.items() if runs[0].shape[1] == count]
        rng = np.random.default_rng([seed, count])
        for start in range(0, resamples, _AT_ONCE):
            drawn = range(start, min(start + _AT_ONCE, resamples))
            times = [np.bincount(rng.integers(count, size=count), minlength=count) for _ in drawn]
            times = np.array(times, float)
            for name in of_count:
                for run, items in enumerate(metrics[name]):
                    totals[name][run, drawn] = (times @ items).swapaxes(0, 1)
    return totals


def _scaled(name, runs, items, totals):
    """Returns a metric's values, its resamples and its counts, each of both runs."""
    sums = [array.sum(1) for array in items]
    scale = _scale(name, runs, sums)
    values = [scale * float(_ratio(total)) for total in sums]
    return values, [scale * _ratio(total) for total in totals], [total.sum(0).tolist() for total in sums]


def _made(name, runs, numbers):
    """Returns the same of a number that is made of others, resample by resample."""
    start, parts = _MADE_OF[name]
    sums = lambda kind, run: start + sum(weight * numbers[part][kind][run] for part, weight in parts.items())
    values = [sums(0, run) for run in range(2)]
    for run, value in zip(runs, values, strict=True):
        said = math.nan if run[name] is None else run[name]
        if math.isnan(said) != math.isnan(value) or (said == said and not math.isclose(said, value, abs_tol=1e-6)):
            raise ValueError(f"{name} is {said}, but what it is made of gives {value:g}; score the answers again")
    return values, [sums(1, run) for run in range(2)], [None, None]


def _summary(values, drawn, counts):
    summary = {
        which: {**_number(value, resampled), "counts": pair}
        for which, value, resampled, pair in zip(("first", "second"), values, drawn, counts, strict=True)
    }
    return summary | {"difference": _number(values[1] - values[0], drawn[1] - drawn[0])}


def _ratio(totals):
    """Returns float64[...], the mean over P of the ratios of float64[..., P, 2]; nan for 0/0."""
    numerator, denominator = totals[..., 0], totals[..., 1]
    ratios = np.divide(numerator, denominator, out=np.full(numerator.shape, math.nan), where=denominator != 0)
    return ratios.mean(-1)


def _scale(name, runs, sums):
    """Returns what the ratio of a metric is multiplied by, as the values of the runs say: 100 for percent."""
    scales = []
    for run, total in zip(runs, sums, strict=True):
        ratio = float(_ratio(total))
        value = math.nan if run[name] is None else run[name]  # JSON proper has no nan
        if math.isnan(ratio) != math.isnan(value) or (ratio == 0) != (value == 0):
            raise ValueError(f"{name} is {value}, but its items give {ratio:g}; score the answers again")
        if ratio and not math.isnan(ratio):
            scales.append(value / ratio)
    if scales and not math.isclose(min(scales), max(scales), rel_tol=1e-4):
        raise ValueError(f"the values of {name} do not fit their items; score the answers again")
    return scales[0] if scales else 1.0  # of zeros and nans alone, any


def _number(value, resampled):
    there = resampled[~np.isnan(resampled)]
    interval = np.percentile(there, _PERCENTILES).tolist() if there.size else [math.nan, math.nan]
    return {"value": value, "interval": interval, "undefined": int(resampled.size - there.size)}
