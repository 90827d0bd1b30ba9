"""Files of benchmarks that are empty or damaged: one line that names the file, whatever is wrong with it."""

import json

import pytest

from napo_jax.command import exit_with_one_line
from napo_jax.evals.answers import Question
from napo_jax.evals.benchmarks import Asked
from napo_jax.evaluate import main
from napo_jax.world.exams import write_chair, write_pope

QUESTION = {"image_id": "i", "image_src": "a/b.png", "question_type": "t", "question": "Q?", "gt_answer": "A."}
AMBER = {
    "query/query_all.json": [{"id": 1, "image": "A.jpg", "query": "Describe."}],
    "annotations.json": [{"id": 1, "type": "generative", "truth": ["tree"], "hallu": []}],
    "relation.json": {"tree": []},
    "safe_words.txt": "a",
}


@pytest.fixture
def data(tmp_path):
    """Has the files of each benchmark, with one row of each kind."""
    write_pope(tmp_path / "pope", 1)
    pope = tmp_path / "pope" / "shapes_pope_random.json"
    write(pope, pope.read_text().splitlines()[0])
    write_chair(tmp_path / "chair", 1)
    write(tmp_path / "mmhal/response_template.json", [QUESTION | {"image_content": ["Tree"]}])
    for name, content in AMBER.items():
        write(tmp_path / "amber" / name, content)
    write(tmp_path / "vlind/data.json", [])
    return tmp_path


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))


def change(name, *path):
    """Returns what puts a value to a place of a file of one JSON value."""

    def do(folder, value):
        content = json.loads((folder / name).read_text())
        inner = content
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value
        write(folder / name, content)

    return do


def replace(name):
    return lambda folder, content: write(folder / name, content)


def score(data, benchmark, *more):
    """Scores the answers by the command."""
    main(
        ["score", "--benchmark", benchmark, "--data", f"{data / benchmark}", "--answers", f"{data / 'a.jsonl'}", *more]
    )


INSTANCES, CAPTIONS = "instances_val2014.json", "captions_val2014.json"
DEEP = '{"images":' * 100_000


@pytest.mark.parametrize(
    ("benchmark", "damage", "value", "message"),
    [
        ("pope", replace("shapes_pope_random.json"), "", "shapes_pope_random.json has no rows; fetch it again"),
        ("pope", replace("shapes_pope_random.json"), {"text": 3}, "question 1, has no question_id, image, label; "),
        ("pope", change("shapes_pope_random.json", "text"), 3, "question 1, has 3 as text, expected a text"),
        ("chair", replace("questions.jsonl"), "", "questions.jsonl has no rows"),
        ("chair", change("questions.jsonl", "image_id"), 1.5, "question 1, has 1.5 as image_id, expected"),
        ("chair", change("questions.jsonl", "image_path"), 3, "question 1, has 3 as image_path, expected a text"),
        ("chair", change(INSTANCES, "images"), [1, 2], f"{INSTANCES} has 1 as images[0], expected an object"),
        ("chair", change(INSTANCES, "annotations", 0), {"image_id": 0}, "has no category_id in annotations[0]"),
        ("chair", change(INSTANCES, "annotations", 0, "category_id"), 99, f"{INSTANCES} has no category 99, which"),
        ("chair", change(INSTANCES, "categories", 0, "name"), [], "has [] as categories[0].name, expected a text"),
        ("chair", change(CAPTIONS, "annotations", 0, "caption"), None, "has null as annotations[0].caption, expected"),
        ("chair", replace(CAPTIONS), DEEP, f"{CAPTIONS} is not JSON (it is nested too deeply)"),
        (
            "chair",
            replace("synonyms.txt"),
            "h\xe9".encode("latin-1"),
            "synonyms.txt, line 1, is not UTF-8; fetch it again",
        ),
        ("mmhal", replace("response_template.json"), [], "response_template.json has no rows"),
        ("mmhal", change("response_template.json", 0, "image_content"), [1], "has 1 as image_content[0], expected a"),
        ("amber", replace("query/query_all.json"), [], "query_all.json has no rows"),
        ("amber", change("query/query_all.json", 0, "query"), 3, "question 1, has 3 as query, expected a text"),
        ("amber", change("annotations.json", 0, "truth"), [["tree"]], "annotations.json, id 1, is not an annotation"),
        ("amber", change("annotations.json", 0, "type"), [], "annotations.json, question 1, has [] as type, expected"),
        ("amber", change("relation.json", "tree"), "branch", "relation.json has 'branch' as tree, expected a list"),
        ("amber", replace("safe_words.txt"), b"a\n\xff", "safe_words.txt, line 2, is not UTF-8; fetch it again"),
        ("vlind", replace("data.json"), [], "vlind/data.json has no rows; fetch it again"),
        ("vlind", replace("data.json"), [1], "vlind/data.json, line 1, holds a JSON int; rows are objects"),
        ("vlind", replace("data.json"), "{}".encode("utf-16"), "vlind/data.json, line 1, is not UTF-8; write the file"),
    ],
)
def test_a_damaged_file_is_one_line(data, capsys, benchmark, damage, value, message):
    damage(data / benchmark, value)
    write(data / "a.jsonl", [{"key": "1" if benchmark == "amber" else "0", "text": "A tree."}])
    more = {"chair": ["--variant", "plain"], "amber": ["--variant", "plain"], "pope": ["--splits", "random"]}
    with pytest.raises(SystemExit) as error:
        exit_with_one_line(lambda: score(data, benchmark, *more.get(benchmark, [])))
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("benchmark", "row", "message"),
    [
        ("chair", {"image_id": 0, "prompt": [], "text": "a"}, "an answer must have a key, or image_id and prompt"),
        ("chair", {"image_id": 0.5, "prompt": "Q?", "text": "a"}, "an answer must have a key, or image_id and prompt"),
        ("mmhal", {"image_id": [], "question": {}, "model_answer": "a"}, "1 are not among the questions"),
    ],
)
def test_an_answer_of_another_shape_is_one_line(data, benchmark, row, message):
    write(data / "a.jsonl", row)
    write(data / "r.jsonl", {"key": "0", "text": "a", "judge": "j", "reply": "Rating: 1"})
    more = ["--variant", "plain"] if benchmark == "chair" else ["--replay", str(data / "r.jsonl")]
    with pytest.raises(ValueError, match=message):
        score(data, benchmark, *more)


