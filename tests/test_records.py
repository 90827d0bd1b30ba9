"""Rows in, records out: three layouts, any order, and a count for each row that was left out."""

import concurrent.futures
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import platform
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from PIL import Image

from napo_jax.data import store
from napo_jax.data.records import DataError, Record, open_records


def png(seed, size=(9, 6)):
    """Returns a small picture unlike that of any other seed."""
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(data, "PNG")
    return data.getvalue()


PICTURES = [png(seed) for seed in range(5)]
QUESTIONS = ["What is it?", "  Who?\n", "naïve 猫 🐈‍⬛?", "a\0b", "</s> <image> ASSISTANT: USER:"]
CHOSEN = ["A cat.", " leading\ttab ", "🐈" * 50, "NUL\0inside", "</s>"]
REJECTED = ["A dog.", "", "É is not É", " ", "word " * 6000]


def write_parquet(file, columns, **options):
    pq.write_table(pa.table(columns), file, **options)


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_rows(file, questions, **columns):
    """Writes RLAIF-V's columns, with a picture for each question."""
    columns = {"image": [png(i) for i in range(len(questions))], "question": questions, "chosen": questions} | columns
    write_parquet(file, columns)


def say(role, text, image=False):
    """Returns a conversation of one message, whose content is a list of parts."""
    parts = [{"type": "text", "text": text}]
    return [{"role": role, "content": [{"type": "image", "text": None}] * image + parts}]


def rlaif_bytes(folder, paths):
    write_parquet(
        folder / "rows.parquet",
        {"image": PICTURES, "question": QUESTIONS, "chosen": CHOSEN, "rejected": REJECTED, "idx": list(range(5))},
    )


def rlaif_struct(folder, paths):
    images = [{"bytes": data, "path": "elsewhere.png"} for data in PICTURES]
    write_parquet(
        folder / "rows.parquet", {"image": images, "question": QUESTIONS, "chosen": CHOSEN, "rejected": REJECTED}
    )


def rlaif_struct_of_paths(folder, paths):
    images = [{"bytes": None, "path": path} for path in paths]
    write_parquet(
        folder / "rows.parquet", {"image": images, "question": QUESTIONS, "chosen": CHOSEN, "rejected": REJECTED}
    )


def json_lines(folder, paths):
    names = ("image", "question", "chosen", "rejected")
    rows = zip(paths, QUESTIONS, CHOSEN, REJECTED, strict=True)
    write_lines(folder / "rows.jsonl", [dict(zip(names, row, strict=True)) for row in rows])


def trl_plain(folder, paths):
    images = [[{"bytes": data, "path": None}] for data in PICTURES]
    write_parquet(
        folder / "rows.parquet", {"images": images, "prompt": QUESTIONS, "chosen": CHOSEN, "rejected": REJECTED}
    )


def trl_conversations(folder, paths):
    write_parquet(
        folder / "rows.parquet",
        {
            "images": [[{"bytes": data, "path": None}] for data in PICTURES],
            "prompt": [say("user", text, image=True) for text in QUESTIONS],
            "chosen": [say("assistant", text) for text in CHOSEN],
            "rejected": [say("assistant", text) for text in REJECTED],
        },
    )


def trl_lines(folder, paths):
    rows = [
        {
            "images": [path],
            "prompt": [{"role": "user", "content": question}],
            "chosen": say("assistant", chosen),
            "rejected": rejected,
        }
        for path, question, chosen, rejected in zip(paths, QUESTIONS, CHOSEN, REJECTED, strict=True)
    ]
    write_lines(folder / "rows.jsonl", rows)


@pytest.fixture
def opened(tmp_path):
    """Opens files with a cache of the test's own; `lines` are those on conversions."""
    lines = []
    opener = functools.partial(open_records, cache=tmp_path / "cache", report=lines.append)
    opener.lines = lines
    return opener


