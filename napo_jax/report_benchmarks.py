"""Benchmarks before and after, as the tables of a run's report."""

import dataclasses
import html
import json
import math

from napo_jax.decoding import Decoding
from napo_jax.html_page import Markup, table
from napo_jax.report import as_float, is_number

STYLE = """
.benchmarks { columns: 30rem; column-gap: 2.5rem; }
.benchmark { padding-bottom: 1.8rem; break-inside: avoid; } .benchmark td { vertical-align: top; }
.of { display: block; font-size: .8rem; line-height: 1.2; color: var(--quiet); }
.better { color: var(--bar); } .worse { color: var(--fault); }
.settings { font-size: .85rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  .benchmark td, .benchmark th { padding-right: .5rem; }
  .benchmark th, .benchmark td:first-child { white-space: normal; }
}
"""

_MORE, _LESS, _UNCLEAR = "more", "less", None
# Each benchmark's metrics, and which way they are better.
_METRICS = {
    "vlind": {"CK": _MORE, "VP": _MORE, "CB": _MORE, "LP": _MORE},
    "pope": {"accuracy": _MORE, "f1": _MORE, "yes_ratio": _UNCLEAR},
    "chair": {"CHAIRs": _LESS, "CHAIRi": _LESS},
    "amber": {"CHAIR": _LESS, "Cover": _MORE, "Hal": _LESS, "Cog": _LESS, "accuracy": _MORE, "f1": _MORE},
    "mmhal": {"score": _MORE, "rate": _LESS},
    "world": {"usual": _MORE, "changed": _MORE, "gap": _LESS, "habit": _LESS, "flood": _LESS},
}
_SETTINGS = ("model", "prompts", "variant", "part", "judge", "dtype", "decoding", "note", "warning")
_SAME = ("prompts", "variant", "part", "judge", "questions", "synonyms", "similarity")  # or else there is no difference
_ALWAYS = ("beams", "max_tokens", "temperature")  # of decoding; the rest is said where it is not as usual


def benchmarks(scores) -> str:
    """Renders the tables.

    Args:
      scores: {benchmark: {label: what `evaluate score` wrote}}; labels in the order in which they are shown.

    Returns:
      HTML.
    """
    if not scores:
        return (
            '<p class="quiet">None are there. <code>python -m napo_jax.evaluate answer</code> asks a model, and '
            "<code>python -m napo_jax.evaluate score --out WORKDIR/evals/before/pope.json</code> makes numbers of its "
            "answers; those of the trained model belong in <code>evals/after</code>.</p>"
        )
    known = list(_METRICS)
    order = sorted(scores, key=lambda name: (known.index(name) if name in known else len(known), name))
    return f'<div class="benchmarks">{"".join(_benchmark(name, scores[name]) for name in order)}</div>'


def right(cell) -> Markup:
    """Returns a cell of a table, which is HTML already, at the right of its column."""
    return Markup(f'<div class="number">{cell}</div>')


def _benchmark(name, runs):
    labels = list(runs)
    first, last = runs[labels[0]], runs[labels[-1]]
    unlike = [field for field in _SAME if first.get(field) != last.get(field)]
    rows, head = [], ["", *(right(html.escape(label)) for label in labels)]
    if len(labels) > 1:
        head.append(right(html.escape(f"{labels[-1]} − {labels[0]}")))
    for title, path, better in _rows(name, runs.values()):
        values, counts = ([find(run, path) for run in runs.values()] for find in (_find, _counts))
        cells = list(map(_value, values, counts))
        if len(labels) > 1:
            cells.append("-" if unlike else _difference(values[0], values[-1], better))
        rows.append((title, *cells))
    shown = table(head, rows) if rows else '<p class="quiet">It has no number that is shown here.</p>'
    if unlike and len(labels) > 1:
        shown += f'<p class="settings">No difference is shown: {", ".join(unlike)} differ.</p>'
    return f'<section class="benchmark"><h3>{html.escape(name)}</h3>{shown}{_settings(runs)}</section>'


