"""Marks key regions: `python -m napo_jax.build_regions --config configs/mfpo7b.py --input FILES --output DIR`.

For each row of some parquet files, the keywords of its chosen answer are found and mapped to places in its picture:
the columns `keywords` and `region`, for the image variant `region`. Where that fails the region is the whole picture,
`region_fault` says why, and it is counted. The same command, given again, goes on where it was.
"""

import collections
import dataclasses
import functools
from typing import Literal

import jax
import pyarrow as pa

from napo_jax.bias.inputs import open_inputs, write_output
from napo_jax.building import RowwiseOptions, run_command, run_job
from napo_jax.command import exit_with_one_line
from napo_jax.config import Config, parse
from napo_jax.data.prompts import Prompter
from napo_jax.model_source import absolute, find_model
from napo_jax.pieces import read_manifest, write_manifest
from napo_jax.progress import wait_until
from napo_jax.regions.chunks import find_chunks
from napo_jax.regions.detector import Detector, files_of
from napo_jax.regions.grounders import read_boxes, read_masks
from napo_jax.regions.keywords import Ranking
from napo_jax.regions.marker import Marked, Marker
from napo_jax.regions.page import write_page
from napo_jax.regions.spacy_chunks import SpacyChunks
from napo_jax.row_pieces import RowPieces
from napo_jax.sharding import make_mesh
from napo_jax.speaker import load_speaker

_BY_MODEL = ("evidence", "attention")  # the grounders that run the model itself
BOOKS, PAGE = "regions", "regions.html"
_REGION = pa.struct({"rule": pa.string(), "exif": pa.bool_(), "side": pa.int64(), "bits": pa.binary()})
_FIELDS = [
    pa.field("region", _REGION),
    pa.field("keywords", pa.list_(pa.string())),
    pa.field("region_fault", pa.string()),
]


@dataclasses.dataclass(frozen=True)
class Options(RowwiseOptions):
    """The command's own options."""

    # What maps a keyword to places: "evidence", those that the model's own log-prob of the word depends on, and
    # "attention", those that it looks at; "boxes" or "masks", those of the column of that name, in pixels of the
    # upright picture; or "detector", those that another model finds.
    grounder: Literal["evidence", "attention", "boxes", "masks", "detector"] = "evidence"
    # How much of the evidence for a word, or of the attention, its places hold at least; as few places as hold it.
    share: float = 0.5
    # The layers whose attention counts, from and to as shares of the depth. The middle half: the first layers look
    # everywhere, and the last ones at what comes next, and at a few places whatever the word.
    layers: tuple[float, float] = (0.25, 0.75)
    # A local folder of a zero-shot object detector of `transformers`, such as OWL-ViT or Grounding DINO.
    detector: str | None = None
    # The least score of a box. None: what the detector's own code has, 0.1 or 0.25 of those two.
    threshold: float | None = None
    # A local folder of a SAM, to mark what is in the detector's boxes and not all of them.
    sam: str | None = None
    # A spaCy model, installed or a folder, whose noun chunks are the candidates for keywords; without one, those that
    # lists of words find.
    spacy: str | None = None
    # How keywords are chosen.
    ranking: Ranking = dataclasses.field(default_factory=Ranking)
    # Rows that are computed at a time on each device of mesh.data x mesh.fsdp.
    batch: int = 8

    def __post_init__(self):
        """Checks the numbers."""
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")
        if not 0 <= self.layers[0] <= self.layers[1] <= 1:
            raise ValueError(f"layers must be two shares of the depth, the lower one first, got {self.layers}")
        if (self.grounder == "detector") != (self.detector is not None):
            raise ValueError("--grounder detector and --detector FOLDER go together: add the other one")
        if self.grounder != "detector" and (self.sam is not None or self.threshold is not None):
            raise ValueError("--sam and --threshold are of --grounder detector")


