"""Builders that are stopped: killed at any moment, asked to end, or one of two."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import Forked
from speaking_model import write_speaking_model
from test_build_bias import row

ROWS, KILLS = 60, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stops")
    write_speaking_model(folder / "model")
    (folder / "in").mkdir()
    rows = [row(i) for i in range(ROWS)]
    rows[5]["image"] = rows[5]["image"][:-40]
    for name, some in (("a", rows[:35]), ("b", rows[35:])):
        pq.write_table(pa.Table.from_pylist(some), folder / "in" / f"{name}.parquet", row_group_size=8)
    return folder


def start(folder, name, processes=1, devices=1, **options):
    """Starts a build, of so many devices where it is one process."""
    options = {"input": folder / "in", "output": folder / name, "model.path": folder / "model", "piece": 2} | options
    options |= {"decoding.beams": 3, "decoding.max-tokens": 24, "slots": 4}
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    words = ["--config", "configs/debug.py", *flags]
    if processes == 1:
        return [Forked("build_bias", words, folder, devices=devices)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, "-m", "napo_jax.build_bias", *words, "--distributed"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(i)}, **pipes) for i in range(processes)]


def finish(processes):
    """Waits; returns what the first one printed."""
    results = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), results[0][1][-3000:]
    return results[0][0]


def built(folder, name):
    """Returns the rows of both files; how they were made too."""
    return [pq.read_table(folder / name / f"{file}.parquet").to_pylist() for file in "ab"]


def pieces(folder, name):
    """Returns how many pieces there are."""
    return len(list((folder / name / "build" / "pieces").glob("*.jsonl")))


@pytest.fixture(scope="module")
def whole(folder):
    """What a build writes that nothing stops."""
    finish(start(folder, "whole"))
    rows = built(folder, "whole")
    assert [len(some) for some in rows] == [35, 25]
    assert rows[0][5]["question_only_fault"] == rows[0][5]["image_only_fault"] == "image_truncated"
    assert sum(each["image_only"] is not None for some in rows for each in some) > ROWS // 2
    return rows


def test_ten_kills_at_random_moments_change_no_row(folder, whole):
    """Each time it goes on, on one, two or eight devices."""
    chance, kills, seen = random.Random(0), 0, []
    while kills < KILLS:
        before = pieces(folder, "killed")
        (process,) = start(folder, "killed", devices=(1, 2, 8)[kills % 3])
        if chance.random() < 0.3:  # while it starts, or soon after
            time.sleep(chance.random() * 4)
        else:  # while it speaks and writes
            wanted, until = before + chance.randrange(1, 4), time.monotonic() + 120
            while pieces(folder, "killed") < wanted and process.poll() is None:
                assert time.monotonic() < until, "no piece in two minutes"
                time.sleep(0.001)
            time.sleep(chance.random() * 0.05)
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
        seen.append(pieces(folder, "killed"))
    assert kills == KILLS, f"it was done after {kills} kills: {seen}"
    assert seen == sorted(seen), "a piece was lost"
    assert seen[-1] > seen[0], "no build came further than the one before"
    said = finish(start(folder, "killed", devices=2))
    left = int(said.partition(" answers to go")[0].rpartition(" ")[2])
    assert 0 < left < 2 * ROWS, "the last one began anew"
    assert built(folder, "killed") == whole


def test_who_is_asked_to_end_keeps_all_that_was_said(folder, whole):
    (process,) = start(folder, "asked", piece=1000)
    while "image_only: prompts" not in process.said():  # all of question_only is said
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    assert pieces(folder, "asked") == 0
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "asked to stop: what is done is kept, and the same command goes on from there" in error
    assert pieces(folder, "asked") == 1
    said = finish(start(folder, "asked", piece=1000))
    assert int(said.partition(" answers to go")[0].rpartition(" ")[2]) <= ROWS
    assert built(folder, "asked") == whole


def test_two_processes_share_the_rows(folder, whole):
    """And go on together from where both were killed."""
    processes = start(folder, "two", 2)
    until = time.monotonic() + 120
    while pieces(folder, "two") < 3:
        assert time.monotonic() < until, "no piece in two minutes"
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.communicate()
    finish(start(folder, "two", 2))
    assert built(folder, "two") == whole
