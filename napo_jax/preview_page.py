"""The preview as one page: counts, lengths, buckets, and sample groups token by token."""

import html

import jax
import numpy as np
from PIL import Image

from napo_jax.data import images
from napo_jax.html_page import Markup, picture_url, table, write_html
from napo_jax.score import pictures_of
from napo_jax.term import split_cell

_STYLE = """
.pictures { display: flex; flex-wrap: wrap; gap: .8rem; margin: .6rem 0; } .pictures img { width: 11rem; }
figcaption { color: var(--quiet); font-size: .85rem; }
.text { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 .8rem; }
.token { background: var(--one); } .token:nth-child(even) { background: var(--other); }
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
    write_html(path, "What the trainer will see", "".join(body), _STYLE)


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
    return lead + (table(("", "why", "rows"), rows) if rows else "")


def _lengths(summary):
    quantiles = summary["tokens"]
    head = ("", *next(iter(quantiles.values())))
    rows = [(name, *values.values()) for name, values in quantiles.items()]
    most = max(count for *_, count in summary["histogram"])
    bars = [
        (f"{first} to {last}", count, Markup(f'<span class="bar" style="width:{12 * count / most:.2f}rem"></span>'))
        for first, last, count in summary["histogram"]
    ]
    return f"<h2>Tokens</h2>{table(head, rows)}<h2>Tokens of a group</h2>{table(('', 'groups', ''), bars)}"


def _buckets(summary):
    columns = ("tokens", "answers", "prefix", "answer", "groups", "batches")
    rows = [[bucket[name] for name in columns] for bucket in summary["buckets"]]
    return (
        f"<h2>Buckets</h2>{table(columns, rows)}<p>{summary['padding']:.1%} of the computed tokens are padding. "
        '<span class="quiet">Tokens and answers lie packed; prefix and answer are what attention alone pads '
        "to.</span></p>"
    )


def _samples(dataset, objective, count):
    """Yields (record number, group, float32[M, n, I, I, 3] images) of the first groups of training."""
    order = dataset.order()
    batches = dataset.loader(order, rows=(0, order.batch_size))(0, order.steps_per_epoch)
    group_of = {int(record): group for group, record in enumerate(dataset.table.records)}
    for batch in batches:
        with jax.default_device(jax.devices("cpu")[0]):  # a preview leaves accelerators alone
            variants = pictures_of(batch, objective, dataset.vision.patch_size)
        for record, pictures in zip(batch.ids, np.asarray(variants), strict=True):
            if count == 0:
                return
            count -= 1
            group = group_of[int(record)]
            several = pictures if pictures.ndim == 5 else pictures[:, None]
            yield int(record), group, several[:, : dataset.table.pictures[group]]


def _group(dataset, objective, record, group, pictures):
    """Renders one group: its pictures, its prefix, and each answer token by token."""
    prefix, answers = dataset.table.tokens(group)
    named = [
        (name if len(several) == 1 else f"{name}, picture {place}", picture)
        for name, several in zip(objective.image_variants, pictures, strict=True)
        for place, picture in enumerate(several, 1)
    ]
    figures = "".join(
        f'<figure><img alt="{html.escape(name)}" src="{_url(picture)}">'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, picture in named
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


def _url(picture):
    """Returns a normalised picture float32[I, I, 3] as a PNG in a data URL."""
    pixels = np.clip(np.rint((picture * images.STD + images.MEAN) * 255), 0, 255).astype(np.uint8)
    return picture_url(Image.fromarray(pixels))
