"""VLind-Bench counted by hand: what passes what, over which denominators."""

import json
import math

import pytest

from napo_jax.evals import vlind
from napo_jax.evals.answers import write_row

# Votes of each instance's pictures; whether its parts a, b and c are right; and which pictures part d is right about.
INSTANCES = (
    ({"0": 2, "4": 3, "8": 3, "9": 1}, "abc", "08"),
    ({"1": 2, "5": 1}, "abc", ""),
    ({"5": 2, "6": 3}, "ac", "56"),
    ({"9": 3}, "bc", "9"),
    ({"2": 2}, "ab", "2"),
    ({"3": 1, "7": 0}, "", ""),  # shows its context to nobody
)
BY_HAND = {
    "all": {"CK": 80, "VP": 80, "CB": 75, "LP": 100 / 3, "CB_accuracy": 80, "LP_accuracy": 100 * 11 / 15},
    "photorealistic": {"CK": 100, "VP": 100, "CB": 200 / 3, "LP": 50, "CB_accuracy": 200 / 3, "LP_accuracy": 200 / 3},
    "illustration": {"CK": 100, "VP": 50, "CB": 100, "LP": 0, "CB_accuracy": 100, "LP_accuracy": 50},
    "cartoon": {"CK": 50, "VP": 100, "CB": 100, "LP": 100, "CB_accuracy": 100, "LP_accuracy": 100},
}


@pytest.fixture
def data(tmp_path):
    instances = [
        {
            "concept": "colour",
            "context_id": i,
            "context": f"a blue {i}",
            "factual_context": f"a red {i}",
            "true_statement": f"The {i} is blue.",
            "false_statement": f"The {i} is red.",
            "existent_noun": f"a {i}",
            "non-existent_noun": "a {car}",
            "best_img_id": max(votes),
            "aggregated_human_label_good_images": votes,
        }
        for i, (votes, _, _) in enumerate(INSTANCES)
    ]
    (tmp_path / "data.json").write_text(json.dumps(instances))
    return tmp_path


def answer(question):
    """Answers as `INSTANCES` says, and wrongly in one half of a part only."""
    folder, part, *image = question.key.removeprefix("colour/").split("/")
    _, right, right_images = INSTANCES[int(folder[0])]
    is_right = part[0] in right or (bool(image) and image[0] in right_images)
    return "True." if part[1] == "1" or not is_right else "false"


def rows_of(data, say=answer, **options):
    return [write_row(question, say(question)) for question in vlind.questions(data, **options)]


def as_official(data, rows, prefix):
    """Returns the same answers as the benchmark's own code writes them."""
    instances = json.loads((data / "data.json").read_text())
    for row in rows:
        folder, part, *image = row["key"].removeprefix("colour/").split("/")
        said = {"response": row["text"], "answer": row["text"].strip(".").title()}
        field = f"{prefix}_{part}" + ("_image" if part[0] in "ac" else "")
        instance = instances[int(folder[0])]
        if image:
            instance.setdefault(field, {})[image[0]] = said
        else:
            instance[field] = said
    return instances


@pytest.mark.parametrize("variant", vlind.VARIANTS)
def test_numbers_by_hand(data, variant):
    result = vlind.score(data, rows_of(data), variant=variant)
    assert {name: result[name] for name in BY_HAND[variant]} == pytest.approx(BY_HAND[variant])
    assert result["official"] == {name: f"{value:.1f}" for name, value in BY_HAND[variant].items()}
    for name, value in BY_HAND[variant].items():
        numerator, denominator = (sum(column) for column in zip(*result["items"][name], strict=True))
        assert [numerator, denominator] == pytest.approx(result["counts"][name])
        assert 100 * numerator / denominator == pytest.approx(value)


def test_counts_by_hand(data):
    counts = vlind.score(data, rows_of(data))["counts"]
    assert (counts["instances"], counts["pictures"], counts["answers"]) == (5, 8, 5 * 6 + 8 * 2)
    assert [counts[name][1] for name in ("CK", "VP", "CB", "LP")] == [5, 5, 4, 2]
    assert counts["LP"][0] == pytest.approx(2 / 3)  # of pictures of one instance, so that each counts as one


