"""The judge command: replies that were paid for are kept, and asked for again only where something has changed."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from napo_jax.command import exit_with_one_line
from napo_jax.evals import mmhal
from napo_jax.evals.answers import read_rows
from napo_jax.evaluate import main
from napo_jax.world.exams import write_chair

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


def words(folder):
    """Returns the flags of all that is asked; the judge is a script in the folder."""
    flags = {"benchmark": "mmhal", "data": folder, "answers": folder / "answers.jsonl", "name": "j-1"}
    flags |= {"template": folder / "prompt.txt", "judge": f"sh {folder}/judge.sh", "replay": folder / "replies.jsonl"}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def ask(folder, judge, *more):
    """Asks a judge, a shell script that finds the prompt in $prompt and keeps a note of each."""
    (folder / "judge.sh").write_text(f'prompt=$(cat)\necho "$prompt" >>{folder}/asked.txt\n{judge}\n')
    exit_with_one_line(lambda: main(["judge", *words(folder), *more]))


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
    assert line.startswith("error: ")
    assert not (folder / "replies.jsonl").exists()
    assert asked(folder) == [f"answer {i}" for i in range(4)]
    with (folder / "replies.jsonl.part").open("a") as file:
        file.write('{"asked": "3", "reply": "Rat')  # written when the power failed
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


def test_one_that_fails_costs_no_reply_beside_it(folder):
    """The first fails when two others have been answered."""
    fail = (
        f'case "$prompt" in *0) for i in $(seq 100); do [ -s {folder}/done.txt ] && exit 7; sleep 0.05; done;; esac; '
    )
    with pytest.raises(SystemExit):
        ask(folder, f'{fail}{RATE_BY_NUMBER}; echo "$prompt" >>{folder}/done.txt', "--at-once", "3")
    seen = set(asked(folder))
    assert len(seen) >= 3
    ask(folder, RATE_BY_NUMBER)
    assert set(asked(folder)) == {f"answer {i}" for i in range(COUNT)} - seen | {"answer 0"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_asked_to_stop_keeps_what_is_under_way(folder, number):
    """The signal goes to the whole group, as Ctrl-C does, and comes while three are asked."""
    (folder / "judge.sh").write_text(f'prompt=$(cat)\necho "$prompt" >>{folder}/asked.txt; sleep 1; {RATE_BY_NUMBER}\n')
    code = f"import sys; sys.argv[1:] = {['judge', *words(folder), '--at-once', '3']}\n"
    code += "from napo_jax import command, evaluate; command.exit_with_one_line(evaluate.main)"
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", code], **how)
    while not (folder / "asked.txt").exists() or len((folder / "asked.txt").read_text().splitlines()) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = err.splitlines()
    assert line.startswith("asked to stop; the replies so far are in ")
    assert sorted(asked(folder)) == ["answer 0", "answer 1", "answer 2"]
    ask(folder, RATE_BY_NUMBER)
    assert asked(folder) == ["answer 3", "answer 4"]


def test_a_file_of_replies_may_lie_beside_the_command(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    ask(folder, RATE_BY_NUMBER, "--replay", "rep.jsonl")
    assert capsys.readouterr().out.splitlines()[-1].startswith("wrote rep.jsonl: 5 replies")
    assert {file.name for file in folder.glob("rep*")} == {"rep.jsonl"}


@pytest.mark.parametrize("text", ['{"asked": 5}', "xx", "[]", '{"asked": "a", "judge": "j", "reply": null}', "\xff"])
def test_a_damaged_reply_of_before_is_named(folder, capsys, text):
    file = folder / "replies.jsonl.part"
    file.write_text(f'{{"asked": "a", "judge": "j", "reply": "r"}}\n{text}\n', encoding="latin-1")
    before = file.read_bytes()
    with pytest.raises(SystemExit) as error:
        ask(folder, RATE_BY_NUMBER)
    assert error.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "replies.jsonl.part, line 2, " in said
    assert said.endswith("; take the line out, and its answer is judged again")
    assert file.read_bytes() == before
    assert asked(folder) == []


def test_two_commands_do_not_pay_for_the_same(folder, capsys):
    with (folder / "replies.jsonl.part").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            ask(folder, RATE_BY_NUMBER)
    assert "another command is at work on" in capsys.readouterr().err
    assert asked(folder) == []


def test_a_reply_that_cannot_be_read_is_asked_for_again(folder, capsys):
    write_chair(folder / "chair", 2)
    rows = [{"key": str(i), "text": f"There is one star here {i}."} for i in range(2)]
    (folder / "answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "prompt.txt").write_text("{question} {answer}\n")
    more = ["--benchmark", "chair", "--data", str(folder / "chair")]
    with pytest.raises(SystemExit):
        ask(folder, 'echo "I see a star"', *more, "--tries", "2")
    assert "the reply about '0' cannot be read after 2 tries" in capsys.readouterr().err
    assert len(asked(folder)) == 2
    ask(folder, "echo '[\"star\"]'", *more)  # the last one of before is tried once more, and asked for anew
    assert len(asked(folder)) == 2
    assert [row["reply"] for row in read_rows(folder / "replies.jsonl")] == ['["star"]'] * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--replay", "answers.jsonl"], "answers.jsonl is there; score it, or name another file"),
        (["--template", "nothing.txt"], "nothing.txt is not there"),
        (["--at-once", "0"], "at_once must be at least 1, got 0"),
        (["--benchmark", "pope"], "chair"),
        (["--judge", "exit 3"], "ended with 3 (it said nothing)"),
        (["--judge", "true"], "printed no reply (it said nothing)"),
        (["--tries", "3"], "mmhal has no tries: leave it out"),
        (["--replay", "gs://a/b"], "replay must be a file of this machine"),
        (["--template", "latin.txt"], "latin.txt is not UTF-8"),
    ],
)
def test_what_cannot_be_judged_is_one_line(folder, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(folder)
    (folder / "latin.txt").write_bytes("é {question}".encode("latin-1"))
    with pytest.raises(SystemExit) as error:
        ask(folder, RATE_BY_NUMBER, *flags)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(folder.glob("*.part"))
