"""The report of a run as one page: what it is, its curves, benchmarks, samples, config and versions."""

import html
import itertools
import math

from napo_jax import charts, report_benchmarks
from napo_jax.charts import Line, chart, exact
from napo_jax.data import images
from napo_jax.html_page import picture_url, table, write_html
from napo_jax.report import is_number
from napo_jax.report_benchmarks import right

_ABLATED = "image_ablated"  # what `evaluation` calls the term that takes the picture away
_MOST_SAMPLES = 24  # shown, so that a page stays small enough to send
_SIDE = 336  # pixels of a picture at most
_SMALL = 128  # one of so few pixels is shown larger, and each pixel as a square

_STYLE = f"""
body {{ max-width: 72rem; overflow-wrap: break-word; }}
h1 {{ overflow-wrap: anywhere; }} h2 {{ margin-top: 2.6rem; padding-top: .5rem; border-top: 1px solid var(--line); }}
h2, h3 {{ break-after: avoid; }} h3 {{ overflow-wrap: anywhere; }} code {{ font-size: .88em; overflow-wrap: anywhere; }}
dl {{ display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem 1.2rem; margin: .8rem 0; }}
dt {{ color: var(--quiet); overflow-wrap: anywhere; }} dd {{ margin: 0; overflow-wrap: anywhere; }}
.ends td {{ white-space: normal; }}
.verdict {{ font-size: 1.15rem; margin: 1.2rem 0 .3rem; }} .fault {{ color: var(--fault); }}
.sample {{ display: grid; grid-template-columns: 15rem minmax(0, 1fr); gap: .6rem 1.6rem; break-inside: avoid; }}
.sample img {{ width: 100%; }} .sample img.small {{ image-rendering: pixelated; }}
.question {{ font-weight: 600; }} .said {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
.turn {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 14rem), 1fr)); gap: .2rem 1.6rem; }}
.turn > div {{ border-left: 3px solid var(--line); padding-left: .7rem; margin: .5rem 0; }}
.turn > .new {{ border-color: var(--bar); }} .learned {{ font-size: .85rem; margin-bottom: 0; }}
details {{ margin: .4rem 0; }} details details {{ margin-left: 1.1rem; }}
details > dl {{ margin: .2rem 0 .6rem 1.1rem; grid-template-columns: 11rem minmax(0, 1fr); }}
summary {{ cursor: pointer; overflow-wrap: anywhere; }}
@media (max-width: 40rem) {{
  .sample {{ grid-template-columns: minmax(0, 1fr); }} .sample figure {{ max-width: 15rem; }}
  dl, details > dl {{ grid-template-columns: minmax(0, 1fr); }} dd {{ margin-bottom: .4rem; }}
}}
@media print {{
  body {{ font-size: 12px; }} .benchmarks {{ columns: auto; }}
  details::details-content {{ content-visibility: visible; block-size: auto; }}
}}
{charts.STYLE}{report_benchmarks.STYLE}"""


def write_page(path, run, title):
    """Writes the page of a `report.Run` to a file, under a title."""
    body = [
        _head(run),
        "<h2>Curves</h2>",
        _curves(run),
        "<h2>Benchmarks</h2>",
        report_benchmarks.benchmarks(run.scores),
        "<h2>Samples</h2>",
        _samples(run),
        "<h2>Config and versions</h2>",
        _config(run),
    ]
    write_html(path, title, "".join(body), _STYLE)


def _head(run):
    facts = [("steps", _progress(run)), *_model(run.config), *_data(run.config), ("objective", _objective(run.config))]
    shown = "".join(f"<dt>{html.escape(name)}</dt><dd>{value}</dd>" for name, value in facts if value)
    parts = [f"<dl>{shown}</dl>"]
    if run.stopped:
        parts.append(f'<p class="fault">{html.escape(_why_stopped(run.stopped))}</p>')
    parts += [f'<p class="fault">{html.escape(note)}</p>' for note in run.notes]
    return "".join(parts) + _verdict(run)


def _progress(run):
    done, steps = max(run.metrics.steps, default=0), _at(run.config, "steps") or _at(run.config, "train", "steps")
    if steps is None:
        epochs = _at(run.config, "train", "epochs")
        return f"{done:,}" + ("" if epochs is None else f"; all of them are {html.escape(str(epochs))} epochs")
    if not is_number(steps):  # whatever else a file may say
        return f"{done:,} of {html.escape(str(steps))}"
    left = "" if done >= steps else ", not finished"
    return f"{done:,} of {steps:,}{left}"


def _model(config):
    if not config:
        return [("model", "config.json is not there, so the page cannot say what was trained")]
    path, size = _at(config, "model", "path"), _at(config, "model", "size")
    said = str(path) if path else f"{size or 'tiny'}, random"
    rank = _at(config, "lora", "rank")
    said += f", {_at(config, 'model', 'dtype')}" + (f", LoRA of rank {rank}" if rank else "")
    return [("model", html.escape(said))]


