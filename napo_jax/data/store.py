"""What one source file becomes, once: a folder with its checked records, which can be read in any order.

Its `records` is an ArrayRecord file of whole records, `texts.parquet` has their texts without the pictures, and
`summary.json` the counts.
"""

import base64
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from napo_jax.data.images import ImageError, decode
from napo_jax.data.regions import Frame, Region, read_region
from napo_jax.data.sources import DataError, RowError, parse, read_batches, read_difficulty, read_image

_FORMAT = 3  # of the folder, and of the checks that its rows passed
_RECORDS, _TEXTS, _SUMMARY = "records", "texts.parquet", "summary.json"  # the files of a store
_TEXT_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "question": pa.string(),
        "answers": pa.map_(pa.string(), pa.string()),
        "difficulty": pa.float64(),
        "pictures": pa.int32(),
    }
)
_TEXT_BATCH = 1024
PICTURE_DIGITS = 16  # of a record's key: those of its picture, or of all its pictures together


class Record(NamedTuple):
    """One row as stored."""

    key: str  # 48 hex digits, a digest of the picture and one of all that follows: equal rows have equal keys
    image: bytes  # the encoded picture
    question: str
    answers: dict[str, str]  # by name, those that are there
    rejected_image: bytes | None = None  # encoded, as `image`; this and the region only where they were asked for
    region: Region | None = None
    difficulty: float | None = None  # how hard it is; no part of the key
    more_images: tuple[bytes, ...] = ()  # encoded, those behind the first, where a record may have several

    @property
    def images(self) -> tuple[bytes, ...]:
        """All its encoded pictures, in order."""
        return self.image, *self.more_images


class Store(NamedTuple):
    """A converted file."""

    folder: str
    rows: int  # of the source
    records: int  # that were kept
    dropped: dict[str, int]  # by reason
    columns: list[str]  # all that the source has
    frames: list[list]  # of the records' regions, each once

    @property
    def file(self) -> str:
        """The ArrayRecord file."""
        return os.path.join(self.folder, _RECORDS)

    def texts(self) -> Iterator[tuple[str, str, dict[str, str]]]:
        """Yields (key, question, answers) of the records in order."""
        names = ("key", "question", "answers")
        for batch in self._text_batches(names):
            columns = (batch.column(name).to_pylist() for name in names)
            for key, question, answers in zip(*columns, strict=True):
                yield key, question, dict(answers)

    def record_keys(self) -> Iterator[str]:
        """Yields the keys of the records in order."""
        for batch in self._text_batches(["key"]):
            yield from batch.column("key").to_pylist()

    def difficulties(self) -> np.ndarray:
        """Returns how hard each record is, float64[N], NaN where that was not read."""
        batches = self._text_batches(["difficulty"])
        columns = [batch.column("difficulty").to_numpy(zero_copy_only=False) for batch in batches]
        return np.concatenate(columns) if columns else np.zeros(0)

    def picture_counts(self) -> np.ndarray:
        """Returns how many pictures each record has, int32[N]."""
        columns = [batch.column("pictures").to_numpy() for batch in self._text_batches(["pictures"])]
        return np.concatenate(columns) if columns else np.zeros(0, np.int32)

    def _text_batches(self, names):
        with pq.ParquetFile(os.path.join(self.folder, _TEXTS)) as file:
            yield from file.iter_batches(_TEXT_BATCH, columns=names)


def find_store(folder) -> Store | None:
    """Returns what an earlier call left, if anything: a folder gets its name when it is whole, so is good if there."""
    return Store(str(folder), **json.loads((folder / _SUMMARY).read_text())) if folder.exists() else None


def store_name(file, *settings) -> str:
    """Returns the name of a file's store: another one where the file or a setting is another.

    Args:
      file: epath.Path, absolute.
      settings: what a conversion depends on, as JSON.
    """
    if is_local(file):
        stat = os.stat(file)
        version = stat.st_size, stat.st_mtime_ns  # epath's times are whole seconds
    else:
        stat = file.stat()
        version = stat.length, stat.mtime
    return hashlib.blake2b(json.dumps([_FORMAT, str(file), *version, *settings]).encode(), digest_size=16).hexdigest()