def _rows(name, runs):
    """Yields (title, path, which way is better) of the metrics that at least one run has."""
    known = _METRICS.get(name) or {key: _UNCLEAR for run in runs for key, value in run.items() if is_number(value)}
    splits = dict.fromkeys(split for run in runs for split in _splits(run))
    every = [(metric, (metric,)) for metric in known]
    every += [(f"{metric}, {split}", ("splits", split, metric)) for split in splits for metric in known]
    for title, path in every:
        if any(_is_present(run, path) for run in runs):
            yield title, path, known[path[-1]]


def _splits(run):
    splits = run.get("splits")
    return splits if isinstance(splits, dict) else {}


def _is_present(run, path):
    for name in path:
        if not isinstance(run, dict) or name not in run:
            return False
        run = run[name]
    return True


def _find(run, path):
    """Returns a number; None where there is none, as of 0/0."""
    for name in path:
        run = run.get(name) if isinstance(run, dict) else None
    return as_float(run) if is_number(run) else None


def _counts(run, path):
    """Returns what a number is the ratio of, (above, below), if the file says it."""
    counts, items = (part if isinstance(part, dict) else {} for part in (run.get("counts"), run.get("items")))
    pair = counts.get(path[0]) if len(path) == 1 else None
    rows = items.get(path[0]) if len(path) == 1 else None
    if pair is None and isinstance(rows, list) and all(map(_is_pair, rows)):
        pair = [sum(map(as_float, column)) for column in zip(*rows, strict=True)]
    return [as_float(part) for part in pair] if _is_pair(pair) else None


def _is_pair(value):
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def _value(value, counts):
    of = f'<span class="of">{counts[0]:g}/{counts[1]:g}</span>' if counts else ""
    return right(_hundredths(value) + of)


def _hundredths(value, form=".2f"):
    return "-" if value is None else f'<data value="{value!r}">{value:{form}}</data>'.replace(">-", ">−")


def _difference(first, last, better):
    if first is None or last is None:
        return right("-")
    change = last - first
    if not math.isfinite(change):
        return right("-")
    if not change:
        return right("0.00 same")
    word = "" if better is _UNCLEAR else "better" if (change > 0) == (better == _MORE) else "worse"
    said = f"{_hundredths(change, '+.2f')} {'↑' if change > 0 else '↓'} {word}"
    return right(f'<span class="{word}">{said.rstrip()}</span>')


def _settings(runs):
    """Says how the answers were made: once what all labels share, and else for each label."""
    shared, apart = [], {label: [] for label in runs}
    for field in _SETTINGS:
        said = {label: _said(field, run[field]) for label, run in runs.items() if field in run}
        if len(said) == len(runs) and len(set(said.values())) == 1:
            shared += [f"{field} {next(iter(said.values()))}"]
        else:
            for label, words in said.items():
                apart[label].append(f"{field} {words}")
    lines = [", ".join(shared)] if shared else []
    lines += [f"{label}: {', '.join(words)}" for label, words in apart.items() if words]
    return "".join(f'<p class="settings quiet">{html.escape(line)}</p>' for line in lines)


def _said(field, value):
    if field != "decoding" or not isinstance(value, dict):
        return str(value)
    flat, usual = _flatten(value), _flatten(dataclasses.asdict(Decoding()))
    said = (f"{name} {value}" for name, value in flat.items() if name in _ALWAYS or value != usual.get(name))
    return f"({', '.join(said)})"


def _flatten(value):
    """Returns a nested dict with names such as "debias.rule", and with lists for tuples as in JSON."""
    flat = {}
    for name, part in json.loads(json.dumps(value)).items():
        flat |= {f"{name}.{more}": v for more, v in _flatten(part).items()} if isinstance(part, dict) else {name: part}
    return flat
