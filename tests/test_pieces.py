"""What was said is on disk in whole pieces, and a folder is of one build."""

import json
import os

import pytest
from etils import epath

from napo_jax import pieces
from napo_jax.pieces import Line, Pieces, make_room, read_manifest, write_durably, write_manifest


def line(row, name="a", file=0):
    return Line(file, row, name, f'said "{row}"\n\u2028 熊', 3, True, -1.25, None)


def test_lines_come_back_as_they_were(tmp_path):
    folder, lines = epath.Path(tmp_path / "out"), [line(row) for row in range(7)]
    mine = Pieces(folder, size=3)
    assert list(mine.new()) == []
    for each in lines:
        mine.add(each)
    other = Pieces(folder)
    read = list(other.new())
    assert sorted(read) == lines[:6], "the seventh waits for its piece"
    mine.flush()
    mine.flush()  # nothing more to write
    assert list(other.new()) == lines[6:], "and what was read is not read again"
    assert len(list((folder / "pieces").iterdir())) == 3
    assert lines[0].key == (0, 0, "a")


def test_a_line_does_not_wait_for_ever(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pieces.time, "monotonic", lambda: now[0])
    mine = Pieces(epath.Path(tmp_path), size=100, seconds=60)
    mine.add(line(0))
    now[0] = 61.0
    mine.add(line(1))
    assert len(list(Pieces(epath.Path(tmp_path)).new())) == 2


def test_a_process_that_dies_while_it_writes_leaves_no_piece(tmp_path, monkeypatch):
    folder = epath.Path(tmp_path)
    mine = Pieces(folder, size=1)
    mine.add(line(0))
    monkeypatch.setattr(pieces.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        mine.add(line(1))
    assert list(Pieces(folder).new()) == [line(0)]


def test_a_damaged_piece_is_named(tmp_path):
    (tmp_path / "pieces").mkdir()
    whole = json.dumps(line(0)._asdict())
    for text in (
        '{"file": 0, "ro',
        '{"file": 0}',
        "[1]",
        "\xff",
        whole.replace('"row": 0', '"row": "a"'),
        "[" * 100_000,
    ):
        (tmp_path / "pieces" / "x.jsonl").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"x.jsonl, line 1, is damaged; delete the file"):
            list(Pieces(epath.Path(tmp_path)).new())


def test_a_folder_is_of_one_build(tmp_path):
    folder = epath.Path(tmp_path / "out")
    settings = {"model": "a folder", "decoding": {"beams": 3, "debias": {"labels": ((1,), (2,))}}, "exif": False}
    assert read_manifest(folder, settings) == {}
    write_manifest(folder, settings | {"weights": "ab"}, {"rows": 3})
    manifest = read_manifest(folder, settings | {"model": "the same folder elsewhere"})
    assert manifest["written"] == {"rows": 3}
    assert manifest["settings"]["weights"] == "ab"
    with pytest.raises(ValueError, match=r"begun with decoding.beams 3, and not 1: go on with the same, or name anoth"):
        read_manifest(folder, settings | {"decoding": {"beams": 1, "debias": {"labels": ((1,), (2,))}}})
    with pytest.raises(ValueError, match=r'begun with weights "ab", and not "cd"'):
        read_manifest(folder, settings | {"weights": "cd"})
    with pytest.raises(ValueError, match="begun with new null, and not 1"):
        read_manifest(folder, settings | {"new": 1})
    with pytest.raises(ValueError, match=r'begun with pictures null, and not \{"0": "abc", .* \.\.\.: go on') as error:
        read_manifest(folder, settings | {"pictures": {str(i): "abc" for i in range(10_000)}})
    assert len(str(error.value)) < 1000
    for text in ('{"settings": {', "[]", "{}", '{"settings": []}', '{"settings": null}', "[" * 100_000):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest.json is damaged"):
            read_manifest(folder, settings)


def test_pieces_of_nobody_knows_what_are_refused(tmp_path):
    folder = epath.Path(tmp_path / "out")
    mine = Pieces(folder, size=1)
    mine.add(line(0))
    with pytest.raises(ValueError, match=r"out has pieces, and no manifest.json that says of what"):
        read_manifest(folder, {})


def test_a_file_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    file = epath.Path(tmp_path / "f.json")
    write_durably(file, "one")
    synced = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(pieces.os, "fsync", lambda handle: (synced.append("sync"), sync(handle)))
    monkeypatch.setattr(pieces.os, "replace", lambda *names: (synced.append("name"), replace(*names)))
    write_durably(file, json.dumps("two"))
    assert synced == ["sync", "name", "sync"], "a name that outlives its content"
    assert file.read_text() == '"two"'
    assert os.listdir(tmp_path) == ["f.json"]


def test_a_file_beside_the_command_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_room(epath.Path("f.json"))
    write_durably(epath.Path("f.json"), "one")
    assert os.listdir() == ["f.json"]


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_durably(epath.Path(tmp_path / "folder"), "one")
    os.rmdir(tmp_path / "folder")
    with pytest.raises(ValueError, match="is a folder; name a file to write"):
        make_room(epath.Path(tmp_path))
    (tmp_path / "f").write_text("")
    with pytest.raises(ValueError, match=r"f/a/b.json cannot be written, for .*/f is no folder"):
        make_room(epath.Path(tmp_path / "f" / "a" / "b.json"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="is read-only; name another file"):
        make_room(epath.Path(tmp_path / "g" / "b.json"))
    assert os.listdir(tmp_path) == ["f"]
