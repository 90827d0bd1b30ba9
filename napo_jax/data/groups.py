"""Records -> tokenised groups: which rows train and with which tokens, and what was left out and why.

All rows are tokenised once, before the first step, and the ids are kept in a file: so the lengths are known from which
buckets are chosen, a row that cannot be used is counted and not met in the middle of a run, and a step reads ids and
decodes pictures, nothing else.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np

from napo_jax.data.edits import edited_tokens
from napo_jax.data.order import NO_GROUP
from napo_jax.data.prompts import IMAGE, IMAGE_SLOT, PromptError
from napo_jax.data.records import DataError
from napo_jax.term import split_cell

_FORMAT = 1  # of the table's files; another number makes them anew
_ROWS_AT_ONCE = 1024
# Text that means something to a template or a tokenizer. In an answer it is read as plain text, and counted.
_SPECIAL_TEXTS = (IMAGE, "</s>", "<s>", " ASSISTANT: ")


@dataclasses.dataclass(frozen=True)
class GroupRules:
    """What a group needs, and what becomes of rows that are not quite right."""

    cells: tuple[str, ...]  # the objective's, C of them; `chosen@crop` has the answer `chosen`
    pairs: tuple[tuple[str, str], ...] = ()  # answers that are compared under one image
    prefixes: int = 1  # M, image variants
    max_tokens: int = 2048  # of the prefix, its image, and one answer together
    long_answers: Literal["cut", "drop"] = "cut"
    identical: Literal["keep", "drop"] = "keep"
    edited: tuple[tuple[str, str], ...] = ()  # answers whose edited spans are marked, each with its counterpart
    # The most pictures of a record. The tokens follow from how many each has, so that a table is not of this.
    pictures: int = dataclasses.field(default=1, repr=False)

    @classmethod
    def of(cls, objective, **options):
        """Returns the rules for an `Objective`."""
        pairs = {
            (split_cell(term.preferred)[0], split_cell(other)[0]): None
            for term in objective.terms
            for other in term.others
            if split_cell(term.preferred)[1] == split_cell(other)[1]
        }
        edited = tuple(sorted(objective.counterparts.items()))
        return cls(objective.cells, tuple(pairs), len(objective.image_variants), edited=edited, **options)

    @property
    def answers(self) -> tuple[str, ...]:
        """The names of the answers, each once."""
        return tuple(dict.fromkeys(split_cell(cell)[0] for cell in self.cells))

    @property
    def cell_answer(self) -> np.ndarray:
        """For each cell, the index of its answer."""
        return np.array([self.answers.index(split_cell(cell)[0]) for cell in self.cells])


class GroupTable:
    """The ids of all usable groups, in a file, with their lengths in memory.

    Attributes:
      records: int32[N], the record's number of each group.
      keys: list[str], its record's key.
      prefix_lengths: int32[N], all image tokens included.
      answer_lengths: int32[N, C].
      pictures: int32[N], how many each has.
      dropped: {reason: count} of records that make no group.
      notes: {what: count} of groups that are kept but worth a look.
      largest_id: the largest token id of all.
    """

    def __init__(self, folder, rules, image_tokens):
        """Opens a table that `tabulate` wrote."""
        self.folder, self.rules, self.image_tokens = Path(folder), rules, image_tokens
        with np.load(self.folder / "lengths.npz") as lengths:
            self.records, self.prefix_lengths = lengths["records"], lengths["prefix_lengths"]
            self._answer_lengths, self._starts = lengths["answer_lengths"], lengths["starts"]
            self._key_bytes = lengths["keys"]
            several = "pictures" in lengths
            self.pictures = lengths["pictures"] if several else np.ones(len(self.records), np.int32)
        report = json.loads((self.folder / "report.json").read_text())
        self.dropped, self.notes = report["dropped"], report["notes"]
        self.fingerprint, self.largest_id = report["fingerprint"], report["largest_id"]
        self._ids = None  # opened where it is used: a worker process gets the path, not the ids

    def __len__(self):
        return len(self.records)

    def __getstate__(self):
        return self.__dict__ | {"_ids": None}

    @property
    def answer_lengths(self):
        """int32[N, C]."""
        return self._answer_lengths[:, self.rules.cell_answer]

    @property
    def keys(self):
        """The record's key of each group."""
        return [key.decode() for key in self._key_bytes]

    def tokens(self, group):
        """Returns the ids of a group's prefix, int32[P], and of each of its answers, by name."""
        prefix, answers = self._stored(group)
        return prefix, {name: np.where(ids < 0, ~ids, ids) for name, ids in answers.items()}

    def edited(self, group):
        """Returns which tokens of each answer lie in edited spans, {name: bool[T]}; none of one without counterpart."""
        return {name: ids < 0 for name, ids in self._stored(group)[1].items()}

    def _stored(self, group):
        """Returns what `tokens` does, but for an edited token ~id, as it is in the file."""
        if self._ids is None:
            self._ids = np.memmap(self.folder / "ids.int32", np.int32, mode="r")
        # The file has one slot for the whole of a picture.
        words = self.prefix_lengths[group] - self.pictures[group] * (self.image_tokens - 1)
        lengths = [words, *self._answer_lengths[group]]
        ends = self._starts[group] + np.cumsum(lengths)
        prefix, *answers = (np.array(self._ids[end - length : end]) for end, length in zip(ends, lengths, strict=True))
        prefix = np.repeat(prefix, np.where(prefix == IMAGE_SLOT, self.image_tokens, 1))
        return prefix, dict(zip(self.rules.answers, answers, strict=True))

    def arrays(self, groups, bucket, seed):
        """Returns what a batch holds besides pictures.

        Args:
          groups: int[B], with NO_GROUP for rows that only fill the batch; those have one token and no answers.
          bucket: the `Bucket` to pad to.
          seed: mixed into each record's own seed.

        Returns:
          {name: array} of prefix_ids int32[B, P], prefix_lengths int32[B], answer_ids int32[B, C, T], answer_lengths
          int32[B, C], seeds uint32[B], ids int32[B], and edited bool[B, C, T] if the rules ask for it; see `Batch`.
        """
        cells = len(self.rules.cells)
        out = {
            "prefix_ids": np.zeros((len(groups), bucket.prefix), np.int32),
            "prefix_lengths": np.ones(len(groups), np.int32),
            "answer_ids": np.zeros((len(groups), cells, bucket.answer), np.int32),
            "answer_lengths": np.zeros((len(groups), cells), np.int32),
            "seeds": np.zeros(len(groups), np.uint32),
            "ids": np.full(len(groups), NO_GROUP, np.int32),
        }
        if self.rules.edited:
            out["edited"] = np.zeros((len(groups), cells, bucket.answer), bool)
        for row, group in enumerate(groups):
            if group == NO_GROUP:
                continue
            prefix, answers = self.tokens(group)
            edited = self.edited(group) if self.rules.edited else {}
            out["prefix_ids"][row, : len(prefix)] = prefix
            out["prefix_lengths"][row] = len(prefix)
            for cell, name in enumerate(self.rules.cells):
                answer, _ = split_cell(name)
                ids = answers[answer]
                out["answer_ids"][row, cell, : len(ids)] = ids
                out["answer_lengths"][row, cell] = len(ids)
                if edited:
                    out["edited"][row, cell, : len(ids)] = edited[answer]
            out["seeds"][row] = record_seed(self._key_bytes[group].decode(), seed)
            out["ids"][row] = self.records[group]
        return out


