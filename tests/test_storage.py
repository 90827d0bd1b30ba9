"""What a disk refuses is one line with the path and what to do, and an exit status that tells room from permission."""

import errno
import importlib
import os
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from etils import epath

from napo_jax import train
from napo_jax.command import exit_with_one_line, verdict
from napo_jax.storage import Refusal, check_writable, find_refusal, naming


def refused(number, path="/data/run"):
    return OSError(number, os.strerror(number), path)


def behind(error, cause=None, context=None):
    if cause is not None:  # None would hide the context
        error.__cause__ = cause
    error.__context__ = context
    return error


TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error writing "a/0" in OCDBT database at local file "/runs/a/checkpoints/4/": Failed to write '
    "[OS error 28: ENOSPC No space left on device]"
)
CASES = {
    "full": (refused(errno.ENOSPC), Refusal(errno.ENOSPC, "/data/run"), 1),
    "quota": (refused(errno.EDQUOT), Refusal(errno.EDQUOT, "/data/run"), 1),
    "file too large": (refused(errno.EFBIG), Refusal(errno.EFBIG, "/data/run"), 1),
    "permission": (refused(errno.EACCES), Refusal(errno.EACCES, "/data/run"), 2),
    "read-only": (refused(errno.EROFS), Refusal(errno.EROFS, "/data/run"), 2),
    "in words": (ValueError(TENSORSTORE), Refusal(errno.ENOSPC, "/runs/a/checkpoints/4/"), 1),
    "behind": (behind(RuntimeError("a step"), refused(errno.EDQUOT)), Refusal(errno.EDQUOT, "/data/run"), 1),
    "while another": (
        behind(RuntimeError(), context=refused(errno.ENOSPC, None)),
        Refusal(errno.ENOSPC, None),
        1,
    ),
}


@pytest.mark.parametrize(("error", "refusal", "status"), CASES.values(), ids=CASES)
def test_what_a_disk_refuses_is_told_apart(error, refusal, status, capsys):
    assert find_refusal(error) == refusal

    def fail():
        raise error

    with pytest.raises(SystemExit) as end:
        exit_with_one_line(fail)
    assert end.value.code == status
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"error: {refusal.path}: " if refusal.path else "error: ")
    assert os.strerror(refusal.number) in said
    assert ("make room, and give the same command again" if status == 1 else "let this user write there") in said


EXAM = ("--benchmark", "world", "--data", "exam")
TOO_LONG = "/".join(["/runs", "x" * 300, *["y" * 200] * 30])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "--config", "debug", "--workdir", TOO_LONG], "File name too long; name a shorter path"),
        (["train", "--config", TOO_LONG], "File name too long; name a shorter path"),
        (["train", "--config", "debug", "--data.path", TOO_LONG, "--workdir", "WORKDIR"], "names no file"),
        (["evaluate", "score", *EXAM, "--answers", "ANSWERS", "--out", TOO_LONG], "File name too long; name a shorter"),
        (["train", "--config", "debug", "--workdir", "gs://b/run"], "pip install 'napo-jax[gcs]' for gs:// paths, or"),
        (["train", "--config", "debug", "--data.path", "gs://b/*.parquet", "--workdir", "WORKDIR"], "napo-jax[gcs]"),
        (["train", "--config", "debug", "--data.cache", "gs://b", "--workdir", "WORKDIR"], "must be a local folder"),
        (
            ["evaluate", "score", *EXAM, "--answers", "gs://b/a.jsonl"],
            "pip install 'napo-jax[gcs]' for gs:// paths, or",
        ),
    ],
)
def test_a_path_that_cannot_be_is_one_line(argv, says, tmp_path, capsys, monkeypatch):
    """Before anything is loaded. Where gcsfs is installed, it is hidden."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setattr(train, "make_mesh", None)
    (tmp_path / "a.jsonl").write_text("{}")
    places = {"WORKDIR": str(tmp_path / "run"), "ANSWERS": str(tmp_path / "a.jsonl")}
    name, *words = (places.get(word, word) for word in argv)
    with pytest.raises(SystemExit) as end:
        exit_with_one_line(lambda: importlib.import_module(f"napo_jax.{name}").main(words))
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert (said.count("\n"), said[:7]) == (1, "error: ")
    assert says in said
    assert len(said) < 400
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl"]


def test_a_collective_whose_other_end_has_gone_is_no_fault_of_the_command():
    """It comes as a ValueError, and what starts runs anew must not take it for a wrong command."""
    assert verdict(ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:1")) is None
    assert verdict(ValueError("UNKNOWN is no config"))[1] == 2


def test_other_errors_are_what_they_were():
    assert find_refusal(ValueError("permission")) is None
    loop = ValueError("a")
    loop.__context__ = RuntimeError("b")
    loop.__context__.__context__ = loop
    assert find_refusal(loop) is None
    better = behind(ValueError("name another file"), context=refused(errno.EACCES))
    better.__suppress_context__ = True
    assert find_refusal(better) is None, "who says it better has hidden what was behind"
    for error in (ZeroDivisionError("a bug"), OSError(errno.EIO, "Input/output error")):

        def fail(error=error):
            raise error

        with pytest.raises(type(error)):
            exit_with_one_line(fail)


def test_who_says_what_to_do_is_not_looked_behind(capsys):
    def fail():
        raise ValueError("name another file") from refused(errno.EACCES)

    with pytest.raises(SystemExit) as end:
        exit_with_one_line(fail)
    assert (end.value.code, capsys.readouterr().err) == (2, "error: name another file\n")


def test_arrow_says_it_too():
    """Parquet files are written by Arrow, whose errors have a number."""
    with pytest.raises(OSError, match="No space left") as error, pa.OSFile("/dev/full", "wb") as file:
        file.write(b"x" * (1 << 20))
    assert find_refusal(error.value).full


def test_a_folder_is_tried_and_nothing_stays(tmp_path, monkeypatch):
    check_writable(epath.Path(tmp_path))
    check_writable(epath.Path(tmp_path / "a" / "b"))
    check_writable(epath.Path("gs://bucket/run"))
    assert os.listdir(tmp_path) == []
    (tmp_path / "f").write_text("")
    with pytest.raises(NotADirectoryError, match=r"f/run cannot be written, for .*/f is no folder; name another path"):
        check_writable(epath.Path(tmp_path / "f" / "run"))
    for number in (errno.EROFS, errno.EACCES, errno.ENOSPC):

        def refuse(number=number, **_):
            raise refused(number, "/some/tmpfile")

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
        with pytest.raises(OSError, match=os.strerror(number)) as error:
            check_writable(epath.Path(tmp_path / "run"))
        assert (error.value.errno, error.value.filename) == (number, str(tmp_path)), "by a name that somebody knows"


def test_what_names_no_file_gets_a_name():
    """A write says what is wrong and not where."""
    full = epath.Path("/dev/full")
    with pytest.raises(OSError, match="No space left") as error, naming(full), open(full, "w") as file:
        file.write("x")
    assert find_refusal(error.value) == Refusal(errno.ENOSPC, "/dev/full")
    with pytest.raises(FileNotFoundError) as error, naming(epath.Path("/a")):
        Path("/b/c").read_text()
    assert error.value.filename == "/b/c"
