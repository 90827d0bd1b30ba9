"""The rows of a source file, parquet or JSONL, with their picture, question and answers found.

Two layouts are known by their columns. RLAIF-V's has `image`, `question` and a column for each answer; TRL's for
preferences about pictures has `images`, a list, and `prompt` and the answers as texts or as conversations.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

# Our name -> the columns it may stand in; the first that is there is read. The released code that builds the answers
# writes `question_only_None`, and the one that trains reads `question_only`.
_COLUMNS = {
    "image": ("image", "images"),
    "question": ("question", "prompt"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "question_only": ("question_only", "question_only_None"),
    "image_only": ("image_only",),
    "rejected_image": ("rejected_image", "retrieved_image"),
    "region": ("region",),
    "difficulty": ("difficulty",),
}
EXTRAS = (
    "rejected_image",
    "region",
    "difficulty",
)  # what is neither text nor the picture asked about; read only where it is needed
_REQUIRED = ("image", "question")
_JSON_LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (".parquet", *_JSON_LINES)  # what is taken from a folder
_BATCH = 32  # rows held at a time: their pictures may be large
_BUFFER = 1 << 20  # bytes read ahead of each parquet column; without one, a row group's whole column is held


class DataError(ValueError):
    """One line on data that cannot be used: what, where, and what to do."""


class RowError(ValueError):
    """A row that makes no record, with the word to count it by."""

    def __init__(self, reason):
        self.reason = reason
        super().__init__(reason)


class Row(NamedTuple):
    """What a row holds, its picture not yet looked at."""

    image: bytes | str  # encoded, or a path under the image root
    question: str
    answers: dict[str, str]  # by name, those that are text
    more_images: tuple[bytes | str, ...] = ()  # those behind the first, where a row may have several


def read_columns(file) -> list[str]:
    """Returns the columns of a file; of JSON lines, those that any line has, so every line is read and checked.

    Args:
      file: epath.Path.
    """
    with _reading(file):
        if _is_json(file):
            return list(dict.fromkeys(itertools.chain.from_iterable(_json_rows(file))))
        with file.open("rb") as f:
            return pq.read_schema(f).names


def match_columns(
    file,
    there: Sequence[str],
    mapping: Mapping[str, str],
    answers: Sequence[str],
    extras: Sequence[str] = (),
    pictures: int = 1,
) -> dict[str, str]:
    """Returns {our name: column}.

    Args:
      file: named in errors.
      there: the columns of the file; none where it has no row.
      mapping: our name -> its column; names beyond those known are more answers.
      answers: those that must have a column.
      extras: those of `EXTRAS` that must; the others are not looked for.
      pictures: the most of a row; where it may have several, their list comes before the one of them.

    Raises:
      DataError: there is no picture, no question, not one of `answers` or `extras`, or not a column that `mapping`
        names.
    """
    several = {"image": _COLUMNS["image"][::-1]} if pictures > 1 else {}
    known = _COLUMNS | several | {name: (column,) for name, column in mapping.items()}
    for name in set(EXTRAS) - set(extras):
        del known[name]
    found = {name: next((column for column in columns if column in there), None) for name, columns in known.items()}
    for name in (*_REQUIRED, *answers, *extras, *(name for name in mapping if name in known)) if there else ():
        if found.get(name) is None:
            wanted = " or ".join(known.get(name, (name,)))
            raise DataError(f"{file} has no column {wanted} for {name!r}; map one of those there: {', '.join(there)}")
    if twice := sorted(column for column in set(found.values()) if there.count(column) > 1):
        raise DataError(f"{file} has several columns called {', '.join(twice)}; give them names of their own")
    return {name: column for name, column in found.items() if column is not None}


def read_batches(file, columns: Mapping[str, str]) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of a file in order, a few at a time, as {our name: value}."""
    return (_read_json if _is_json(file) else _read_parquet)(file, columns)


def parse(values: Mapping[str, Any], pictures: int = 1) -> Row:
    """Returns what a row of so many pictures at most holds; raises RowError where it has none, more or no question."""
    image, *more = read_images(values.get("image"), pictures)
    question = read_question(values.get("question"), pictures)
    answers = {
        name: read_text(value, "assistant") for name, value in values.items() if name not in (*_REQUIRED, *EXTRAS)
    }
    return Row(image, question, {name: text for name, text in answers.items() if text is not None}, tuple(more))


