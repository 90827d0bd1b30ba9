"""Metrics over the steps of a run as line charts in SVG, whose text has one size at every width of a page."""

import html
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from napo_jax.html_page import Markup

STYLE = """
:root { --c0: #0068a8; --c1: #c94f00; --c2: #00805c; --c3: #a2407e; --c4: #57606a; }
@media (prefers-color-scheme: dark) {
  :root { --c0: #5cb6ee; --c1: #f2994a; --c2: #3ecf9f; --c3: #e591c0; --c4: #b4bac2; }
}
.charts { display: grid; margin-top: 1.4rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19.5rem), 1fr));
  gap: 2rem 2.2rem; }
.chart { min-width: 0; break-inside: avoid; } .chart p { font-size: .85rem; }
.plot { display: block; height: 9.5rem; width: calc(100% - 4rem); margin: .8rem .9rem 1.7rem 3.1rem; }
.plot, .plot svg, .key svg { overflow: visible; }
.plot text { font-size: 11.5px; fill: var(--quiet); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); } .zero { stroke: var(--quiet); }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.raw { stroke-width: 1; opacity: .25; } .held { stroke-width: 1.2; }
.mark { fill: var(--back); stroke: var(--c); stroke-width: 1.6; } .dot { fill: var(--c); stroke: none; }
.hit { fill: transparent; } .hit:hover { fill: var(--quiet); opacity: .22; }
.legend { font-size: .85rem; width: 100%; } .legend th { border: 0; } .legend tr > :last-child { padding-right: 0; }
.legend tr > :nth-child(2) { width: 100%; white-space: normal; overflow-wrap: anywhere; }
.key { display: block; width: 34px; height: 12px; }
"""

_COLOURS = 5
# As many as make, with the colours, each pair of them once before one comes again.
_DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "12 4", "5 2 2 2 2 2")
_MARKS = (  # around a point
    '<circle r="3.4"/>',
    '<rect x="-3.2" y="-3.2" width="6.4" height="6.4"/>',
    '<path d="M-4.2 3.4 4.2 3.4 0 -4.2z"/>',
    '<path d="M-4.4 0 0 -4.4 4.4 0 0 4.4z"/>',
)

_SIDE = 1000  # coordinates of a plot's lines in either direction
_COLUMNS = 400  # of a plot, in each of which a line keeps its lowest and its highest point
_MARKED = 40  # the same of a line with marks
_HITS = 64  # columns that show their values to a pointer
_WINDOWS = 30  # the share of the points that a mean runs over is one in this many
_LONG = 1e10  # a tick's label has no more digits than this, in its unit
_FEWEST = 40  # points that a mean runs over at all
# A value beyond the first is drawn there, and a range below the second as none, so that no sum or ratio of what is
# drawn is infinite or 0/0.
_FAR, _NEAR = 1e300, 1e-300
_NOISE = 0.01  # of the range: what a line differs from its mean by, if the mean is to be drawn


class Line(NamedTuple):
    """What one metric did.

    Attributes:
      label: its name in the chart.
      metric: its name in the files.
      points: (step, value) in order of steps, finite.
      last: its value in the last line of the file; None if there is none.
      held_out: (step, value) of the evaluations.
    """

    label: str
    metric: str
    points: Sequence[tuple[int, float]]
    last: float | None
    held_out: Sequence[tuple[int, float]] = ()


def chart(title, lines, end, last_step, *, share=False, limits=None, zero=True, left_out="") -> str:
    """Draws a chart with its legend, which says the last values.

    Args:
      title: what is measured.
      lines: the `Line`s, of which at least one has a point.
      end: the step at the right end, at least 1.
      last_step: the one that the lines' last values are of.
      share: whether 1 is 100%.
      limits: (lowest, highest) of the vertical axis; None for what the values need.
      zero: whether the vertical axis has 0 on it, where `limits` leaves that open.
      left_out: what is said below of values that could not be drawn.

    Returns:
      HTML.
    """
    values = [value for line in lines for _, value in (*line.points, *line.held_out)]
    low, high = limits or _bounds(values, zero)
    # In percent.
    place = lambda step, value: (100 * step / end, 100 * (high - min(max(value, low), high)) / (high - low))
    drawn = [_line(index, line, place, share) for index, line in enumerate(lines)]
    left_out = f'<p class="quiet">{html.escape(left_out)}</p>' if left_out else ""
    said = "; ".join(_in_words(line, share) for line in lines if line.points)
    return (
        f'<figure class="chart"><h3>{html.escape(title)}</h3>'
        f'<svg class="plot" role="img" aria-label="{html.escape(f"{title}: {said}")}">'
        f"{_axes(low, high, end, place, share)}"
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" width="100%" height="100%">'
        f"{''.join(path for path, _ in drawn)}</svg>"
        f"{_hits(lines, end, share)}{''.join(marks for _, marks in drawn)}</svg>"
        f"{_legend(lines, share, last_step)}{left_out}</figure>"
    )


