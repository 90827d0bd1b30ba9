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


def test_missing_answers_are_no_smaller_benchmark(data):
    rows = rows_of(data)
    with pytest.raises(ValueError, match=r"the 46 questions: 45 have no answer"):
        vlind.score(data, rows[:1])
    with pytest.raises(ValueError, match=r"1 are answered again"):
        vlind.score(data, [*rows, rows[0]])
    with pytest.raises(ValueError, match="46 have no answer"):
        vlind.score(data, [])


def test_the_questions(data):
    asked = {question.key.removeprefix("colour/0_a blue 0/"): question for question in vlind.questions(data)[:12]}
    assert list(asked) == ["a1", "a2", "b1", "b2", "c1", "c2", "d1/0", "d2/0", "d1/4", "d2/4", "d1/8", "d2/8"]
    assert "The 0 is red." in asked["a1"].text  # what common sense says is asked first there, and the picture's else
    assert "The 0 is blue." in asked["a2"].text
    assert "There is a 0 in the given image." in asked["b1"].text
    assert "There is a {car} in the given image." in asked["b2"].text
    assert asked["c1"].text.startswith("Context: a blue 0\nStatement: The 0 is blue.\nBased on the context, is")
    assert "The 0 is red." in asked["c2"].text
    assert "The 0 is blue." in asked["d1/8"].text
    assert all(question.text.endswith(" Only respond in True or False.") for question in asked.values())
    told = {key[0] for key, question in asked.items() if "Forget real-world common sense" in question.text}
    assert told == {"c", "d"}
    pictures = {key: question.image for key, question in asked.items()}
    assert pictures["a2"] == "factual/colour/0_a red 0/0.jpg"
    assert pictures["d2/0"] == "counterfactual/colour/0_a blue 0/0.jpg"
    assert pictures["b1"] == pictures["c2"] == pictures["d1/4"]  # the first of those with the most votes


def test_prompt_sets_differ_in_words_and_in_the_best_picture(data):
    released, gpt4o, instructblip = (
        {question.key: question for question in vlind.questions(data, prompts=prompts)} for prompts in vlind.PROMPTS
    )
    assert gpt4o["colour/0_a blue 0/b1"].image.endswith("/9.jpg")
    other = {key for key in released if released[key].text != gpt4o[key].text}
    assert {key.split("/")[2] for key in other} == {"a1", "a2"}
    texts = [question.text for question in instructblip.values()]
    assert all(text.startswith("Only respond in True or False.\n") and text.endswith("false?") for text in texts)
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
    refused(
        "the instance 'colour/1_a blue 1' has no 'existent_noun'",
        [*instances[:1], _without(instances[1], "existent_noun")],
    )
    refused("instance 1, is not one of VLind-Bench: KeyError", [{"concept": "colour"}])
    refused("several questions are called 'colour/0_a blue 0/a1'", instances[:1] * 2)
    (data / "data.json").unlink()
    refused("data.json is missing; fetch the data set klee972/VLind-Bench")


def test_a_style_without_pictures_is_no_score(data):
    (data / "data.json").write_text(json.dumps(json.loads((data / "data.json").read_text())[1:2]))
    with pytest.raises(ValueError, match="no picture of the style cartoon with 2 votes or more"):
        vlind.score(data, rows_of(data), variant="cartoon")


def _without(row, field):
    return {name: value for name, value in row.items() if name != field}
