"""The judge command: replies that were paid for are kept, and asked for again only where something has changed."""

import json
import os

import pytest

from napo_jax.command import exit_with_one_line
from napo_jax.evals import mmhal
from napo_jax.evals.answers import read_rows
from napo_jax.evaluate import main

COUNT = 5


@pytest.fixture
def folder(tmp_path):
    """Has a benchmark, its answers and a judge's prompt."""
    known = {"question_type": "attribute", "image_src": "a/b.png", "image_content": ["Tree"], "gt_answer": "Truth."}
    rows = [known | {"image_id": str(i), "question": f"Question {i}?"} for i in range(COUNT)]
    (tmp_path / "response_template.json").write_text(json.dumps(rows))
    write_answers(tmp_path, *(f"answer {i}" for i in range(COUNT)))
    (tmp_path / "prompt.txt").write_text("{image_content} {question} {gt_answer} {model_answer}\n")
    return tmp_path


def write_answers(folder, *texts):
    rows = [{"key": str(i), "text": text} for i, text in enumerate(texts)]
    (folder / "answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def ask(folder, judge, *more):
    """Asks a judge, a shell script that finds the prompt in $prompt and keeps a note of each."""
    script = folder / "judge.sh"
    script.write_text(f'prompt=$(cat)\necho "$prompt" >>{folder}/asked.txt\n{judge}\n')
    flags = {"benchmark": "mmhal", "data": folder, "answers": folder / "answers.jsonl", "name": "j-1"}
    flags |= {"template": folder / "prompt.txt", "judge": f"sh {script}", "replay": folder / "replies.jsonl"}
    exit_with_one_line(lambda: main(["judge", *(w for k, v in flags.items() for w in (f"--{k}", str(v))), *more]))


def asked(folder):
    """Returns which answers the judge has seen since the last look."""
    file = folder / "asked.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return [line.rpartition(". ")[2] for line in lines]


RATE_BY_NUMBER = 'echo "Rating: $(echo "$prompt" | grep -o "[0-9]$")"'
FAIL_AT_3 = f'case "$prompt" in *3) echo "no more money" >&2; exit 7;; esac; {RATE_BY_NUMBER}'


def test_all_replies_are_scored(folder, capsys):
    ask(folder, RATE_BY_NUMBER)
    assert asked(folder) == [f"answer {i}" for i in range(COUNT)]
    assert capsys.readouterr().out.splitlines()[-1].endswith("replies.jsonl: 5 replies of j-1, 0 of them from before")
    assert sorted(os.listdir(folder)) == sorted(
        ("answers.jsonl", "judge.sh", "prompt.txt", "replies.jsonl", "response_template.json")
    )
    scored = mmhal.score(folder, read_rows(folder / "answers.jsonl"), replay=folder / "replies.jsonl")
    assert (scored["score"], scored["rate"], scored["judge"]) == (2.0, 3 / 5, "j-1")


def test_it_goes_on_where_it_was(folder, capsys):
    with pytest.raises(SystemExit) as error:
        ask(folder, FAIL_AT_3)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "ended with 7 (no more money)" in line
    assert "replies.jsonl.part: give the same command again" in line
    assert not (folder / "replies.jsonl").exists()
    assert asked(folder) == [f"answer {i}" for i in range(4)]
    with (folder / "replies.jsonl.part").open("a") as file:
        file.write('{"key": "3", "text": "answ')  # written when the power failed
    ask(folder, RATE_BY_NUMBER)
    assert asked(folder) == ["answer 3", "answer 4"]
    assert "5 replies of j-1, 3 of them from before" in capsys.readouterr().out
    assert [row["reply"] for row in read_rows(folder / "replies.jsonl")] == [f"Rating: {i}" for i in range(5)]


@pytest.mark.parametrize("changed", ["answer", "template", "name"])
def test_what_has_changed_is_asked_again(folder, changed):
    with pytest.raises(SystemExit):
        ask(folder, FAIL_AT_3)
    asked(folder)
    if changed == "answer":
        write_answers(folder, "answer 0", "answer 9", *(f"answer {i}" for i in range(2, COUNT)))
    elif changed == "template":
        (folder / "prompt.txt").write_text("Rate. {image_content} {question} {gt_answer} {model_answer}\n")
    ask(folder, 'echo "Rating: 1"', *(["--name", "j-2"] if changed == "name" else []))
    again = ["answer 9"] if changed == "answer" else [f"answer {i}" for i in range(3)]
    assert asked(folder) == [*again, "answer 3", "answer 4"]
    rows = read_rows(folder / "replies.jsonl")
    assert len(rows) == COUNT
    mmhal.score(folder, read_rows(folder / "answers.jsonl"), replay=folder / "replies.jsonl")


def test_several_are_asked_at_a_time(folder):
    """Each waits for another to be asked, which never comes where one is asked at a time."""
    wait = f"for i in $(seq 100); do [ $(wc -l <{folder}/asked.txt) -ge 2 ] && break; sleep 0.05; done; "
    wait += f"[ $i -lt 100 ] || exit 1; {RATE_BY_NUMBER}"
    ask(folder, wait, "--at-once", "3")
    assert sorted(asked(folder)) == [f"answer {i}" for i in range(COUNT)]
    assert [row["reply"] for row in read_rows(folder / "replies.jsonl")] == [f"Rating: {i}" for i in range(5)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--replay", "answers.jsonl"], "answers.jsonl is there; score it, or name another file"),
        (["--template", "nothing.txt"], "nothing.txt is not there"),
        (["--at-once", "0"], "at_once must be at least 1, got 0"),
        (["--benchmark", "pope"], "chair"),
        (["--judge", "exit 3"], "ended with 3 (it said nothing)"),
    ],
)
def test_what_cannot_be_judged_is_one_line(folder, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as error:
        ask(folder, RATE_BY_NUMBER, *flags)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
