"""Answer files: every row that is there, exactly one for each question, and a line on all else."""

import json

import pytest

from napo_jax.evals.answers import (
    Question,
    choose,
    fingerprint,
    join,
    misfit,
    read_object,
    read_rows,
    row_files,
    write_row,
)

QUESTIONS = [
    Question(key, f"What is {key}?", None, {"prompt": f"What is {key}?", "id": i}) for i, key in enumerate("abc")
]
ROWS = [write_row(question, f"It is {question.key}.") for question in QUESTIONS]
SAID = {"a": "It is a.", "b": "It is b.", "c": "It is c."}


def write(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_what_is_written_is_joined_whatever_the_order(tmp_path):
    rows = read_rows(write(tmp_path / "answers.jsonl", *ROWS[::-1]))
    assert rows == ROWS[::-1]
    assert rows[0] == {"prompt": "What is c?", "id": 2, "key": "c", "text": "It is c."}
    assert list(join(QUESTIONS, rows).items()) == list(SAID.items())


def test_a_file_is_an_array_or_lines_whatever_its_name(tmp_path):
    (tmp_path / "array.jsonl").write_text("\ufeff\n " + json.dumps(ROWS, indent=1))
    (tmp_path / "lines.json").write_bytes(b"\r\n\r\n".join(json.dumps(row).encode() for row in ROWS))
    assert read_rows(tmp_path / "array.jsonl") == read_rows(tmp_path / "lines.json") == ROWS
    text = [{"text": "one\u2028line\x85"}]
    (tmp_path / "ends.jsonl").write_text(json.dumps(text[0], ensure_ascii=False), encoding="utf-8")
    assert read_rows(tmp_path / "ends.jsonl") == text


def test_several_files_by_folder_and_by_glob(tmp_path):
    for i in (4, 1, 0, 7, 2, 6, 5, 3):  # no folder lists them in order by chance
        write(tmp_path / f"part-{i}.jsonl", {"key": i})
    write(tmp_path / "._part.jsonl", {"key": 8})
    (tmp_path / "notes.txt").write_text("no rows")
    assert read_rows(tmp_path) == read_rows(f"{tmp_path}/part-*.jsonl") == [{"key": i} for i in range(8)]
    assert read_rows(f"{tmp_path}/part-[12].jsonl") == [{"key": 1}, {"key": 2}]


def test_folders_of_a_glob_may_be_patterns_too(tmp_path):
    """And what is there is none, whatever its name holds."""
    for number, folder in enumerate(("host[0]", "host1", "host1/deep", "host2.books")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "part.jsonl", {"key": number})
    numbers = lambda pattern: [row["key"] for row in read_rows(f"{tmp_path}/{pattern}")]
    assert numbers("*/part.jsonl") == [1, 3, 0]  # "1" before "2" before "["
    assert numbers("host[12]*/part.jsonl") == [1, 3]
    assert numbers("host[0]/p*.jsonl") == [0]
    assert numbers("host1/*/*.jsonl") == [2]
    assert numbers("host1/*") == [1], "a folder is no file of answers"
    with pytest.raises(ValueError, match=r"host\?/\*.json names no file"):
        numbers("host?/*.json")


def test_numbers_in_names_count_as_such(tmp_path):
    """Some files are told apart by their order alone, and "part_10" is written behind "part_2"."""
    for i in (10, 2, 1, 0, 11):
        write(tmp_path / f"part_{i}.jsonl", {"key": i})
    assert [row["key"] for row in read_rows(tmp_path)] == [0, 1, 2, 10, 11]
    (tmp_path / "part_02.jsonl").write_text("")
    assert [file.name[5:-6] for file in row_files(f"{tmp_path}/part_*2.jsonl")] == ["02", "2"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b'{"key": "a"}\n\n{"key": "b", "te', "line 3, is not JSON"),
        (b'[{"key": "a"},\n {"key": "b"', "line 2, is not JSON"),
        (b'{"key": "a"}\n{"text": "\xe9"}\n', "line 2, is not UTF-8"),
        (b'{"key": "a"}\n"b"\n', "line 2, holds a JSON str"),
        (b'[{"key": "a"}, null]', "line 1, holds a JSON NoneType"),
        (b'{"key": ' + b"1" * 5000 + b"}", "line 1, is not JSON"),
        (b"{" * 100_000, "line 1, is not JSON"),
        (b'{"a":' * 100_000, r"line 1, is not JSON \(it is nested too deeply\)"),
        (
            b'{"key": "a"}\n{"key": "b", "text": "x", "text": "y"}',
            "line 2: an object has 'text' more than once, 'x' and",
        ),
    ],
)
def test_damage_is_a_line_with_its_place(tmp_path, damage, message):
    (tmp_path / "answers.jsonl").write_bytes(damage)
    with pytest.raises(ValueError, match=rf"answers\.jsonl, {message}[^\n]*$"):
        read_rows(tmp_path / "answers.jsonl")


