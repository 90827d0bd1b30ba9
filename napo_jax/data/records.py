"""Records in any order: preference rows with a picture, read by number out of many files.

Every source file is converted once, to ArrayRecord, since parquet cannot be read in any order: for one row, all rows of
its group are read and unpacked. `benchmarks/record_access.py`, with pictures of 60 KB, one thread:

    parquet, row groups of 1000       37 records/s    400 MB at the peak
    parquet, row groups of 100       410 records/s     83 MB
    Arrow file, mapped             10757 records/s    473 MB, all of the file that was touched
    ArrayRecord                    23872 records/s      5 MB

The conversion of these 8000 rows, every picture decoded, took 6.3 s. It needs the disk space of the pictures again.
"""

import glob
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from napo_jax.data.regions import Frame
from napo_jax.data.sources import SUFFIXES, DataError, match_columns, read_columns
from napo_jax.data.store import (
    Record,
    Store,
    convert,
    find_store,
    is_local,
    store_name,
    unpack,
    unpack_image,
    unpack_images,
)

__all__ = ["DataError", "Record", "Records", "open_records"]


class Records:
    """Random access to the records of some stores, one behind the other.

    Nothing of them is held in memory. It may be pickled, which is small, and read from many threads.

    Attributes:
      rows: int, the rows that the source files hold, with those that made no record.
      dropped: {reason: count} of the rows that made no record.
      frames: set of `Frame`, those of the records' regions.
    """

    def __init__(self, stores: Sequence[Store]):
        """Opens nothing until a record is asked for."""
        self._stores = tuple(stores)
        self._source = ArrayRecordDataSource(
            [f"{store.file}[0:{store.records}]" for store in stores]  # with the counts, no file is opened to count
        )
        self.rows = sum(store.rows for store in stores)
        self.dropped = dict(sorted(sum((Counter(store.dropped) for store in stores), Counter()).items()))
        self.frames = {Frame(*frame) for store in stores for frame in store.frames}

    def __len__(self):
        return len(self._source)

    def __getitem__(self, number) -> Record:
        return unpack(self._read(number))

    def image(self, number) -> bytes:
        """Returns the encoded picture of a record, and does not look at its texts."""
        return unpack_image(self._read(number))

    def images(self, number) -> tuple[bytes, ...]:
        """Returns all encoded pictures of a record, and does not look at its texts."""
        return unpack_images(self._read(number))

    def texts(self) -> Iterator[tuple[str, str, dict[str, str]]]:
        """Yields (key, question, answers) of all records in order, and reads no picture."""
        for store in self._stores:
            yield from store.texts()

    def difficulties(self) -> np.ndarray:
        """Returns how hard each record is, float64[N]."""
        return np.concatenate([store.difficulties() for store in self._stores])

    def picture_counts(self) -> np.ndarray:
        """Returns how many pictures each record has, int32[N]."""
        return np.concatenate([store.picture_counts() for store in self._stores])

    @property
    def fingerprint(self) -> str:
        """32 hex digits that stand for all records and their order, however they are spread over files."""
        digest = hashlib.blake2b(digest_size=16)
        for store in self._stores:
            for key in store.record_keys():
                digest.update(key.encode())
        return digest.hexdigest()

    def _read(self, number):
        return self._source[range(len(self))[number]]  # counts from the end, and raises IndexError, as a list does


