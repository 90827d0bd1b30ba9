"""Input files: rows by number, and the same file again with columns beside what it had."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from test_records import png

from napo_jax.bias.inputs import open_inputs, read_questions, read_rows, write_output
from napo_jax.data.sources import DataError

NAMES = ("question_only", "image_only")
LOOK = {"image_root": None, "exif": False, "threads": 3}


def rows(count, **change):
    return [
        {"image": {"bytes": png(i), "path": f"{i}.png"}, "question": f"What is {i}?", "chosen": "A", "rejected": "B"}
        | {"idx": i, "origin_split": '{"model": "x"}'}
        | change
        for i in range(count)
    ]


FIELDS = [
    pa.field("image_only", pa.string()),
    pa.field("image_only_made_by", pa.dictionary(pa.int32(), pa.string())),
    pa.field("keywords", pa.list_(pa.string())),
    pa.field("region", pa.struct({"side": pa.int64(), "bits": pa.binary()})),
]


def write(folder, count, name="a.parquet", metadata=None, **options):
    folder.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(rows(count))
    options = {"row_group_size": 4} | options
    pq.write_table(table.replace_schema_metadata(metadata), folder / name, **options)
    return folder / name


def opened(path, names=NAMES, columns=None, output="/elsewhere"):
    return open_inputs([path], names, columns or {}, epath.Path(output))


def again(file, folder, count, answers=None):
    """Writes the file with answers that name their rows, and with columns of other types."""
    folder.mkdir(exist_ok=True)
    say = lambda row, values: {
        "image_only": f"image_only {row} {values['question']}",
        "image_only_made_by": "{}",
        "keywords": ["cat", str(row)] if row else None,
        "region": {"side": row, "bits": bytes([row])} if row else None,
    }
    write_output(file, epath.Path(folder), count, FIELDS, answers or say)
    return pq.ParquetFile(folder / file.path.name)


def test_rows_by_number_in_order_whatever_the_threads(tmp_path):
    (file,) = opened(write(tmp_path / "in", 11))
    assert (file.rows, file.groups) == (11, (4, 4, 3))
    got = list(read_rows(file, {9, 0, 4, 3}, lambda number, record, _: (number, record.question, record.image), **LOOK))
    assert got == [(i, (i, f"What is {i}?", png(i))) for i in (0, 3, 4, 9)]
    assert list(read_rows(file, set(), lambda *_: 1 / 0, **LOOK)) == []
    assert list(read_questions(file)) == [f"What is {i}?" for i in range(11)]


def test_what_goes_wrong_with_a_row_is_said_in_its_place(tmp_path):
    table = rows(4)
    table[1]["image"]["bytes"] = png(1)[:-40]
    table[2]["question"] = " "
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "in" / "a.parquet")
    (file,) = opened(tmp_path / "in")
    got = dict(
        read_rows(file, set(range(4)), lambda _, record, values: record if isinstance(record, str) else "", **LOOK)
    )
    assert got == {0: "", 1: "image_truncated", 2: "no_question", 3: ""}
    assert list(read_questions(file)) == ["What is 0?", "What is 1?", None, "What is 3?"]


def test_an_error_on_a_thread_arrives(tmp_path):
    (file,) = opened(write(tmp_path / "in", 9))
    with pytest.raises(ZeroDivisionError):
        list(read_rows(file, set(range(9)), lambda *_: 1 / 0, **LOOK))


@pytest.mark.parametrize("codec", ["snappy", "zstd", "none"])
def test_the_file_again_with_its_row_groups_and_all_it_had(tmp_path, codec):
    source = write(tmp_path / "in", 11, compression=codec)
    (file,) = opened(source)
    out = again(file, tmp_path / "out", 11)
    before, after = pq.read_table(source), out.read()
    assert after.select(before.column_names).equals(before)
    assert [out.metadata.row_group(i).num_rows for i in range(3)] == [4, 4, 3]
    assert out.metadata.row_group(0).column(0).compression.lower() == codec.replace("none", "uncompressed")
    assert after["image_only"].to_pylist() == [f"image_only {i} What is {i}?" for i in range(11)]
    assert set(after["image_only_made_by"].to_pylist()) == {"{}"}
    assert after["keywords"].to_pylist() == [None, *(["cat", str(i)] for i in range(1, 11))]
    assert after["region"].to_pylist() == [None, *({"side": i, "bits": bytes([i])} for i in range(1, 11))]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.parquet"]


def test_the_first_rows_alone(tmp_path):
    (file,) = opened(write(tmp_path / "in", 11))
    out = again(file, tmp_path / "out", 6)
    assert [out.metadata.row_group(i).num_rows for i in range(out.metadata.num_row_groups)] == [4, 2]
    assert out.read()["idx"].to_pylist() == list(range(6))


def test_none_is_null(tmp_path):
    (file,) = opened(write(tmp_path / "in", 2))
    nothing = {field.name: None for field in FIELDS} | {"image_only": ""}
    table = again(file, tmp_path / "out", 2, lambda row, _: nothing).read()
    assert table["image_only"].to_pylist() == ["", ""]
    assert all(table[field.name].null_count == 2 for field in FIELDS if field.name != "image_only")


def test_what_the_datasets_library_keeps_of_its_columns_knows_the_new_ones(tmp_path):
    features = {"idx": {"dtype": "int64", "_type": "Value"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode(), b"other": b"stays"}
    (file,) = opened(write(tmp_path / "in", 3, metadata=metadata))
    got = again(file, tmp_path / "out", 3).schema_arrow.metadata
    known = json.loads(got[b"huggingface"])["info"]["features"]
    text = {"dtype": "string", "_type": "Value"}
    region = {"side": {"dtype": "int64", "_type": "Value"}, "bits": {"dtype": "binary", "_type": "Value"}}
    words = {"keywords": {"feature": text, "_type": "Sequence"}, "region": region}
    assert known == features | {"image_only": text, "image_only_made_by": text} | words
    assert got[b"other"] == b"stays"


def test_a_writing_that_fails_leaves_the_file_that_was_there(tmp_path):
    (file,) = opened(write(tmp_path / "in", 11))
    again(file, tmp_path / "out", 11)
    before = (tmp_path / "out" / "a.parquet").read_bytes()

    def fail(row, values):
        if row == 5:
            raise KeyboardInterrupt
        return {field.name: None for field in FIELDS}

    with pytest.raises(KeyboardInterrupt):
        again(file, tmp_path / "out", 11, fail)
    assert (tmp_path / "out" / "a.parquet").read_bytes() == before


def test_row_groups_and_files_without_rows(tmp_path):
    (tmp_path / "in").mkdir()
    some = pa.Table.from_pylist(rows(3))
    with pq.ParquetWriter(tmp_path / "in" / "a.parquet", some.schema) as writer:
        for size in (3, 0, 3):
            writer.write_table(some.slice(0, size))
    (file,) = opened(tmp_path / "in")
    assert file.groups == (3, 0, 3)
    out = again(file, tmp_path / "out", 6)
    assert out.read()["idx"].to_pylist() == [0, 1, 2, 0, 1, 2]
    assert [out.metadata.row_group(i).num_rows for i in range(out.metadata.num_row_groups)] == [3, 0, 3]


@pytest.mark.parametrize("kept", [b"not json", b"[]", b'{"info": null}', b'{"info": {"features": []}}', b"{}"])
def test_what_is_kept_of_columns_may_be_of_any_kind(tmp_path, kept):
    (file,) = opened(write(tmp_path / "in", 2, metadata={b"huggingface": kept}))
    assert again(file, tmp_path / "out", 2).schema_arrow.metadata[b"huggingface"] == kept


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    (file,) = opened(write(tmp_path / "in", 2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.parquet.0123abcd.tmp").write_bytes(b"half")
    again(file, tmp_path / "out", 2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.parquet"]


def test_a_column_that_is_built_need_not_be_there(tmp_path):
    source = write(tmp_path / "in", 2)
    (file,) = opened(source, columns={"question_only": "qo", "question": "question"})
    assert "question_only" not in file.columns


def test_inputs_that_cannot_be_used_are_one_line(tmp_path):
    source = write(tmp_path / "in", 3)
    with pytest.raises(DataError, match="names no file"):
        opened(tmp_path / "nothing")
    with pytest.raises(DataError, match="would be written over; name another folder for the output"):
        opened(source, output=tmp_path / "in")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(DataError, match="would be written over"):
        opened(source, output=tmp_path / "link")
    with pytest.raises(DataError, match="has a column chosen already; drop it there, or do not build it again"):
        opened(source, names=["chosen"])
    with pytest.raises(DataError, match="has no column what for 'question'"):
        opened(source, columns={"question": "what"})
    write(tmp_path / "other", 3)
    with pytest.raises(DataError, match=r"several input files are called a\.parquet"):
        open_inputs([source, tmp_path / "other"], NAMES, {}, epath.Path("/elsewhere"))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"rows.jsonl is no parquet file"):
        opened(tmp_path / "rows.jsonl")
    (tmp_path / "broken.parquet").write_bytes(source.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"broken\.parquet cannot be read"):
        opened(tmp_path / "broken.parquet")
    with pytest.raises(DataError, match="there are no rows in"):
        opened(write(tmp_path / "empty", 0))


def test_pictures_of_any_size_go_through_unread(tmp_path):
    """What no reader here would take is written again as it was."""
    table = pa.Table.from_pylist([{"image": b"\xff" * 1000, "question": "q", "more": np.arange(3).tolist()}] * 2)
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    (file,) = opened(tmp_path / "in")
    assert again(file, tmp_path / "out", 2).read().select(["image", "question", "more"]).equals(table)