def test_an_object_of_another_shape_is_named(tmp_path):
    file = tmp_path / "a.json"
    shape = {"rows": [{"id": int}], "names": {...: [str]}}
    for content, message in (
        ({"rows": [{"id": 1}, {"id": True}], "names": {}}, r"has true as rows\[1\].id, expected a whole number"),
        ({"rows": [{"id": 1}, 2], "names": {}}, r"has 2 as rows\[1\], expected an object"),
        ({"rows": [{"name": 1}], "names": {}}, r"has no id in rows\[0\]"),
        ({"rows": [], "names": {"a": ["b"], "c": "d"}}, "has 'd' as names.c, expected a list"),
        ({"names": {}}, "has no rows"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"a.json {message}; mend it$"):
            read_object(file, "mend it", shape)
    file.write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match=r"a.json is not JSON \(it is nested too deeply\); mend it"):
        read_object(file, "mend it")
    assert misfit({"rows": [{"id": 1, "more": None}], "names": {"a": ["b"]}}, shape) is None
    assert misfit("x", (int, float, type(None))) == "is 'x', expected a number or null"


def test_nothing_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "answers.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(ValueError, match="names no file"):
            read_rows(path)


def test_every_question_has_exactly_one_answer():
    with pytest.raises(ValueError, match=r"the 3 questions: 2 have no answer \(first 'a'\)$"):
        join(QUESTIONS, ROWS[2:])
    with pytest.raises(ValueError, match=r"3 have no answer"):
        join(QUESTIONS, [])
    with pytest.raises(ValueError, match=r"questions: 1 are answered again \(first 'b'\)$"):
        join(QUESTIONS, [*ROWS, ROWS[1]])
    with pytest.raises(ValueError, match=r"questions: 2 are not among the questions \(first 'x'\)$"):
        join(QUESTIONS, [*ROWS, ROWS[0] | {"key": "x"}, ROWS[0] | {"key": "y"}])
    with pytest.raises(ValueError, match=r"1 have no answer \(first 'c'\), 1 are answered again \(first 'a'\)"):
        join(QUESTIONS, [ROWS[0], ROWS[0], ROWS[1]])
    with pytest.raises(ValueError, match="there is no question"):
        join([], [])
    with pytest.raises(ValueError, match="several questions are called 'b'"):
        join([*QUESTIONS, QUESTIONS[1]], ROWS)


def test_answers_to_other_words_are_refused():
    with pytest.raises(ValueError, match=r"1 were asked in other words \(first 'b'\)"):
        join(QUESTIONS, [ROWS[0], ROWS[1] | {"prompt": "What's b?"}, ROWS[2]])
    bare = [{"key": row["key"], "text": row["text"]} for row in ROWS]
    assert join(QUESTIONS, bare) == SAID  # that does not say what was asked
    unsaid = [question._replace(row={}) for question in QUESTIONS]
    assert join(unsaid, [row | {"prompt": ["any"]} for row in ROWS]) == SAID


def test_other_fields_may_hold_key_and_text():
    questions = [question._replace(key=str(question.row["id"])) for question in QUESTIONS]
    rows = [{"id": i, "response": "yes"} for i in range(3)]
    assert join(questions, rows, key="id", text="response") == {"0": "yes", "1": "yes", "2": "yes"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "It is b."}, "answer 2 has no 'key' that names its question; it has text"),
        ({"key": True, "text": "It is b."}, "answer 2 has no 'key'"),
        ({"key": "b"}, "the answer to 'b' has no 'text' that is a text; it has key"),
        ({"key": "b", "text": None}, "the answer to 'b' has no 'text'"),
    ],
)
def test_rows_without_key_or_text_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        join(QUESTIONS, [ROWS[0], row, ROWS[2]])


def test_an_empty_answer_is_an_answer():
    assert join(QUESTIONS, [row | {"text": ""} for row in ROWS]) == dict.fromkeys("abc", "")


def test_the_fingerprint_is_of_all_that_is_asked():
    other = [
        QUESTIONS[::-1],
        QUESTIONS[:2],
        *([QUESTIONS[0]._replace(**{field: "x"}), *QUESTIONS[1:]] for field in ("key", "text", "image")),
        [QUESTIONS[0]._replace(row={"prompt": "What is a?", "id": 7}), *QUESTIONS[1:]],
    ]
    assert len({fingerprint(questions) for questions in (QUESTIONS, *other)}) == 7
    assert fingerprint(QUESTIONS) == fingerprint(list(QUESTIONS))


def test_a_choice_that_there_is_not_is_named():
    assert choose({"one": 1, "two": 2}, "two", "prompts") == 2
    with pytest.raises(ValueError, match="prompts must be one of one, two, got three"):
        choose({"one": 1, "two": 2}, "three", "prompts")