def number(value, share=False) -> str:
    """Returns a number with four digits, or as a share of 100%; nothing as a dash.

    >>> [number(value) for value in (0.693147, 12345.6, 2e-05, -1.5, 0.0, None)]
    ['0.6931', '12,346', '2e−5', '−1.5', '0', '-']
    >>> number(0.75, share=True)
    '75.0%'
    """
    if value is None:
        return "-"
    if share:
        text = f"{value:.1%}" if abs(value) < 1e4 else f"{100 * value:.4g}%"
    elif 1000 <= abs(value) < 1e7:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")
    return text.replace("-", "−")


def exact(value, share=False, name="") -> Markup:
    """Returns the HTML of a number that holds all its digits too, and says the name of its metric."""
    if value is None:
        return Markup("-")
    title = f' title="{html.escape(name)}"' if name else ""
    return Markup(f'<data value="{value!r}"{title}>{number(value, share)}</data>')


def ticks(low, high, most=5, *, whole=False) -> list[float]:
    """Returns round numbers in a range: multiples of 1, 2 or 5 times a power of ten.

    >>> ticks(0, 1000), ticks(0.35, 0.72), ticks(-1.2, 3.1), ticks(0, 3, whole=True)
    ([0, 200, 400, 600, 800, 1000], [0.4, 0.5, 0.6, 0.7], [-1, 0, 1, 2, 3], [0, 1, 2, 3])
    """
    power = math.floor(math.log10((high - low) / most))
    sizes = [(factor, power + more) for more in (0, 1) for factor in (1, 2, 5)]
    # As fractions of whole numbers, so that 3 times 0.1 is 0.3.
    for factor, exponent in sizes:
        up, down = factor * 10 ** max(exponent, 0), 10 ** max(-exponent, 0)
        first, last = math.ceil(low * down / up), math.floor(high * down / up)
        if last - first <= most and not (whole and down > 1):
            break
    return [i * up if down == 1 else i * up / down for i in range(first, last + 1)]


def thin(points, columns=_COLUMNS):
    """Leaves out points that nobody would see.

    Args:
      points: (step, value) in order of steps.
      columns: the steps are divided into so many.

    Returns:
      The first and the last point, and of each column the lowest and the highest one; all where that is no fewer.
    """
    if len(points) <= 2 * columns:
        return points
    start, width = points[0][0], (points[-1][0] - points[0][0] + 1) / columns
    kept = {points[0], points[-1]}
    for _, some in itertools.groupby(points, lambda point: int((point[0] - start) / width)):
        some = sorted(some, key=lambda point: point[1])
        kept |= {some[0], some[-1]}
    return sorted(kept)


