"""What is found of rows, under way: in files of a few hundred rows each, that are there whole or not at all."""

import json

from napo_jax.bias.inputs import read_rows
from napo_jax.pieces import write_durably

_PIECES = "pieces"


class RowPieces:
    """Some rows each, under the number of their file and first row."""

    def __init__(self, books, sizes, piece, kind):
        """Names the pieces.

        Args:
          books: epath.Path of the folder that they are kept in.
          sizes: how many rows are wanted of each file.
          piece: rows of a piece.
          kind: a NamedTuple of plain values, what is found of a row.
        """
        self._folder, self._kind = books / _PIECES, kind
        self._ranges = {
            (number, start): range(start, min(start + piece, rows))
            for number, rows in enumerate(sizes)
            for start in range(0, rows, piece)
        }

    def missing(self, share=(0, 1)) -> list[tuple[int, range]]:
        """Returns (file, rows) of the pieces that are not there yet.

        Args:
          share: (i, n), for every n-th piece alone.
        """
        index, count = share
        there = {file.name for file in self._folder.glob("*.json")} if self._folder.is_dir() else set()
        mine = list(self._ranges.items())[index::count]
        return [(number, rows) for (number, start), rows in mine if _name(number, start) not in there]

    def count_missing(self) -> int:
        """Returns how many rows are in none yet."""
        return sum(len(rows) for _, rows in self.missing())

    def fill(self, inputs, data, ask, answer, console, check, share=(0, 1)):
        """Finds what is missing, and writes it piece by piece.

        Args:
          inputs: list of `InputFile`.
          data: how rows are read, a `DataConfig`.
          ask: as `read_rows` has its `work`: returns what is found of a row, or what has to be asked about it.
          answer: ({row: what is asked}, check) -> {row: what is found}.
          console: shows how far it is.
          check: called after each row; raises to end it.
          share: as for `missing`.
        """
        missing = self.missing(share)
        done, total = 0, sum(len(rows) for _, rows in missing)
        for number, rows in missing:
            found, asked = {}, {}
            look = {"image_root": data.image_root, "exif": data.exif, "threads": data.threads}
            for row, one in read_rows(inputs[number], set(rows), ask, **look):
                (found if isinstance(one, self._kind) else asked)[row] = one
                check()
            self.write(number, rows, found | answer(asked, check))
            done += len(rows)
            console.progress(f"{done} of {total} rows")

    def write(self, number, rows, found):
        """Writes a piece.

        Args:
          number: of the file.
          rows: its range.
          found: {row: what is found of it}.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps([list(found[row]) for row in rows], ensure_ascii=False)
        write_durably(self._folder / _name(number, rows.start), text)

    def read(self, number) -> dict:
        """Returns what was found for the rows of a file."""
        found = {}
        for (other, start), rows in self._ranges.items():
            if other != number:
                continue
            file = self._folder / _name(number, start)
            try:
                values = [self._kind(*values) for values in json.loads(file.read_text())]
                found |= dict(zip(rows, values, strict=True))
            except (ValueError, TypeError):
                raise ValueError(f"{file} is damaged; delete it, and its rows are done again") from None
        return found


def _name(number, start):
    return f"{number:05}-{start:09}.json"
