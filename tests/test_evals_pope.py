"""POPE counted by hand: the first sentence decides, and the splits are counted apart."""

import json
import math

import pytest

from napo_jax.evals import pope
from napo_jax.evals.answers import write_row

# Of each split, the true answers and what is said: the pictures are 1, 1, 2, 2, 3, 3.
SPLITS = {
    "adversarial": (("yes", "no", "yes", "no", "no", "no"), ("Yes", "No", "No, none", "Yes", "A dog.", "no")),
    "popular": (("yes", "no", "yes", "no"), ("Yes", "", "NO", "not")),
    "random": (("yes", "no", "yes", "no"), ("Yes", "No, there is not.", "no", "Yes. No")),
}
MEAN = {"accuracy": 175 / 3, "precision": 50, "recall": 200 / 3, "f1": 170 / 3, "yes_ratio": 175 / 3}
POOLED = {"accuracy": 800 / 14, "precision": 50, "recall": 400 / 6, "f1": 800 / 14, "yes_ratio": 800 / 14}


def write(folder, name, rows):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_split(folder, split, labels, word="coco"):
    rows = [
        {"question_id": i + 1, "image": f"{1 + i // 2}.jpg", "text": f"Is there a {split} {i} in it?", "label": label}
        for i, label in enumerate(labels)
    ]
    write(folder, f"{word}_pope_{split}.json", rows)


@pytest.fixture
def data(tmp_path):
    for split, (labels, _) in SPLITS.items():
        write_split(tmp_path, split, labels)
    return tmp_path


def rows_of(data, say=None, **options):
    asked = pope.questions(data, **options)
    said = [text for split, (_, texts) in SPLITS.items() for text in texts if split in options.get("splits", SPLITS)]
    return [write_row(question, said[i] if say is None else say(question)) for i, question in enumerate(asked)]


def metrics(result):
    return {name: result[name] for name in MEAN}


@pytest.mark.parametrize(("variant", "by_hand"), [("mean", MEAN), ("pooled", POOLED)])
def test_numbers_by_hand(data, variant, by_hand):
    result = pope.score(data, rows_of(data), variant=variant)
    assert metrics(result) == pytest.approx(by_hand)
    assert result["counts"] == {
        "adversarial": {"questions": 6, "TP": 1, "FP": 2, "TN": 2, "FN": 1},
        "popular": {"questions": 4, "TP": 2, "FP": 1, "TN": 1, "FN": 0},
        "random": {"questions": 4, "TP": 1, "FP": 1, "TN": 1, "FN": 1},
    }
    assert result["official"] == {
        "adversarial": "0.400, 0.500, 0.333, 0.500, 0.500",
        "popular": "0.800, 0.750, 0.667, 1.000, 0.750",
        "random": "0.500, 0.500, 0.500, 0.500, 0.500",
    }
    assert {split: numbers["f1"] for split, numbers in result["splits"].items()} == pytest.approx(
        {"adversarial": 40, "popular": 80, "random": 50}
    )


@pytest.mark.parametrize("variant", pope.VARIANTS)
def test_items_are_of_pictures_and_give_the_numbers(data, variant):
    result = pope.score(data, rows_of(data), variant=variant)
    for name, parts in result["items"].items():
        assert [len(items) for items in parts.values()] == [3] * (3 if variant == "mean" else 1)
        ratios = [sum(n for n, _ in items) / sum(d for _, d in items) for items in parts.values()]
        assert 100 * sum(ratios) / len(ratios) == pytest.approx(result[name])
    if variant == "mean":
        assert result["items"]["precision"]["popular"] == [[1, 2], [1, 1], [0, 0]]


def test_one_split_alone(data):
    result = pope.score(data, rows_of(data, splits=("popular",)), splits=("popular",))
    expected = {"accuracy": 75, "precision": 200 / 3, "recall": 100, "f1": 80, "yes_ratio": 75}
    assert metrics(result) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"4 are not among the questions \(first 'popular/1'\)"):
        pope.score(data, rows_of(data, splits=("popular", "random")), splits=("random",))
    with pytest.raises(ValueError, match=r"10 have no answer \(first 'adversarial/1'\)"):
        pope.score(data, rows_of(data, splits=("popular",)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "yes"),
        ("NO", "yes"),
        ("None", "yes"),
        ("No!", "yes"),
        ("No\nthere is none", "yes"),
        ("No,", "no"),
        ("no", "no"),
        ("There is not", "no"),
        ("No. Yes", "no"),
        ("Yes. No", "yes"),
        ("Yes, no", "no"),
        ("maybe,no", "yes"),  # a comma goes and leaves no space
        ("A knot", "yes"),
    ],
)
def test_the_first_sentence_decides(text, expected):
    assert pope.read_answer(text) == expected


def test_always_yes_and_nothing_at_all(data):
    for text in ("Yes", ""):
        result = pope.score(data, rows_of(data, lambda _, text=text: text), splits=pope.SPLITS)
        precision = (1 / 3 + 1 / 2 + 1 / 2) / 3
        assert result["precision"] == result["accuracy"] == pytest.approx(100 * precision)
        assert result["recall"] == result["yes_ratio"] == 100
        assert result["f1"] == pytest.approx(100 * (1 / 2 + 2 / 3 + 2 / 3) / 3)


