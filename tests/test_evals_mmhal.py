"""MMHal-Bench: the judge's prompt and replies, and means counted by hand."""

import json

import pytest

from napo_jax.evals import mmhal

TYPES = ("attribute", "adversarial", "attribute", "adversarial")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    known = [
        {
            "question_type": kind,
            "question_topic": "t",
            "image_id": f"id{i}",
            "image_src": f"https://host/a/{i}_o.jpg",
            "image_content": ["Tree", "{Sky}"],
            "question": f"Question {i}?",
            "gt_answer": f"Truth {i}.",
            "model_answer": "",
        }
        for i, kind in enumerate(TYPES)
    ]
    (folder / "response_template.json").write_text(json.dumps(known, indent=2))
    return folder


def rows(*texts):
    return [{"key": str(i), "text": text} for i, text in enumerate(texts)]


SAID = rows("a {question}", "b", "c", "d")


def replies(path, *texts, judge="j-1"):
    kept = [{**row, "judge": judge, "reply": text} for row, text in zip(SAID, texts, strict=True)]
    path.write_text("\n".join(map(json.dumps, kept)))
    return path


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("It is fine. Rating: 5, very informative", 5),
        ("RATING: 4", 4),
        ("rating: 6\nRating: 6", 6),  # one rating, twice
        ("Rating: 4 ... or Rating: 3", 0),
        ("Rating: 0 or rating: 3", 0),  # 0 is a rating as any, so that these are two
        ("rating: 10", 1),  # as the official script reads it
        ("Rating 4", 0),
        ("Rating:4", 0),
        ("Rating: 7", 0),
        ("", 0),
    ],
)
def test_a_rating_in_a_reply(reply, rating):
    assert mmhal.read_rating(reply) == rating


def test_counted_by_hand(data, tmp_path):
    path = replies(tmp_path / "r.jsonl", "Rating: 6", "Rating: 2", "Rating: 3", "none")
    result = mmhal.score(data, SAID, replay=path)
    assert result["score"] == 11 / 4
    assert result["rate"] == 2 / 4
    assert result["informativeness"] == pytest.approx((3 + 2 + 0 + 0) / 4 / 3 * 100)
    assert (result["score/attribute"], result["score/adversarial"]) == (4.5, 1.0)
    assert result["official"] == {
        "score": "2.75",
        "rate": "0.50",
        "informativeness": "41.67",
        "score/attribute": 4.5,
        "score/adversarial": 1.0,
    }
    assert result["counts"]["rate"] == [2, 4]
    assert result["counts"]["without_one_rating"] == 1
    assert (result["judge"], result["variant"]) == ("j-1", "released")
    assert mmhal.score(data, SAID, replay=path, variant="rlaifv")["official"]["rate"] == "0.500"
    for name, pairs in result["items"].items():
        assert len(pairs) == 4
        share = sum(above for above, _ in pairs) / sum(below for _, below in pairs)
        assert result[name] == pytest.approx(share * (100 if name == "informativeness" else 1)), name


def test_means_of_types_are_rounded_as_published_but_not_as_scored(data, tmp_path):
    known = json.loads((data / "response_template.json").read_text())
    known[1]["question_type"] = "attribute"  # three of a type, whose mean has no end
    (data / "response_template.json").write_text(json.dumps(known))
    path = replies(tmp_path / "r.jsonl", "Rating: 1", "Rating: 2", "Rating: 2", "Rating: 6")
    result = mmhal.score(data, SAID, replay=path)
    assert result["score/attribute"] == pytest.approx(5 / 3, abs=1e-9)
    assert result["official"]["score/attribute"] == 1.67


@pytest.mark.parametrize(("reply", "score", "rate"), [("Rating: 3", 3, 0), ("Rating: 2", 2, 1), ("", 0, 1)])
def test_constant_replies(data, tmp_path, reply, score, rate):
    result = mmhal.score(data, SAID, replay=replies(tmp_path / "r.jsonl", *[reply] * 4))
    assert (result["score"], result["rate"]) == (score, rate)


