"""The parquet files that answers are built for: their rows by number, and the same files with the answers beside."""

import concurrent.futures
import itertools
import json
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from napo_jax.data.records import find_files
from napo_jax.data.sources import DataError, RowError, match_columns, read_batches, read_columns, read_question
from napo_jax.data.store import check_row, is_local, real_root

SUFFIXES = ("", "_fault", "_made_by")  # of an answer's columns: the text, why there is none, and how it was made


class InputFile(NamedTuple):
    """A parquet file."""

    path: epath.Path
    bytes: int
    groups: tuple[int, ...]  # rows of its row groups
    columns: dict[str, str]  # our name -> its column

    @property
    def rows(self) -> int:
        """How many it has."""
        return sum(self.groups)


def open_inputs(paths, names, columns, output, suffixes=SUFFIXES) -> list[InputFile]:
    """Finds the files and looks at their columns; raises DataError if they cannot be used.

    Args:
      paths: files, folders or globs, local or gs://.
      names: what will be built.
      columns: our name -> the file's column, where they differ.
      output: epath.Path of the folder that files of the same names will be written to.
      suffixes: the columns that each name will have.
    """
    found = []
    columns = {name: column for name, column in columns.items() if name not in names}  # these are built, not read
    for file in find_files(paths):
        if file.suffix != ".parquet":
            raise DataError(f"{file} is no parquet file; expected files of rows as RLAIF-V has them")
        there = read_columns(file)
        for column in (f"{name}{suffix}" for name in names for suffix in suffixes):
            if column in there:
                raise DataError(f"{file} has a column {column} already; drop it there, or do not build it again")
        matched = match_columns(file, there, columns, ())
        with file.open("rb") as f:
            metadata = pq.read_metadata(f)
            size = f.seek(0, os.SEEK_END)
        groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        found.append(InputFile(file, size, groups, matched))
        if _real(file.parent) == _real(output):
            raise DataError(f"{file} would be written over; name another folder for the output")
    names = [file.path.name for file in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"several input files are called {', '.join(twice)}, and so would the output; rename them")
    if not sum(file.rows for file in found):
        raise DataError(f"there are no rows in {', '.join(names)}")
    return found


def read_questions(file: InputFile) -> Iterator[str | None]:
    """Yields the question of each row in order, None where there is none; reads no picture."""
    for batch in read_batches(file.path, {"question": file.columns["question"]}):
        for values in batch:
            try:
                yield read_question(values["question"])
            except RowError:
                yield None


def read_rows(file: InputFile, rows: set[int], work: Callable, *, image_root, exif, threads) -> Iterator:
    """Yields (row number, what work makes of it) of some rows in order, with threads ahead of the reader.

    Args:
      file: the file.
      rows: the numbers of those wanted.
      work: (row number, Record or reason, {our name: value}) -> anything; called on threads.
      image_root: the folder that paths of pictures start from; None for that of the file.
      exif: whether pictures will be turned as their EXIF says.
      threads: how many.
    """
    if not rows:
        return
    root = image_root_of(file, image_root)
    batches = read_batches(file.path, file.columns)
    wanted = ((i, row) for i, row in enumerate(itertools.chain.from_iterable(batches)) if i in rows)
    run = lambda number, values: (number, work(number, check_row(values, root, exif), values))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        try:
            for number, values in wanted:
                waiting.append(pool.submit(run, number, values))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def image_root_of(file: InputFile, root) -> epath.Path:
    """Returns the folder that paths of pictures start from: the one that is named, or that of the file."""
    return real_root(file.path.parent if root is None else epath.Path(root))


def write_output(file: InputFile, folder, rows: int, fields: list[pa.Field], made: Callable, without=()):
    """Writes a file again, row group by row group, with more columns.

    Args:
      file: the file.
      folder: epath.Path to write it to, under the same name.
      rows: how many of its rows, from the first.
      fields: of the new columns.
      made: (row number, {our name: value}) -> {field's name: value}; None for a row that is left out.
      without: columns that are left out.
    """
    target = folder / file.path.name
    for left in folder.glob(f"{file.path.name}.*.tmp"):  # by a process that was killed
        left.unlink()
    aside = folder / f"{file.path.name}.{uuid.uuid4().hex[:8]}.tmp"
    first = 0
    with file.path.open("rb") as source, aside.open("wb") as sink:
        parquet = pq.ParquetFile(source)
        schema, gone = parquet.schema_arrow, set(without)
        kept = [place for place, name in enumerate(schema.names) if name not in gone]
        schema = pa.schema(
            [*(schema.field(place) for place in kept), *fields], _with_features(schema.metadata, fields, gone)
        )
        options = {"compression": _compression(parquet.metadata)}
        with pq.ParquetWriter(sink, schema, **options) as writer:
            for group, size in enumerate(file.groups):
                if first >= rows:
                    break
                size = min(size, rows - first)
                table = parquet.read_row_group(group).slice(0, size)
                found = [made(first + i, values) for i, values in enumerate(_values(table, file.columns))]
                if None in found:
                    table = table.filter(pa.array([row is not None for row in found]))
                    found = [row for row in found if row is not None]
                arrays = [pa.array([row[field.name] for row in found], field.type) for field in fields]
                columns = [table.column(place) for place in kept]
                writer.write_table(pa.table([*columns, *arrays], schema=schema), row_group_size=max(len(found), 1))
                first += size
        if is_local(target):
            sink.flush()
            os.fsync(sink.fileno())
    aside.replace(target)


def _real(folder):
    """Returns where a folder truly is, for comparison."""
    return os.path.realpath(folder) if is_local(folder) else os.fspath(folder)


def _values(table, columns):
    """Yields {our name: value} of each row of a table."""
    arrays = {name: table.column(column) for name, column in columns.items()}
    for i in range(table.num_rows):
        yield {name: _value(array[i]) for name, array in arrays.items()}


def _value(scalar):
    try:
        return scalar.as_py()
    except ValueError:  # not UTF-8
        return None


def _compression(metadata):
    """Returns the codec of a file's first column, which is almost always that of all."""
    if not metadata.num_row_groups or not metadata.num_columns:
        return "snappy"
    return metadata.row_group(0).column(0).compression.lower().replace("uncompressed", "none")


def _with_features(metadata, fields, gone):
    """Returns a schema's metadata with new columns, and without others, in what the `datasets` library keeps there."""
    metadata = dict(metadata or {})
    try:
        known = json.loads(metadata[b"huggingface"])
        features = {name: feature for name, feature in known["info"]["features"].items() if name not in gone}
        known["info"]["features"] = features | {field.name: _feature(field.type) for field in fields}
        metadata[b"huggingface"] = json.dumps(known).encode()
    except (KeyError, ValueError, TypeError, AttributeError):  # nothing of the kind, or of another kind: leave it
        pass
    return metadata or None


def _feature(kind):
    """Returns what the `datasets` library calls a type of column."""
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "Sequence"}
    return {"dtype": "string" if pa.types.is_dictionary(kind) else str(kind), "_type": "Value"}
