"""Makes rows of several pictures: `python -m napo_jax.build_composed --config FILE --input FILES --output DIR`.

Each row's picture is put among those of other rows, in a sequence, in a grid, or into the middle of one of them, and
its question gets the words that name it (MIA-DPO). The model answers, and answers that looked at the other pictures
become `rejected`; rows whose answer did not are left out, and counted. The same command, given again, goes on where it
was; it takes one process, with all its devices.
"""

import collections
import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from napo_jax.bias.inputs import image_root_of, open_inputs, read_questions, write_output
from napo_jax.building import BuildOptions, run_command, run_job
from napo_jax.command import exit_with_one_line
from napo_jax.composed.answerer import Answerer
from napo_jax.composed.asker import Asked, Composer, Form
from napo_jax.composed.drawing import Pool
from napo_jax.composed.misplaced import Said, Selection, why_not
from napo_jax.composed.wording import COUNTS, INSET_WORDS, name_picture
from napo_jax.config import Config, parse
from napo_jax.data.prompts import IMAGE, Prompter, PromptError
from napo_jax.data.records import default_cache, open_records
from napo_jax.data.store import check_row
from napo_jax.decoding import Decoding
from napo_jax.model_source import absolute, find_model
from napo_jax.pieces import read_manifest, write_manifest
from napo_jax.row_pieces import RowPieces
from napo_jax.sharding import make_mesh
from napo_jax.speaker import load_speaker

BOOKS = "composed"
_PICTURE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_FIELDS = {
    "images": pa.list_(_PICTURE),
    "question": pa.string(),
    "rejected": pa.string(),
    "composed": pa.struct({"form": pa.string(), "pictures": pa.int32(), "place": pa.int32()}),
    "on_target": pa.float32(),
}
_SLACK = 16  # tokens by which a text may be longer than its parts, one by one


@dataclasses.dataclass(frozen=True)
class Options(BuildOptions):
    """The command's own options."""

    # "sequence": several pictures one behind the other; "grid": as cells of one; "inset": set into the middle of one.
    form: Form = "sequence"
    # How many pictures a row may get: one number is drawn of these. By default 2 to 5 in a sequence, up to 9 in a grid.
    pictures: tuple[int, ...] = ()
    # "misplaced": what the model says without looking at the true picture; "kept": the row's own, with no model asked.
    rejected: Literal["misplaced", "kept"] = "misplaced"
    # "paper"; or "released", as the published code has it: cells of a grid bear numbers, what is asked about a grid or
    # an inset has noise, and an inset is taken to fill the middle 16 x 16 of 24 x 24 patches, whatever its shape.
    variant: Literal["paper", "released"] = "paper"
    # Which answers become rejected. It is looked at when the files are written: nothing is asked again.
    selection: Selection = dataclasses.field(default_factory=Selection)
    # How the model answers.
    decoding: Decoding = dataclasses.field(default_factory=lambda: Decoding(max_tokens=256))
    # The layer of the decoder whose attention counts, from 0; None: the middle one, which of 32 is 16, as published.
    layer: int | None = None
    # Rows whose chosen answer has more characters are left out, as published.
    longest_chosen: int = 511
    # Of what is drawn for a row.
    seed: int = 0
    # The first so many rows of each file alone, to try things out.
    limit: int | None = None
    # Prompts that are answered at a time, and answers whose attention is computed at a time, on each device of
    # mesh.data x mesh.fsdp.
    slots: int = 4
    batch: int = 2
    # Rows that are written at a time: as many may be lost when the process is killed.
    piece: int = 64

    def __post_init__(self):
        """Checks the numbers."""
        super().__post_init__()
        if self.longest_chosen < 1:
            raise ValueError(f"longest_chosen must be at least 1, got {self.longest_chosen}")
        if wrong := set(self.pictures) - set(COUNTS[self.form]):
            there = ", ".join(map(str, COUNTS[self.form]))
            raise ValueError(f"the form {self.form} has {there} pictures, and not {min(wrong)}")

    @property
    def counts(self) -> tuple[int, ...]:
        """How many pictures there may be."""
        return self.pictures or COUNTS[self.form]


