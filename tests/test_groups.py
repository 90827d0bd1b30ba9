"""Which rows become groups, with which tokens; and that everything else is counted."""

import pickle

import numpy as np
import pytest

from napo_jax.data.buckets import Bucket
from napo_jax.data.byte_tokenizer import BYTE_VOCABULARY, byte_tokenizer
from napo_jax.data.groups import GroupRules, record_seed, tabulate
from napo_jax.data.made_up import MadeUpRecords
from napo_jax.data.order import NO_GROUP
from napo_jax.data.prompts import IMAGE_SLOT, Prompter
from napo_jax.data.records import DataError
from napo_jax.losses import anchor_loss, dpo_loss
from napo_jax.methods import napo
from napo_jax.objective import Objective
from napo_jax.term import Term

IMAGE_TOKENS = 16
PROMPTER = Prompter(byte_tokenizer(), "llava_v1", IMAGE_TOKENS)
MDPO = Objective(
    (
        Term("text", dpo_loss, "chosen", "rejected"),
        Term("image", dpo_loss, "chosen", "chosen@crop"),
        Term("anchor", anchor_loss, "chosen"),
    )
)


class Rows:
    """Records made of texts alone: a list of (question, answers)."""

    def __init__(self, *rows, dropped=None):
        self._rows, self.dropped = rows, dropped or {}
        self.rows = len(rows) + sum(self.dropped.values())
        self.fingerprint = repr(rows)

    def texts(self):
        """Yields as `Records.texts` does."""
        return ((f"{i:032x}", question, answers) for i, (question, answers) in enumerate(self._rows))


def pair(chosen="Yes.", rejected="No.", question="Is it?"):
    return question, {"chosen": chosen, "rejected": rejected}


def table_of(tmp_path, *rows, objective=MDPO, prompter=PROMPTER, **rules):
    return tabulate(Rows(*rows), prompter, GroupRules.of(objective, **rules), tmp_path)


def test_tokens_are_the_prompters_with_every_image_token(tmp_path):
    """T1 and T9: all image tokens, one BOS, EOS at the end of each answer."""
    table = table_of(tmp_path, pair(), pair("A much longer one.", "B", "What <image>?"))
    for group, (question, chosen, rejected) in enumerate(
        [("Is it?", "Yes.", "No."), ("What <image>?", "A much longer one.", "B")]
    ):
        prefix, answers = table.tokens(group)
        assert prefix.tolist() == PROMPTER.prefix(question)
        assert [answers["chosen"].tolist(), answers["rejected"].tolist()] == PROMPTER.answers([chosen, rejected])
        assert (prefix == IMAGE_SLOT).sum() == IMAGE_TOKENS
        assert table.prefix_lengths[group] == len(prefix)
        assert table.answer_lengths[group].tolist() == [len(answers[name]) for name in ("chosen", "rejected", "chosen")]


def test_rows_without_what_the_objective_needs_are_dropped_and_counted(tmp_path):
    rows = [
        pair(),
        ("q", {"chosen": "a"}),
        pair(rejected=" \n"),
        pair(chosen=""),
        pair(question="<image> and <image>"),
        pair(question="x" * 600),
        pair(chosen="\udc00"),
        ("q", {"chosen": "a", "rejected": "b", "question_only": ""}),  # not needed here
    ]
    table = table_of(tmp_path, *rows, max_tokens=512)
    assert table.dropped == {
        "no_rejected": 1,
        "empty_rejected": 1,
        "empty_chosen": 1,
        "several_image_markers": 1,
        "prefix_too_long": 1,
        "invalid_unicode": 1,
    }
    assert table.records.tolist() == [0, 7]
    assert [key[-1] for key in table.keys] == ["0", "7"]