def record_seed(key, seed):
    """Returns the uint32 seed of a record: of its content and the run's seed, wherever and whenever it is met."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=4).digest()
    return np.uint32(int.from_bytes(digest, "little"))


def tabulate(records, prompter, rules, cache):
    """Tokenises all records, or opens what an earlier call with the same records and settings wrote.

    Args:
      records: `Records`; only their texts are read.
      prompter: `Prompter`.
      rules: `GroupRules`.
      cache: a folder to keep tables in.

    Returns:
      the `GroupTable`. Raises DataError if no row is usable.
    """
    settings = repr((_FORMAT, records.fingerprint, prompter.fingerprint, rules))
    fingerprint = hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()
    folder = Path(cache).expanduser() / fingerprint
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed when whole: nobody ever opens a part. Who comes second finds the work done.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{fingerprint}.") as aside:
            _write(Path(aside) / "table", records, prompter, rules, fingerprint)
            try:
                os.rename(Path(aside) / "table", folder)
            except OSError:
                if not folder.exists():
                    raise
    return GroupTable(folder, rules, prompter.image_tokens)


def _write(folder, records, prompter, rules, fingerprint):
    """Writes the files of a table."""
    folder.mkdir()
    dropped, notes = collections.Counter(), collections.Counter()
    numbers, keys, prefix_lengths, answer_lengths, pictures, largest = [], [], [], [], [], 0
    counts = iter(records.picture_counts()) if rules.pictures > 1 else itertools.repeat(1)
    with open(folder / "ids.int32", "wb") as file:
        rows = zip(itertools.count(), records.texts(), counts, strict=False)
        while some := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            for number, key, prefix, answers, count in _tokenise(some, prompter, rules, dropped, notes):
                numbers.append(number)
                keys.append(key.encode())
                pictures.append(count)
                prefix_lengths.append(_length(prefix, count, prompter))
                answer_lengths.append([len(answer) for answer in answers])
                largest = max(largest, *prefix, *itertools.chain(*answers))
                ids = np.array([*prefix, *itertools.chain(*_marked(answers, rules))], np.int32)
                file.write(ids.tobytes())
    if not numbers:
        reasons = dropped + collections.Counter(records.dropped)
        why = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        raise DataError(f"none of {records.rows} rows is usable: {why or 'there are none'}")
    prefix_lengths, answer_lengths = np.array(prefix_lengths, np.int32), np.array(answer_lengths, np.int32)
    pictures = np.array(pictures, np.int32)
    stored = prefix_lengths - pictures * (prompter.image_tokens - 1) + answer_lengths.sum(axis=1)
    np.savez(
        folder / "lengths.npz",
        records=np.array(numbers, np.int32),
        keys=np.array(keys),
        prefix_lengths=prefix_lengths,
        answer_lengths=answer_lengths,
        pictures=pictures,
        starts=np.cumsum(stored, dtype=np.int64) - stored,
    )
    report = {"fingerprint": fingerprint, "dropped": dropped, "notes": notes, "largest_id": largest}
    (folder / "report.json").write_text(json.dumps(report, indent=1))


def _tokenise(rows, prompter, rules, dropped, notes):
    """Yields (number, key, prefix ids with a slot for each picture, [answer ids], pictures) of usable rows."""
    usable = []
    for number, (key, question, answers), count in rows:
        reason = next((reason for name in rules.answers if (reason := _missing(name, answers))), None)
        if reason is None:
            usable.append((number, key, question, int(count), [answers[name] for name in rules.answers]))
        else:
            dropped[reason] += 1
    counts = [count for *_, count, _ in usable]
    prefixes = prompter.prefixes([question for _, _, question, *_ in usable], slots=1, pictures=counts)
    all_answers = iter(prompter.answers([text for *_, texts in usable for text in texts]))
    for (number, key, _, count, texts), prefix in zip(usable, prefixes, strict=True):
        answers = list(itertools.islice(all_answers, len(texts)))
        errors = [ids for ids in (prefix, *answers) if isinstance(ids, PromptError)]
        if errors:
            dropped[errors[0].reason] += 1
            continue
        room = rules.max_tokens - _length(prefix, count, prompter)
        if room < 1:
            dropped["prefix_too_long"] += 1
            continue
        too_long = sum(len(ids) > room for ids in answers)
        if too_long and rules.long_answers == "drop":
            dropped["answer_too_long"] += 1
            continue
        answers = [ids[:room] for ids in answers]
        by_name = dict(zip(rules.answers, answers, strict=True))
        same = [f"{one} = {other}" for one, other in rules.pairs if by_name[one] == by_name[other]]
        if same and rules.identical == "drop":
            dropped["identical_answers"] += 1
            continue
        notes.update(same)
        if too_long:
            notes["an answer is cut"] += 1
        if any(mark in text for mark in _SPECIAL_TEXTS for text in texts):
            notes["special text in an answer, read as text"] += 1
        yield number, key, prefix, answers, count


def _length(prefix, pictures, prompter):
    """Returns the tokens of a prefix that has one slot for each of its pictures."""
    return len(prefix) + pictures * (prompter.image_tokens - 1)


def _marked(answers, rules):
    """Returns ids with ~id for each token in an edited span."""
    by_name = dict(zip(rules.answers, map(np.array, answers), strict=True))
    marks = {one: edited_tokens(by_name[one], by_name[other])[0] for one, other in rules.edited}
    return [np.where(marks[name], ~ids, ids) if name in marks else ids for name, ids in by_name.items()]


def _missing(name, answers):
    """Returns why an answer is not there, or None."""
    if name not in answers:
        return f"no_{name}"
    return None if answers[name].strip() else f"empty_{name}"