def test_always_no_divides_by_nothing(data):
    result = pope.score(data, rows_of(data, lambda _: "No"))
    assert math.isnan(result["precision"])
    assert (result["recall"], result["f1"], result["yes_ratio"]) == (0, 0, 0)
    assert result["official"]["popular"] == "nan, 0.500, nan, 0.000, 0.000"  # where LLaVA's script stops


def llava_files(data, change=lambda rows: rows):
    """Writes LLaVA's question file, its splits in another order, and returns answers by its ids."""
    asked = {question.key: question for question in pope.questions(data)}
    said = {row["key"]: row["text"] for row in rows_of(data)}
    keys = sorted(asked, key=lambda key: pope.SPLITS.index(key.split("/")[0]), reverse=True)
    rows = [
        {"question_id": i, "image": asked[key].image, "text": asked[key].text, "category": key.split("/")[0]}
        for i, key in enumerate(keys)
    ]
    write(data, "llava_pope_test.jsonl", change(rows))
    return [{"question_id": i, "prompt": asked[key].text, "text": said[key]} for i, key in enumerate(keys)]


def test_answers_of_llavas_code_score_alike(data):
    assert pope.score(data, llava_files(data)[::-1]) == pope.score(data, rows_of(data))


def test_llavas_question_file_and_popes_must_be_of_one_time(data):
    rows = llava_files(data, lambda rows: [row for row in rows if row["question_id"] != 2])
    with pytest.raises(ValueError, match="3 questions of random, POPE's file 4; fetch both of one time"):
        pope.score(data, rows)
    rows = llava_files(data, lambda rows: [rows[1], rows[0], *rows[2:]])
    with pytest.raises(ValueError, match="question 1 is not random/1 of POPE's file"):
        pope.score(data, rows)
    (data / "llava_pope_test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"llava_pope_test.jsonl is missing; it says which split a question_id is of"):
        pope.score(data, rows)
    alone = [{"question_id": i + 1, "text": text} for i, text in enumerate(SPLITS["random"][1])]
    assert pope.score(data, alone, splits=("random",))["f1"] == 50


def test_answers_of_popes_code_are_in_order(data):
    rows = [{"question": row["question"], "answer": row["text"]} for row in rows_of(data)]
    assert pope.score(data, rows) == pope.score(data, rows_of(data))
    with pytest.raises(ValueError, match="answer 3 is to 'Is there a adversarial 3 in it"):
        pope.score(data, [*rows[:2], rows[3], rows[2], *rows[4:]])
    with pytest.raises(ValueError, match="there are 13 answers without a key to 14 questions"):
        pope.score(data, rows[1:])
    with pytest.raises(ValueError, match=r"the answer to 'adversarial/1' has no 'text' that is a text"):
        pope.score(data, [{"question": rows[0]["question"]}, *rows[1:]])


@pytest.mark.parametrize("count", [2910, 3000])
def test_random_splits_of_both_sizes(tmp_path, count):
    write_split(tmp_path, "random", ["yes" if i < 1500 else "no" for i in range(count)])
    asked = pope.questions(tmp_path, splits=("random",))
    rows = [write_row(question, question.row["label"]) for question in asked]
    result = pope.score(tmp_path, rows, splits=("random",))
    assert metrics(result) == pytest.approx(dict.fromkeys(MEAN, 100) | {"yes_ratio": 150_000 / count})
    assert result["counts"]["random"]["questions"] == count
    with pytest.raises(ValueError, match=f"the {count} questions: 1 have no answer"):
        pope.score(tmp_path, rows[1:], splits=("random",))


def test_the_questions(data):
    asked = pope.questions(data)
    assert [question.key for question in asked[5:8]] == ["adversarial/6", "popular/1", "popular/2"]
    assert asked[6].text == "Is there a popular 0 in it?\nAnswer the question using a single word or phrase."
    assert (asked[6].image, asked[6].row["label"], asked[6].row["question_id"]) == ("1.jpg", "yes", 1)
    assert pope.questions(data, prompts="plain")[6].text == asked[6].row["question"] == "Is there a popular 0 in it?"
    with pytest.raises(ValueError, match="14 were asked in other words"):
        pope.score(data, rows_of(data), prompts="plain")


def test_data_that_cannot_be_used_is_one_line(data):
    def refused(message, **options):
        with pytest.raises(ValueError, match=rf"{message}[^\n]*$"):
            pope.score(data, [], **options)

    refused("prompts must be one of llava, plain, got mine", prompts="mine")
    refused("variant must be one of mean, pooled, got median", variant="median")
    write_split(data / "below", "random", ["yes"], "shapes")
    refused("has several files for random: .*name the folder of one")
    (data / "coco_pope_random.json").unlink()
    assert len(pope.questions(data, splits=("random",))) == 1
    write_split(data / "below", "random", ["Yes"], "shapes")
    refused(r"shapes_pope_random.json, question 1, has the label 'Yes'; expected yes or no")
    write(data / "below", "shapes_pope_random.json", [{"question_id": 1, "text": "?"}])
    refused("question 1, has no image, label; fetch it again")
    write(data / "below", "shapes_pope_random.json", [])
    refused("shapes_pope_random.json has no rows; fetch it again", splits=("random",))
    refused("splits must be one or more of adversarial, popular, random, got none", splits=())
    refused("splits must be one or more of .*, got random, random", splits=("random", "random"))
    (data / "coco_pope_popular.json").unlink()
    refused(r"has no coco_pope_popular.json; fetch POPE's question files", splits=("popular",))