def test_a_long_answer_is_cut_or_dropped_and_the_image_never(tmp_path):
    """T1 and T2: what is too long costs the answer's end, or the row; a prefix that leaves no room, the row."""
    room = 20
    limit = len(PROMPTER.prefix("Is it?")) + room
    rows = [pair(), pair(chosen="y" * 50), pair(chosen="y" * (room - 2)), pair(chosen="y" * (room - 1))]
    cut = table_of(tmp_path, *rows, max_tokens=limit)
    assert cut.notes == {"an answer is cut": 2}
    assert cut.answer_lengths[:, 0].tolist() == [6, room, room, room]
    eos = byte_tokenizer().eos_token_id
    ends = [cut.tokens(group)[1]["chosen"][-1] == eos for group in range(4)]
    assert ends == [True, False, True, False]  # " " + 18 letters + </s> just fit
    assert all((cut.tokens(group)[0] == IMAGE_SLOT).sum() == IMAGE_TOKENS for group in range(4))
    dropped = table_of(tmp_path, *rows, max_tokens=limit, long_answers="drop")
    assert dropped.dropped == {"answer_too_long": 2}
    assert dropped.records.tolist() == [0, 2]
    none = table_of(tmp_path, pair(), pair(question="Is it a long one?" * 3), max_tokens=limit)
    assert none.dropped == {"prefix_too_long": 1}


@pytest.mark.parametrize(("room", "kept"), [(-1, 0), (0, 0), (1, 1), (2, 1)])
def test_a_prefix_needs_room_for_one_token_of_an_answer(tmp_path, room, kept):
    """T2 and T3: an answer cut to nothing would be a mean over no token. The other row is short enough for all."""
    short, long = pair("a", "b", "?"), pair(question="Is it a long one?")
    table = table_of(tmp_path, short, long, max_tokens=len(PROMPTER.prefix(long[0])) + room)
    assert len(table) == 1 + kept
    assert table.dropped == ({} if kept else {"prefix_too_long": 1})
    assert table.answer_lengths[1:].tolist() == [[room] * 3] * kept


def test_the_largest_id_is_that_of_all_rows(tmp_path):
    """It tells a tokenizer of another model; the row that holds it may be any."""
    for rows in ([pair("\x7f"), pair("!", "!", "!")], [pair("!", "!", "!"), pair("!", "\x7f", "!")]):
        table = table_of(tmp_path, *rows)
        ids = [np.concatenate([table.tokens(g)[0], *table.tokens(g)[1].values()]).max() for g in range(2)]
        assert ids[0] != ids[1]
        assert table.largest_id == max(ids)


def test_a_table_travels_without_its_ids(tmp_path):
    """A worker process opens the file itself; else every one would be sent, and hold, all ids."""
    table = table_of(tmp_path, pair("y" * 9000), max_tokens=10_000)
    want = table.tokens(0)[1]["chosen"].tolist()
    data = pickle.dumps(table)
    assert len(data) < 9000
    assert pickle.loads(data).tokens(0)[1]["chosen"].tolist() == want


def test_equal_answers_are_counted_and_dropped_if_asked(tmp_path):
    """T22. Under another image the same answer is the point, and not counted."""
    rows = [pair(), pair("Same.", "Same."), pair("z" * 99 + "1", "z" * 99 + "2")]
    limit = len(PROMPTER.prefix("Is it?")) + 30  # cut, the third pair is one answer too
    table = table_of(tmp_path, *rows, max_tokens=limit)
    assert len(table) == 3
    assert table.notes == {"chosen = rejected": 2, "an answer is cut": 1}
    table = table_of(tmp_path, *rows, max_tokens=limit, identical="drop")
    assert table.dropped == {"identical_answers": 2}
    assert table.records.tolist() == [0]


def test_special_text_in_an_answer_is_text(tmp_path):
    """T14 and B4: no row is lost, no token is special, and the rows are counted."""
    marks = ["a <image> b", "c </s> d", "e ASSISTANT: f", "g <s>"]
    table = table_of(tmp_path, *(pair(chosen=mark) for mark in marks), pair())
    assert table.notes == {"special text in an answer, read as text": 4}
    for group, mark in enumerate(marks):
        ids = table.tokens(group)[1]["chosen"]
        assert (ids[:-1] > 2).all()
        assert "".join(PROMPTER.read_answer(ids.tolist())) == f" {mark}</s>"


def test_the_rules_of_objectives():
    rules = GroupRules.of(napo())
    assert rules.answers == ("chosen", "rejected", "question_only", "image_only")
    assert rules.pairs == (("chosen", "rejected"), ("chosen", "question_only"), ("chosen", "image_only"))
    assert rules.prefixes == 1
    rules = GroupRules.of(MDPO)
    assert rules.answers == ("chosen", "rejected")
    assert rules.cell_answer.tolist() == [0, 1, 0]
    assert rules.pairs == (("chosen", "rejected"),)
    assert rules.prefixes == 2


