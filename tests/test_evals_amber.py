"""AMBER: marks, roundings and readings of yes and no, counted by hand."""

import json
import math
import sys
import types

import pytest

from napo_jax.evals import amber
from napo_jax.evals.amber_words import Words, mark, read_table, read_words, write_table
from napo_jax.evals.nlp import Language

# A word -> what it may also be called. The bough is like the branch, the log like the bough, the pond like the sea.
ASSOCIATION = {
    "tree": ["branch", "leaf"],
    "branch": ["leaf"],
    "bough": [],
    "log": [],
    "sea": ["wave"],
    "boat": ["wave"],
    "pond": [],
    "lamp": [],
}
ALIKE = ({"bough", "branch"}, {"log", "bough"}, {"pond", "sea"}, {"log", "boat"})
WORDS = Words(ASSOCIATION, frozenset(["lamp"]))


def alike(word, other):
    return word == other or {word, other} in ALIKE


def marks(nouns, truth, likely):
    found = mark(nouns.split(), truth.split(), likely.split(), WORDS, alike)
    return tuple("".join(str(int(m)) for m in part) for part in found)


@pytest.mark.parametrize(
    ("nouns", "truth", "likely", "expected"),
    [
        ("tree", "tree", "sea", ("0", "1", "0")),
        ("leaf", "tree", "sea", ("0", "1", "0")),  # what a true word may be called
        ("leaf", "sea branch tree", "", ("0", "010", "")),  # the first word that it may stand for
        ("branch", "branch tree", "", ("0", "01", "")),  # what words may be called goes before the words
        ("tree", "tree tree", "", ("0", "10", "")),  # the second copy is never marked
        ("tree tree", "tree", "", ("00", "1", "")),  # a repeated noun counts again
        ("lamp", "lamp", "lamp", ("0", "0", "0")),  # harmless words mark nothing, but are counted
        ("pond", "tree", "lamp", ("1", "0", "0")),
        ("bough", "tree", "", ("0", "1", "")),  # like the branch that a tree may be called
        ("log", "tree", "", ("1", "0", "")),  # like what is alike is not alike
        ("sea", "tree", "sea", ("1", "0", "1")),
        ("wave", "tree", "sea boat", ("1", "0", "10")),  # the first likely word
        ("wave", "boat", "sea", ("0", "1", "0")),  # true words go first
        ("pond", "tree", "boat sea", ("1", "0", "01")),  # by likeness alone
        ("bough", "branch", "log", ("0", "1", "1")),  # both made up and true, by likeness
        ("log", "tree", "bough boat log", ("1", "0", "101")),  # equal to one, and then like an earlier one
        ("", "tree", "sea", ("", "0", "0")),
    ],
)
def test_marks(nouns, truth, likely, expected):
    assert marks(nouns, truth, likely) == expected


def test_a_true_word_must_have_names():
    with pytest.raises(ValueError, match=r"relation\.json has no word 'gnome'"):
        marks("tree", "gnome", "")


TRUTHS = [
    {"type": "generative", "truth": ["tree", "sea", "boat"], "hallu": ["bough", "log", "branch"]},
    {"type": "generative", "truth": ["pond"], "hallu": ["boat"]},
    {"type": "discriminative-hallucination", "truth": "no"},
    {"type": "discriminative-hallucination", "truth": "no"},
    {"type": "discriminative-attribute-state", "truth": "yes"},
    {"type": "discriminative-attribute-state", "truth": "no"},
    {"type": "discriminative-attribute-number", "truth": "no"},
    {"type": "discriminative-attribute-action", "truth": "yes"},
    {"type": "discriminative-relation", "truth": "yes"},
    {"type": "relation", "truth": "no"},
]
GENERATIVE, CLOSED = range(2), range(2, 10)
FILES = {
    "all": range(10),
    "generative": GENERATIVE,
    "discriminative": CLOSED,
    "discriminative-existence": range(2, 4),
    "discriminative-attribute": range(4, 8),
    "discriminative-relation": range(8, 10),
}


@pytest.fixture
def data(tmp_path):
    """Two pictures to describe; the second's questions of yes and no are about one picture, but for existence."""
    folder = tmp_path / "data"
    (folder / "query").mkdir(parents=True)
    (folder / "annotations.json").write_text(json.dumps([{"id": i + 1, **t} for i, t in enumerate(TRUTHS)]))
    (folder / "relation.json").write_text(json.dumps(ASSOCIATION))
    (folder / "safe_words.txt").write_text("lamp\nline")
    image = lambda i: f"A_{i + 1 if i < 4 else 9}.jpg"
    for name, numbers in FILES.items():
        rows = [{"id": i + 1, "image": image(i), "query": f"Query {i + 1}?"} for i in numbers]
        (folder / "query" / f"query_{name}.json").write_text(json.dumps(rows, indent=1))
    return folder


