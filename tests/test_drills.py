"""Four real processes train together, and everything happens to them. docs/reliability.md has a row for each drill.

One run is harmed again and again, each drill going on from what the one before has left; at the end it must have come
to the same bits as a run that nothing has touched.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from drills import BALLAST, BEHIND, Nursery, flags

from napo_jax.checkpoint import Checkpoints

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
STEPS, EVERY, BATCH = 8, 2, 4
RATES = ("seconds_per_step", "examples_per_second", "tokens_per_second")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drills")


@pytest.fixture(scope="module")
def nursery(folder):
    with Nursery(folder) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def disk(folder):
    """A small disk of its own, where this user may have one; None elsewhere, where drills limit files instead."""
    place = folder / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], capture_output=True, check=False
    )
    yield place if mounted.returncode == 0 else None
    if mounted.returncode == 0:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture(scope="module")
def workdir(folder, disk):
    """Of the run that is harmed."""
    return folder / "disk" / "run"


def command(folder, workdir, **options):
    """Returns the words of the training command."""
    options = {"data.made-up": 24, "data.batch-size": BATCH, "data.buckets": 1, "train.steps": STEPS} | options
    options |= {"config": "configs/debug.py", "data.cache": folder / "cache", "train.checkpoint-every": EVERY}
    return flags(**options, workdir=workdir)


@pytest.fixture(scope="module")
def straight(nursery, folder):
    """A run that nothing touches."""
    outcome = nursery.run(command(folder, folder / "straight"), harm="watch")
    assert outcome.statuses == [0, 0, 0, 0], outcome.err[0][-3000:]
    return outcome


@pytest.fixture
def drill(nursery, folder, workdir, straight):
    """Goes on with the run, under a harm; returns what became of it and the steps that are saved."""

    def go(harm=None, who=None, **options):
        outcome = nursery.run(command(folder, workdir), harm=harm, who=who, **options)
        assert not outcome.late, outcome.err
        return outcome, Checkpoints(workdir / "checkpoints").steps()

    return go


def assert_all_end_soon(outcome, who):
    """One was killed: the others end by themselves, and not as if all was done or the command was wrong."""
    assert outcome.statuses[who] == -9
    for index, status in enumerate(outcome.statuses):
        assert index == who or status not in (0, 2, 143), (index, status, outcome.err[index][-2000:])
    assert outcome.behind < BEHIND, outcome.seconds


def lines(workdir):
    """Returns {step: what was measured, without the rates}; each step stands there once."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {row.pop("step"): {key: value for key, value in row.items() if key not in RATES} for row in rows}
    assert len(found) == len(rows)
    return found


