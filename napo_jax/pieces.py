"""What has been said so far, on disk: small files that are there whole or not at all, and a manifest of what for.

A run that is killed loses the answers since its last piece, and those that were being said. As a line says which row
and answer it is of, the run may go on with other devices, other hosts and in another order.
"""

import json
import os
import time
import uuid
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from napo_jax.data.store import is_local

BOOKS = ".books"  # the end of the name of a folder with a manifest and pieces, beside what they are for
_MANIFEST, _PIECES = "manifest.json", "pieces"
_NAMED = "model"  # a setting that only tells people; weights are told apart by what they are


class Line(NamedTuple):
    """An answer, or why there is none."""

    file: int  # the number of the input file
    row: int  # in that file
    name: str  # of the answer
    text: str | None  # None where nothing could be asked
    tokens: int
    ended: bool  # whether it came to its end, and not to the most tokens
    score: float | None
    why: str | None  # nothing could be asked

    @classmethod
    def of(cls, file, row, name, text, answer):
        """Returns the line of a text and of the `Answer` that it spells."""
        tokens = len(answer.ids) + answer.ended
        return cls(file, row, name, text, tokens, answer.ended, round(answer.score, 6), None)

    @property
    def key(self) -> tuple[int, int, str]:
        """What it is an answer to."""
        return self.file, self.row, self.name


class Pieces:
    """The pieces of a build: read all, write this process's own."""

    def __init__(self, folder, *, size=64, seconds=60.0):
        """Names the folder of the books, which need not exist.

        Args:
          folder: epath.Path of the books, local or gs://, which all processes share.
          size: lines of a piece.
          seconds: the longest that a line waits for others.
        """
        self._folder, self._size, self._seconds = folder / _PIECES, size, seconds
        self._lines, self._since, self._read = [], time.monotonic(), set()

    def new(self) -> Iterator[Line]:
        """Yields the lines of all pieces that were not read before, those of other processes too."""
        if not self._folder.is_dir():
            return
        for file in sorted(self._folder.glob("*.jsonl"), key=os.fspath):
            if file.name in self._read:
                continue
            self._read.add(file.name)
            # At newlines alone: a text may hold other characters that end lines.
            for number, text in enumerate(file.read_text().rstrip("\n").split("\n"), 1):
                try:
                    yield Line(**json.loads(text))
                except (ValueError, TypeError):
                    raise ValueError(
                        f"{file}, line {number}, is damaged; delete the file, and its answers are made again"
                    ) from None

    def add(self, line: Line):
        """Keeps a line; it is on disk when its piece is full or has waited long enough."""
        self._lines.append(line)
        if len(self._lines) >= self._size or time.monotonic() - self._since > self._seconds:
            self.flush()

    def flush(self):
        """Writes what is kept as a piece."""
        self._since = time.monotonic()
        if not self._lines:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line._asdict(), ensure_ascii=False) + "\n" for line in self._lines)
        # A name of its own, whoever writes beside it.
        write_durably(self._folder / f"{uuid.uuid4().hex}.jsonl", text)
        self._lines.clear()


def read_manifest(folder, settings) -> dict:
    """Returns the manifest of some books, an empty dict if they are not begun.

    Args:
      folder: epath.Path of the books.
      settings: a dict for JSON of all that decides the answers, as far as it is known.

    Raises:
      ValueError: the books were begun with other settings, or are damaged.
    """
    file = folder / _MANIFEST
    if not file.exists():
        if (folder / _PIECES).is_dir() and any((folder / _PIECES).iterdir()):
            raise ValueError(f"{folder} has pieces, and no {_MANIFEST} that says of what; name another output")
        return {}
    try:
        manifest = json.loads(file.read_text())
        before = manifest["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); name another output") from None
    for name, now in json.loads(json.dumps(settings)).items():
        if name != _NAMED and before.get(name) != now:
            part, was, now = _difference(name, before.get(name), now)
            raise ValueError(
                f"{folder} was begun with {part} {was}, and not {now}: go on with the same, or name another output"
            )
    return manifest


def write_manifest(folder, settings, written=None):
    """Writes the manifest.

    Args:
      folder: epath.Path of the books.
      settings: as for `read_manifest`, complete.
      written: what is said of the finished whole; None while it is under way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / _MANIFEST, json.dumps({"settings": settings, "written": written}, indent=1))


def write_durably(file, text):
    """Writes a file that is there whole or not at all, whenever the process or the machine stops."""
    if not is_local(file):
        file.write_text(text)  # an object appears when it is whole
        return
    aside = epath.Path(f"{os.fspath(file)}.{uuid.uuid4().hex[:8]}.tmp")
    with open(aside, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, file)
    folder = os.open(os.path.dirname(os.fspath(file)), os.O_RDONLY)
    try:
        os.fsync(folder)  # the name too
    finally:
        os.close(folder)


def _difference(name, before, now):
    """Returns the innermost name under which two settings differ, and both values."""
    while isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key))
        name, before, now = f"{name}.{key}", before.get(key), now.get(key)
    return name, json.dumps(before), json.dumps(now)
