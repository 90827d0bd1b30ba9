"""Sums of the files of a save, in the save itself: each process sums what it has written, and the first one the rest.

They are written before a save counts as whole, so each save has its sums or is none. Files are read back in pieces:
nothing is ever in memory whole. What lies on gs:// is told by its size alone, for the store keeps sums of its own.
"""

import concurrent.futures
import dataclasses
import json
import os
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp

FOLDER = "sums"  # of a save: an item of its own, beside its state
_REST = "rest.json"  # what no process has written alone, the sums of the processes among it
_PIECE, _THREADS = 1 << 20, 4


class FileSum(NamedTuple):
    """What tells a file from a damaged one."""

    size: int  # bytes
    crc32: int | None  # None on gs://


def sum_file(file) -> FileSum:
    """Reads a file through, epath.Path."""
    if "://" in os.fspath(file):
        return FileSum(file.stat().length, None)
    size = crc = 0
    with open(file, "rb", buffering=0) as f:
        while piece := f.read(_PIECE):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return FileSum(size, crc)


def sum_files(files) -> dict[str, FileSum]:
    """Reads files through, {name: epath.Path}, several at a time."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(files, pool.map(sum_file, files.values()), strict=True))


def read_sums(save) -> dict[str, FileSum]:
    """Returns the sums of a save by the names of files in it; empty if it was saved without.

    Raises:
      ValueError: sums are there, and not as they were written.
    """
    folder = save / FOLDER
    if not folder.is_dir():
        return {}
    sums = _read(folder / _REST)
    for name, found in list(sums.items()):
        if name.startswith(f"{FOLDER}/") and name.endswith(".json"):
            file = save / name
            if not file.exists() or sum_file(file) != found:
                raise ValueError(f"{name} is damaged")
            sums |= _read(file)
    return sums


class SumsHandler(ocp.AsyncCheckpointHandler):
    """Writes the sums as an item of a save. Its name comes after that of the state, so that the state is there."""

    async def async_save(self, directory, args):
        """Returns what sums this process's files, once they are written."""
        args.begun(directory.parent)
        return [_Later(lambda: _sum_own(directory))]

    def save(self, directory, args):
        """Is not used: saves are written while training goes on."""
        raise NotImplementedError

    def restore(self, directory, args):
        """Is not used: see `read_sums`."""
        raise NotImplementedError


@ocp.args.register_with_handler(SumsHandler, for_save=True, for_restore=True)  # Orbax wants both
@dataclasses.dataclass
class SumsSave(ocp.args.CheckpointArgs):
    """Asks Orbax for sums."""

    begun: Callable  # called with the epath.Path of the save while it is made


def seal(save):
    """Sums what no process has summed yet: called by the first one, when all items are finished."""
    folder = save / FOLDER
    done = {name for file in folder.glob("*.json") for name in _read(file)}
    items = [item for item in save.iterdir() if item.is_dir()]
    files = {_name(save, file): file for item in items for file in _files(item)}
    _write(folder / _REST, sum_files({name: file for name, file in files.items() if name not in done}))


def _sum_own(folder):
    """Sums what this process has written alone."""
    index = jax.process_index()
    (state,) = folder.parent.glob("state*")  # not by its last name yet
    own = state / f"ocdbt.process_{index}"
    files = _files(own) if own.is_dir() else ()
    _write(folder / f"{index}.json", sum_files({f"state/{_name(state, file)}": file for file in files}))


def _files(folder):
    """Yields the files in a folder and below."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _name(folder, file):
    return os.fspath(file.relative_to(folder))


class _Later:
    """Is done when it is asked for, and not before: Orbax asks for one result after the other."""

    def __init__(self, work):
        self._work = work

    def result(self, timeout=None):
        """Does the work; reading a file takes the time that it takes."""
        del timeout
        self._work()

    def cancel(self):
        """Has nothing to cancel."""


def _read(file):
    try:
        return {name: FileSum(*found) for name, found in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        raise ValueError(f"{FOLDER}/{file.name} is damaged") from None


def _write(file, sums):
    text = json.dumps(sums)
    if "://" in os.fspath(file):
        file.write_text(text)
        return
    with open(file, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
