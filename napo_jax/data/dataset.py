"""From a config to batches: records, groups and buckets, opened together."""

import collections
import dataclasses
from pathlib import Path

import numpy as np

from napo_jax.config import DataConfig
from napo_jax.data.buckets import Bucket, choose_buckets, padding_share
from napo_jax.data.corruptions import VARIANTS
from napo_jax.data.groups import GroupRules, GroupTable, tabulate
from napo_jax.data.loader import Loader, Pictures
from napo_jax.data.made_up import MadeUpRecords
from napo_jax.data.order import NO_GROUP, Order, Stages, thirds
from napo_jax.data.prompts import Prompter
from napo_jax.data.records import default_cache, open_records
from napo_jax.data.regions import Frame
from napo_jax.data.sources import EXTRAS, DataError
from napo_jax.data.store import PICTURE_DIGITS
from napo_jax.models.clip import ClipConfig
from napo_jax.objective import Objective


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The usable groups of some records under an objective, and the buckets that they fall into."""

    config: DataConfig
    records: object
    prompter: Prompter
    table: GroupTable
    buckets: tuple[Bucket, ...]
    bucket_of: object  # int[N]
    vision: ClipConfig
    held_out: np.ndarray  # bool[N], the groups that are evaluated and never trained on
    cache: Path  # where records, groups and what is computed of them are kept
    extras: tuple[str, ...] = ()  # what of `sources.EXTRAS` is read

    @property
    def rows(self) -> int:
        """How many rows were read."""
        return self.records.rows

    @property
    def dropped(self) -> dict[str, int]:
        """How many rows were dropped, by reason, the most frequent first."""
        return dict((collections.Counter(self.records.dropped) + collections.Counter(self.table.dropped)).most_common())

    @property
    def padding(self) -> float:
        """The share of computed tokens that are padding."""
        lengths = self.table.prefix_lengths, self.table.answer_lengths
        return padding_share(self.buckets, self.bucket_of, *lengths, self.table.rules.prefixes)

    def order(self, *, held_out: bool | None = False, **options) -> Order:
        """Returns the order of batches; options are those of `Order`, in place of the config's.

        Args:
          held_out: False for the groups to train on, True for those held out, None for all.
          **options: of `Order`.
        """
        options = {"batch_size": self.config.batch_size, "seed": self.config.seed} | options
        drawn = True if held_out is None else self.held_out == held_out
        return Order(np.where(drawn, self.bucket_of, NO_GROUP), **options)

    def training_order(self, steps) -> Order | Stages:
        """Returns the order of a run of so many steps: shuffled, and from easy to hard if the config says so."""
        if self.config.curriculum == "none":
            return self.order()
        drawn = np.flatnonzero(~self.held_out & (self.bucket_of != NO_GROUP))
        third_of = np.full(len(self.table), NO_GROUP)
        third_of[drawn] = thirds(self.records.difficulties()[self.table.records[drawn]])
        options = {"batch_size": self.config.batch_size, "seed": self.config.seed}
        some = lambda third: np.where(third_of == third, self.bucket_of, NO_GROUP)
        return Stages([Order(some(third), **options) for third in range(3)], steps)

    def under(self, objective: Objective) -> "Dataset":
        """Returns the same groups under another objective of the same answers, in buckets for those held out."""
        rules = GroupRules.of(objective)
        if rules.answers != self.table.rules.answers:
            raise ValueError(f"groups hold the answers {self.table.rules.answers}, and not {rules.answers}")
        rules = dataclasses.replace(self.table.rules, cells=rules.cells, prefixes=rules.prefixes)
        table = GroupTable(self.table.folder, rules, self.table.image_tokens)
        buckets, held_out = _buckets(table, self.config, self.held_out)
        bucket_of = np.full(len(table), NO_GROUP, np.int32)
        bucket_of[self.held_out] = held_out
        return dataclasses.replace(self, table=table, buckets=buckets, bucket_of=bucket_of)

    def loader(self, order=None, **options) -> Loader:
        """Returns a loader of an order, by default the shuffled one for training; options are those of `Loader`."""
        config = self.config
        pictures = Pictures(self.vision.image_size, config.image_rule, config.exif)
        options = {"seed": config.seed, "threads": config.threads, "workers": config.workers} | options
        options = {"extras": self.extras} | options
        return Loader(self.records, self.table, self.buckets, order or self.order(), pictures, **options)


def open_dataset(config: DataConfig, objective: Objective, tokenizer, model) -> Dataset:
    """Reads, checks and tokenises all rows, or opens what an earlier run kept; raises DataError if none is usable.

    Args:
      config: where the rows are and what becomes of them.
      objective: which answers and image variants they need.
      tokenizer: the model's, a fast Hugging Face one.
      model: the model's `LlavaConfig`.
    """
    if unknown := sorted(set(objective.image_variants) - set(VARIANTS)):
        raise ValueError(f"the objective needs the image variants {unknown}; there are {', '.join(VARIANTS)}")
    # Before any file is converted, which may take an hour.
    if "swap" in objective.image_variants and config.batch_size == 1:
        raise ValueError("the objective swaps pictures within a batch, and data.batch_size is 1")
    if config.max_tokens > model.text.max_positions:
        raise ValueError(
            f"data.max_tokens is {config.max_tokens}, and the model has {model.text.max_positions} positions: lower it"
        )
    one_picture = sorted({"swap", "rejected_image", "region"} & {*objective.image_variants})
    if config.pictures > 1 and one_picture:
        raise ValueError(
            f"the objective needs the image variant {one_picture[0]}, which is of one picture, and data.pictures is "
            f"{config.pictures}: set it to 1, or use another variant"
        )
    rules = GroupRules.of(
        objective,
        max_tokens=config.max_tokens,
        long_answers=config.long_answers,
        identical=config.identical,
        pictures=config.pictures,
    )
    cache = Path(config.cache).expanduser() if config.cache else default_cache()
    needed = {*objective.image_variants, *(["difficulty"] if config.curriculum != "none" else [])}
    extras = tuple(name for name in EXTRAS if name in needed)
    if config.path is None:
        frame = Frame(config.image_rule, config.exif, model.vision.image_size // model.vision.patch_size)
        records = MadeUpRecords(config.made_up, seed=config.seed, frame=frame, pictures=config.pictures)
    else:
        records = open_records(
            config.path,
            columns=config.columns,
            answers=rules.answers,
            extras=extras,
            pictures=config.pictures,
            image_root=config.image_root,
            cache=cache / "records",
            exif=config.exif,
        )
    if "region" in objective.image_variants:
        _check_frames(records.frames, config, model.vision)
    prompter = Prompter(tokenizer, config.template, model.vision.image_tokens)
    table = tabulate(records, prompter, rules, cache / "groups")
    if table.largest_id >= model.text.vocab_size:
        raise ValueError(
            f"the tokenizer gives the id {table.largest_id}, and the model knows {model.text.vocab_size} ids: they do "
            "not belong together"
        )
    buckets, bucket_of = _buckets(table, config)
    held_out = _hold_out(table.keys, config.held_out, config.seed)
    return Dataset(config, records, prompter, table, buckets, bucket_of, model.vision, held_out, cache, extras)


def _check_frames(frames, config, vision):
    """Raises if regions were marked in other squares than the model will see."""
    fits = lambda frame: (
        (frame.rule, frame.exif) == (config.image_rule, config.exif) and not vision.image_size % frame.side
    )
    if len(frames) > 1 or not all(map(fits, frames)):
        raise DataError(
            f"the records' regions are of {'; '.join(map(str, sorted(frames)))}, and this run needs one of them, with "
            f"image_rule {config.image_rule}, exif {config.exif} and cells that tile {vision.image_size} pixels: mark "
            "them again for it, or set data.image_rule and data.exif to what they were marked with"
        )


def _buckets(table, config, some=slice(None)):
    """Chooses the buckets of some groups."""
    return choose_buckets(
        table.prefix_lengths[some],
        table.answer_lengths[some],
        table.rules.prefixes,
        pictures=table.pictures[some],
        count=config.buckets,
        attention_multiple=config.attention_multiple,
    )


def _hold_out(keys, count, seed):
    """Chooses at least `count` groups, bool[N]: whole pictures, so that none is both trained on and evaluated.

    Of groups of several pictures, all groups of the same ones in the same order; one of them alone may be on both
    sides.
    """
    _, picture_of = np.unique([key[:PICTURE_DIGITS] for key in keys], return_inverse=True)
    if not 0 <= count < len(keys):
        raise ValueError(f"data.held_out is {count}, and there are {len(keys)} groups in all: set less apart")
    groups = np.bincount(picture_of)
    turn = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(groups))
    chosen = turn[: np.searchsorted(np.cumsum(groups[turn]), count) + 1] if count else []
    held_out = np.isin(picture_of, chosen)
    if held_out.all():
        raise ValueError(f"data.held_out is {count}, and leaves none to train on, as pictures are few: set it lower")
    return held_out