class Job:
    """Some files whose regions are marked."""

    def __init__(self, config: Config, options: Options):
        """Looks at the files, the model and what was done so far; raises one line if something cannot be used."""
        self.folder, self.options, self.config = absolute(options.output), options, config
        data, columns = config.data, dict(config.data.columns)
        if options.grounder in ("boxes", "masks"):
            columns.setdefault(options.grounder, options.grounder)
        names = [field.name for field in _FIELDS]
        self.inputs = open_inputs(options.input, names, columns, self.folder, suffixes=("",))
        for file in self.inputs:
            if "chosen" not in file.columns:
                raise ValueError(f"{file.path} has no column chosen, whose keywords are looked for; map it to one")
        self.source = find_model(config.model, config.train.seed)
        vision = self.source.shape.vision
        self.prompter = Prompter(self.source.tokenizer, data.template, vision.image_tokens)
        most = min(data.max_tokens, self.source.shape.text.max_positions)
        find = find_chunks if options.spacy is None else SpacyChunks(options.spacy)
        frame = data.image_rule, data.exif
        self.marker = Marker(self.prompter, vision, options.ranking, *frame, most, options.share, find)
        self.detector = None
        if options.grounder == "detector":
            self.detector = Detector(options.detector, options.sam, options.threshold)
        self.root = data.image_root and str(absolute(data.image_root))
        left = options.limit
        self.sizes = []
        for file in self.inputs:
            self.sizes.append(file.rows if left is None else min(file.rows, left))
            left = None if left is None else left - self.sizes[-1]
        self.books = self.folder / BOOKS
        self.settings = self._settings()
        self.manifest = read_manifest(self.books, self.settings)
        self.pieces = RowPieces(self.books, self.sizes, options.piece, Marked)
        self.count_missing = self.pieces.count_missing
        self.written = {"rows": sum(self.sizes)}
        self.summary = self.books / "report.json"
        # Those that have a row that is wanted, or none at all.
        self.numbers = [number for number, file in enumerate(self.inputs) if self.sizes[number] or not file.rows]
        self.files = [*(self.folder / self.inputs[number].path.name for number in self.numbers), self.folder / PAGE]

    def _settings(self):
        """Returns all that decides the regions, for JSON."""
        data, options = self.config.data, self.options
        own = {"grounder": options.grounder, "ranking": dataclasses.asdict(options.ranking), "piece": options.piece}
        if options.spacy is not None:
            own |= {"spacy": self.marker.find.version}
        if options.grounder == "detector":
            files = {name: files_of(name) for name in (options.detector, options.sam) if name is not None}
            own |= {"detector": files, "threshold": options.threshold}
        if options.grounder == "attention":
            own |= {"layers": list(options.layers)}
        if options.grounder in _BY_MODEL:
            own |= {"model": str(self.source), "source": self.source.fingerprint, "dtype": self.config.model.dtype}
            own |= {"tokenizer": self.prompter.fingerprint, "max_tokens": data.max_tokens, "share": options.share}
        frame = {"image_rule": data.image_rule, "exif": data.exif, "patches": self.marker.vision.image_tokens}
        inputs = {file.path.name: file.bytes for file in self.inputs}
        return own | frame | {"columns": data.columns, "image_root": self.root, "inputs": inputs}

    def plan(self):
        """Yields what a person wants to read before it starts."""
        grounder = self.options.grounder
        by = f"{grounder} of {self.source}" if grounder in _BY_MODEL else f"{grounder} of the rows"
        by = f"detector {self.options.detector}" if grounder == "detector" else by
        yield f"regions  {self.options.ranking.count} keywords of each chosen answer, found by the {by}"
        yield f"rows     {sum(self.sizes)} in {len(self.inputs)} file(s); {self.count_missing()} to go"

    def build(self, console, check):
        """Marks this process's share of the pieces."""
        ground = self._by_model() if self.options.grounder in _BY_MODEL else self._one_by_one
        if jax.process_index() == 0 and not self.manifest:
            write_manifest(self.books, self.settings)
        wait_until(lambda: read_manifest(self.books, self.settings), check)
        ask = lambda row, record, values: self.marker.ask(
            record, read_boxes(values.get("boxes")), read_masks(values.get("masks"))
        )
        self.pieces.fill(self.inputs, self.config.data, ask, ground, console, check, self.options.part)

    def _one_by_one(self, waiting, check):
        """Marks rows by what came with them, or by a detector."""
        mark = {"boxes": self.marker.by_boxes, "masks": self.marker.by_masks}.get(
            self.options.grounder, functools.partial(self.marker.by_detector, self.detector)
        )
        found = {}
        for row, asked in waiting.items():
            found[row] = mark(asked)
            check()
        return found

    def _by_model(self):
        """Loads the model, and returns what marks rows with it."""
        # Each process has a mesh of its own devices: none waits for another's rows.
        mesh = make_mesh(self.config.mesh, jax.local_devices())
        model = self.config.model
        speaker = load_speaker(self.source, mesh, dtype=model.dtype, attention=model.attention)
        self.settings["weights"] = speaker.digest
        batch = self.options.batch * mesh.shape["data"] * mesh.shape["fsdp"]
        layers = tuple(self.options.layers) if self.options.grounder == "attention" else None

        def ground(waiting, check):
            # Rows of like lengths are computed together, so that little is padding.
            waiting = sorted(waiting.items(), key=lambda each: len(each[1].prefix) + len(each[1].answer))
            found = {}
            for start in range(0, len(waiting), batch):
                rows, asked = zip(*waiting[start : start + batch], strict=True)
                found |= dict(zip(rows, self.marker.by_model(speaker, asked, batch, layers), strict=True))
                check()
            return found

        return ground

    def finish(self) -> dict:
        """Writes the files with their regions, and the page, when all is marked; returns the counts."""
        counts, samples = collections.Counter(), []
        for number in self.numbers:
            file, size, found = self.inputs[number], self.sizes[number], self.pieces.read(number)

            def made(row, values, file=file, found=found):
                marked = found[row]
                region = self.marker.region(marked)
                counts[marked.fault or "marked"] += 1
                if region is not None and len(samples) < 12:
                    samples.append((file, values, marked, region))
                column = None if region is None else region.column
                return {"region": column, "keywords": marked.keywords, "region_fault": marked.fault}

            write_output(file, self.folder, size, _FIELDS, made)
        summary = {"rows": sum(self.sizes), "regions": dict(counts.most_common())}
        write_page(self.folder / PAGE, summary, samples, self.marker, self.root)
        return summary

    def says(self, counts):
        """Yields what there is to say of the regions."""
        yield ", ".join(f"{what} {count}" for what, count in counts["regions"].items())
        yield f"wrote {self.folder}; see {self.folder / PAGE}"


def build(config: Config, options: Options, console=None):
    """Marks the regions, or goes on with them; returns the counts, None where another process writes them."""
    return run_job(Job, config, options, console)


def main(argv=None):
    """Runs the command."""
    run_command(build, *parse(Options, argv, description=__doc__))


if __name__ == "__main__":
    exit_with_one_line(main)