LAYOUTS = [rlaif_bytes, rlaif_struct, rlaif_struct_of_paths, json_lines, trl_plain, trl_conversations, trl_lines]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_gives_the_same_records_byte_for_byte(tmp_path, opened, layout):
    paths = [f"pictures/deep/{i}.png" for i in range(5)]
    for path, data in zip(paths, PICTURES, strict=True):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    layout(tmp_path, paths)
    records = opened(tmp_path)
    assert (len(records), records.rows, records.dropped) == (5, 5, {})
    for i, record in enumerate(records):
        answers = {"chosen": CHOSEN[i], "rejected": REJECTED[i]}
        assert record == Record(reference_key(PICTURES[i], QUESTIONS[i], answers), PICTURES[i], QUESTIONS[i], answers)
        assert records.image(i) == PICTURES[i]
    assert list(records.texts()) == [(record.key, record.question, record.answers) for record in records]


def reference_key(image, question, answers):
    """Returns a record's key, written out."""
    parts = [image, question.encode()]
    for name in sorted(answers):
        parts += [name.encode(), answers[name].encode()]
    whole = hashlib.blake2b(b"".join(len(p).to_bytes(8, "little") + p for p in parts), digest_size=16)
    return hashlib.blake2b(image, digest_size=8).hexdigest() + whole.hexdigest()


def test_all_of_a_row_is_in_its_key(tmp_path, opened):
    base = {"image": PICTURES[0], "question": "ab", "chosen": "cd", "rejected": "e"}
    others = [{"image": PICTURES[1]}, {"question": "abc", "chosen": "d"}, {"chosen": "e", "rejected": "cd"}]
    others += [{"rejected": None}, {"chosen": "cd "}, {"chosen": "c", "rejected": "de"}]
    pq.write_table(pa.Table.from_pylist([base, *({**base, **other} for other in others), base]), tmp_path / "a.parquet")
    keys = [record.key for record in opened(tmp_path)]
    assert keys[0] == keys[-1]
    assert len(set(keys)) == len(keys) - 1


def test_columns_may_have_other_names(tmp_path, opened):
    columns = {"picture": PICTURES, "ask": QUESTIONS, "good": CHOSEN, "bad": REJECTED, "guess": CHOSEN}
    write_parquet(tmp_path / "a.parquet", columns)
    names = {"image": "picture", "question": "ask", "chosen": "bad", "rejected": "good", "question_only_black": "guess"}
    record = opened(tmp_path, columns=names)[0]
    assert (record.image, record.question) == (PICTURES[0], QUESTIONS[0])
    assert record.answers == {"chosen": REJECTED[0], "rejected": CHOSEN[0], "question_only_black": CHOSEN[0]}


def test_b1_both_names_of_question_only(tmp_path, opened):
    write_rows(tmp_path / "a.parquet", ["q"], question_only_None=["none"], question_only_white=["white"])
    write_rows(tmp_path / "b.parquet", ["q"], question_only_None=["none"], question_only=["plain"])
    answers = [record.answers["question_only"] for record in opened(tmp_path)]
    assert answers == ["none", "plain"]
    mapped = opened(tmp_path / "b.parquet", columns={"question_only": "question_only_None"})
    assert mapped[0].answers == {"chosen": "q", "question_only": "none"}


