"""What a disk refuses, found in whatever error it comes as, and said with what to do about it."""

import contextlib
import errno
import os
import re
import tempfile
from typing import NamedTuple

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_LONG = {errno.ENAMETOOLONG}
# As libraries of C++ say it, with the words of the system.
_WORDS = {os.strerror(number): number for number in (*_FULL, errno.EACCES, errno.EROFS)}
_STORES = re.compile(r"\b(gcsfs|s3fs|fsspec)\b")
_QUOTED = re.compile(r'"((?:\w+://|/)[^"\n]*)"')


class Refusal(NamedTuple):
    """What a disk did not do."""

    number: int  # of `errno`
    path: str | None  # where, if that was said

    @property
    def full(self) -> bool:
        """Whether room would do, and not only another permission or path."""
        return self.number in _FULL

    def __str__(self):
        """Says what is wrong and what to do."""
        where = f"{self.path}: " if self.path else ""
        if self.full:
            return f"{where}{os.strerror(self.number)}; make room, and give the same command again"
        if self.number in _LONG:
            return f"{where}{os.strerror(self.number)}; name a shorter path"
        return f"{where}{os.strerror(self.number)}; let this user write there, or name another path"


def refusal_of(error) -> Refusal | None:
    """Returns what a disk refused if an error says so."""
    if isinstance(error, OSError) and error.errno in _FULL | _CLOSED | _LONG:
        return Refusal(error.errno, None if error.filename is None else os.fsdecode(error.filename))
    if number := next((number for words, number in _WORDS.items() if words in str(error)), None):
        path = _QUOTED.search(str(error))
        return Refusal(number, path and path[1])
    return None


def find_refusal(error) -> Refusal | None:
    """Returns the same of an error or of those that it came from."""
    seen = []
    while error is not None and error not in seen:
        if (refusal := refusal_of(error)) is not None:
            return refusal
        seen.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def missing_store(error) -> str | None:
    """Returns what to say of a path of a store, such as gs://, if an error is that of a package that reads it."""
    found = _STORES.search(str(error)) if isinstance(error, ImportError) else None
    if found is None:
        return None
    lacks = f"a path is not local, and the package {found[0]} that reads such paths is not installed"
    return f"{lacks}: pip install 'napo-jax[gcs]' for gs:// paths, or name a local one"


@contextlib.contextmanager
def naming(path):
    """Adds the path to what the system says inside a `with` of writing to a file, which names none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error


def check_writable(folder):
    """Raises what the system says if nothing can be written into a folder, there already or not; leaves nothing.

    Args:
      folder: epath.Path. On gs:// nothing is asked.
    """
    if "://" in os.fspath(folder):
        return
    try:
        os.stat(folder)
    except OSError as error:
        if error.errno in _LONG:  # to ask whether it exists would say no
            raise
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{folder} cannot be written, for {above} is no folder; name another path")
    try:
        with tempfile.TemporaryFile(dir=above) as file:
            file.write(b"?")
    except OSError as error:  # by its own name, and not that of a file that nobody knows
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(above)) from None