def test_no_splits_are_no_questions(data):
    write(data / "a.jsonl", "")
    with pytest.raises(ValueError, match="splits must be one or more of adversarial, popular, random, got none"):
        score(data, "pope", "--splits")


def test_a_question_that_comes_twice_is_one_line_before_anything_is_asked(data):
    """And not when all is said, and cannot be told apart."""
    rows = [json.loads(line) for line in (data / "chair/questions.jsonl").read_text().splitlines()]
    query = data / "amber/query/query_all.json"
    write(query, json.loads(query.read_text()) * 2)
    with pytest.raises(ValueError, match=r"amber has 1 questions of amber more than once \(first '1'\); fetch"):
        Asked(benchmark="amber", data=str(data / "amber")).questions()
    annotations = data / "amber/annotations.json"
    write(annotations, json.loads(annotations.read_text()) * 2)
    with pytest.raises(ValueError, match=r"annotations.json has the id 1 more than once; fetch the file again"):
        Asked(benchmark="amber", data=str(data / "amber")).questions()
    write(data / "chair/questions.jsonl", rows * 2)  # CHAIR's are numbered: two may ask the same
    assert len(Asked(benchmark="chair", data=str(data / "chair")).questions()) == 2


@pytest.mark.parametrize(
    ("benchmark", "part", "count", "published"),
    [
        ("mmhal", None, 96, [96]),
        ("chair", None, 300, [300]),
        ("amber", None, 1004 + 14216, [15220]),
        ("amber", "generative", 1004, [1004]),
        ("amber", "discriminative", 14216, [14216]),
        ("amber", "existence", 4924, [4924]),
        ("amber", "attribute", 7628, [7628]),
        ("amber", "relation", 1664, [1664]),
    ],
)
def test_a_benchmark_is_held_against_the_published_one(benchmark, part, count, published):
    some = [Question(str(i), "Q?", None, {}) for i in range(count)]
    asked = Asked(benchmark=benchmark, data="D", part=part)
    assert asked.size(some) == {"size": {"questions": {"here": count, "published": published}}}
    size = asked.size(some[1:])
    assert size["size"]["questions"]["here"] == count - 1
    said = f"these numbers are not those of papers, for D has {count - 1:,} questions, published are {count:,}"
    assert size["warning"] == said


def test_splits_and_instances_are_held_against_the_published_ones():
    split = lambda name, count: [Question(f"{name}/{i}", "Q?", "i", {"category": name}) for i in range(count)]
    pope = Asked(benchmark="pope", data="D")
    for random in (3000, 2910):  # today's file, and the one that LLaVA pins
        size = pope.size([*split("random", random), *split("popular", 3000)])
        assert size.keys() == {"size"}
        assert size["size"]["random questions"] == {"here": random, "published": [3000, 2910]}
    said = "D has 2,909 random questions, published are 3,000 or 2,910; 1 popular questions, published are 3,000"
    assert pope.size([*split("random", 2909), *split("popular", 1)])["warning"].endswith(said)
    vlind = Asked(benchmark="vlind", data="D")
    instances = [
        Question(f"{i}/{part}", "Q?", "i", {"part": part}) for i in range(302) for part in ("a1", "a2", "d1/0")
    ]
    assert vlind.size(instances) == {"size": {"instances": {"here": 302, "published": [421, 302]}}}
    assert "D has 301 instances, published are 421 or 302" in vlind.size(instances[3:])["warning"]
    assert Asked(benchmark="world", data="D").size(instances) == {}
