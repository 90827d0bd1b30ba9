"""Finds rejected pictures: `python -m napo_jax.build_retrieved --config configs/rdpo7b.py --input FILES --output DIR`.

Beside each row of some parquet files comes the picture of another row that is most like its own to the model's vision
tower: the column `retrieved_image`, for the image variant `rejected_image` of rDPO. All pictures are compared with all
others. The same command, given again, goes on where it was; it takes one process, with all its devices.
"""

import dataclasses
import hashlib
import io
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa

from napo_jax.bias.inputs import image_root_of, open_inputs, write_output
from napo_jax.building import BuildOptions, run_command, run_job
from napo_jax.command import exit_with_one_line
from napo_jax.config import Config, parse
from napo_jax.data.loader import Pictures
from napo_jax.data.records import default_cache, open_records
from napo_jax.data.sources import RowError, read_image
from napo_jax.data.store import PICTURE_DIGITS, read_picture
from napo_jax.model_source import absolute, find_model
from napo_jax.pieces import read_manifest, write_durably, write_manifest
from napo_jax.retrieval import nearest, picture_features
from napo_jax.sharding import make_mesh, over_rows
from napo_jax.speaker import load_speaker

BOOKS = "retrieval"
_FIELDS = [
    pa.field("retrieved_image", pa.struct({"bytes": pa.binary(), "path": pa.string()})),
    pa.field("retrieved_cosine", pa.float32()),
]


@dataclasses.dataclass(frozen=True)
class Options(BuildOptions):
    """The command's own options."""

    # Which picture: 1 for the most alike, 2 for the next one, and so on.
    rank: int = 1
    # Pictures whose cosine is above this are taken for the same one, saved twice, and passed over.
    most: float = 0.999
    # Pictures that are computed at a time on each device of mesh.data x mesh.fsdp.
    batch: int = 32
    # Pictures that are written at a time: as many may be lost when the process is killed.
    piece: int = 2048

    def __post_init__(self):
        """Checks the numbers."""
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not -1 <= self.most <= 1:
            raise ValueError(f"most is a cosine, from -1 to 1, got {self.most}")


