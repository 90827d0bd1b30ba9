"""The end of a build: answers are judged, and written beside their rows, with a report."""

import dataclasses
import json

import pyarrow as pa

from napo_jax.bias.filters import find_fault
from napo_jax.bias.inputs import SUFFIXES, write_output
from napo_jax.bias.report import Report, Row, Said, as_text, write_page
from napo_jax.bias.work import Work
from napo_jax.data.sources import RowError, read_image, read_question, read_text
from napo_jax.decoding import Decoding
from napo_jax.pieces import Line, read_manifest, write_durably

PAGE, TEXT = "report.html", "report.txt"  # where the report is, beside the files
# Settings that go with every row.
_PROVENANCE = ("model", "weights", "dtype", "template", "tokenizer", "image_rule", "decoding")


def finish(work: Work, filters) -> dict:
    """Writes the files with their answers, and the report, when all is said; returns the report's summary.

    Args:
      work: the `Work`.
      filters: names of the faults that take an answer out.
    """
    settings = read_manifest(work.books, work.settings)["settings"]
    made_by = {name: settings[name] for name in _PROVENANCE}
    provenance = {name: json.dumps(made_by | dataclasses.asdict(recipe)) for name, recipe in work.recipes.items()}
    # One text for all rows of an answer takes no room as a dictionary.
    types = dict(zip(SUFFIXES, (pa.string(), pa.string(), pa.dictionary(pa.int32(), pa.string())), strict=True))
    fields = [pa.field(f"{name}{suffix}", kind) for name in work.recipes for suffix, kind in types.items()]
    report = Report(
        {"model": settings["model"]}
        | {name: str(recipe) for name, recipe in work.recipes.items()}
        | {"decoding": _in_short(settings["decoding"]), "filters": ", ".join(filters) or "none"}
    )
    for number in work.written_files:
        file, before = work.inputs[number], sum(file.rows for file in work.inputs[:number])

        def judge(row, values, number=number, before=before):
            texts = _texts(values)
            said = {name: _judge(work.lines[number, row, name], texts, filters) for name in work.recipes}
            report.add(Row(before + row, **texts, said=said, file=number))
            columns = {}
            for name, answer in said.items():
                made = (None if answer.fault else answer.text, answer.fault, provenance[name])
                columns |= {f"{name}{suffix}": value for suffix, value in zip(SUFFIXES, made, strict=True)}
            return columns

        write_output(file, work.folder, work.wanted(number), fields, judge)
    summary = report.summary()
    write_durably(work.folder / TEXT, as_text(summary) + "\n")
    write_page(work.folder / PAGE, report, work.picture)
    return summary


def _judge(line: Line, texts, filters) -> Said:
    if line.why is not None:
        return Said(None, 0, line.why)
    others = (texts["chosen"], texts["rejected"])
    return Said(line.text, line.tokens, find_fault(line.text, others=others, ended=line.ended, filters=filters))


def _texts(values):
    """Returns what there is of a row, however rotten it is: None for the rest."""
    answer = lambda name: read_text(values.get(name), "assistant")
    return {
        "question": _or_none(read_question, values.get("question")),
        "chosen": answer("chosen"),
        "rejected": answer("rejected"),
        "image": _or_none(read_image, values.get("image")),
    }


def _or_none(read, value):
    try:
        return read(value)
    except RowError:
        return None


def _in_short(decoding):
    """Returns the parts of a decoding that are not as they are by default."""
    usual = json.loads(json.dumps(dataclasses.asdict(Decoding())))
    unusual = [f"{name} {value}" for name, value in decoding.items() if value != usual[name]]
    return ", ".join(unusual) or "greedy"
