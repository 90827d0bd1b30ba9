"""The preview as one page: no script, nothing from the network, and text from the data is always escaped."""

import base64
import html
import io

import jax
import numpy as np
from etils import epath
from PIL import Image

from napo_jax.data import images
from napo_jax.data.corruptions import image_variants
from napo_jax.objective import split_cell

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --quiet: #666c75; --line: #d9dce1; --back: #fff; --card: #f6f7f9;
  --one: #cfe6d4; --other: #b5d9bd; --bar: #5a8f69; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e7e9; --quiet: #9aa1ab; --line: #383c43; --back: #16181b;
  --card: #1f2226; --one: #234a2e; --other: #2f6340; --bar: #6fae81; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.2rem; font: 15px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--back); }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; margin: 0; }
p { margin: .3rem 0; } .quiet { color: var(--quiet); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; font-weight: normal; white-space: nowrap; }
th { color: var(--quiet); border-bottom: 1px solid var(--line); } .number { text-align: right; }
.bar { display: inline-block; height: .7rem; background: var(--bar); min-width: 1px; }
.group { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1rem 0; }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem; margin: .6rem 0; }
figure { margin: 0; } figure img { width: 11rem; max-width: 100%; display: block; border-radius: 4px;
  image-rendering: auto; }
figcaption { color: var(--quiet); font-size: .85rem; }
.text { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 .8rem; }
.token { background: var(--one); } .token:nth-child(even) { background: var(--other); }
.label { color: var(--quiet); font-size: .85rem; }
"""


def write_page(path, dataset, summary, objective, groups):
    """Writes the page.

    Args:
      path: the file to write.
      dataset: the `Dataset`.
      summary: what `preview.summarise` made of it.
      objective: the `Objective`, for its image variants.
      groups: how many sample groups to show, the first that training would see.
    """
    body = [_counts(summary), _lengths(summary), _buckets(summary), "<h2>Groups, as training will see them</h2>"]
    body.append(
        '<p class="quiet">Every token with a background is trained; the rest of a sequence is its prefix, which all '
        "answers of a group share.</p>"
    )
    body += [_group(dataset, objective, *sample) for sample in _samples(dataset, objective, groups)]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Should anything ever escape the escaping, the browser still runs and fetches nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>What the trainer will see</title><style>{_STYLE}</style></head><body>"
        f"<h1>What the trainer will see</h1>{''.join(body)}</body></html>"
    )
    epath.Path(path).write_text(page)


def _table(head, rows):
    """Renders a table; numbers go to the right, and text that is no `_Markup` is escaped."""
    numbers = [isinstance(value, int) for value in rows[0]]

    def line(tag, row):
        cells = (
            f"<{tag}{' class=number' if number else ''}>{_cell(value)}</{tag}>"
            for value, number in zip(row, numbers, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    return f'<div class="scroll"><table>{line("th", head)}{"".join(line("td", row) for row in rows)}</table></div>'


class _Markup(str):
    """Text that is HTML already."""


def _cell(value):
    if isinstance(value, _Markup):
        return value
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))


def _counts(summary):
    dropped = summary["rows"] - summary["kept"]
    rows = [("dropped", reason, count) for reason, count in summary["dropped"].items()]
    rows += [("kept, but", note, count) for note, count in summary["notes"].items()]
    if summary["duplicate_rows"]:
        rows.append(("kept, but", "repeats another row", summary["duplicate_rows"]))
    lead = (
        f"<p>{summary['rows']:,} rows, {summary['kept']:,} kept, {dropped:,} dropped. "
        f"{summary['steps_per_epoch']:,} steps of {summary['batch_size']:,} groups in an epoch.</p>"
    )
    return lead + (_table(("", "why", "rows"), rows) if rows else "")


def _lengths(summary):
    quantiles = summary["tokens"]
    head = ("", *next(iter(quantiles.values())))
    rows = [(name, *values.values()) for name, values in quantiles.items()]
    most = max(count for *_, count in summary["histogram"])
    bars = [
        (f"{first} to {last}", count, _Markup(f'<span class="bar" style="width:{12 * count / most:.2f}rem"></span>'))
        for first, last, count in summary["histogram"]
    ]
    return f"<h2>Tokens</h2>{_table(head, rows)}<h2>Tokens of a group</h2>{_table(('', 'groups', ''), bars)}"


def _buckets(summary):
    columns = ("tokens", "answers", "prefix", "answer", "groups", "batches")
    rows = [[bucket[name] for name in columns] for bucket in summary["buckets"]]
    return (
        f"<h2>Buckets</h2>{_table(columns, rows)}<p>{summary['padding']:.1%} of the computed tokens are padding. "
        '<span class="quiet">Tokens and answers lie packed; prefix and answer are what attention alone pads '
        "to.</span></p>"
    )


def _samples(dataset, objective, count):
    """Yields (record number, group, float32[M, I, I, 3] images) of the first groups of training."""
    order = dataset.order()
    batches = dataset.loader(order, rows=(0, order.batch_size))(0, order.steps_per_epoch)
    group_of = {int(record): group for group, record in enumerate(dataset.table.records)}
    for batch in batches:
        with jax.default_device(jax.devices("cpu")[0]):  # a preview leaves accelerators alone
            clean = images.normalise(batch.images)
            variants = image_variants(clean, batch.seeds, objective.image_variants, patch=dataset.vision.patch_size)
        for record, pictures in zip(batch.ids, np.asarray(variants), strict=True):
            if count == 0:
                return
            count -= 1
            yield int(record), group_of[int(record)], pictures


def _group(dataset, objective, record, group, pictures):
    """Renders one group: its pictures, its prefix, and each answer token by token."""
    prefix, answers = dataset.table.tokens(group)
    figures = "".join(
        f'<figure><img alt="{html.escape(name)}" src="{_data_url(picture)}">'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, picture in zip(objective.image_variants, pictures, strict=True)
    )
    parts = [
        f'<section class="group"><h3>Record {record:,}</h3><div class="pictures">{figures}</div>'
        f'<div class="label">prefix, {len(prefix)} tokens</div>'
        f'<div class="text">{html.escape(dataset.prompter.read_prefix(prefix.tolist()))}</div>'
    ]
    for cell in objective.cells:
        name, variant = split_cell(cell)
        ids = answers[name]
        tokens = "".join(
            f'<span class="token">{html.escape(token)}</span>' for token in dataset.prompter.read_answer(ids.tolist())
        )
        parts.append(
            f'<div class="label">{html.escape(name)} under {html.escape(variant)}, {len(ids)} tokens</div>'
            f'<div class="text">{tokens}</div>'
        )
    return "".join(parts) + "</section>"


def _data_url(picture):
    """Returns a normalised picture float32[I, I, 3] as a PNG in a data URL."""
    pixels = np.clip(np.rint((picture * images.STD + images.MEAN) * 255), 0, 255).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
