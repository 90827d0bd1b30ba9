"""Pages that stand alone: no script, nothing from the network, and text from the data is always escaped."""

import base64
import html
import io

from etils import epath

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --quiet: #666c75; --line: #d9dce1; --back: #fff; --card: #f6f7f9;
  --one: #cfe6d4; --other: #b5d9bd; --bar: #5a8f69; --fault: #a8431f; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e7e9; --quiet: #9aa1ab; --line: #383c43; --back: #16181b;
  --card: #1f2226; --one: #234a2e; --other: #2f6340; --bar: #6fae81; --fault: #f0916c; } }
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
figure { margin: 0; } figure img { max-width: 100%; display: block; border-radius: 4px; }
.label { color: var(--quiet); font-size: .85rem; }
"""


class Markup(str):
    """Text that is HTML already."""


def write_html(path, title, body, style=""):
    """Writes a page.

    Args:
      path: the file to write.
      title: its title and first heading, as plain text.
      body: the HTML below the heading.
      style: the page's own CSS, after the one that all pages share.
    """
    title = html.escape(title)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Should anything ever escape the escaping, the browser still runs and fetches nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{_STYLE}{style}</style></head><body><h1>{title}</h1>{body}</body></html>"
    )
    epath.Path(path).write_bytes(page.encode(errors="replace"))  # half of a surrogate pair has no bytes


def table(head, rows):
    """Renders a table with its numbers to the right.

    Args:
      head: one value a column.
      rows: sequences of as many values. `Markup` is shown as it is; all else becomes text as by `as_words`, escaped.

    Returns:
      HTML.
    """
    numbers = [any(isinstance(value, int | float) for value in column) for column in zip(*rows, strict=True)]

    def line(tag, row):
        cells = (
            f"<{tag}{' class=number' if number else ''}>{_cell(value)}</{tag}>"
            for value, number in zip(row, numbers, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    return f'<div class="scroll"><table>{line("th", head)}{"".join(line("td", row) for row in rows)}</table></div>'


def _cell(value):
    return value if isinstance(value, Markup) else html.escape(as_words(value))


def as_words(value):
    """Returns a value of a report as text: 1234 as 1,234, a share as 12.3%, nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def picture_url(picture, kind="PNG"):
    """Returns a Pillow picture, encoded as "PNG" or "JPEG", in a data URL."""
    data = io.BytesIO()
    picture.save(data, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