def bits(workdir):
    """Returns every leaf of the last checkpoint as bytes."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    parts = {}
    for part in ("params", "opt_state"):
        shapes = checkpoints.shapes(STEPS, part)
        like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for name, leaf in shapes.items()}
        found = checkpoints.restore(STEPS, {part: like}, partial=True)[0][part]
        parts |= {f"{part}/{name}": np.asarray(leaf).tobytes() for name, leaf in found.items()}
    assert len(parts) > 30
    return parts


def test_killed_in_the_first_compilation(drill):
    outcome, saved = drill("in_the_first_compilation", who=1)
    assert_all_end_soon(outcome, 1)
    assert saved == []


def test_killed_in_a_step(drill):
    outcome, saved = drill("in_a_step", who=2, at=5)
    assert_all_end_soon(outcome, 2)
    assert saved in ([2], [2, 4]), "the save before last is whole by now"


def test_killed_in_a_save(drill, workdir):
    """Its part is written and the save is not whole: it counts as none."""
    before = max(Checkpoints(workdir / "checkpoints").steps())
    outcome, saved = drill("in_a_save", who=3, at=2)
    assert_all_end_soon(outcome, 3)
    assert max(saved) == before + EVERY, "the first one was whole"
    assert any("tmp" in path.name for path in (workdir / "checkpoints").iterdir()), "nothing was under way"


def test_killed_in_a_restore(drill, workdir):
    before = Checkpoints(workdir / "checkpoints").steps()
    outcome, saved = drill("in_a_restore", who=1)
    assert_all_end_soon(outcome, 1)
    assert saved == before


def test_the_disk_is_full(drill, workdir, disk):
    """All end, one line says where and what to do, the checkpoint before stays, and with room the command goes on."""
    before = max(Checkpoints(workdir / "checkpoints").steps())
    outcome, saved = drill("disk_fills_up", disk=disk and str(disk))
    (workdir.parent / BALLAST).unlink(missing_ok=True)
    assert not set(outcome.statuses) & {0, 2, 143}, outcome.statuses
    assert outcome.behind < BEHIND, outcome.seconds
    said = [line for err in outcome.err for line in err.splitlines() if line.startswith("error: ")]
    assert said, outcome.err
    reason = "No space left on device" if disk else "File too large"
    assert all(line.endswith(f"{reason}; make room, and give the same command again") for line in said)
    assert all(str(workdir) in line for line in said)
    assert 1 in outcome.statuses
    assert before in saved


def test_the_disk_of_one_is_full(drill, workdir):
    """It writes behind the training, where the others wait for it: they do not wait long."""
    before = max(Checkpoints(workdir / "checkpoints").steps())
    outcome, saved = drill("disk_fills_up", who=3, disk=None)
    assert outcome.statuses[3] == 1, outcome.err[3]
    assert not set(outcome.statuses) & {0, 2, 143}, outcome.statuses
    assert outcome.behind < BEHIND, outcome.seconds
    (said,) = (line for line in outcome.err[3].splitlines() if line.startswith("error: "))
    assert said.endswith("File too large; make room, and give the same command again")
    assert max(saved) == before


def test_permission_goes_while_it_runs(drill, workdir):
    before = Checkpoints(workdir / "checkpoints").steps()
    outcome, saved = drill("permission_goes", folder=str(workdir / "checkpoints"))
    os.chmod(workdir / "checkpoints", 0o755)
    assert not set(outcome.statuses) & {0, 143}, outcome.statuses
    assert outcome.behind < BEHIND, outcome.seconds
    said = [line for err in outcome.err for line in err.splitlines() if line.startswith("error: ")]
    assert said, outcome.err
    assert all(line.endswith("Permission denied; let this user write there, or name another path") for line in said)
    assert saved == before


def test_no_permission_from_the_start(nursery, folder):
    """Nothing is loaded or compiled before that is said."""
    (folder / "closed").mkdir(mode=0o555)
    arguments = command(folder, folder / "closed" / "run")
    outcome = nursery.run(arguments, count=1, harm="obey_permissions")
    assert outcome.statuses == [2], outcome.err
    expected = f"error: {folder / 'closed'}: Permission denied; let this user write there, or name another path\n"
    assert outcome.err == [expected]
    assert "model  " not in outcome.out[0]
    assert "devices" not in outcome.out[0]


@pytest.fixture(scope="module")
def finished(nursery, folder, workdir, straight):
    """The last drill: the newest checkpoint is damaged, and one process is slow; the run comes to its end."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    newest = checkpoints.folder / str(checkpoints.latest())
    files = [file for file in Path(newest).rglob("*") if file.is_file()]
    data = bytearray((largest := max(files, key=lambda file: file.stat().st_size)).read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    outcome = nursery.run(command(folder, workdir), harm="slow", who=2, seconds=1.0)
    return int(newest.name), outcome


def test_the_newest_checkpoint_is_damaged(finished, workdir):
    """One bit is another: it is said and set aside, and the run goes on from the one before."""
    newest, outcome = finished
    assert outcome.statuses == [0, 0, 0, 0], outcome.err[0][-3000:]
    said = re.search(
        r"damaged  the checkpoint of step (\d+): (\S+) has other bytes than when it was saved", outcome.out[0]
    )
    assert int(said[1]) == newest
    assert (workdir / "checkpoints" / f"{newest}.damaged" / said[2]).is_file()
    assert f"goes on from step {newest - EVERY} of" in outcome.out[0]


def test_one_is_slow(finished):
    _, outcome = finished
    slow = re.findall(r"slow     process (\d) takes (\S+) s of each step for itself", outcome.out[0])
    assert {index for index, _ in slow} == {"2"}
    assert all(float(seconds) > 0.9 for _, seconds in slow)


def test_whatever_happened_the_bits_are_the_same(finished, straight, folder, workdir):
    assert lines(workdir) == lines(folder / "straight")
    assert list(lines(workdir)) == list(range(1, STEPS + 1))
    assert bits(workdir) == bits(folder / "straight")


def test_each_process_reads_its_rows_and_no_others(straight):
    for step in range(1, STEPS + 1):
        shares = [seen["rows"][str(step)] for seen in straight.seen]
        assert [len(share) for share in shares] == [BATCH // 4] * 4
        assert len({number for share in shares for number in share}) == BATCH


def test_the_first_process_alone_writes_what_is_written_once(straight, folder):
    # All say where they are, and Gloo how it is connected; the first one says all else.
    said = [re.sub(r"^(place    |\[Gloo\] ).*\n", "", out, flags=re.MULTILINE) for out in straight.out]
    assert [out == "" for out in said] == [False, True, True, True]
    written = [set(seen["written"]) for seen in straight.seen]
    once = {"config.json.new", "versions.json.new", "metrics.jsonl"}
    assert once <= written[0]
    for index, others in enumerate(written[1:], 1):
        own = re.compile(rf"checkpoints/.*(sums.*/{index}\.json|process_{index})$")
        assert [name for name in others if not own.search(name)] == []


def test_the_page_has_a_row_for_each_drill():
    """And for each test of several hosts; and each names a test that is there."""
    rows = re.findall(r"^\|.*`(test_\w+)`.*\|$", PAGE.read_text(), re.MULTILINE)
    texts = [(Path(__file__).parent / name).read_text() for name in ("test_drills.py", "test_hosts.py")]
    here = re.findall(r"^def (test_\w+)", "".join(texts), re.MULTILINE)
    assert sorted(set(here) - set(rows)) == ["test_the_page_has_a_row_for_each_drill"]
    defined = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    assert [name for name in rows if f"def {name}(" not in defined] == []