def open_records(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    columns: Mapping[str, str] | None = None,
    answers: Sequence[str] = (),
    extras: Sequence[str] = (),
    pictures: int = 1,
    image_root: str | os.PathLike | None = None,
    cache: str | os.PathLike | None = None,
    exif: bool = False,
    workers: int | None = None,
    report: Callable[[str], None] | None = None,
) -> Records:
    """Opens source files, each of which is converted the first time.

    At that time every row is checked, down to the last pixel of its picture, so that training meets no bad one. Rows
    that make no record are counted: `no_image`, `several_images` (or `too_many_images`, where there may be several),
    `image_outside_root`, `image_missing`, the reasons of `ImageError`, `no_question` (none, blank, or no text) and
    `several_messages` (a prompt with more than one); where they are asked for, `no_region`, `bad_region`,
    `no_difficulty`, and the reasons of pictures with `rejected_image` for `image`.

    A file is converted again when its name, size or time of change is new, or when an argument here is; a picture that
    changes under its path is not noticed. The cache may be deleted whenever nothing reads it.

    Args:
      paths: files, folders or globs, local or gs://. Files are read in the order of their names.
      columns: our name -> the file's column, for `image`, `question` and answers. Names not known are more answers.
      answers: those that every file must have a column for.
      extras: those of `sources.EXTRAS` that every row must have; otherwise they are not read.
      pictures: the most of a row.
      image_root: the folder that paths of pictures are relative to; by default, that of the file that names them.
      cache: a local folder, which hosts may share; by default `napo_jax/records` in $XDG_CACHE_HOME or ~/.cache.
      exif: whether pictures will be turned as their EXIF says; see `napo_jax.data.images.decode`.
      workers: threads that check pictures; by default one a core.
      report: called with one line on each file that was converted; by default it is printed to stderr.

    Raises:
      DataError: there is no file, no row or no column, or a file cannot be read.
    """
    files = find_files([paths] if isinstance(paths, (str, os.PathLike)) else paths)
    cache = Path(cache or default_cache() / "records")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the cache of records cannot be made ({error}); name another folder for it") from None
    mapping, sources = dict(columns or {}), []
    for file in files:  # all of them, before the first is converted
        root = file.parent if image_root is None else _absolute(image_root)
        options = (sorted(mapping.items()), str(root), exif, sorted(extras), *([pictures] if pictures > 1 else []))
        folder = cache.absolute() / store_name(file, *options)
        store = find_store(folder)
        there = store.columns if store else read_columns(file)
        sources.append(
            (file, root, folder, store, there, match_columns(file, there, mapping, answers, extras, pictures))
        )
    settings = {"exif": exif, "pictures": pictures, "workers": workers or os.cpu_count(), "report": report or _print}
    stores = [
        store or convert(file, folder, there, found, image_root=root, **settings)
        for file, root, folder, store, there, found in sources
    ]
    records = Records(stores)
    if not records:
        why = ", ".join(f"{reason} {count}" for reason, count in records.dropped.items()) or "there are none"
        raise DataError(f"none of {records.rows} rows in {_list(files)} makes a record: {why}")
    return records


def default_cache() -> Path:
    """Returns the folder in which everything that can be made again is kept, unless another one is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "napo_jax")


def find_files(paths: Sequence[str | os.PathLike]) -> list[epath.Path]:
    """Returns the files that paths name, in the order of their names, so that every host numbers them alike."""
    files = set()
    for path in map(_absolute, paths):
        try:
            found = _find(path)
        except ImportError as error:  # what reads buckets is not part of every installation
            raise DataError(f"{path} cannot be read ({error}); pip install 'napo-jax[gcs]'") from None
        if not found:
            raise DataError(f"{path} names no file; expected a file, a folder of {'/'.join(SUFFIXES)} files, or a glob")
        files.update(found)
    return sorted(files, key=os.fspath)


def _find(path):
    if path.is_dir():
        return [file for file in path.iterdir() if file.suffix in SUFFIXES and file.name[0] not in "._"]
    return [path] if path.exists() else _glob(path)


def _glob(path):
    """Returns the files that a pattern matches."""
    if is_local(path):
        found = map(epath.Path, glob.glob(os.fspath(path), recursive=True))
    elif "**" in path.parts:
        raise DataError(f"{path}: ** works on local folders alone; write one * for each level")
    else:
        found = path.parent.glob(path.name)
    return [file for file in found if file.exists() and not file.is_dir()]  # a link may lead nowhere


def _absolute(path):
    path = os.fspath(path)
    if is_local(path):
        return epath.Path(os.path.abspath(os.path.expanduser(path)))
    try:
        return epath.Path(path)
    except KeyError:
        raise DataError(f"{path} is neither local nor of a kind of storage that is known, such as gs://") from None


def _list(files):
    return ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _print(line):
    print(line, file=sys.stderr)
