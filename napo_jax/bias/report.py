"""What was built, as numbers and sample rows, for JSON, a terminal and a page."""

import bisect
import hashlib
import html
from typing import NamedTuple

from napo_jax.bias.tally import FIRST_WORDS, SIZES, Profile, Tally
from napo_jax.data import images
from napo_jax.html_page import as_words, picture_url, table, write_html

_FAULTY_SAMPLES = 2  # What goes wrong should be seen too, but most samples are to show what training will get.
_PICTURE_SIDE = 320  # pixels: enough to see what an answer speaks of, and little enough for a page of ten
_TEXT_LENGTH = 300  # characters of a sample's text in a terminal

_STYLE = """
.tables { display: flex; flex-wrap: wrap; gap: 0 3.5rem; } .tables > * { max-width: 100%; }
.sample { display: grid; grid-template-columns: minmax(8rem, 15rem) minmax(0, 1fr); gap: .6rem 1.2rem; }
.sample h3 { grid-column: 1 / -1; }
@media (max-width: 40rem) { .sample { grid-template-columns: minmax(0, 1fr); } }
.said { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 16rem; overflow-y: auto; margin-bottom: .7rem; }
.fault { color: var(--fault); }
"""


class Said(NamedTuple):
    """A built answer.

    Attributes:
      text: None where nothing could be asked; the fault says why.
      tokens: how many were generated.
      fault: None for an answer that is kept; else why there is none, or which filter took it out.
    """

    text: str | None
    tokens: int
    fault: str | None


class Row(NamedTuple):
    """A row of the input with its built answers.

    Attributes:
      number: its place in the whole input.
      question: as stored, None where there is none; `chosen` and `rejected` likewise.
      image: the encoded picture as stored, perhaps damaged, or its path; None where there is none.
      said: the `Said` of each built answer by its name, such as "question_only".
      file: the number of its file, from which a path starts.
    """

    number: int
    question: str | None
    chosen: str | None
    rejected: str | None
    image: bytes | str | None
    said: dict[str, Said]
    file: int = 0


