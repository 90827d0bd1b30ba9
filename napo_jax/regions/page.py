"""A page to look at marked regions: the picture, its keywords, the mask, and what the image variant makes of it."""

import html

import jax
import numpy as np
from PIL import Image

from napo_jax.bias.inputs import image_root_of
from napo_jax.data.corruptions import image_variants
from napo_jax.data.images import MEAN, STD, decode, fit, normalise
from napo_jax.data.sources import RowError, read_image, read_question, read_text
from napo_jax.data.store import read_picture
from napo_jax.html_page import picture_url, table, write_html

_STYLE = """
.sample { display: grid; grid-template-columns: repeat(3, minmax(0, 14rem)); gap: .6rem 1rem; }
.sample > * { min-width: 0; } .words { grid-column: 1 / -1; overflow-wrap: anywhere; }
.sample img { width: 100%; image-rendering: pixelated; }
@media (max-width: 40rem) { .sample { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
"""


def write_page(path, summary, samples, marker, image_root):
    """Writes the page.

    Args:
      path: epath.Path.
      summary: {"rows": count, "regions": {what: count}}.
      samples: (file, {our name: value}, `Marked`, `Region`) of a few rows.
      marker: the `Marker`.
      image_root: as of the config, absolute; None for the file's folder.
    """
    counts = table(("region", "rows"), list(summary["regions"].items()))
    body = [f"<h2>{summary['rows']} rows</h2>{counts}"]
    for file, values, marked, region in samples:
        image = read_image(values["image"])
        if isinstance(image, str):
            image = read_picture(image_root_of(file, image_root), image)
        pixels = fit(decode(image, exif=marker.exif), marker.vision.image_size, marker.rule)
        shown = {"picture": pixels, "region": _dimmed(pixels, region.mask), "with noise there": _noisy(pixels, region)}
        figures = "".join(
            f'<figure><img alt="{name}" src="{picture_url(Image.fromarray(each))}">'
            f"<figcaption>{name}</figcaption></figure>"
            for name, each in shown.items()
        )
        words = ", ".join(marked.keywords) or "none"
        fault = f" ({marked.fault}: the whole picture)" if marked.fault else ""
        body.append(
            f'<section class="group sample">{figures}<div class="words"><div class="label">question</div>'
            f"{html.escape(_text(read_question, values.get('question')))}"
            f'<div class="label">chosen</div>{html.escape(read_text(values.get("chosen"), "assistant") or "")}'
            f'<div class="label">keywords</div>{html.escape(words + fault)}</div></section>'
        )
    write_html(path, "Key regions", "".join(body), _STYLE)


def _text(read, value):
    try:
        return read(value)
    except RowError:
        return ""


def _dimmed(pixels, mask):
    """Returns the picture with all that is not marked in the dark."""
    scale = len(pixels) // len(mask)
    wide = np.kron(mask, np.ones((scale, scale), bool))[..., None]
    return np.where(wide, pixels, pixels // 4)


def _noisy(pixels, region):
    """Returns the picture under the image variant."""
    with jax.default_device(jax.local_devices()[0]):
        made = image_variants(normalise(pixels)[None], np.zeros(1, np.uint32), ("region",), masks=region.mask[None])
    return np.clip(np.rint((np.asarray(made[0, 0]) * STD + MEAN) * 255), 0, 255).astype(np.uint8)