@pytest.mark.parametrize(
    ("style", "ids"),
    [
        ("photorealistic", ["0", "1", "2", "3"]),
        ("illustration", ["4", "5", "6", "7"]),
        ("cartoon", ["8", "9", "10", "11"]),
    ],
)
def test_each_of_twelve_pictures_is_of_one_style(data, style, ids):
    """The fixture's good pictures are few, so that a style could lose another unnoticed."""
    (instance, *_) = json.loads((data / "data.json").read_text())
    instance["aggregated_human_label_good_images"] = {str(i): 2 for i in range(12)}
    (data / "data.json").write_text(json.dumps([instance]))

    def say(question):  # rightly about the pictures of this style only
        _, _, part, *image = question.key.split("/")
        is_right = not image or image[0] in ids
        return "True" if part[1] == "1" or not is_right else "False"

    def count(variant):
        result = vlind.score(data, rows_of(data, say), variant=variant)
        return result["counts"]["pictures"], round(result["LP_accuracy"], 6)

    assert count("all") == (12, round(100 / 3, 6))
    assert {other: count(other) for other in BY_HAND if other != "all"} == {
        other: (4, 100 if other == style else 0) for other in BY_HAND if other != "all"
    }


@pytest.mark.parametrize("prefix", ["tiny_pred", "llava-v1.5-7b"])
def test_files_of_the_official_code_score_alike(data, prefix):
    rows = rows_of(data)
    official = as_official(data, rows, prefix)
    assert vlind.score(data, official) == vlind.score(data, rows)
    shards = official[3:] + official[:3]
    assert vlind.score(data, shards) == vlind.score(data, rows)


def test_official_files_that_do_not_add_up_are_refused(data):
    def refused(message, **change):
        instances = as_official(data, rows_of(data), "m")
        instances[2] |= change
        with pytest.raises(ValueError, match=message):
            vlind.score(data, instances)

    refused(r"1 have no answer \(first 'colour/2_a blue 2/d1/6'\)", m_d1={"5": {"response": "True"}})
    refused("1 are not among the questions", m_d1={id_: {"response": "True"} for id_ in "567"})
    refused("'answer' 'False' is not what the 'response' 'True' says", m_b1={"response": "True", "answer": "False"})
    refused("several models: m, n", n_a1_image={"response": "True"})
    refused("instance 3 is not as VLind-Bench's code writes it", m_b1="True")
    refused("instance 3 is not as VLind-Bench's code writes it", m_d2=[])
    with pytest.raises(ValueError, match="12 have no answer"):  # a shard less
        vlind.score(data, as_official(data, rows_of(data), "m")[1:])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("True.", "True"),
        ("false, because it is red", "False"),
        ("The statement\nis false.\nTrue is", "False"),
        ("T.r,ue", "True"),  # points and commas go wherever they stand
        ("TRUE!", "NA"),
        ('"true"', "NA"),
        ("true: yes", "NA"),
        ("untrue", "NA"),
        ("It is\ttrue", "NA"),  # words end at spaces and lines only
        ("Yes.", "NA"),
        ("", "NA"),
    ],
)
def test_answers_are_read_as_the_official_code_reads_them(text, expected):
    assert vlind.read_answer(text) == expected


@pytest.mark.parametrize("text", ["True", "False", "", "I cannot say."])
def test_saying_always_the_same_scores_nothing(data, text):
    result = vlind.score(data, rows_of(data, lambda _: text))
    assert [result[name] for name in ("CK", "VP", "CB_accuracy", "LP_accuracy")] == [0, 0, 0, 0]
    assert math.isnan(result["CB"])
    assert math.isnan(result["LP"])
    assert result["official"] == dict.fromkeys(result["official"], "0.0")
    assert result["counts"]["CB"] == result["counts"]["LP"] == [0, 0]
    assert result["counts"]["neither_true_nor_false"] == (46 if text in ("", "I cannot say.") else 0)


@pytest.mark.parametrize(
    ("halves", "percent"), [(("True", "False"), 100), (("True", "Maybe"), 0), (("Maybe", "False"), 0)]
)
def test_half_an_answer_is_none(data, halves, percent):
    """What is neither true nor false is not the opposite of either."""
    result = vlind.score(data, rows_of(data, lambda question: halves[int(question.key.split("/")[2][1]) - 1]))
    assert {result[name] for name in ("CK", "VP", "CB_accuracy", "LP_accuracy")} == {percent}
    assert result["counts"]["neither_true_nor_false"] == 23 * halves.count("Maybe")


def test_missing_answers_are_no_smaller_benchmark(data):
    rows = rows_of(data)
    with pytest.raises(ValueError, match=r"the 46 questions: 45 have no answer"):
        vlind.score(data, rows[:1])
    with pytest.raises(ValueError, match=r"1 are answered again"):
        vlind.score(data, [*rows, rows[0]])
    with pytest.raises(ValueError, match="46 have no answer"):
        vlind.score(data, [])