def test_no_bad_row_passes_or_stops_the_others(tmp_path, opened):
    whole = png(0, (40, 40))
    header = Image.new("1", (1, 1))
    thin = io.BytesIO()
    header.resize((3000, 2)).save(thin, "PNG")
    bad = {
        "no_image": [None, {"bytes": None, "path": None}, {"bytes": None, "path": ""}],
        "image_empty": [{"bytes": b"", "path": "0.png"}],
        "image_unreadable": [{"bytes": b"not an image", "path": None}, {"bytes": None, "path": "a.parquet"}],
        "image_truncated": [{"bytes": whole[: len(whole) // 2], "path": None}],
        "image_too_thin": [{"bytes": thin.getvalue(), "path": None}],
        "image_missing": [{"bytes": None, "path": "nowhere.png"}],
    }
    good = {"bytes": whole, "path": None}
    images = [image for images in bad.values() for image in (*images, good)]
    questions = ["q"] * len(images) + [None, "", " \n", "fine"]
    images += [good] * 4
    write_parquet(tmp_path / "a.parquet", {"image": images, "question": questions, "chosen": questions})
    records = opened(tmp_path)
    assert records.dropped == {reason: len(rows) for reason, rows in bad.items()} | {"no_question": 3}
    assert len(records) == len(bad) + 1
    assert records.rows == len(images) == len(records) + sum(records.dropped.values())
    assert {record.image for record in records} == {whole}
    assert opened.lines[0].startswith(f"{tmp_path / 'a.parquet'}: {len(images)} rows, 7 kept, image_empty 1,")


def test_answers_that_are_no_text_are_absent_and_blank_ones_stay(tmp_path, opened):
    bad_utf8 = pa.array([b"ok", b"\xff\xfe", b"", None]).view(pa.string())
    write_rows(tmp_path / "a.parquet", list("abcd"), chosen=[1, 2, 3, 4], rejected=bad_utf8)
    assert [record.answers for record in opened(tmp_path)] == [{"rejected": "ok"}, {}, {"rejected": ""}, {}]
    write_rows(tmp_path / "b.parquet", bad_utf8)
    assert opened(tmp_path / "b.parquet").dropped == {"no_question": 3}
    write_rows(tmp_path / "c.parquet", list("ab"), question=[1, 2])
    with pytest.raises(DataError, match=r"none of 2 rows in .*c.parquet makes a record: no_question 2"):
        opened(tmp_path / "c.parquet")


def test_conversations_that_fit_no_record(tmp_path, opened):
    (tmp_path / "0.png").write_bytes(PICTURES[0])
    user, agent = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    text = {"type": "text", "text": "t"}
    whole = {"images": ["0.png"], "prompt": [user], "chosen": [agent], "rejected": "r"}
    bad = {
        "several_images": [
            {"images": ["0.png", "0.png"]},
            {"prompt": [{"role": "user", "content": [{"type": "image"}, text, {"type": "image"}]}]},
        ],
        "no_image": [{"images": []}, {"images": None}, {"images": [{"bytes": "iVBORw0K", "path": "0.png"}]}],
        "several_messages": [{"prompt": [user, agent, user]}, {"prompt": [{"role": "system", "content": "s"}, user]}],
        "no_question": [
            {"prompt": []},
            {"prompt": [agent]},
            {"prompt": ["q"]},
            {"prompt": [{"role": "user", "content": [text, {"type": "video", "text": "v"}]}]},
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            {"prompt": "half of a pair: \ud83d"},
        ],
    }
    odd = {"prompt": [{"role": "user", "content": [text, {"type": "image"}, text]}], "rejected": [agent, agent]}
    rows = [whole | change for changes in (*bad.values(), [odd, {"chosen": [user]}]) for change in changes]
    write_lines(tmp_path / "a.jsonl", rows)
    records = opened(tmp_path)
    assert records.dropped == {reason: len(changes) for reason, changes in bad.items()}
    assert [(record.question, record.answers) for record in records] == [
        ("tt", {"chosen": "a"}),
        ("q", {"rejected": "r"}),
    ]


def test_no_path_leaves_the_image_root(tmp_path, opened):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for file in (tmp_path / "secret.png", root / "ok.png", root / "sub" / "ok.png"):
        file.write_bytes(PICTURES[0])
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "in.png").symlink_to(root / "sub" / "ok.png")
    (tmp_path / "root2").symlink_to(root)
    inside = ["ok.png", "sub/ok.png", "./sub/../ok.png", "in.png"]
    outside = ["../secret.png", "sub/../../secret.png", str(root / "ok.png"), "out.png", "up/secret.png", ".."]
    outside += ["gs://bucket/ok.png", "../root2/ok.png"]
    missing = ["nowhere.png", "sub", "ok.png/x", "a\0b", "x" * 300, "\ud83d.png"]
    rows = [{"image": path, "question": "q"} for path in inside + outside + missing]
    write_lines(tmp_path / "a.jsonl", rows)
    for name in ("root", "root2"):
        records = opened(tmp_path / "a.jsonl", image_root=tmp_path / name)
        assert records.dropped == {"image_outside_root": len(outside), "image_missing": len(missing)}
        assert len(records) == len(inside)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.parquet", b"", {}, "a.parquet cannot be read"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", {}, "no whole parquet file; fetch it again"),
        ("a.parquet", {"image": [b""], "chosen": ["a"]}, {}, "no column question or prompt .*: image, chosen$"),
        ("a.parquet", {"question": ["a"]}, {}, "no column image or images for 'image'"),
        (
            "a.parquet",
            {"image": [b""], "question": ["a"]},
            {"columns": {"chosen": "best"}},
            "no column best for 'chosen'",
        ),
        (
            "a.parquet",
            {"image": [b""], "question": ["a"]},
            {"answers": ["rejected"]},
            "no column rejected for 'rejected'",
        ),
        (
            "a.parquet",
            {"image": pa.array([], pa.binary()), "question": pa.array([], pa.string())},
            {},
            "none of 0 rows",
        ),
        ("a.jsonl", b"", {}, "none of 0 rows in .*a.jsonl makes a record: there are none"),
        ("a.jsonl", b'{"image": "a"}\n\n{"image": \n', {}, "a.jsonl, line 3, is not JSON"),
        ("a.jsonl", b'{"image": "a", "question": "\xff"}\n', {}, "a.jsonl, line 1, is not JSON"),
        ("a.jsonl", b"[" * 100_000, {}, "a.jsonl, line 1, is not JSON"),
        ("a.jsonl", b'[{"image": "a"}]', {}, "line 1, is a JSON list; one object a line"),
        ("a.jsonl", b'{"image": "a"}', {}, "no column question or prompt"),
        ("a.jsonl", b'{"image": "a", "question": "q"}', {}, "makes a record: image_missing 1"),
        ("a.txt", b"", {}, "names no file"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(tmp_path, opened, name, content, options, message):
    folder = tmp_path / "data"
    folder.mkdir()
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        write_parquet(folder / name, content)
    with pytest.raises(DataError, match=message) as error:
        opened(folder, **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_errors_on_paths(tmp_path, opened):
    for path in ("nothing.parquet", "no*thing", "**/nothing"):
        with pytest.raises(DataError, match="names no file"):
            opened(tmp_path / path)
    write_rows(tmp_path / "a.parquet", ["q"])
    (tmp_path / "taken").touch()
    with pytest.raises(DataError, match="cache of records cannot be made"):
        open_records(tmp_path / "a.parquet", cache=tmp_path / "taken")


def test_a_parquet_file_damaged_at_its_rows_leaves_no_store(tmp_path, opened):
    file = tmp_path / "a.parquet"
    write_rows(file, [f"question {i}" for i in range(400)])
    data = bytearray(file.read_bytes())
    data[len(data) // 8 : len(data) // 4] = b"\xff" * (len(data) // 4 - len(data) // 8)
    file.write_bytes(data)
    with pytest.raises(DataError, match="cannot be read"):
        opened(file)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_all_columns_are_checked_before_the_first_file_is_converted(tmp_path, opened):
    write_rows(tmp_path / "a.parquet", ["q"])
    write_parquet(tmp_path / "b.parquet", {"image": [b""]})
    with pytest.raises(DataError, match=r"b.parquet has no column question"):
        opened(tmp_path)
    assert opened.lines == []


def test_files_come_in_the_order_of_their_names(tmp_path, opened):
    for name in ("c", "a", "b[1]"):
        write_rows(tmp_path / f"{name}.parquet", [name])
    (tmp_path / ".hidden.parquet").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"")
    questions = lambda paths: [question for _, question, _ in opened(paths).texts()]
    assert questions(tmp_path) == ["a", "b[1]", "c"]
    assert questions(str(tmp_path / "*.parquet")) == ["a", "b[1]", "c"]
    assert questions(str(tmp_path / "**" / "[ac].parquet")) == ["a", "c"]
    assert questions([tmp_path / "c.parquet", str(tmp_path / "a*"), tmp_path / "c.parquet"]) == ["a", "c"]
    assert questions(tmp_path / "b[1].parquet") == ["b[1]"]


def test_paths_relative_to_the_folder_and_to_home(tmp_path, opened, monkeypatch):
    write_rows(tmp_path / "a.parquet", ["q"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("a.parquet", "./*.parquet", "~/a.parquet", tmp_path / "a.parquet"):
        assert len(opened(path)) == 1
    assert len(opened.lines) == 1


def test_a_bucket(tmp_path, opened):
    bucket = tmp_path / "bucket"
    (bucket / "images").mkdir(parents=True)
    write_rows(bucket / "a.parquet", ["in parquet"])
    (bucket / "images" / "0.png").write_bytes(PICTURES[0])
    paths = ["images/0.png", "../0.png", "gs://bucket/a.png", "images/1.png"]
    write_lines(bucket / "b.jsonl", [{"image": path, "question": "in lines"} for path in paths])
    local = lambda path: os.fspath(path).replace("gs://bucket", str(bucket))
    redirect = lambda original, path, *args, **kwargs: original(local(path), *args, **kwargs)
    names = ("open", "exists", "isdir", "listdir", "stat")
    there = lambda original, path: [f"gs://bucket/{Path(file).name}" for file in original(local(path))]
    with epath.testing.mock_epath(**dict.fromkeys(names, redirect), glob=there):
        for path in ("gs://bucket", "gs://bucket/*.*"):
            records = opened(path)
            assert [question for _, question, _ in records.texts()] == ["in parquet", "in lines"]
            assert records[1].image == PICTURES[0]
            assert records.dropped == {"image_missing": 1, "image_outside_root": 2}
        with pytest.raises(DataError, match="works on local folders alone"):
            opened("gs://bucket/**/a.parquet")
    assert len(opened.lines) == 2


def test_a_bucket_without_what_reads_buckets_is_one_line(opened):
    def absent(*_):
        raise ImportError("Please install gcsfs")

    with epath.testing.mock_epath(isdir=absent), pytest.raises(DataError, match=r"gs://bucket.*napo-jax\[gcs\]"):
        opened("gs://bucket/a.parquet")


def test_any_order_as_of_a_list(tmp_path, opened):
    for name, start, stop in (("a", 0, 3), ("b", 3, 3), ("c", 3, 8)):
        questions = pa.array([f"q{i}" for i in range(start, stop)], pa.string())
        images = pa.array([png(i) for i in range(start, stop)], pa.binary())
        write_parquet(tmp_path / f"{name}.parquet", {"image": images, "question": questions})
    records = opened(tmp_path)
    for i in (7, 0, 3, 2, np.int32(5), -1, -8):
        assert (records[i].question, records.image(i)) == (f"q{i % 8}", png(i % 8))
    for i in (8, -9):
        with pytest.raises(IndexError):
            records[i]


def test_the_fingerprint_is_of_the_records_and_their_order(tmp_path, opened):
    texts = ["a", "b", "c"]
    write_rows(tmp_path / "all.parquet", texts)
    write_rows(tmp_path / "turned.parquet", texts[::-1], image=[png(i) for i in (2, 1, 0)])
    write_rows(tmp_path / "other.parquet", texts, rejected=["x", "x", "x"])
    (tmp_path / "parts").mkdir()
    write_rows(tmp_path / "parts" / "0.parquet", texts[:1])
    write_rows(tmp_path / "parts" / "1.parquet", texts[1:], image=[png(1), png(2)])
    print_of = lambda name: opened(tmp_path / name).fingerprint
    assert print_of("all.parquet") == print_of("parts")
    assert len({print_of(name) for name in ("all.parquet", "turned.parquet", "other.parquet")}) == 3


def test_a_second_open_converts_nothing(tmp_path, opened, monkeypatch):
    write_rows(tmp_path / "a.parquet", ["q"])
    first = opened(tmp_path)
    monkeypatch.setattr(store, "decode", None)
    second = opened(tmp_path)
    assert len(opened.lines) == 1
    assert (second[0], second.fingerprint, second.rows) == (first[0], first.fingerprint, first.rows)


def test_what_a_conversion_depends_on_makes_another(tmp_path, opened):
    file = tmp_path / "a.parquet"
    write_rows(file, ["old"], other=["other"])
    opened(file)
    size, changed = file.stat().st_size, file.stat().st_mtime_ns
    write_rows(file, ["new"], other=["other"])
    os.utime(file, ns=(changed + 1, changed + 1))
    assert file.stat().st_size == size  # so that time alone tells, within the same second
    assert opened(file)[0].question == "new"
    opened(file, columns={"chosen": "other"})
    opened(file, image_root=tmp_path.parent)
    opened(file, exif=True)
    file.rename(tmp_path / "b.parquet")
    opened(tmp_path / "b.parquet")
    assert len(opened.lines) == 6
    opened(tmp_path / "b.parquet")
    assert len(opened.lines) == 6


def test_exif_is_handed_to_the_check(tmp_path, opened, monkeypatch):
    write_rows(tmp_path / "a.parquet", ["q"])
    asked, decode = [], store.decode
    monkeypatch.setattr(store, "decode", lambda data, *, exif: asked.append(exif) or decode(data, exif=exif))
    opened(tmp_path)
    opened(tmp_path, exif=True)
    assert asked == [False, True]


# A process that says when it has checked 50 rows, and then checks no more.
STUCK = """
import sys, threading, time
from napo_jax.data import records, store
seen, decode = [], store.decode
def stop(data, exif):
    seen.append(data)
    if len(seen) == 50:
        print("busy", flush=True)
        time.sleep(60)
    return decode(data, exif=exif)
store.decode = stop
records.open_records(sys.argv[1], cache=sys.argv[2], workers=1)
"""


def test_a_conversion_that_is_killed_leaves_nothing_to_believe(tmp_path, opened):
    file, cache = tmp_path / "a.parquet", tmp_path / "cache"
    write_rows(file, [f"question {i}" for i in range(100)])
    with subprocess.Popen([sys.executable, "-c", STUCK, file, cache], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "busy\n"
        process.send_signal(signal.SIGKILL)
    (aside,) = cache.glob("*.tmp")
    assert {path.name for path in aside.iterdir()} >= {"records", "texts.parquet"}
    records = opened(file)
    assert [record.question for record in records] == [f"question {i}" for i in range(100)]
    assert not list(cache.glob("*.tmp"))


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, opened, monkeypatch):
    write_rows(tmp_path / "a.parquet", ["q"] * 100)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_text_batch", lambda texts: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opened(tmp_path)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert len(opened(tmp_path)) == 100


def test_hosts_that_share_a_folder_without_locks(tmp_path, opened, monkeypatch):
    write_rows(tmp_path / "a.parquet", ["a", "b"])
    write = store._write
    monkeypatch.setattr(store, "_lock", lambda file: contextlib.nullcontext())

    def slow(*args):
        monkeypatch.setattr(store, "_write", write)
        monkeypatch.setattr(platform, "node", lambda: "another")
        assert len(opened(tmp_path)) == 2  # begins later and ends earlier
        return write(*args)

    monkeypatch.setattr(store, "_write", slow)
    assert [record.question for record in opened(tmp_path)] == ["a", "b"]
    assert len(opened.lines) == 2
    assert not list((tmp_path / "cache").glob("*.tmp"))


@pytest.fixture(scope="module")
def processes():
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        yield pool


def convert_slowly(folder, number):
    """Opens a folder together with the other process; returns the lines on conversions."""
    decode, lines = store.decode, []
    store.decode = lambda data, exif: time.sleep(0.002) or decode(data, exif=exif)
    (folder / f"here{number}").touch()
    while not (folder / "here0").exists() or not (folder / "here1").exists():
        time.sleep(0.001)
    records = open_records(folder, cache=folder / "cache", workers=1, report=lines.append)
    return lines, [record.question for record in records]


def test_two_processes_at_once_convert_each_file_once(tmp_path, processes):
    questions = [[f"{name} {i}" for i in range(100)] for name in "ab"]
    for name, texts in zip("ab", questions, strict=True):
        write_rows(tmp_path / f"{name}.parquet", texts)
    results = processes.starmap(convert_slowly, [(tmp_path, 0), (tmp_path, 1)], chunksize=1)
    assert sorted(line.partition(": ")[0] for lines, _ in results for line in lines) == [
        str(tmp_path / "a.parquet"),
        str(tmp_path / "b.parquet"),
    ]
    assert all(texts == questions[0] + questions[1] for _, texts in results)


def read_shuffled(records, seed):
    """Returns whether every record has its own number's picture and question."""
    order = random.Random(seed).sample(range(len(records)), len(records))
    return all(records[i].question == f"{i}" and records.image(i) == png(i) for i in order)


def test_eight_threads_and_spawned_processes_read_the_same(tmp_path, opened, processes):
    for part in range(4):
        numbers = range(50 * part, 50 * (part + 1))
        write_rows(tmp_path / f"{part}.parquet", list(map(str, numbers)), image=list(map(png, numbers)))
    records = opened(tmp_path)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # on files that none has opened yet
        assert all(pool.map(functools.partial(read_shuffled, records), range(8)))
    assert len(pickle.dumps(records)) < 2000  # and no file, though all are open
    assert processes.starmap(read_shuffled, [(records, 0), (records, 1)], chunksize=1) == [True, True]
    assert not read_shuffled(opened(tmp_path / "3.parquet"), 0)


# Prints how far a conversion raises the memory of a process that did one before; the naive one reads whole row groups.
MEMORY = """
import json, pathlib, re, sys
from napo_jax.data import records, sources
small, large, how = sys.argv[1:]
if how == "naive":
    sources._BUFFER = 0
convert = lambda file: records.open_records(file, cache=large + how, report=lambda line: None)
convert(small)
memory = lambda field: int(re.search(field + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
before = memory("VmRSS")
opened = convert(large)
sum(len(opened.image(i)) for i in range(len(opened)))
print(json.dumps([len(opened), memory("VmHWM") - before]))
"""


def test_a_conversion_holds_a_few_rows_at_a_time(tmp_path):
    small, file = tmp_path / "small.parquet", tmp_path / "large.parquet"
    write_rows(small, ["q"])
    images = pa.array([png(seed, (200, 200)) for seed in range(10)] * 140)
    columns = {"image": images, "question": pa.array(["q"] * len(images))}
    write_parquet(file, columns, row_group_size=len(images), use_dictionary=False, write_batch_size=8)
    rise = {}
    for how in ("streamed", "naive"):
        command = [sys.executable, "-c", MEMORY, small, file, how]
        records, rise[how] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        assert records == len(images)
    assert file.stat().st_size > 160e6
    assert rise["streamed"] < file.stat().st_size / 2
    assert rise["naive"] > file.stat().st_size