def _data(config):
    if not config:
        return []
    path = _at(config, "data", "path")
    said = f"{_at(config, 'data', 'made_up')} made-up records" if path is None else _in_line(path)
    said += f", {_at(config, 'data', 'batch_size')} groups a step"
    held_out = _at(config, "data", "held_out")
    return [("data", html.escape(said + (f", {held_out} held out" if held_out else "")))]


def _objective(config):
    lines = []
    for term in _listed_terms(config):
        others = _in_line(_at(term, "other") or "")
        over = f" over {others}" if others else ""
        said = f"{_at(term, 'loss')}, {_at(term, 'preferred')}{over}, weight {_at(term, 'weight')}"
        lines.append(f"<b>{html.escape(str(_at(term, 'name')))}</b> {html.escape(said)}")
    return "<br>".join(lines)


def _listed_terms(config):
    """Returns the objective's terms; none if a config says something else there."""
    terms = _at(config, "objective", "terms")
    return [term for term in terms if isinstance(term, dict)] if isinstance(terms, list) else []


def _at(value, *path):
    """Returns what is at a place of nested dicts; None where there is nothing."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _in_line(value):
    return ", ".join(map(_in_line, value)) if isinstance(value, list) else str(value)


def _why_stopped(stopped):
    metrics = _at(stopped, "metrics") or {}
    odd = [f"{name} {metrics[name]}" for name in metrics if str(metrics[name]) in ("nan", "inf", "-inf")]
    return f"Step {stopped.get('step')} ended the run: {', '.join(odd)}. Its records are in not_finite.json."


def _verdict(run):
    """Renders where loss, accuracies and margins came from and went to."""
    count = len(run.metrics.steps)
    if not count:
        return '<p class="verdict">No step has been logged yet.</p>'
    tenth = max(1, count // 10)
    ends = run.metrics.steps[tenth - 1], run.metrics.steps[-tenth]

    def change(metric, share=False):
        points = run.metrics.points.get(metric, [])
        parts = [[v for s, v in points if s <= ends[0]], [v for s, v in points if s >= ends[1]]]
        return " → ".join(exact(_mean(part) if part else None, share) for part in parts)

    rows = [
        (term, right(change(f"{term}/accuracy", share=True)), right(change(f"{term}/margin")))
        for term in _terms(run, ("accuracy", "margin"))
    ]
    terms = f'<div class="ends">{table(("", right("accuracy"), right("margin")), rows)}</div>' if rows else ""
    each = f"{tenth:,} line{'s' if tenth > 1 else ''} each"
    return (
        f'<div class="verdict">Loss {change("loss")}</div>{terms}'
        f'<p class="quiet">Means over the first and the last tenth of {count:,} logged steps, {each}.</p>'
    )


def _mean(values):
    total = sum(values)
    # Of numbers near the largest, the sum may be none though the mean is one.
    return total / len(values) if math.isfinite(total) else sum(value / len(values) for value in values)


def _terms(run, kinds):
    """Returns the names of terms that have a metric of some kinds, in the objective's order and then by name."""
    logs = run.metrics, run.held_out
    named = {name.rpartition("/") for log in logs for metrics in (log.points, log.not_finite) for name in metrics}
    there = {term for term, slash, kind in named if slash and kind in kinds} - {_ABLATED}
    order = [_at(term, "name") for term in _listed_terms(run.config)]
    return sorted(there, key=lambda term: (order.index(term) if term in order else len(order), term))


def _curves(run):
    end = max((*run.metrics.steps, *run.held_out.steps, 1))
    of_terms = [
        ("Margin", "margin", {}),
        ("Accuracy", "accuracy", {"share": True, "limits": (0, 1)}),
        ("Noise robustness q", "q", {}),
        ("Weight", "weight", {}),
    ]
    drawn = [("Loss", [("loss", "loss")], {"zero": False})]
    drawn += [(title, [(t, f"{t}/{kind}") for t in _terms(run, (kind,))], looks) for title, kind, looks in of_terms]
    drawn += [
        ("What the picture adds", [("log-prob", f"{_ABLATED}/margin")], {}),
        ("Learning rate", [("learning rate", "learning_rate")], {}),
        ("Gradient norm", [("gradient norm", "gradient_norm")], {}),
        ("Examples a second", [("examples/s", "examples_per_second")], {}),
        ("Tokens a second", [("tokens/s", "tokens_per_second")], {}),
        ("MFU", [("of the peak", "mfu")], {"share": True}),
    ]
    figures = "".join(_figure(run, *each, end) for each in drawn)
    if not figures:
        return '<p class="quiet">There is nothing to draw yet.</p>'
    said = "Where a metric is noisy, the thick line is its running mean and the thin one every logged step."
    if run.held_out.steps:
        said += (
            " Marks are the groups held out. What the picture adds is the log-prob of the preferred answer with its "
            "picture, less the same under a black one."
        )
    return f'<p class="quiet">{said}</p><div class="charts">{figures}</div>'