def test_the_questions(data):
    """The words as published: models answer others otherwise, and nothing else would show it."""
    said, only = "is the given statement true or false?", "Only respond in True or False."
    forget = "Forget real-world common sense and just follow the information provided in the"
    blue, red, there, not_there = (
        f"Statement: {statement}\nBased on"
        for statement in (
            "The 0 is blue.",
            "The 0 is red.",
            "There is a 0 in the given image.",
            "There is a {car} in the given image.",
        )
    )
    factual, best = "factual/colour/0_a red 0/0.jpg", "counterfactual/colour/0_a blue 0/4.jpg"  # with the most votes
    expected = {  # common sense is asked first about what is true of it, the others about the picture's truth
        "a1": (f"{red} common sense, {said} {only}", factual),
        "a2": (f"{blue} common sense, {said} {only}", factual),
        "b1": (f"{there} the image, {said} {only}", best),
        "b2": (f"{not_there} the image, {said} {only}", best),
        "c1": (f"Context: a blue 0\n{blue} the context, {said} {forget} context. {only}", best),
        "c2": (f"Context: a blue 0\n{red} the context, {said} {forget} context. {only}", best),
    }
    for image in "048":
        picture = f"counterfactual/colour/0_a blue 0/{image}.jpg"
        expected[f"d1/{image}"] = (f"{blue} the image, {said} {forget} image. {only}", picture)
        expected[f"d2/{image}"] = (f"{red} the image, {said} {forget} image. {only}", picture)
    asked = {question.key.removeprefix("colour/0_a blue 0/"): question for question in vlind.questions(data)[:12]}
    assert {key: (question.text, question.image) for key, question in asked.items()} == expected
    assert list(asked) == list(expected)


def test_prompt_sets_differ_in_words_and_in_the_best_picture(data):
    released, gpt4o, instructblip = (
        {question.key: question for question in vlind.questions(data, prompts=prompts)} for prompts in vlind.PROMPTS
    )
    for key, question in released.items():
        assert gpt4o[key].text == question.text.replace("Based on common", "Based on the common")
        asked, _, _ = question.text.partition("?")
        assert instructblip[key].text == f"Only respond in True or False.\n{asked}?"
    for others in (gpt4o, instructblip):
        named = {part: others[f"colour/0_a blue 0/{part}"].image[-6:] for part in ("a1", "a2", "b1", "b2", "c1", "c2")}
        assert named == {"a1": "/0.jpg", "a2": "/0.jpg"} | dict.fromkeys(("b1", "b2", "c1", "c2"), "/9.jpg")
    with pytest.raises(ValueError, match="46 were asked in other words"):
        vlind.score(data, rows_of(data), prompts="instructblip")
    assert vlind.score(data, rows_of(data, prompts="instructblip"), prompts="instructblip")["LP"] == pytest.approx(
        100 / 3
    )


def test_data_that_cannot_be_used_is_one_line(data, tmp_path):
    def refused(message, content=None, **options):
        if content is not None:
            (data / "data.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"{message}[^\n]*$"):
            vlind.score(data, [], **options)

    instances = json.loads((data / "data.json").read_text())
    refused("prompts must be one of released, gpt4o, instructblip, got mine", prompts="mine")
    refused("variant must be one of all, photorealistic, illustration, cartoon, got sketch", variant="sketch")
    without = [*instances[:1], _without(instances[1], "existent_noun")]
    refused("data.json, question 2, has no existent_noun; fetch it again", without)
    refused("question 1, has no context, factual_context, true_statement, .*best_img_id, agg", [{"concept": "colour"}])
    for field, wrong in (("true_statement", "null"), ("aggregated_human_label_good_images", "a list")):
        value = {"null": None, "a list": ["3"]}[wrong]
        refused(f"question 1, has .* as {field}, expected", [instances[0] | {field: value}])
    refused("several questions are called 'colour/0_a blue 0/a1'", instances[:1] * 2)
    (data / "data.json").unlink()
    refused("data.json is missing; fetch the data set klee972/VLind-Bench")


def test_a_style_without_pictures_is_no_score(data):
    (data / "data.json").write_text(json.dumps(json.loads((data / "data.json").read_text())[1:2]))
    with pytest.raises(ValueError, match="no picture of the style cartoon with 2 votes or more"):
        vlind.score(data, rows_of(data), variant="cartoon")


def _without(row, field):
    return {name: value for name, value in row.items() if name != field}
