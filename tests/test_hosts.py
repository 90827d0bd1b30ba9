"""What each of several hosts holds, reads and says, and who does the work of one that dies.

Real processes, joined over localhost as hosts are, that share a folder and no more. docs/reliability.md has a row for
each of these tests.
"""

import shutil

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drills import BEHIND, Nursery, flags
from quick import quick_jit
from speaking_model import write_speaking_model
from test_build_bias import row

from napo_jax.world.exams import write_world

STATE = 8 * 2048 * 2048 * 4  # bytes, as `drills.keep_a_state` makes it
JUNK = 200_000  # bytes behind each picture, which make a file of rows a large one
ROWS = {"a": 7, "b": 5}  # of the files that biased answers are built for
QUESTIONS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def nursery(folder):
    with Nursery(folder) as nursery:
        yield nursery


def run(nursery, arguments, **how):
    """Runs processes that all come to their end; returns what became of them."""
    outcome = nursery.run(arguments, **how)
    assert set(outcome.statuses) == {0}, outcome.err
    return outcome


def test_no_host_holds_the_whole_checkpoint(nursery, folder):
    """A state of 128 MB, restored by 1, 2 and 4 processes from what one has saved.

    There the parts of an array lie together, and who wants one of them must not read all.
    """
    rises = {}
    for step, count in enumerate((1, 1, 2, 4), 1):
        if count > 1:
            shutil.copytree(folder / "one", folder / str(count))
        place = folder / ("one" if count == 1 else str(count))
        seen = run(nursery, [place, step], command="keep_a_state", count=count).seen
        rises[count] = {name: max(each["memory"][name] for each in seen) for name in ("restore", "save")}
    assert rises[1]["restore"] > STATE, "one holds it all: the measure is none"
    assert rises[2]["restore"] < 0.7 * rises[1]["restore"], rises
    assert rises[4]["restore"] < 0.45 * rises[1]["restore"], rises
    assert rises[2]["restore"] < STATE, rises
    assert rises[4]["save"] < STATE / 2, rises


def test_no_host_holds_the_whole_dataset(nursery, folder):
    """Two processes read a file of 19 MB and one of 77 MB, each its share: neither takes more memory for more rows."""
    rises = {}
    for rows in (96, 384):
        file = folder / f"{rows}.parquet"
        random = np.random.default_rng(rows)
        table = [row(i) for i in range(rows)]
        answers = {"question_only": "One.", "image_only": "Two."}
        table = [each | answers | {"image": each["image"] + random.bytes(JUNK)} for each in table]
        pq.write_table(pa.Table.from_pylist(table), file, row_group_size=8)
        outcome = run(nursery, [file, folder / "cache", rows // 3], command="read_a_share", count=2)
        shares = [{number for some in seen["rows"].values() for number in some} for seen in outcome.seen]
        assert all(len(share) > rows / 3 for share in shares), "not much was read"
        for step in outcome.seen[0]["rows"]:
            first, second = (set(seen["rows"][step]) for seen in outcome.seen)
            assert not (first & second) - {-1}, "both have read a row for the same step"
        rises[rows] = {name: max(seen["memory"][name] for seen in outcome.seen) for name in ("convert", "read")}
    more = (384 - 96) * JUNK
    for name in ("convert", "read"):
        assert rises[384][name] - rises[96][name] < more / 4, rises


@pytest.fixture(scope="module")
def model(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick_jit)
        return write_speaking_model(folder / "model")


@pytest.fixture(scope="module")
def building(folder, model):
    """The command that builds into a folder, the folder's files, and how many answers there are."""
    (folder / "in").mkdir()
    for name, rows in ROWS.items():
        pq.write_table(
            pa.Table.from_pylist([row(i + ord(name)) for i in range(rows)]), folder / "in" / f"{name}.parquet"
        )
    options = {"config": "configs/debug.py", "input": folder / "in", "model.path": model, "slots": 4}
    options |= {"decoding.beams": 1, "decoding.max-tokens": 12}
    command = lambda place: flags(**options, output=place / "out")
    return (
        "build_bias",
        command,
        lambda place: [place / "out" / f"{name}.parquet" for name in ROWS],
        2 * sum(ROWS.values()),
    )


@pytest.fixture(scope="module")
def answering(folder, model):
    """The same of the command that answers a benchmark's questions."""
    write_world(folder / "world", QUESTIONS // 2)
    options = {"benchmark": "world", "data": folder / "world", "checkpoint": model, "slots": 3}
    command = lambda place: ["answer", *flags(**options, **{"decoding.max-tokens": 12}, answers=place / "a.jsonl")]
    return "evaluate", command, lambda place: [place / "a.jsonl"], QUESTIONS


def share_and_take_over(nursery, folder, work, dies):
    """Two hosts work, and one dies; the same command ends the work to the same files, on two hosts and on one."""
    name, command, files, answers = work
    for place in ("whole", "two", "one"):
        (folder / name / place).mkdir(parents=True)
    whole = run(nursery, command(folder / name / "whole"), command=name, count=1, harm="watch_answers")
    assert len(said_by(whole.seen[0])) == answers
    expected = [file.read_bytes() for file in files(folder / name / "whole")]

    broken = folder / name / "two"
    outcome = nursery.run(command(broken), command=name, count=2, harm="between_answers", who=dies, at=1)
    assert not outcome.late, outcome.err
    assert outcome.statuses[dies] == -9
    assert outcome.statuses[1 - dies] not in (0, 2, 143), (
        "the work was not done, and nothing was wrong with the command"
    )
    assert outcome.behind < BEHIND, outcome.seconds
    assert not any(file.exists() for file in files(broken)), "a part looks like the whole"
    shutil.copytree(broken, folder / name / "one", dirs_exist_ok=True)

    left = []
    for place, count in (("two", 2), ("one", 1)):
        outcome = run(nursery, command(folder / name / place), command=name, count=count, harm="watch_answers")
        assert [file.read_bytes() for file in files(folder / name / place)] == expected, (place, outcome.out)
        said = [said_by(seen) for seen in outcome.seen]
        assert sum(map(len, said)) == len(set().union(*said)), "two have answered the same"
        left.append(set().union(*said))
    assert left[0] == left[1] < said_by(whole.seen[0]), "what was said is said again"
    assert len(left[0]) >= answers // 2 - 1, "the dead one has said one answer"


def said_by(seen) -> set:
    """Returns what a process has answered: (name of the answer, file, row)."""
    return {(name, *where) for name, some in seen["rows"].items() for where in some}


def test_hosts_that_build_share_the_rows_and_a_dead_one_is_taken_over(nursery, folder, building):
    share_and_take_over(nursery, folder, building, dies=0)


def test_hosts_that_answer_share_the_questions_and_a_dead_one_is_taken_over(nursery, folder, answering):
    share_and_take_over(nursery, folder, answering, dies=1)
