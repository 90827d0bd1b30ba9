"""A save that the disk has damaged is told by its sums, set aside, and the one before is used."""

import itertools
import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from napo_jax import checksums
from napo_jax.checkpoint import Checkpoints
from napo_jax.checksums import FOLDER, read_sums, sum_file
from napo_jax.damage import find_damage, saves_set_aside

STEPS = (2, 4, 6)


def state(step):
    return {"weights": jnp.full((64, 8), step, jnp.float32), "step": jnp.int32(step)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with three saves."""
    with Checkpoints(tmp_path_factory.mktemp("saved"), best_metric="loss") as checkpoints:
        for step in STEPS:
            checkpoints.save(step, state(step), {"step": step}, {"loss": 0.5})
    return checkpoints.folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return epath.Path(tmp_path / "checkpoints")


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


HARMS = {
    "is gone": lambda file: file.unlink(),
    "another size": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "other bytes": flip,
}


def test_every_file_of_a_save_is_summed_and_every_harm_is_found(folder):
    save = folder / "6"
    assert find_damage(save) is None
    files = [file for file in Path(save).rglob("*") if file.is_file() and file.parent != Path(save)]
    kinds = {str(file.relative_to(save)).split("/")[0] for file in files}
    assert kinds == {"state", "extra", "metrics", FOLDER}
    assert len(files) > 6
    for file, (harm, do) in itertools.product(files, HARMS.items()):
        before = file.read_bytes()
        if not before:
            continue
        do(file)
        found = find_damage(save)
        assert found, f"{file}: {harm}"
        if FOLDER not in file.parts:
            assert found == f"{file.relative_to(save)} {found[len(str(file.relative_to(save))) + 1 :]}"
            assert harm in found
        file.write_bytes(before)
    assert find_damage(save) is None


@pytest.mark.parametrize("text", ["", "[1]", '{"state/a": 3}', '{"state/a": [1, 2, 3]}', '{"sums/0.json": [1, 2]}'])
def test_sums_that_are_no_sums_are_damage(folder, text):
    (folder / "6" / FOLDER / "rest.json").write_text(text)
    assert find_damage(folder / "6") == "the sums of its files cannot be read"


def test_a_large_file_is_never_in_memory_whole(tmp_path):
    file = epath.Path(tmp_path / "large")
    file.write_bytes(np.random.default_rng(0).bytes(32 << 20))
    tracemalloc.start()
    assert sum_file(file).size == 32 << 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_the_damaged_are_set_aside_one_after_the_other(folder):
    """And never deleted; the run that goes on from the one before saves the same steps again."""
    flip(max(Path(folder / "6").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0))
    (folder / "4" / "state" / "manifest.ocdbt").unlink()
    said = []
    checkpoints = Checkpoints(folder, keep_last=3)
    assert checkpoints.recover(said.append) == 2
    assert [line.split(":")[0] for line in said] == [f"damaged  the checkpoint of step {step}" for step in (6, 4)]
    assert said[1].endswith(f"state/manifest.ocdbt is gone; set aside as {folder / '4.damaged'}")
    assert checkpoints.recover(said.append) == 2
    assert len(said) == 2, "what is set aside is not told again"
    restored, extra = checkpoints.restore(2, state(0))
    assert (int(restored["step"]), extra) == (2, {"step": 2})
    with checkpoints:
        for step in (4, 6, 8):
            checkpoints.save(step, state(step), {"step": step}, {"loss": 0.5})
    assert checkpoints.steps() == [4, 6, 8], "old saves are removed, and what was set aside is none"
    assert [path.name for path in saves_set_aside(folder)] == ["4.damaged", "6.damaged"]
    (folder / "8" / "state" / "manifest.ocdbt").unlink()
    (folder / "6" / "state" / "manifest.ocdbt").unlink()
    assert checkpoints.recover(said.append) == 4
    assert [path.name for path in saves_set_aside(folder)] == ["4.damaged", "6.damaged", "6.damaged2", "8.damaged"]


def test_a_run_that_has_lost_all_does_not_begin_anew(folder):
    for step in STEPS:
        flip(folder / str(step) / "state" / "manifest.ocdbt")
    for _ in range(2):  # as often as it is started
        with pytest.raises(
            ValueError, match=r"no checkpoint left to go on from, and 3 damaged ones, such as 6.damaged"
        ):
            Checkpoints(folder).recover(lambda line: None)
    shutil.copytree(folder / "4.damaged", folder / "4")
    flip(folder / "4" / "state" / "manifest.ocdbt")  # as if from a copy elsewhere
    assert Checkpoints(folder).recover(lambda line: None) == 4


def test_where_nothing_was_saved_there_is_nothing_to_recover(tmp_path):
    assert Checkpoints(tmp_path / "none").recover(pytest.fail) is None
    assert not (tmp_path / "none").exists()


def test_a_save_without_sums_is_used_and_said_to_be(folder):
    """As runs of before had them."""
    shutil.rmtree(folder / "6" / FOLDER)
    assert read_sums(folder / "6") == {}
    said = []
    assert Checkpoints(folder).recover(said.append) == 6
    assert said == ["unknown  step 6 was saved without sums of its files: used as it is"]


def test_who_reads_the_saves_of_others_is_refused_and_changes_nothing(folder):
    Checkpoints(folder).check(6)
    flip(folder / "6" / "state" / "manifest.ocdbt")
    with pytest.raises(ValueError, match=r"step 6 in .* is damaged, state/manifest.ocdbt has other .*there: \[2, 4\]"):
        Checkpoints(folder).check(6)
    assert Checkpoints(folder).steps() == [2, 4, 6]


def test_a_save_that_cannot_be_summed_is_none(tmp_path, monkeypatch):
    """A file that is not what was written when it is read back fails the save, and not a restore weeks later."""

    def fail(*_):
        raise OSError(5, "Input/output error")

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), {})
        checkpoints.wait()
        monkeypatch.setattr(checksums, "sum_file", fail)
        checkpoints.save(2, state(2), {})
        with pytest.raises(OSError, match="Input/output error"):
            checkpoints.wait()
    assert Checkpoints(tmp_path).steps() == [1]


def test_sums_are_of_what_was_written(folder):
    """Held against another sum: that of zlib over the whole file, read at once."""
    import zlib

    sums = json.loads((folder / "6" / FOLDER / "0.json").read_text())
    assert any(name.startswith("state/ocdbt.process_0/d/") for name in sums)
    for name, (size, crc) in sums.items():
        data = (folder / "6" / name).read_bytes()
        assert (size, crc) == (len(data), zlib.crc32(data)), name
    assert jax.process_count() == 1


def test_what_orbax_notes_of_a_save_is_not_needed(folder):
    """Its file beside the items is the only one without a sum."""
    note = folder / "6" / "_CHECKPOINT_METADATA"
    note.write_text(note.read_text()[:-5])
    assert Checkpoints(folder).restore(6, state(0))[1] == {"step": 6}
    note.unlink()
    assert Checkpoints(folder).recover(pytest.fail) == 6
    assert Checkpoints(folder).restore(6, state(0))[1] == {"step": 6}