def tags(text):
    """Takes an s off words, and tags those with a capital as no nouns."""
    return [(word.lower().removesuffix("s"), "JJ" if word[0].isupper() else "NNS") for word in text.split()]


def score(data, rows, **options):
    return amber.score(data, rows, language=Language("fake", str.split, tags), alike=alike, **options)


def rows(*texts, first=1):
    return [{"key": str(i), "text": text} for i, text in enumerate(texts, first)]


# Existence: one right, one neither. State: both wrong. Number: right. Action: neither. Relation: both "No".
SAID = ("No", "no", "No", "Yes", "No", "yes.", "No", "No")
# The first has 5 nouns that count: a tree, a log that it makes up, two lamps, a wave; the second none.
DESCRIBED = ("Tree trees logs lamps lamps waves gnomes", "A Pond")


def test_descriptions_counted_by_hand(data):
    result = score(data, rows(*DESCRIBED), part="generative")
    # The log equals what is likely made up, and is like the bough; it is like the boat too, which is true.
    assert result["counts"] == {"CHAIR": [0, 5], "Cover": [3, 4], "Hal": [0, 2], "Cog": [2, 4]}
    assert (result["CHAIR"], result["Cover"], result["Hal"], result["Cog"]) == (0, 75, 0, 50)
    assert result["official"] == {"CHAIR": 0.0, "Cover": 75.0, "Hal": 0.0, "Cog": 50.0}
    result = score(data, rows("ponds lamps trees", "trees boats"), part="generative")
    assert result["counts"] == {"CHAIR": [2, 5], "Cover": [2, 4], "Hal": [1, 2], "Cog": [1, 4]}
    assert result["items"]["CHAIR"] == [[0, 3], [2, 2]]
    assert result["items"]["Hal"] == [[0, 1], [1, 1]]
    assert (result["CHAIR"], result["Hal"]) == (40, 50)
    assert "accuracy" not in result


def test_nouns_of_every_kind_count_as_they_are_written(data):
    tagger = Language("tagged", str.split, lambda text: [tuple(word.split("/")) for word in text.split()])
    said = rows("sea/NN log/NNS boat/NNP pond/NNPS wave/VB tree/NNX Pond/NN", "leaf/JJ")
    result = amber.score(data, said, part="generative", language=tagger, alike=str.__eq__)
    assert result["items"]["CHAIR"] == [[2, 5], [0, 0]]  # whatever begins with NN; the pond and the log are made up


def test_the_start_of_denominators_shows_in_small_counts(data):
    result = score(data, rows("trees", "trees"), part="generative")
    assert result["official"] == {"CHAIR": 50.0, "Cover": 25.0, "Hal": 50.0, "Cog": 0.0}
    result = score(data, rows("Nothing", "trees"), part="generative")
    assert (result["CHAIR"], result["official"]["CHAIR"]) == (100, 99.9)  # 1/1.001
    result = score(data, rows("Nothing", "Nothing"), part="generative")
    assert math.isnan(result["CHAIR"])
    assert result["official"] == {"CHAIR": 0.0, "Cover": 0.0, "Hal": 0.0, "Cog": 0.0}  # 100 - 2/2.001 rounds to 0.0
    # Of one caption the script counts whether it is clean, so that the start shows where it is: 100 - 1/1.001.
    (data / "query" / "query_generative.json").write_text('[{"id": 2, "image": "A", "query": "?"}]')
    assert score(data, rows("trees", first=2), part="generative")["official"]["Hal"] == 100.0
    assert score(data, rows("ponds", first=2), part="generative")["official"]["Hal"] == 0.1