def test_the_judge_is_shown_what_is_known(data, tmp_path):
    asked = []
    template = tmp_path / "prompt.txt"
    template.write_text("Rate.\n{image_content}|{question}|{gt_answer}|{model_answer}\n")
    judge = lambda prompt: asked.append(prompt) or "Rating: 1"
    kept = list(mmhal.ask_judge(data, SAID, template, judge, "j-1"))
    assert asked[0] == "Rate.\nTree, {Sky}|Question 0?|Truth 0.|a {question}\n"  # braces in texts are no slots
    assert kept[0] == {"key": "0", "text": "a {question}", "judge": "j-1", "reply": "Rating: 1"}
    template.write_text("{} / {} / {} / {}")
    assert list(mmhal.ask_judge(data, SAID, template, judge, "j-1")) == kept
    assert asked[5] == "Tree, {Sky} / Question 1? / Truth 1. / b"
    for wrong in ("{} {} {}", "{} {question} {gt_answer} {model_answer}", "{question} {question} {gt_answer} {}", ""):
        template.write_text(wrong)
        with pytest.raises(ValueError, match=r"must hold \{image_content\} \{question\} .*, or \{\} 4 times"):
            list(mmhal.ask_judge(data, SAID, template, judge, "j-1"))


def test_responses_of_the_chat_api_go_by_order(data, tmp_path):
    response = lambda text: {"model": "g", "choices": [{"message": {"content": text}}]}
    path = tmp_path / "reviews.json"
    path.write_text(json.dumps([response(f"Rating: {i}") for i in (5, 0, 4, 1)]))
    result = mmhal.score(data, SAID[::-1], replay=path)
    assert (result["judge"], result["score/attribute"], result["score/adversarial"]) == ("g", 4.5, 0.5)
    path.write_text(json.dumps([response("Rating: 1")] * 3))
    with pytest.raises(ValueError, match="3 responses of the chat API to 4 questions"):
        mmhal.score(data, SAID, replay=path)
    path.write_text(json.dumps([*[response("Rating: 1")] * 3, {"choices": []}]))
    with pytest.raises(ValueError, match=r"about '3' has no choices"):
        mmhal.score(data, SAID, replay=path)
    path.write_text(json.dumps([*[response("Rating: 1")] * 3, response("Rating: 1") | {"model": "h"}]))
    with pytest.raises(ValueError, match="found g, h"):
        mmhal.score(data, SAID, replay=path)


def test_replies_must_be_all_there_and_about_these_answers(data, tmp_path):
    path = replies(tmp_path / "r.jsonl", *["Rating: 1"] * 4)
    with pytest.raises(ValueError, match=r"2 replies are about other answers \(first '1'\)"):
        mmhal.score(data, rows("a {question}", "x", "c", "x"), replay=path)
    lines = path.read_text().split("\n")
    path.write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match=r"the judge's replies: .* 1 have no answer"):
        mmhal.score(data, SAID, replay=path)
    path.write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(ValueError, match="answered again"):
        mmhal.score(data, SAID, replay=path)
    with pytest.raises(ValueError, match="name the file of them as replay"):
        mmhal.score(data, SAID)
    with pytest.raises(ValueError, match="names no file"):
        mmhal.score(data, SAID, replay=tmp_path / "none.jsonl")


def test_answers_in_three_layouts(data, tmp_path):
    path = replies(tmp_path / "r.jsonl", *["Rating: 1"] * 4)
    expected = mmhal.score(data, SAID, replay=path)
    released = [{"question_id": i, "text": f"Assistant: {row['text']} "} for i, row in enumerate(SAID)]
    assert mmhal.score(data, released[::-1], replay=path) == expected
    filled = json.loads((data / "response_template.json").read_text())
    for row, said in zip(filled, SAID, strict=True):
        row["model_answer"] = said["text"]
    assert mmhal.score(data, filled[::-1], replay=path) == expected
    with pytest.raises(ValueError, match="1 have no answer"):
        mmhal.score(data, filled[1:], replay=path)
    with pytest.raises(ValueError, match="no 'key'"):
        mmhal.score(data, [{"text": "a"}], replay=path)


def test_questions(data):
    asked = mmhal.questions(data)
    assert asked[1] == ("1", "Question 1?", "1_o.jpg", {"question_id": 1, "image_id": "id1", "prompt": "Question 1?"})
    known = json.loads((data / "response_template.json").read_text())
    (data / "response_template.json").write_text(json.dumps([known[0], {**known[1], "image_content": "Tree"}]))
    with pytest.raises(ValueError, match="question 2, has 'Tree' as image_content, expected a list; fetch it again"):
        mmhal.questions(data)
    (data / "response_template.json").write_text(json.dumps([known[0] | {"gt_answer": None}]))
    with pytest.raises(ValueError, match="question 1, has null as gt_answer, expected a text; fetch it again"):
        mmhal.questions(data)
    (data / "mmhal-bench_answer_template.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"must hold one of .*, has 2"):
        mmhal.questions(data)
    (data / "response_template.json").unlink()
    assert len(mmhal.questions(data)) == 4