def read_question(value, pictures: int = 1) -> str:
    """Returns the text of a question's column; raises RowError where there is none.

    Several pictures among the parts of a message, where there may be several, leave `<image>` in their places.
    """
    if isinstance(value, list):
        if len(value) > 1:
            raise RowError("several_messages")
        parts = value[0].get("content") if value and isinstance(value[0], dict) else None
        if isinstance(parts, list) and len(_of_type(parts, "image")) > 1:
            if pictures == 1:
                raise RowError("several_images")
            mark = {"type": "text", "text": "<image>"}
            value = [value[0] | {"content": [mark if _of_type([part], "image") else part for part in parts]}]
    text = read_text(value, "user")
    if text is None or not text.strip():
        raise RowError("no_question")
    return text


def read_difficulty(value) -> float:
    """Returns what the column holds of how hard a row is; raises RowError where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError("no_difficulty")
    return float(value)


def read_text(value, role) -> str | None:
    """Returns the text of a column, plain or a conversation of one message; None where there is none."""
    if isinstance(value, list):
        message = value[0] if len(value) == 1 and isinstance(value[0], dict) else {}
        value = message.get("content") if message.get("role") == role else None
        if isinstance(value, list):
            value = _join(value)
    if not isinstance(value, str):
        return None
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write
        return None
    return value


def read_image(value) -> bytes | str:
    """Returns what the picture's column holds, encoded or a path; raises RowError where there is no one picture."""
    if isinstance(value, list):
        if len(value) > 1:
            raise RowError("several_images")
        value = value[0] if value else None
    if isinstance(value, dict):
        data = value.get("bytes")
        value = value.get("path") if data is None else data if isinstance(data, bytes) else None
    if not isinstance(value, bytes) and not (isinstance(value, str) and value):
        raise RowError("no_image")
    return value


def read_images(value, most: int) -> list[bytes | str]:
    """Returns what the pictures' column holds, each as `read_image` does; raises RowError where there are too many."""
    if most == 1 or not isinstance(value, list) or len(value) < 2:
        return [read_image(value)]
    if len(value) > most:
        raise RowError("too_many_images")
    return [read_image([each]) for each in value]


def _join(parts):
    """Returns the text parts of a message one behind the other; the picture's place among them is not kept."""
    texts = [part.get("text") for part in _of_type(parts, "text")]
    whole = len(texts) + len(_of_type(parts, "image")) == len(parts) and all(isinstance(text, str) for text in texts)
    return "".join(texts) if whole else None


def _of_type(parts, kind):
    return [part for part in parts if isinstance(part, dict) and part.get("type") == kind]


def _read_parquet(file, columns):
    with file.open("rb") as f:
        with _reading(file):
            batches = pq.ParquetFile(f, buffer_size=_BUFFER, pre_buffer=False).iter_batches(
                _BATCH, columns=list(dict.fromkeys(columns.values()))
            )
        while True:
            with _reading(file):
                batch = next(batches, None)
            if batch is None:
                return
            arrays = {name: batch.column(column) for name, column in columns.items()}
            yield [{name: _value(array[i]) for name, array in arrays.items()} for i in range(len(batch))]


def _value(scalar):
    try:
        return scalar.as_py()
    except ValueError:  # not UTF-8, or a date that Python has not
        return None


@contextlib.contextmanager
def _reading(file):
    """Turns what is said of a file that cannot be read into one line."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        why = str(error).partition("\n")[0]
        raise DataError(f"{file} cannot be read, or is no whole parquet file; fetch it again ({why})") from None


def _is_json(file):
    return file.suffix in _JSON_LINES


def _json_rows(file):
    with file.open("rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}, line {number}, is not JSON: {error}; one object a line is expected") from None
            if not isinstance(row, dict):
                raise DataError(f"{file}, line {number}, is a JSON {type(row).__name__}; one object a line is expected")
            yield row


def _read_json(file, columns):
    rows = ({name: row.get(column) for name, column in columns.items()} for row in _json_rows(file))
    while batch := list(itertools.islice(rows, _BATCH)):
        yield batch