def test_yes_and_no_counted_by_hand(data):
    result = score(data, rows(*SAID, first=3), part="discriminative")
    expected = {  # right / asked, rightly no / said no, rightly no / truly no
        "": ([3, 8], [3, 5], [3, 5]),
        "existence/": ([1, 2], [1, 1], [1, 2]),
        "attribute/": ([1, 4], [1, 2], [1, 2]),
        "state/": ([0, 2], [0, 1], [0, 1]),
        "number/": ([1, 1], [1, 1], [1, 1]),
        "action/": ([0, 1], [0, 0], [0, 0]),
        "relation/": ([1, 2], [1, 2], [1, 1]),
    }
    for group, counts in expected.items():
        found = tuple(result["counts"][f"{group}{name}"] for name in ("accuracy", "precision", "recall"))
        assert found == counts, group
    assert result["accuracy"] == 37.5
    assert result["f1"] == pytest.approx(60)
    assert result["relation/f1"] == pytest.approx(200 / 3)
    assert math.isnan(result["action/f1"])
    assert result["items"]["accuracy"] == [[1, 1], [0, 1], [2, 6]]  # by picture
    assert result["items"]["existence/precision"] == [[1, 1], [0, 0], [0, 0]]
    for name, pairs in result["items"].items():
        below = sum(b for _, b in pairs)
        share = 100 * sum(a for a, _ in pairs) / below if below else math.nan
        assert result[name] == pytest.approx(share, nan_ok=True), name
    # By hand: 1/1.001 = 99.9, 1/2.001 = 50.0; F1 of .999 and .5 over 1.499 + .001 is 66.6, and with .0001 66.6 too.
    official = result["official"]
    assert [official[f"existence/{name}"] for name in ("accuracy", "precision", "recall")] == [50.0, 99.9, 50.0]
    assert official["existence/f1"] == 66.6
    # Attributes begin thrice: 1/4.003 = 25.0, 1/2.003 = 49.9.
    assert [official[f"attribute/{name}"] for name in ("accuracy", "precision", "recall")] == [25.0, 49.9, 49.9]
    assert official["attribute/f1"] == 49.9
    assert official["number/f1"] == 99.9
    assert official["state/f1"] == official["action/f1"] == 0.0


@pytest.mark.parametrize(
    ("kind", "said", "f1"),
    [  # All but the last are no in truth.
        ("discriminative-hallucination", "No Yes Yes No", 39.9),  # P 50.0, R 33.3: .333 / (.833 + .001)
        ("discriminative-attribute-state", "No Yes Yes No", 40.0),  # and .333 / (.833 + .0001)
        ("discriminative-attribute-state", "No No Yes Yes", 79.9),  # P 100.0, R 66.6: 80.0 without an epsilon
    ],
)
def test_f1_is_of_rounded_numbers_with_an_epsilon(data, kind, said, f1):
    group = "existence" if kind.endswith("hallucination") else "state"
    truths = [{"id": i, "type": kind, "truth": truth} for i, truth in enumerate(("no", "no", "no", "yes"))]
    (data / "annotations.json").write_text(json.dumps(truths))
    queries = [{"id": i, "image": "A", "query": "?"} for i in range(4)]
    (data / "query" / "query_discriminative.json").write_text(json.dumps(queries))
    result = score(data, rows(*said.split(), first=0), part="discriminative")
    assert result["official"][f"{group}/f1"] == f1


def test_only_yes_and_no_to_the_letter_are_answers(data):
    said = ("No", "No.", "NO", " No", "no", "No, it is", "Yes", "Not")
    strict = score(data, rows(*said, first=3), part="discriminative")
    assert strict["counts"]["precision"] == [1, 1]
    assert strict["counts"]["accuracy"] == [2, 8]
    normalised = score(data, rows(*said, first=3), part="discriminative", variant="normalised")
    assert normalised["counts"]["precision"] == [4, 6]
    assert normalised["counts"]["accuracy"] == [5, 8]
    assert normalised["variant"] == "normalised"


@pytest.mark.parametrize(
    ("said", "accuracy", "precision", "recall"),
    [("No", 62.5, 62.5, 100), ("Yes", 37.5, math.nan, 0), ("", 0, math.nan, 0)],
)
def test_constant_answers(data, said, accuracy, precision, recall):
    result = score(data, rows(*[said] * 10))
    assert (result["accuracy"], result["recall"]) == (accuracy, recall)
    assert result["precision"] == pytest.approx(precision, nan_ok=True)
    assert math.isnan(result["CHAIR"])
    assert result["Cover"] == 0


def test_all_parts_give_one_score(data):
    result = score(data, rows("ponds lamps trees", "trees boats", *SAID))
    assert result["AMBER"] == pytest.approx((100 - 40 + 60) / 2)
    official = result["official"]
    assert (official["CHAIR"], official["f1"]) == (40.0, 60.0)
    assert official["AMBER"] == 60.0
    assert (result["part"], result["language"], result["similarity"]) == ("all", "fake", "given")


@pytest.mark.parametrize(("part", "count"), [("existence", 2), ("attribute", 4), ("relation", 2)])
def test_parts_alone(data, part, count):
    asked = amber.questions(data, part=part)
    assert len(asked) == count
    result = score(data, [{"id": int(q.key), "response": "No"} for q in asked], part=part)
    assert {f"{part}/f1"} <= result["official"].keys()
    assert "f1" not in result


