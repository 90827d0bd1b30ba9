"""What a benchmark asks, and the files of what was said to it: one answer to each question, or an error."""

import glob
import hashlib
import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

NUMBER = (int, float)  # of JSON, as a shape
_SUFFIXES = (".jsonl", ".json")  # what is taken from a folder
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
_WORDS |= {list: "a list", dict: "an object"}


class Question(NamedTuple):
    """What a model is asked.

    Attributes:
      key: names the question among those of its benchmark, and its answer.
      text: what is asked, without `<image>`.
      image: path of the picture, absolute or relative to the folder of pictures; None where there is none.
      row: what stands beside the answer in its file, for other scorers to read.
    """

    key: str
    text: str
    image: str | None
    row: dict[str, Any]


def choose(choices: Mapping[str, Any], name: str, what: str) -> Any:
    """Returns the choice of a name; raises ValueError where there is none.

    Args:
      choices: such as a module's `PROMPTS`.
      name: what was asked for.
      what: what is chosen, for the error.
    """
    if name not in choices:
        raise ValueError(f"{what} must be one of {', '.join(choices)}, got {name}")
    return choices[name]


def write_row(question: Question, text: str) -> dict[str, Any]:
    """Returns the row of an answer file, for JSON."""
    return question.row | {"key": question.key, "text": text}


def fingerprint(questions: Sequence[Question]) -> str:
    """Returns 32 hex digits that stand for all that is asked, in its order."""
    return hashlib.sha256(json.dumps([list(question) for question in questions]).encode()).hexdigest()[:32]


def strict_json(scored) -> str:
    """Returns what a benchmark's `score` gives as JSON, with null for a number that is none: JSON has no nan."""
    return json.dumps(_without_nan(scored), allow_nan=False)


def _without_nan(value):
    """Returns a value in which null stands for numbers that are none: JSON has no nan."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def parse_json(text: str | bytes, **options) -> Any:
    """Parses JSON that others have written: ValueError whatever is wrong with it.

    Args:
      text: what is parsed.
      **options: those of `json.loads`.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """Says what is wrong with a value out of JSON; None if it has a shape.

    Args:
      value: the value.
      shape: a type or several; or [the shape of each entry of a list]; or {field: its shape}, other fields may be
        there too; or {...: the shape of every field}.
      place: where the value stands.

    >>> misfit({"id": 3, "words": ["tree", None]}, {"id": int, "words": [str]})
    'has null as words[1], expected a text'
    >>> misfit({"words": []}, {"id": int, "words": [str]})
    'has no id'
    """
    kinds = shape if isinstance(shape, tuple) else (shape if isinstance(shape, type) else type(shape),)
    if type(value) not in kinds:
        told = json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)
        wanted = " or ".join(_WORDS[kind] for kind in kinds if kind is not int or float not in kinds)
        return f"has {told} as {place}, expected {wanted}" if place else f"is {told}, expected {wanted}"
    if isinstance(shape, list):
        parts = ((f"{place}[{i}]", part, shape[0]) for i, part in enumerate(value))
    elif isinstance(shape, dict):
        fields = dict.fromkeys(value, shape[...]) if ... in shape else shape
        if missing := [name for name in fields if name not in value]:
            return f"has no {', '.join(missing)}{f' in {place}' if place else ''}"
        parts = ((f"{place}.{name}" if place else name, value[name], part) for name, part in fields.items())
    else:
        return None
    return next((wrong for where, part, of in parts if (wrong := misfit(part, of, where))), None)


def read_object(path: str | os.PathLike, remedy: str, shape: Any = dict) -> dict[str, Any]:
    """Reads a file of one JSON object.

    Args:
      path: the file, local or gs://.
      remedy: what to do about a damaged file, for the error.
      shape: what `misfit` is to find in it.
    """
    try:
        content = parse_json(epath.Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, expected an object; {remedy}")
    if wrong := misfit(content, shape):
        raise ValueError(f"{path} {wrong}; {remedy}")
    return content


def read_text(path: str | os.PathLike, remedy: str) -> str:
    """Reads a text file, whose lines may end in any way; raises with file and line if it is not UTF-8."""
    content = epath.Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}, is not UTF-8; {remedy}") from None