class Job:
    """Some files whose pictures are compared."""

    def __init__(self, config: Config, options: Options):
        """Looks at the files, the pictures, the model and what was done so far."""
        self.config, self.options, self.folder = config, options, absolute(options.output)
        data = config.data
        names = [field.name for field in _FIELDS]
        columns = {name: column for name, column in data.columns.items() if name != "rejected_image"}
        self.inputs = open_inputs(options.input, names, columns, self.folder, suffixes=("",))
        self.source = find_model(config.model, config.train.seed)
        cache = Path(data.cache).expanduser() if data.cache else default_cache()
        self.root = data.image_root and str(absolute(data.image_root))
        self.records = open_records(
            options.input, columns=columns, image_root=data.image_root, cache=cache / "records", exif=data.exif
        )
        keys = np.array([key[:PICTURE_DIGITS] for key, *_ in self.records.texts()])
        # By content: a picture that many rows have is computed once, and none of them is another's neighbour.
        self.pictures, self.record_of = np.unique(keys, return_index=True)
        self.look = Pictures(self.source.shape.vision.image_size, data.image_rule, data.exif)
        self.books = self.folder / BOOKS
        self.settings = {
            "model": str(self.source),
            "source": self.source.fingerprint,
            "dtype": config.model.dtype,
            "pictures": hashlib.blake2b("".join(self.pictures).encode(), digest_size=16).hexdigest(),
            "look": dataclasses.asdict(self.look),
            "piece": options.piece,
        }
        self.manifest = read_manifest(self.books, self.settings)
        inputs = {file.path.name: file.bytes for file in self.inputs}
        self.written = {"rank": options.rank, "most": options.most, "inputs": inputs}
        self.rows, self.summary = sum(file.rows for file in self.inputs), self.books / "report.json"
        self.files = [self.folder / file.path.name for file in self.inputs]
        if len(self.pictures) < 2:
            raise ValueError("all rows have one picture: there is no other to find")

    def plan(self):
        """Yields what a person wants to read before it starts."""
        yield f"model    {self.source}"
        yield f"pictures {len(self.pictures)} of {self.rows} rows; {self.count_missing()} to go"

    def missing(self) -> list[range]:
        """Returns the pictures of the pieces that are not there yet."""
        count, size = len(self.pictures), self.options.piece
        pieces = (range(start, min(start + size, count)) for start in range(0, count, size))
        return [piece for piece in pieces if not self._file(piece.start).exists()]

    def count_missing(self) -> int:
        """Returns how many pictures those are."""
        return sum(map(len, self.missing()))

    def _file(self, start):
        return self.books / "pieces" / f"{start:09}.npy"

    def build(self, console, check):
        """Computes the features of the pictures that lack them."""
        model, mesh = self.config.model, make_mesh(self.config.mesh)
        speaker = load_speaker(self.source, mesh, dtype=model.dtype, attention=model.attention)
        batch = self.options.batch * mesh.shape["data"] * mesh.shape["fsdp"]
        if not self.manifest:
            write_manifest(self.books, self.settings | {"weights": speaker.digest})
        self._file(0).parent.mkdir(parents=True, exist_ok=True)
        missing = self.missing()
        done, total = 0, sum(map(len, missing))
        size = self.look.size
        for piece in missing:
            found = []
            for start in range(piece.start, piece.stop, batch):
                some = range(start, min(start + batch, piece.stop))
                pixels = np.zeros((batch, size, size, 3), np.uint8)
                for i, picture in enumerate(some):
                    pixels[i] = self.look(self.records.image(int(self.record_of[picture])))
                values = picture_features(speaker.model, speaker.params, jax.device_put(pixels, over_rows(mesh)))
                found.append(np.asarray(values)[: len(some)])
                check()
            write_durably(self._file(piece.start), _npy(np.concatenate(found)))
            done += len(piece)
            console.progress(f"{done} of {total} pictures")

    def finish(self) -> dict:
        """Compares all pictures, writes the files and returns the counts."""
        starts = range(0, len(self.pictures), self.options.piece)
        features = np.concatenate([_read_npy(self._file(start)) for start in starts])
        others, cosines = nearest(features, make_mesh(self.config.mesh), rank=self.options.rank, most=self.options.most)
        place_of = {picture: place for place, picture in enumerate(self.pictures)}
        found = []
        for file in self.inputs:
            root = image_root_of(file, self.root)

            def made(_, values, root=root):
                place = place_of.get(_picture_of(values, root), -1)
                other = -1 if place < 0 else others[place]
                if other < 0:
                    return dict.fromkeys(field.name for field in _FIELDS)
                found.append(float(cosines[place]))
                picture = self.records.image(int(self.record_of[other]))
                return {"retrieved_image": {"bytes": picture, "path": None}, "retrieved_cosine": found[-1]}

            write_output(file, self.folder, file.rows, _FIELDS, made)
        quantiles = [round(float(np.quantile(found, q)), 4) for q in (0.05, 0.5, 0.95)] if found else None
        return {"rows": self.rows, "pictures": len(self.pictures), "retrieved": len(found), "cosines": quantiles}

    def says(self, counts):
        """Yields what there is to say of the pictures."""
        yield f"{counts['retrieved']} of {counts['rows']} rows have a picture; cosines {counts['cosines']}"
        yield f"wrote {self.folder}"


def _npy(array):
    """Returns an array as the bytes of a .npy file."""
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _read_npy(file):
    try:
        return np.load(io.BytesIO(file.read_bytes()))
    except (ValueError, EOFError):
        raise ValueError(f"{file} is damaged; delete it, and its pictures are computed again") from None


def _picture_of(values, root):
    """Returns the digest of a row's picture, None where it has none."""
    try:
        image = read_image(values.get("image"))
        data = image if isinstance(image, bytes) else read_picture(root, image)
    except RowError:
        return None
    return hashlib.blake2b(data, digest_size=PICTURE_DIGITS // 2).hexdigest()


def build(config: Config, options: Options, console=None):
    """Finds the pictures, or goes on with it; returns the counts."""
    return run_job(Job, config, options, console)


def main(argv=None):
    """Runs the command."""
    run_command(build, *parse(Options, argv, description=__doc__))


if __name__ == "__main__":
    exit_with_one_line(main)
