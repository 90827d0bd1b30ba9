"""From a config to batches: records, groups and buckets, opened together."""

import collections
import dataclasses
from pathlib import Path

from napo_jax.config import DataConfig
from napo_jax.data.buckets import Bucket, choose_buckets, padding_share
from napo_jax.data.corruptions import VARIANTS
from napo_jax.data.groups import GroupRules, GroupTable, tabulate
from napo_jax.data.loader import Loader, Pictures
from napo_jax.data.made_up import MadeUpRecords
from napo_jax.data.order import Order
from napo_jax.data.prompts import Prompter
from napo_jax.data.records import default_cache, open_records
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
    cache: Path  # where records, groups and what is computed of them are kept

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

    def order(self, **options) -> Order:
        """Returns the order of batches; options are those of `Order`, in place of the config's."""
        options = {"batch_size": self.config.batch_size, "seed": self.config.seed} | options
        return Order(self.bucket_of, **options)

    def loader(self, order=None, **options) -> Loader:
        """Returns a loader of an order, by default the shuffled one for training; options are those of `Loader`."""
        config = self.config
        pictures = Pictures(self.vision.image_size, config.image_rule, config.exif)
        options = {"seed": config.seed, "threads": config.threads, "workers": config.workers} | options
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
    if "region" in objective.image_variants:
        raise ValueError("the objective needs the image variant region, and records hold no masks of regions yet")
    if "swap" in objective.image_variants and config.batch_size == 1:
        raise ValueError("the objective swaps pictures within a batch, and data.batch_size is 1")
    if config.max_tokens > model.text.max_positions:
        raise ValueError(
            f"data.max_tokens is {config.max_tokens}, and the model has {model.text.max_positions} positions: lower it"
        )
    rules = GroupRules.of(
        objective, max_tokens=config.max_tokens, long_answers=config.long_answers, identical=config.identical
    )
    cache = Path(config.cache).expanduser() if config.cache else default_cache()
    if config.path is None:
        records = MadeUpRecords(config.made_up, seed=config.seed)
    else:
        records = open_records(
            config.path,
            columns=config.columns,
            answers=rules.answers,
            image_root=config.image_root,
            cache=cache / "records",
            exif=config.exif,
        )
    prompter = Prompter(tokenizer, config.template, model.vision.image_tokens)
    table = tabulate(records, prompter, rules, cache / "groups")
    if table.largest_id >= model.text.vocab_size:
        raise ValueError(
            f"the tokenizer gives the id {table.largest_id}, and the model knows {model.text.vocab_size} ids: they do "
            "not belong together"
        )
    buckets, bucket_of = choose_buckets(
        table.prefix_lengths,
        table.answer_lengths,
        rules.prefixes,
        count=config.buckets,
        attention_multiple=config.attention_multiple,
    )
    return Dataset(config, records, prompter, table, buckets, bucket_of, model.vision, cache)