def read_data(path: str | os.PathLike, shape: Any) -> list[dict[str, Any]]:
    """Reads the rows of a benchmark's own file, of which there is at least one.

    Args:
      path: as for `read_rows`.
      shape: of each row, for `misfit`.
    """
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path} has no rows; fetch it again")
    for number, row in enumerate(rows, 1):
        if wrong := misfit(row, shape):
            raise ValueError(f"{path}, question {number}, {wrong}; fetch it again")
    return rows


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads rows of JSON, one on a line or all in one array whatever the file is called.

    Args:
      path: a file, a folder of .jsonl and .json files, or a glob, whose folders may be patterns too; local or gs://.
        Files are read in the order of their names, in which numbers count as such: part-2 comes before part-10.

    Raises:
      ValueError: there is no file, or one is damaged, or an object has two values of one name.
    """
    files = row_files(path)
    if not files:
        raise ValueError(f"{path} names no file; expected a file, a folder of {'/'.join(_SUFFIXES)} files, or a glob")
    return [row for file in files for row in _read(file)]


def row_files(path: str | os.PathLike) -> list[epath.Path]:
    """Returns the files that `read_rows` reads, in their order; none if there is none."""
    path = epath.Path(path)
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix in _SUFFIXES and file.name[0] not in "._"]
    elif path.exists():
        files = [path]
    else:
        # The part that is there is no pattern, whatever its names hold.
        above = next((folder for folder in path.parents if folder.exists()), path.parent)
        found = epath.Path(glob.escape(os.fspath(above))).glob(os.fspath(path.relative_to(above)))
        files = [file for file in found if not file.is_dir()]
    return sorted(files, key=_in_order)


def _in_order(file):
    parts = re.split("([0-9]+)", os.fspath(file))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], os.fspath(file)


def _read(file):
    text = read_text(file, "write the file again")
    # An array may go over many lines, and only "\n" ends a line: JSON may hold the other line ends as they are.
    pieces = [(1, text)] if text.lstrip().startswith("[") else enumerate(text.split("\n"), 1)
    rows = []
    for first, piece in pieces:
        if not piece.strip():
            continue
        try:
            value = parse_json(piece, object_pairs_hook=_once_each)
        except _TwiceError as error:
            raise ValueError(f"{file}, line {first}: {error}; keep one of them") from None
        except ValueError as error:
            line = first + getattr(error, "lineno", 1) - 1
            why = getattr(error, "msg", error)
            raise ValueError(f"{file}, line {line}, is not JSON ({why}); it may be cut, write it again") from None
        found = value if isinstance(value, list) else [value]
        for row in found:
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {first}, holds a JSON {type(row).__name__}; rows are objects")
        rows += found
    return rows


class _TwiceError(ValueError):
    """Two values have one name."""


def _once_each(pairs):
    """Makes a dict of the names and values of an object; Python's own way takes the last of two in silence."""
    made = dict(pairs)
    if len(made) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        values = " and ".join(reprlib.repr(value) for other, value in pairs if other == name)
        raise _TwiceError(f"an object has {name!r} more than once, {values}")
    return made


def join(
    questions: Sequence[Question], rows: Sequence[Mapping[str, Any]], *, key: str = "key", text: str = "text"
) -> dict[str, str]:
    """Returns the answer of every question, {key: text}, in the order of the questions.

    Args:
      questions: all that were asked.
      rows: the answers, in any order.
      key: the field that names the question; a number there is taken as its digits.
      text: the field that holds the answer.

    Raises:
      ValueError: there is no question; or one has no answer or several, an answer no question, or the `prompt` in
        its row is another.
    """
    if not questions:
        raise ValueError("there is no question: the benchmark's file is empty; fetch it again")
    asked = {question.key: question for question in questions}
    if len(asked) < len(questions):
        ((twice, _),) = Counter(question.key for question in questions).most_common(1)
        raise ValueError(f"several questions are called {twice!r}; each needs a key of its own")
    answers = {}
    repeated, unknown, others = [], [], []
    for number, row in enumerate(rows, 1):
        if type(row.get(key)) not in (str, int):
            raise ValueError(f"answer {number} has no {key!r} that names its question; it has {', '.join(row)}")
        name = str(row[key])
        if not isinstance(row.get(text), str):
            raise ValueError(f"the answer to {name!r} has no {text!r} that is a text; it has {', '.join(row)}")
        if name not in asked:
            unknown.append(name)
        elif name in answers:
            repeated.append(name)
        elif _is_other(row.get("prompt"), asked[name].row.get("prompt")):
            others.append(name)
        answers[name] = row[text]
    missing = [name for name in asked if name not in answers]
    faults = (
        (missing, "have no answer"),
        (repeated, "are answered again"),
        (others, "were asked in other words"),
        (unknown, "are not among the questions"),
    )
    if found := [f"{len(names)} {fault} (first {names[0]!r})" for names, fault in faults if names]:
        raise ValueError(f"the answers do not fit the {len(asked)} questions: {', '.join(found)}")
    return {name: answers[name] for name in asked}


def _is_other(prompt, asked):
    return None not in (prompt, asked) and prompt != asked