def convert(file, folder, there, columns, *, image_root, exif, workers, report, pictures=1) -> Store:
    """Converts a file, unless another process just did: who comes second waits for the first.

    Args:
      file: epath.Path of the source.
      folder: Path that the store will have.
      there: all columns of the source.
      columns: {our name: column} of those to read.
      image_root: epath.Path.
      exif: whether pictures will be turned as their EXIF says.
      workers: threads that check pictures.
      report: called with one line when it is done.
      pictures: the most of a row.
    """
    with _lock(folder.with_suffix(".lock")):
        if not folder.exists():
            aside = folder.with_suffix(f".{platform.node()}.tmp")  # a host's own: not all shared folders can lock
            shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
            aside.mkdir()
            try:
                check = functools.partial(check_row, image_root=real_root(image_root), exif=exif, pictures=pictures)
                counts = _write(aside, file, columns, check, workers, report)
                (aside / _SUMMARY).write_text(json.dumps(counts | {"columns": there}))
                aside.rename(folder)
            except OSError:
                if not folder.exists():  # else another host's, which is just as good
                    raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return find_store(folder)


def check_row(values, image_root, exif, pictures=1) -> Record | str:
    """Returns the record of a row, its picture read to the end, or the reason why there is none.

    Args:
      values: {our name: value}, as `sources.read_batches` yields them.
      image_root: the folder that paths of pictures start from, as `real_root` returns it.
      exif: whether pictures will be turned as their EXIF says.
      pictures: the most of a row.
    """
    try:
        row = parse(values, pictures)
        image = _check_picture(row.image, image_root, exif)
        more = tuple(_check_picture(each, image_root, exif) for each in row.more_images)
        region = read_region(values["region"]) if "region" in values else None
        difficulty = read_difficulty(values["difficulty"]) if "difficulty" in values else None
    except (RowError, ImageError) as error:
        return error.reason
    rejected = None
    if "rejected_image" in values:
        try:
            rejected = _check_picture(read_image(values["rejected_image"]), image_root, exif)
        except (RowError, ImageError) as error:
            return error.reason.replace("image", "rejected_image")
    key = _key((image, *more), row, rejected, region)
    return Record(key, image, row.question, row.answers, rejected, region, difficulty, more)


def _check_picture(image, image_root, exif) -> bytes:
    """Returns the bytes of a picture that can be decoded to its end, given themselves or by their path."""
    data = image if isinstance(image, bytes) else read_picture(image_root, image)
    decode(data, exif=exif)
    return data


def real_root(image_root):
    """Returns a folder of pictures as symbolic links lead there, so that what lies in it can be told."""
    return epath.Path(os.path.realpath(image_root)) if is_local(image_root) else image_root


def read_picture(root, name) -> bytes:
    """Returns the bytes of a picture under a root; raises RowError where there is none, or the path leads elsewhere."""
    if "\0" in name or name.encode(errors="ignore").decode() != name:
        raise RowError("image_missing")  # no file can be called so
    if os.path.isabs(name) or "://" in name or os.path.normpath(name).split("/")[0] == "..":
        raise RowError("image_outside_root")
    path = root / name
    if is_local(root):
        path = epath.Path(os.path.realpath(path))  # where symbolic links lead
        if not path.is_relative_to(root):
            raise RowError("image_outside_root")
    try:
        if path.is_file():
            return path.read_bytes()
    except (FileNotFoundError, PermissionError):
        pass
    except OSError as error:  # the disk's or the network's fault, and not the row's
        raise DataError(f"{path} cannot be read: {error}") from None
    raise RowError("image_missing")


def unpack(data: bytes) -> Record:
    """Returns the record that an entry of the ArrayRecord file holds."""
    start, end = _image_place(data)
    key, question, answers, region, difficulty, *lengths = json.loads(data[8:start])
    if region is not None:
        region = Region(Frame(*region[:-1]), base64.b64decode(region[-1]))
    more, rest = _cut(data[end:], lengths)
    return Record(key, data[start:end], question, answers, rest or None, region, difficulty, more)