def test_arrays_are_padded_to_the_bucket(tmp_path):
    table = table_of(tmp_path, pair(), pair("A longer one.", "B"))
    bucket = Bucket(tokens=999, prefix=300, answer=24, answers=99)
    arrays = table.arrays(np.array([1, NO_GROUP, 0]), bucket, seed=5)
    prefix, answers = table.tokens(1)
    assert arrays["prefix_ids"].shape == (3, 300)
    assert arrays["answer_ids"].shape == (3, 3, 24)
    assert arrays["prefix_ids"][0].tolist() == [*prefix, *[0] * (300 - len(prefix))]
    for cell, name in enumerate(("chosen", "rejected", "chosen")):
        assert arrays["answer_ids"][0, cell].tolist() == [*answers[name], *[0] * (24 - len(answers[name]))]
    assert arrays["answer_lengths"].tolist() == [[15, 3, 15], [0, 0, 0], [6, 5, 6]]
    assert arrays["prefix_lengths"][1] == 1
    assert not (arrays["prefix_ids"][1] == IMAGE_SLOT).any()
    assert arrays["ids"].tolist() == [1, NO_GROUP, 0]
    keys = table.keys
    assert arrays["seeds"].tolist() == [record_seed(keys[1], 5), 0, record_seed(keys[0], 5)]
    assert record_seed(keys[0], 5) != record_seed(keys[0], 6) != record_seed(keys[1], 6)


def test_a_table_is_made_once(tmp_path):
    rows, rules = Rows(pair(), pair("a", "b")), GroupRules.of(MDPO)
    first = tabulate(rows, PROMPTER, rules, tmp_path)
    rows.texts = None  # whoever reads again fails
    again = tabulate(rows, PROMPTER, rules, tmp_path)
    assert first.fingerprint == again.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == [first.fingerprint]


def test_another_setting_makes_another_table(tmp_path):
    tables = [
        table_of(tmp_path, pair()),
        table_of(tmp_path, pair(), max_tokens=1000),
        table_of(tmp_path, pair(), long_answers="drop"),
        table_of(tmp_path, pair(), identical="drop"),
        table_of(tmp_path, pair(), pair()),
        table_of(tmp_path, pair(), prompter=Prompter(byte_tokenizer(), "vicuna_v1", IMAGE_TOKENS)),
        table_of(tmp_path, pair(), prompter=Prompter(byte_tokenizer(), "llava_v1", 4)),
    ]
    assert len({table.fingerprint for table in tables}) == 7


def test_a_kill_leaves_no_table_to_believe_in(tmp_path):
    def interrupted():
        yield from Rows(pair()).texts()
        raise KeyboardInterrupt

    rows = Rows(pair(), pair("a", "b"))
    rows.texts = interrupted
    with pytest.raises(KeyboardInterrupt):
        tabulate(rows, PROMPTER, GroupRules.of(MDPO), tmp_path)
    del rows.texts
    assert len(tabulate(rows, PROMPTER, GroupRules.of(MDPO), tmp_path)) == 2


def test_no_usable_row_is_one_line(tmp_path):
    rows = Rows(pair(chosen=""), ("q", {}), dropped={"no_image": 3})
    with pytest.raises(DataError, match="none of 5 rows is usable: no_image 3, empty_chosen 1, no_chosen 1"):
        tabulate(rows, PROMPTER, GroupRules.of(MDPO), tmp_path)


def test_made_up_records_are_usable_and_repeat(tmp_path):
    records = MadeUpRecords(20, seed=1)
    table = tabulate(records, PROMPTER, GroupRules.of(napo()), tmp_path)
    assert len(table) == 20
    assert table.dropped == {}
    assert table.largest_id < BYTE_VOCABULARY
    assert records[3] == MadeUpRecords(20, seed=1)[3] != MadeUpRecords(20, seed=2)[3]
    assert len({records[i].image for i in range(20)}) == 20
    with pytest.raises(IndexError):
        records[20]
