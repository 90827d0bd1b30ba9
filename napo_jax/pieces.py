"""What has been said so far, on disk: small files that are there whole or not at all, and a manifest of what for.

A run that is killed loses the answers since its last piece, and those that were being said. As a line says which row
and answer it is of, the run may go on with other devices, other hosts and in another order.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from napo_jax.data.store import is_local
from napo_jax.evals.answers import NUMBER, misfit, parse_json
from napo_jax.storage import naming

BOOKS = ".books"  # the end of the name of a folder with a manifest and pieces, beside what they are for
_MANIFEST, _PIECES = "manifest.json", "pieces"
_NAMED = "model"  # a setting that only tells people; weights are told apart by what they are
_LONGEST = 300  # characters of a setting in an error
_LINE = {"file": int, "row": int, "name": str, "text": (str, type(None)), "tokens": int, "ended": bool}
_LINE |= {"score": (*NUMBER, type(None)), "why": (str, type(None))}


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
            for number, text in enumerate(file.read_bytes().rstrip(b"\n").split(b"\n"), 1):
                yield _line(text, f"{file}, line {number}, is damaged; delete the file, and its answers are made again")

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


def _line(text, fault):
    try:
        fields = parse_json(text)
    except ValueError:
        raise ValueError(fault) from None
    if misfit(fields, _LINE) or len(fields) > len(_LINE):
        raise ValueError(fault)
    return Line(**fields)


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
        manifest = parse_json(file.read_bytes())
        wrong = misfit(manifest, {"settings": dict})
    except ValueError as error:
        wrong = error
    if wrong:
        raise ValueError(f"{file} is damaged ({wrong}); move {folder} away, or name another output")
    before = manifest["settings"]
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


def digest(content: bytes) -> str:
    """Returns 32 hex digits that stand for a file's content."""
    return hashlib.sha256(content).hexdigest()[:32]


def make_room(file):
    """Makes the folder of a file that is to be written; called before the work whose result it is.

    Args:
      file: epath.Path, local or gs://.

    Raises:
      ValueError: no file of this name can be written.
    """
    if not is_local(file):
        return  # objects need no folder
    if file.is_dir():
        raise ValueError(f"{file} is a folder; name a file to write")
    above = next(folder for folder in file.parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{file} cannot be written, for {above} is no folder; name another file")
    if not os.access(above, os.W_OK):
        raise ValueError(f"{file} cannot be written, for {above} is read-only; name another file")
    file.parent.mkdir(parents=True, exist_ok=True)


def write_durably(file, content):
    """Writes a file, of text or bytes, that is there whole or not at all, whenever process or machine stops."""
    data = content.encode() if isinstance(content, str) else content
    if not is_local(file):
        file.write_bytes(data)  # an object appears when it is whole
        return
    aside = epath.Path(f"{os.fspath(file)}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with naming(file), open(aside, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(os.path.dirname(os.fspath(file)) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)  # the name too
    finally:
        os.close(folder)


def _difference(name, before, now):
    """Returns the innermost name under which two settings differ, and both values."""
    while isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key))
        name, before, now = f"{name}.{key}", before.get(key), now.get(key)
    said = (json.dumps(value) for value in (before, now))
    return name, *(text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..." for text in said)