def unpack_image(data: bytes) -> bytes:
    """Returns its picture alone, the first of several."""
    return data[slice(*_image_place(data))]


def unpack_images(data: bytes) -> tuple[bytes, ...]:
    """Returns its pictures alone."""
    start, end = _image_place(data)
    return data[start:end], *_cut(data[end:], json.loads(data[8:start])[5:])[0]


def is_local(path) -> bool:
    """Returns whether a path is one of this system, and not gs:// or the like."""
    return "://" not in os.fspath(path)


def _pack(record):
    """Returns the lengths of a JSON header and of the picture, the header, the pictures, and the rejected one if any.

    The lengths of pictures behind the first end the header.
    """
    region = record.region and [*record.region.frame, base64.b64encode(record.region.bits).decode()]
    parts = [record.key, record.question, record.answers, region, record.difficulty, *map(len, record.more_images)]
    header = json.dumps(parts, ensure_ascii=False).encode()
    lengths = b"".join(len(part).to_bytes(4, "little") for part in (header, record.image))
    return lengths + header + b"".join(record.images) + (record.rejected_image or b"")


def _cut(data, lengths):
    """Returns the pieces of some lengths that data begins with, and the rest."""
    ends = list(itertools.accumulate(lengths, initial=0))
    return tuple(data[start:end] for start, end in itertools.pairwise(ends)), data[ends[-1] :]


def _image_place(data):
    """Returns where the picture begins and ends."""
    start = 8 + int.from_bytes(data[:4], "little")
    return start, start + int.from_bytes(data[4:8], "little")


@contextlib.contextmanager
def _lock(file):
    with file.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)  # ends with the file, or with the process
        yield


def _write(folder, file, columns, check, workers, report):
    start, rows, records, dropped, texts, frames = time.monotonic(), 0, 0, Counter(), [], set()
    with (
        contextlib.closing(ArrayRecordWriter(str(folder / _RECORDS), "group_size:1,uncompressed")) as writer,
        pq.ParquetWriter(folder / _TEXTS, _TEXT_SCHEMA) as text_writer,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):
        for batch in read_batches(file, columns):
            rows += len(batch)
            for outcome in pool.map(check, batch):
                if isinstance(outcome, str):
                    dropped[outcome] += 1
                    continue
                writer.write(_pack(outcome))
                answers = list(outcome.answers.items())
                count = len(outcome.images)
                texts.append((outcome.key, outcome.question, answers, outcome.difficulty, count))
                if outcome.region is not None:
                    frames.add(outcome.region.frame)
                records += 1
            if len(texts) >= _TEXT_BATCH:
                text_writer.write_batch(_text_batch(texts))
                texts.clear()
        text_writer.write_batch(_text_batch(texts))
    if ArrayRecordReader(str(folder / _RECORDS)).num_records() != records:
        raise OSError(f"{folder} did not take every record; is its disk full?")
    dropped = dict(sorted(dropped.items()))
    why = "".join(f", {reason} {count}" for reason, count in dropped.items())
    report(f"{file}: {rows} rows, {records} kept{why}; {time.monotonic() - start:.0f} s")
    return {"rows": rows, "records": records, "dropped": dropped, "frames": sorted(frames)}


def _text_batch(texts):
    columns = zip(*texts, strict=True) if texts else ([] for _ in _TEXT_SCHEMA)
    arrays = [pa.array(column, kind) for column, kind in zip(columns, _TEXT_SCHEMA.types, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=_TEXT_SCHEMA)


def _key(images, row, rejected, region):
    digest = hashlib.blake2b(digest_size=16)
    texts = [row.question, *itertools.chain.from_iterable(sorted(row.answers.items()))]
    extras = [] if rejected is None else [b"rejected_image", rejected]
    extras += [] if region is None else [b"region", repr(region.frame).encode(), region.bits]
    for part in (*images, *(text.encode() for text in texts), *extras):
        digest.update(len(part).to_bytes(8, "little"))  # so that what ends one part cannot begin the next
        digest.update(part)
    return hashlib.blake2b(b"".join(images), digest_size=PICTURE_DIGITS // 2).hexdigest() + digest.hexdigest()