class Job:
    """Some files whose rows are composed."""

    def __init__(self, config: Config, options: Options):
        """Looks at the files, the pictures, the model and what was done so far."""
        self.config, self.options, self.folder = config, options, absolute(options.output)
        data, asks = config.data, options.rejected == "misplaced"
        names = [name for name in _FIELDS if name not in ("images", "question", "rejected")]
        self.inputs = open_inputs(options.input, names, data.columns, self.folder, suffixes=("",))
        for file in self.inputs:
            if "chosen" not in file.columns:
                raise ValueError(f"{file.path} has no column chosen, which no row can do without; map it to one")
        self.root = data.image_root and str(absolute(data.image_root))
        cache = Path(data.cache).expanduser() if data.cache else default_cache()
        options_of_records = {"image_root": data.image_root, "exif": data.exif, "cache": cache / "records"}
        self.records = open_records(options.input, columns=data.columns, **options_of_records)
        self.pool = Pool([key for key, *_ in self.records.texts()])
        self.composer = Composer(options.form, options.variant == "released", data.exif)
        self.sizes = [file.rows if options.limit is None else min(file.rows, options.limit) for file in self.inputs]
        self.books, self.source = self.folder / BOOKS, find_model(config.model, config.train.seed) if asks else None
        if asks:
            self.vision, text = self.source.shape.vision, self.source.shape.text
            self.prompter = Prompter(self.source.tokenizer, data.template, self.vision.image_tokens)
            self.layer = text.layers // 2 if options.layer is None else options.layer
            if not 0 <= self.layer < text.layers:
                raise ValueError(f"layer must be from 0 to {text.layers - 1}, got {self.layer}")
            self.room = min(data.max_tokens, text.max_positions) - options.decoding.max_tokens
            if self.room < 1:
                raise ValueError(
                    f"decoding.max_tokens {options.decoding.max_tokens} leaves no room for a prompt; lower it"
                )
        self.settings = self._settings(asks)
        self.manifest = read_manifest(self.books, self.settings)
        self.pieces = RowPieces(self.books, self.sizes if asks else [], options.piece, Said)
        self.count_missing = self.pieces.count_missing
        self.written = {"rows": sum(self.sizes), "selection": repr(options.selection)}
        self.summary = self.books / "report.json"
        self.files = [self.folder / file.path.name for file in self.inputs]
        if len(self.pool) < max(options.counts):
            raise ValueError(f"there are {len(self.pool)} pictures, and {max(options.counts)} are to stand together")

    def _settings(self, asks):
        """Returns all that decides the composed rows and what is said to them, for JSON."""
        data, options = self.config.data, self.options
        own = {name: getattr(options, name) for name in ("form", "rejected", "variant", "seed", "longest_chosen")}
        own |= {"pictures": list(options.counts), "records": self.records.fingerprint, "exif": data.exif}
        if asks:
            own |= {"model": str(self.source), "source": self.source.fingerprint, "dtype": self.config.model.dtype}
            own |= {"tokenizer": self.prompter.fingerprint, "image_rule": data.image_rule, "layer": self.layer}
            own |= {"max_tokens": data.max_tokens, "decoding": dataclasses.asdict(options.decoding)}
            own |= {"piece": options.piece, "limit": options.limit}
        inputs = {file.path.name: file.bytes for file in self.inputs}
        return own | {"columns": data.columns, "image_root": self.root, "inputs": inputs}

    def plan(self):
        """Yields what a person wants to read before it starts."""
        options = self.options
        yield f"model    {self.source or 'none: the rows keep what they reject'}"
        yield f"form     {options.form} of {', '.join(map(str, options.counts))} pictures out of {len(self.pool)}"
        yield f"rows     {sum(self.sizes)} in {len(self.inputs)} file(s); {self.count_missing()} to go"

    def draw(self, record):
        """Returns what is drawn for a record."""
        return self.pool.draw(record.key, self.options.counts, self.options.seed)

    def compose(self, record, drawn):
        """Returns the `Composed` of a record."""
        others = [self.records.image(number) for number in drawn.others]
        return self.composer.compose(record.image, others, record.question, drawn)

    def fault_of(self, record) -> str | None:
        """Returns why a row is not composed, None if it is."""
        if isinstance(record, str):
            return record
        chosen = record.answers.get("chosen", "")
        if not chosen.strip():
            return "no_chosen"
        return "chosen_too_long" if len(chosen) > self.options.longest_chosen else None

    def _ask(self, _, record, values) -> Asked | Said:
        """Returns what is asked about a row, or why nothing is; called on threads."""
        del values
        fault = self.fault_of(record)
        if fault is None:
            drawn = self.draw(record)
            composed = self.compose(record, drawn)
            try:
                asked = self.composer.ask(composed, drawn, self.prompter, self.vision, self.config.data.image_rule)
            except PromptError as error:
                fault = error.reason
            else:
                if len(asked.ids) <= self.room:
                    return asked
                fault = "prefix_too_long"
        return Said(None, False, None, None, fault)

    def build(self, console, check):
        """Asks about the rows that lack it."""
        options, model, mesh = self.options, self.config.model, make_mesh(self.config.mesh)
        speaker = load_speaker(self.source, mesh, dtype=model.dtype, attention=model.attention)
        if not self.manifest:
            write_manifest(self.books, self.settings | {"weights": speaker.digest})
        self.room = min(self.room, self._longest_prompt())
        answerer = Answerer(
            speaker, options.decoding, room=self.room, layer=self.layer, slots=options.slots, batch=options.batch
        )
        self.pieces.fill(self.inputs, self.config.data, self._ask, answerer, console, check)

    def _longest_prompt(self):
        """Returns how many tokens the longest prompt has that there is room for, or a few more."""
        counts, form, labelled = self.options.counts, self.options.form, self.composer.labelled
        images = counts if form == "sequence" else (1,)
        count = lambda texts: [
            len(ids) for ids in self.prompter.prefixes(texts, slots=0) if not isinstance(ids, PromptError)
        ]
        # What is said before any question, whatever is drawn: its marks are left out, for it is counted alone.
        names = [
            name_picture(form, number, place, "", labelled=labelled, wording=wording).replace(IMAGE, "")
            for number in counts
            for place in range(number)
            for wording in range(len(INSET_WORDS) if form == "inset" else 1)
        ]
        longest, (empty,), before = 1, count([""]), max(count(names))
        fits = self.room - min(images) * self.vision.image_tokens
        for file in self.inputs:
            questions = [question.replace(IMAGE, "") for question in read_questions(file) if question is not None]
            longest = max([longest, *(length for length in count(questions) if length <= fits)])
        return before - empty + longest + max(images) * self.vision.image_tokens + _SLACK

    def finish(self) -> dict:
        """Writes the files; returns the counts."""
        counts, shares = collections.Counter(), collections.defaultdict(list)
        options, asks = self.options, self.source is not None
        for number, (file, size) in enumerate(zip(self.inputs, self.sizes, strict=True)):
            said = self.pieces.read(number) if asks else {}
            root = image_root_of(file, self.root)

            def made(row, values, said=said, root=root):
                record = check_row(values, root, self.config.data.exif)
                fault = self.fault_of(record)
                drawn = self.draw(record) if fault is None else None
                if drawn and asks:
                    fault = why_not(said[row], record.answers["chosen"], options.form, drawn.count, options.selection)
                    if said[row].fault is None:
                        shares[drawn.count].append(said[row].on_target)
                counts[fault or "composed"] += 1
                if fault is not None:
                    return None
                composed = self.compose(record, drawn)
                return {
                    "images": [{"bytes": image, "path": None} for image in composed.images],
                    "question": composed.question,
                    "rejected": said[row].text if asks else record.answers.get("rejected"),
                    "composed": {"form": options.form, "pictures": drawn.count, "place": drawn.place + 1},
                    "on_target": said[row].on_target if asks else None,
                }

            replaced = {file.columns.get(name) for name in ("image", "question", "rejected")}
            fields = [pa.field(name, kind) for name, kind in _FIELDS.items()]
            write_output(file, self.folder, size, fields, made, without=replaced | {"image", *_FIELDS})
        summary = {"rows": sum(self.sizes), "form": options.form, "counts": dict(counts.most_common())}
        quantiles = lambda values: [round(float(np.quantile(values, q)), 4) for q in (0.05, 0.5, 0.95)]
        summary["on_target"] = {str(count): quantiles(shares[count]) for count in sorted(shares)}
        return summary

    def says(self, counts):
        """Yields what there is to say of the rows."""
        yield ", ".join(f"{what} {count}" for what, count in counts["counts"].items())
        most = max(self.options.counts) if self.options.form == "sequence" else 1
        yield f"wrote {self.folder}; train with --data.pictures {most}"


def build(config: Config, options: Options, console=None):
    """Composes the rows, or goes on with it; returns the counts."""
    return run_job(Job, config, options, console)


def main(argv=None):
    """Runs the command."""
    run_command(build, *parse(Options, argv, description=__doc__))


if __name__ == "__main__":
    exit_with_one_line(main)