def test_prompts_and_layouts_of_answers(data):
    asked = amber.questions(data, prompts="yes_no")
    assert asked[0].text == "Query 1?"
    assert asked[2].text == "Query 3?\nPlease answer yes or no."
    assert asked[2][2:] == ("A_3.jpg", {"question_id": 3, "id": 3, "prompt": asked[2].text})
    assert amber.questions(data)[2].text == "Query 3?"
    texts = ("ponds", "trees", *SAID)
    items = score(data, rows(*texts))["items"]
    assert score(data, [{"id": i, "response": t} for i, t in enumerate(texts, 1)])["items"] == items
    assert score(data, [{"question_id": i, "text": t} for i, t in enumerate(texts, 1)][::-1])["items"] == items
    with pytest.raises(ValueError, match=r"8 have no answer \(first '3'\)"):
        score(data, rows("ponds", "trees"))
    with pytest.raises(ValueError, match="10 have no answer"):
        score(data, [])
    with pytest.raises(ValueError, match="id and response; the first has id, text"):
        score(data, [{"id": 1, "text": ""}])


def test_the_plain_variant_needs_nothing(data):
    result = amber.score(data, rows("Trees, ponds; waves!", "A boughs", *SAID), variant="plain")
    assert result["counts"]["CHAIR"] == [2, 4]  # the pond, and the bough that only likeness would let pass
    assert result["counts"]["Cover"] == [2, 4]
    assert (result["language"], result["similarity"]) == ("plain", "equal")


@pytest.mark.parametrize("variant", ["official", "normalised"])
def test_nouns_are_those_of_nltk_if_no_other_reads_them(data, monkeypatch, variant):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ValueError, match="words are read with nltk"):
        amber.score(data, rows("trees", "trees"), part="generative", variant=variant, alike=alike)


def test_the_table_of_likeness(data, tmp_path):
    with pytest.raises(ValueError, match=r"similarity\.json is missing; make it once"):
        read_table(data, [])
    vocabulary = read_words(data).vocabulary
    assert vocabulary == ["tree", "branch", "leaf", "bough", "log", "sea", "wave", "boat", "pond", "lamp"]
    similarity = lambda word, other: 1.0 if alike(word, other) else 0.8
    write_table(data, similarity, "hand")
    found, made_by = read_table(data, vocabulary)
    assert made_by == "hand"
    assert all(found(word, other) == alike(word, other) for word in vocabulary for other in vocabulary)
    language = Language("fake", str.split, tags)
    texts = rows("ponds logs", "trees boats", *SAID)
    result = amber.score(data, texts, language=language)
    assert result["similarity"] == "hand"
    assert result["counts"] == score(data, texts)["counts"]
    with pytest.raises(ValueError, match=r"lacks 1 words of relation\.json \(first 'elf'\)"):
        read_table(data, [*vocabulary, "elf"])
    (data / "similarity.json").write_text('{"above": 0.7, "alike": {}}')
    with pytest.raises(ValueError, match=r"more alike than 0\.8"):
        read_table(data, vocabulary)


def test_likeness_is_that_of_large_word_vectors_if_no_other_is_given(data, monkeypatch):
    class Text(str):
        def similarity(self, other):
            return 0.81 if {self, other} == {"tree", "log"} else 0.8

    def load(model):
        nlp = lambda word: Text(word)
        nlp.meta = {"version": model[-2:]}
        return nlp

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(__version__="1", load=load))
    write_table(data)
    found, made_by = read_table(data, ASSOCIATION)
    assert made_by == "spacy 1, en_core_web_lg lg"
    assert [word for word in ASSOCIATION if found("log", word)] == ["tree"]


def test_damaged_files_are_named(data):
    broken = json.loads((data / "annotations.json").read_text())
    broken[2]["truth"] = "maybe"
    (data / "annotations.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"annotations\.json, id 3, is not an annotation"):
        amber.questions(data)
    assert len(amber.questions(data, part="generative")) == 2
    (data / "annotations.json").write_text(json.dumps(broken[:1]))
    with pytest.raises(ValueError, match="says nothing of question 2"):
        amber.questions(data)
    (data / "query" / "query_all.json").write_text('[{"id": 1, "image": "A"}]')
    with pytest.raises(ValueError, match="question 1, has no query"):
        amber.questions(data)
    (data / "query" / "query_all.json").unlink()
    with pytest.raises(ValueError, match=r"query_all\.json is missing; name the folder data"):
        amber.questions(data)
    (data / "safe_words.txt").unlink()
    with pytest.raises(ValueError, match=r"safe_words\.txt is missing"):
        read_words(data)
