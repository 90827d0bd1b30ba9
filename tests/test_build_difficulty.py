"""How hard a row is to a model: drawn answers, grouped by what they mean, as an entropy beside the row."""

import io
import json
import math

import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from quick import quick_jit
from speaking_model import write_speaking_model
from test_build_bias import config_of, row

from napo_jax.bias import work
from napo_jax.build_difficulty import Options, build, main
from napo_jax.command import exit_with_one_line
from napo_jax.data.sources import DataError
from napo_jax.decoding import Decoding
from napo_jax.meaning import group_meanings, mean_the_same, semantic_entropy
from napo_jax.metrics import Console
from napo_jax.sharding import make_mesh

DRAWN = Decoding(temperature=1.0, max_tokens=4, seed=3)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Brown.", "It is brown."),
        ("There are two dogs.", "2 dogs are there"),
        ("The man holds a red umbrella.", "A man holds the red umbrella!"),
        ("Yes.", "yes"),
        ("", " . "),
        ("It is not false.", "It is."),
        ("cats", "cat"),
    ],
)
def test_what_means_the_same(one, other):
    assert mean_the_same(one, other)
    assert mean_the_same(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Brown.", "Black."),
        ("Two dogs.", "Three dogs."),
        ("The bear is brown.", "The bear is not brown."),
        ("Yes.", "No."),
        ("True", "False"),
        ("A man holds a red umbrella.", "A woman rides a small horse."),
        ("a dog", ""),
        ("a glass", "a gla"),
    ],
)
def test_what_does_not(one, other):
    assert not mean_the_same(one, other)
    assert not mean_the_same(other, one)


def test_how_much_words_must_be_alike_is_a_parameter():
    assert mean_the_same("red round ball", "red round cube", alike=0.5)
    assert not mean_the_same("red round ball", "red round cube", alike=0.51)


def test_the_entropy_of_meanings_by_hand():
    answers = ["Brown.", "It is brown.", "Black.", "Brown"]
    assert group_meanings(answers) == [0, 0, 1, 0]
    assert semantic_entropy(answers) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert semantic_entropy(["a dog"] * 5) == 0
    assert math.copysign(1, semantic_entropy(["a dog"])) == 1
    assert semantic_entropy(["dog", "cat", "bus"]) == pytest.approx(math.log(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("difficulty")
    write_speaking_model(folder / "model")
    (folder / "in").mkdir()
    rows = [row(number) for number in range(7)]
    rows[4]["image"] = rows[4]["image"][:-40]
    pq.write_table(pa.Table.from_pylist(rows), folder / "in" / "a.parquet", row_group_size=3)
    return folder


def run(folder, name, **options):
    said = io.StringIO()
    options = {"answers": 3, "decoding": DRAWN, "slots": 4, "piece": 4} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick_jit)
        patch.setattr(work, "make_mesh", lambda config, _: make_mesh(config, jax.devices()[:1]))
        summary = build(
            config_of(folder), Options(input=(str(folder / "in"),), output=str(folder / name), **options), Console(said)
        )
    file = folder / name / "a.parquet"
    return (pq.read_table(file).to_pylist() if file.exists() else None), summary, said.getvalue()


def test_rows_get_the_entropy_of_their_answers(folder):
    rows, summary, _ = run(folder, "all")
    assert [row["idx"] if "idx" in row else row["question"] for row in rows]
    for number, one in enumerate(rows):
        if number == 4:
            assert one["difficulty"] is one["drawn"] is None, "its picture is damaged"
            continue
        assert len(one["drawn"]) == 3
        assert one["difficulty"] == semantic_entropy(one["drawn"])
    assert len({tuple(one["drawn"]) for one in rows if one["drawn"]}) > 3, "each has its own picture and question"
    assert any(one["difficulty"] for one in rows), "answers are drawn, each anew"
    assert (summary["rows"], summary["measured"]) == (7, 6)
    again, _, said = run(folder, "all")
    assert "all of that is done" in said
    assert again == rows
    # Another idea of what is alike draws nothing again.
    looser, _, said = run(folder, "all", alike=0.01)
    assert "0 answers to go" in said
    assert [one["drawn"] for one in looser] == [one["drawn"] for one in rows]
    # The first rows alone are those rows.
    assert run(folder, "few", limit=3)[0] == rows[:3]


def test_it_goes_on_where_it_was(folder):
    rows, _, _ = run(folder, "straight")
    run(folder, "stopped", limit=2)
    pieces = sorted((folder / "stopped" / "build" / "pieces").iterdir())
    pieces[0].unlink()  # as if it had been killed before
    assert run(folder, "stopped")[0] == rows
    with pytest.raises(ValueError, match=r"was begun with decoding\.seed 3, and not 4"):
        run(folder, "stopped", decoding=Decoding(temperature=1.0, max_tokens=4, seed=4))


def test_what_is_measured_already_is_refused(folder):
    run(folder, "once")
    with pytest.raises(DataError, match="has a column difficulty already"):
        build(
            config_of(folder),
            Options(input=(str(folder / "once"),), output=str(folder / "twice")),
            Console(io.StringIO()),
        )
    assert json.loads((folder / "once" / "build" / "difficulty.json").read_text())["rows"] == 7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "say what to read and where to write"),
        (["--answers", "1"], "answers must be at least 2"),
        (["--decoding.temperature", "0"], "decoding.temperature must be above 0"),
        (["--alike", "0"], "alike must be above 0"),
        (["--slots", "0"], "slots must be at least 1"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line(lambda: main(["--config", "configs/debug.py", *argv]))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