def _figure(run, title, metrics, looks, end):
    """Renders a chart of (label, metric); nothing where there is no point."""
    lines = [
        Line(label, metric, points, run.metrics.last.get(metric), held_out)
        for label, metric in metrics
        for points, held_out in [(run.metrics.points.get(metric, []), run.held_out.points.get(metric, []))]
        if points or held_out
    ]
    odd = []
    for where, log in (("", run.metrics), (" held out", run.held_out)):
        for label, metric in metrics:
            kinds = log.not_finite.get(metric, {})
            odd += [f"{label}{where} {count:,} × {what}" for what, count in kinds.items()]
    left_out = f"Left out, not finite: {', '.join(odd)}." if odd else ""
    if not lines:
        return f'<div class="chart"><h3>{title}</h3><p class="quiet">{html.escape(left_out)}</p></div>' if odd else ""
    return chart(title, lines, end, max(run.metrics.steps, default=0), left_out=left_out, **looks)


def _samples(run):
    if run.samples is None:
        return (
            '<p class="quiet">None are there. They come from <code>samples.jsonl</code> in the workdir: a line for '
            "each picture and question, with the answers that were compared, and what the model said before and "
            "after.</p>"
        )
    shown = "".join(_sample(run.workdir, sample) for sample in run.samples[:_MOST_SAMPLES])
    more = len(run.samples) - _MOST_SAMPLES
    return shown + (f'<p class="quiet">{more:,} more are in samples.jsonl.</p>' if more > 0 else "")


def _sample(workdir, sample):
    turns = "".join(
        f'<div class="{kind}"><div class="label">{name}</div>{_said(sample.get(name))}</div>'
        for name, kind in (("before", "old"), ("after", "new"))
    )
    learned = [*sample.get("answers", {}).items()]
    if sample.get("truth") is not None:
        learned = [("in truth", sample["truth"]), *learned]
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{_said(text)}</dd>" for name, text in learned)
    return (
        f'<section class="group sample">{_picture(workdir, sample.get("picture"))}<div>'
        f'<div class="said question" dir="auto">{html.escape(sample["question"])}</div><div class="turn">{turns}</div>'
        f'<dl class="learned">{rows}</dl></div></section>'
    )


def _said(text):
    if text is None:
        return '<div class="quiet">not asked</div>'
    return f'<div class="said" dir="auto">{html.escape(text) or "<span class=quiet>nothing</span>"}</div>'


def _picture(workdir, name):
    """Renders a picture, or why there is none."""
    if name is None:
        return '<p class="quiet">no picture</p>'
    try:
        picture = images.decode((workdir / name).read_bytes())
    except (OSError, ValueError) as error:  # a name may be none that a file can have
        reason = error.reason if isinstance(error, images.ImageError) else "no such file"
        return f'<p class="fault">{html.escape(name)} cannot be shown: {html.escape(reason)}</p>'
    small = max(picture.size) <= _SMALL
    picture.thumbnail((_SIDE, _SIDE))
    url = picture_url(picture, "PNG" if small else "JPEG")
    return f'<figure><img{" class=small" if small else ""} alt="the picture that is asked about" src="{url}"></figure>'


def _config(run):
    parts = []
    if run.config:
        parts.append(f"<details><summary>Config</summary>{_nested(run.config)}</details>")
    if run.versions:
        parts.append(table(("", "version"), [(name, _in_line(value)) for name, value in run.versions.items()]))
    else:
        parts.append('<p class="quiet">The versions of what the run was made with were not recorded.</p>')
    return "".join(parts)


def _nested(values):
    """Renders a dict in its order; dicts in it, and lists of dicts, unfold."""
    parts = []
    for nests, items in itertools.groupby(values.items(), lambda item: _nests(item[1])):
        if not nests:
            rows = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(_plain(value))}</dd>" for name, value in items)
            parts.append(f"<dl>{''.join(rows)}</dl>")
            continue
        for name, value in items:
            inner = value if isinstance(value, dict) else {_title(part, i): part for i, part in enumerate(value, 1)}
            parts.append(f"<details open><summary>{html.escape(name)}</summary>{_nested(inner)}</details>")
    return "".join(parts)


def _nests(value):
    parts = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
    return any(isinstance(part, dict) and part for part in parts)


def _title(part, number):
    name = _at(part, "name")
    return f"{number}. {name}" if name else f"{number}."


def _plain(value):
    """Returns a value of a config as text, with its options as names and values."""
    if isinstance(value, list):
        parts = (f"{part[0]} {_plain(part[1])}" if _is_pair(part) else _plain(part) for part in value)
        return ", ".join(parts) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value in (None, {}) else str(value)


def _is_pair(value):
    return isinstance(value, list) and len(value) == 2