class Report:
    """Counts rows as they come, in any order, and remembers none of them but the samples.

    >>> report = Report({"model": "tiny"}, samples=1)
    >>> report.add(Row(0, "What colour?", "A red bus.", "A car.", None, {"image_only": Said("A red car.", 4, None)}))
    >>> report.summary()["answers"]["image_only"]["overlap"]["answer"]["2"]
    0.5
    """

    def __init__(self, settings: dict, samples: int = 10):
        """Starts with nothing counted.

        Args:
          settings: what was built and how, shown on top.
          samples: how many rows to show.
        """
        self._settings = settings
        self._rows = 0
        self._tallies = None
        self._most = samples
        self._kept, self._faulty = [], []  # the rows whose numbers have the smallest hashes

    def add(self, row: Row):
        """Counts a row; all rows must have answers of the same names."""
        if self._tallies is None:
            self._tallies = {name: Tally() for name in row.said}
        _check(row, self._tallies)
        self._rows += 1
        chosen, rejected = Profile.of(row.chosen), Profile.of(row.rejected)
        for name, said in row.said.items():
            self._tallies[name].add(said, chosen, rejected)
        rows = self._kept if all(said.fault is None for said in row.said.values()) else self._faulty
        bisect.insort(rows, row, key=_hash)
        del rows[self._most :]

    def samples(self) -> list[Row]:
        """Returns rows from all over the input, those with every answer kept first, and both kinds by number.

        The numbers alone decide which, not the order in which the rows came.
        """
        faulty = min(len(self._faulty), max(self._most - len(self._kept), min(_FAULTY_SAMPLES, self._most // 2)))
        kinds = self._kept[: self._most - faulty], self._faulty[:faulty]
        return [row for kind in kinds for row in sorted(kind, key=lambda row: row.number)]

    def summary(self) -> dict:
        """Returns all that there is to know as a dict for JSON; its samples are without their pictures."""
        return {
            "settings": self._settings,
            "rows": self._rows,
            "answers": {name: tally.summary() for name, tally in (self._tallies or {}).items()},
            "samples": [_without_picture(row) for row in self.samples()],
        }


def _check(row, names):
    if row.said.keys() != names.keys():
        raise ValueError(f"row {row.number} has the answers {list(row.said)}, the rows before it {list(names)}")
    for name, said in row.said.items():
        if said.text is None and said.fault is None:
            raise ValueError(f"row {row.number}: {name} has neither a text nor a fault that says why")


def _hash(row):
    return hashlib.sha256(str(row.number).encode()).digest()


def _without_picture(row):
    fields = row._asdict() | {"said": {name: said._asdict() for name, said in row.said.items()}}
    del fields["image"], fields["file"]
    return fields


def _tables(summary):
    """Returns [(title, head, rows)], shown alike in a terminal and on the page."""
    answers = summary["answers"]
    if not answers:
        return []
    counts = [(name, a["rows"], a["kept"], a["kept"] / a["rows"]) for name, a in answers.items()]
    faults = [(f"{name}: {fault}", count) for name, a in answers.items() for fault, count in a["faults"].items()]
    tokens = [(name, *a["tokens"].values()) for name, a in answers.items()]
    return [
        ("Answers", ("", "rows", "kept", "share"), counts),
        *([("Not kept", ("", "rows"), faults)] if faults else []),
        ("Tokens of kept answers", ("", "min", "median", "95%", "max"), tokens),
        ("N-grams that chosen has too", ("", *(f"{n}-grams" for n in SIZES)), _shares(answers, "overlap")),
        ("First word", ("", *FIRST_WORDS), _shares(answers, "begins")),
    ]


def _shares(answers, what):
    return [
        (name if who == "answer" else f"{who} of these rows", *shares.values())
        for name, answer in answers.items()
        for who, shares in answer[what].items()
    ]


def as_text(summary):
    """Renders a summary for a terminal."""
    lines = [f"{_line(name):<24}  {_line(value)}" for name, value in summary["settings"].items()]
    lines.append(f"{summary['rows']} rows")
    for title, head, rows in _tables(summary):
        lines += ["", _columns(title, *head[1:], width=38)]
        lines += ["  " + _columns(*row) for row in rows]
    for sample in summary["samples"]:
        lines += ["", f"row {sample['number']}"]
        lines += [f"  {_line(label)}: {_line(text, _TEXT_LENGTH)}" for label, text, _ in _texts(sample)]
    return "\n".join(lines)


def _columns(first, *others, width=36):
    return f"{_line(first):<{width}}" + "".join(f"{_line(as_words(value)):>12}" for value in others)


def _line(value, most=None):
    """Returns a value as one line without what would move a terminal's cursor."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(value).split()))
    return line if most is None or len(line) <= most else line[:most] + " ..."


def _texts(sample):
    """Yields (label, text, whether faulty) of a sample of the summary."""
    for name in ("question", "chosen", "rejected"):
        yield name, "none" if sample[name] is None else sample[name], False
    for name, said in sample["said"].items():
        if said["text"] is None:
            yield f"{name}, not asked", said["fault"], True
        elif said["fault"] is not None:
            yield f"{name}, {said['tokens']} tokens, not kept ({said['fault']})", said["text"], True
        else:
            yield f"{name}, {said['tokens']} tokens", said["text"], False


def write_page(path, report: Report, picture=lambda file, image: image):
    """Writes the report as a page that needs no other file.

    Args:
      path: the file to write.
      report: the `Report`.
      picture: (file, image of a row) -> the encoded picture or None; for rows that hold paths.
    """
    summary = report.summary()
    settings = [(name, str(value)) for name, value in summary["settings"].items()]
    body = [table(("what was built", "how"), settings) if settings else "", f"<p>{summary['rows']:,} rows.</p>"]
    tables = (f"<div><h2>{title}</h2>{table(head, rows)}</div>" for title, head, rows in _tables(summary))
    body.append(f'<div class="tables">{"".join(tables)}</div><h2>Rows</h2>')
    body += [_sample(s, picture(r.file, r.image)) for s, r in zip(summary["samples"], report.samples(), strict=True)]
    write_html(path, "The answers that were built", "".join(body), _STYLE)


def _sample(sample, image):
    texts = (
        f'<div class="label{" fault" if faulty else ""}">{html.escape(label)}</div>'
        f'<div class="said" dir="auto">{html.escape(text)}</div>'  # a text in Arabic begins at the right
        for label, text, faulty in _texts(sample)
    )
    return (
        f'<section class="group sample"><h3>Row {sample["number"]:,}</h3>{_figure(image)}'
        f"<div>{''.join(texts)}</div></section>"
    )


def _figure(image):
    if image is None:
        return '<p class="quiet">no picture</p>'
    try:
        picture = images.decode(image)
    except images.ImageError as error:
        return f'<p class="quiet">no picture can be shown: {html.escape(error.reason)}</p>'
    picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    return f'<figure><img alt="the picture of the row" src="{picture_url(picture, "JPEG")}"></figure>'