def running_mean(points, columns=_COLUMNS):
    """Returns (step, mean of the values around it) at no more than so many steps; none for few points or little noise.

    Each mean is summed anew: one that is carried along never recovers from a value that dwarfs the others.
    """
    if len(points) < _FEWEST:
        return []
    values = np.clip([value for _, value in points], -_FAR, _FAR)
    half = max(1, len(points) // _WINDOWS // 2)
    centres = np.unique(np.linspace(0, len(points) - 1, min(len(points), columns)).round().astype(int))
    means = np.array([values[max(0, c - half) : c + half + 1].mean() for c in centres])
    low, high = np.percentile(values, (5, 95))  # a spike is no reason to call the rest smooth
    if np.median(np.abs(values[centres] - means)) <= _NOISE * (high - low):
        return []
    return [(points[c][0], float(mean)) for c, mean in zip(centres, means, strict=True)]


def _bounds(values, zero):
    low, high = (min(max(value, -_FAR), _FAR) for value in (min(values), max(values)))
    if zero:
        low, high = min(low, 0), max(high, 0)
    if high - low < _NEAR:
        half = abs(low) / 2
        return (low - half, high + half) if half > _NEAR else (low - 1, high + 1)
    room = 0.05 * (high - low)
    return low if zero and low == 0 else low - room, high if zero and high == 0 else high + room


def _look(index):
    return f'style="--c:var(--c{index % _COLOURS})"', f'stroke-dasharray="{_DASHES[index % len(_DASHES)]}"'


def _line(index, line, place, share):
    """Returns what is drawn of a line in the plot's coordinates, and the marks around points of it."""
    colour, dash = _look(index)
    mean = running_mean(line.points)
    paths, marks = [], []
    for kind, dashes, points in (
        ("raw", "", thin(line.points) if mean else []),
        ("", dash, mean or thin(line.points)),
        ("held", dash, thin(line.held_out, _MARKED)),
    ):
        if len(points) > 1:
            at = (place(*point) for point in points)
            corners = " ".join(f"{x * _SIDE / 100:.0f},{y * _SIDE / 100:.0f}" for x, y in at)
            paths.append(f'<polyline class="line {kind}" {colour} {dashes} points="{corners}"/>')
    if len(line.points) == 1:
        x, y = place(*line.points[0])
        marks.append(f'<circle class="dot" {colour} cx="{x:.2f}%" cy="{y:.2f}%" r="3"/>')
    for step, value in thin(line.held_out, _MARKED):
        title = f"{line.label}, held out, step {step:,}: {number(value, share)}"
        marks.append(_mark(place(step, value), index, title))
    return "".join(paths), "".join(marks)


def _mark(at, index, title):
    """Returns the mark of a line around a point of it, in percent of the plot."""
    x, y = at
    colour, _ = _look(index)
    title = f"<title>{html.escape(title)}</title>" if title else ""
    return f'<svg x="{x:.2f}%" y="{y:.2f}%"><g class="mark" {colour}>{title}{_MARKS[index % len(_MARKS)]}</g></svg>'


def _axes(low, high, end, place, share):
    parts = []
    heights = ticks(low, high)
    for value in heights:
        _, y = place(0, value)
        kind = "zero" if value == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="0" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>')
        text = _tick(value, heights, share)
        parts.append(f'<text x="-8" y="{y:.2f}%" dy=".35em" text-anchor="end">{text}</text>')
    steps = ticks(0, end, whole=True)
    for step in steps:
        x, _ = place(step, low)
        parts.append(f'<text x="{x:.2f}%" y="100%" dy="1.6em" text-anchor="middle">{_tick(step, steps)}</text>')
    return "".join(parts) + '<text x="-14" y="100%" dy="1.6em" text-anchor="end">step</text>'


def _tick(value, others, share=False):
    """Returns a tick's label, with as many digits as tell it from its neighbours."""
    scale, unit = (100, "%") if share else (1, "")
    most = max(map(abs, others)) * scale
    if not share and most >= 10_000:
        scale, unit = (1e-6, "M") if most >= 1e7 else (1e-3, "k")
    gap = (others[1] - others[0]) * scale if len(others) > 1 else 1
    if not value:
        return "0"
    if gap < 1e-4 or most >= _LONG:
        return number(value, share)
    return f"{value * scale:,.{max(0, math.ceil(-math.log10(gap) - 1e-9))}f}{unit}".replace("-", "−")


def _hits(lines, end, share):
    """Returns columns that no one sees, with the values at their first step for whoever points there."""
    at = [dict(line.points) for line in lines]
    width, columns = end / _HITS, {}
    for step in sorted(set().union(*at)):
        columns.setdefault(min(int(step / width), _HITS - 1), step)
    parts = []
    for column, step in columns.items():
        said = [f"{line.label} {number(p[step], share)}" for line, p in zip(lines, at, strict=True) if step in p]
        title = html.escape("\n".join([f"step {step:,}", *said]))
        parts.append(
            f'<rect class="hit" x="{100 * column / _HITS:.2f}%" width="{100 / _HITS:.2f}%" height="100%">'
            f"<title>{title}</title></rect>"
        )
    return "".join(parts)


def _legend(lines, share, last_step):
    """Returns the lines' looks and names, with their last values."""
    trained, held = any(line.points for line in lines), any(line.held_out for line in lines)
    heads = [f"step {last_step:,}"] * trained + ["held out"] * held
    head = "".join(f'<th class="number">{title}</th>' for title in heads)
    rows = []
    for index, line in enumerate(lines):
        colour, dash = _look(index)
        mark = _mark((50, 50), index, "") if line.held_out else ""
        key = f'<svg class="key" {colour}><line class="line" {dash} x1="0" x2="100%" y1="50%" y2="50%"/>{mark}</svg>'
        last = line.held_out[-1][1] if line.held_out else None
        cells = [exact(line.last, share, line.metric)] * trained + [
            exact(last, share, f"held out: {line.metric}")
        ] * held
        values = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(f"<tr><td>{key}</td><td>{html.escape(line.label)}</td>{values}</tr>")
    return f'<table class="legend"><tr><th></th><th></th>{head}</tr>{"".join(rows)}</table>'


def _in_words(line, share):
    (first, start), (last, stop) = line.points[0], line.points[-1]
    return f"{line.label} from {number(start, share)} at step {first:,} to {number(stop, share)} at step {last:,}"
