"""Object HalBench and CHAIR: every rule by cases counted by hand."""

import base64
import json
import math
import sys
import types

import pytest

from napo_jax.evals import chair
from napo_jax.evals.chair_words import Vocabulary, find_listed_objects, find_objects, parse_list, read_vocabulary
from napo_jax.evals.nlp import Language, nltk_language, plain, spacy_language

SYNONYMS = """\
creature, human , little one, baby
hound, puppy, hot hound
potty, toilet
bench, seat
goblet, wine glass, glass
rails, train
"""
ASKED = ((7, "What is there?"), (8, "What is there?"), (9, "Describe it."))


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def data(tmp_path):
    """Three pictures: 7 has a bench and a hound, 8 a potty, 9 nothing by instances and a creature by a caption."""
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, "synonyms_refine.txt", SYNONYMS)
    rows = [{"image_id": str(i), "question": q, "image": base64.b64encode(b"p%d" % i).decode()} for i, q in ASKED]
    write(folder, "questions.jsonl", "\n".join(map(json.dumps, rows)))
    categories = [{"id": 1, "name": "seat"}, {"id": 2, "name": "hound"}, {"id": 3, "name": "toilet"}]
    kinds = {
        "instances_train2014": ([7], [{"image_id": 7, "category_id": 1}, {"image_id": 7, "category_id": 1}]),
        "instances_val2014": ([8, 9, 1], [{"image_id": 8, "category_id": 3}, {"image_id": 1, "category_id": 2}]),
        "captions_train2014": ([7], [{"image_id": 7, "caption": "Some PUPPIES"}]),
        "captions_val2014": ([8, 9, 1], [{"image_id": 9, "caption": "a baby"}, {"image_id": 1, "caption": "a train"}]),
    }
    for name, (images, annotations) in kinds.items():
        content = {"images": [{"id": i} for i in images], "annotations": annotations, "categories": categories}
        write(folder, f"{name}.json", content)
    return folder


def answers(*texts):
    return [{"key": str(i), "text": text} for i, text in enumerate(texts)]


def spaced():
    """Returns a back end that splits at spaces; a word's tag is NN, or what it says behind a slash."""
    tag = lambda word: tuple(word.split("/")) if "/" in word else (word, "NN")
    return Language("spaced", str.split, lambda text: [tag(word) for word in text.split()])


def determined():
    """Returns the same of what begins with an article, which is no noun."""
    return Language("determined", str.split, lambda text: [("a", "DT"), *spaced().tagged(text[2:])])


def test_words_of_a_line_stand_for_its_first(data):
    vocabulary = read_vocabulary(data)
    assert vocabulary.nodes["human"] == "creature"  # without the stray space
    assert vocabulary.nodes["hound"] == "hound"
    assert vocabulary.pairs["wine glass"] == "wine glass"
    assert "" not in vocabulary.nodes
    write(data, "synonyms.txt", SYNONYMS)
    with pytest.raises(ValueError, match="has 2"):
        read_vocabulary(data)
    (data / "synonyms.txt").unlink()
    (data / "synonyms_refine.txt").unlink()
    with pytest.raises(ValueError, match="has 0"):
        read_vocabulary(data)


@pytest.mark.parametrize(
    ("lemmas", "expected"),
    [
        ("a puppy and a puppy see a hound", ["hound"] * 3),  # every mention
        ("a baby", ["creature"]),
        ("a baby cat", []),  # no creature, and no cat in this list
        ("an adult animal", []),
        ("a passenger train", ["rails"]),
        ("the train track", []),
        ("a hot hound", ["hound"]),
        ("a little one", ["creature"]),
        ("wine glas", ["goblet"]),
        ("wine glass", ["goblet"]),  # once, though glass is a word too
        ("hot hound hound", ["hound", "hound"]),  # pairs from the left
        ("a seat", ["bench"]),
        ("the seat of the toilet", ["potty"]),
        ("a toilet seat", ["potty"]),
        ("a toilet seat and a seat", ["potty"]),
        ("the seat of the toilet and a seat", ["potty"]),  # all seats go
        ("a potty and a seat", ["potty", "bench"]),  # the word itself must be there, not its node
        ("bow tie", []),
        ("", []),
    ],
)
def test_objects_by_words(data, lemmas, expected):
    assert find_objects(lemmas.split(), read_vocabulary(data)) == expected


ANIMALS = ["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub"]


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("home plate", []),
        ("train track", []),
        ("bow tie", ["tie"]),
        ("toilet seat", ["toilet"]),
        ("passenger jet", ["airplane"]),
        ("passenger train", ["train"]),
        *((f"{age} {animal}", [animal]) for age in ("baby", "adult") for animal in ANIMALS),
    ],
)
def test_pairs_of_the_rule_where_each_word_is_an_object_too(tmp_path, pair, expected):
    # With COCO's own list, a bow tie is a tie by its synonyms as well, and no plate counts: the rule would not show.
    lines = ["person, baby, adult, passenger", "plate, home", "tie, bow", "airplane, jet", "train, track"]
    write(tmp_path, "synonyms.txt", "\n".join([*lines, "toilet", "chair, seat", *ANIMALS]))
    vocabulary = read_vocabulary(tmp_path)
    assert all(find_objects([word], vocabulary) for word in pair.split())
    assert find_objects(pair.split(), vocabulary) == expected
    # A judge's object that is no pair is one run of nouns, in no list: no seat is dropped there beside a toilet.
    assert find_listed_objects("four words in it", [pair], vocabulary, spaced()) == expected


def test_a_bow_tie_that_a_judge_lists_beside_a_tie_is_one(tmp_path):
    write(tmp_path, "synonyms.txt", "tie, bow, bow tie")  # as COCO's list has it: the rule's "tie" comes before that
    listed = ["bow tie", "tie", "bow"]
    assert find_listed_objects("a b c d", listed, read_vocabulary(tmp_path), determined()) == ["tie", "tie"]


def test_plain_words(data):
    vocabulary = read_vocabulary(data)
    read = plain([*vocabulary.nodes, *vocabulary.pairs]).lemmas
    assert read("Puppies, hounds; glasses: TOILETS' benches") == ["puppy", "hound", "glass", "toilet", "bench"]
    assert read("rails trains") == ["rails", "train"]  # what is known stays
    assert plain(["knife", "wolf"]).lemmas("knives wolves lives") == ["knife", "wolf", "lives"]


def test_counted_by_hand(data):
    # 7 is a bench and a hound: of four mentions two goblets are wrong. 8 is a potty: right, twice. 9: names nothing.
    rows = answers("Two hounds, a bench, a glass and a wine glass.", "A toilet is a  potty.", "Sand and sky.")
    result = chair.score(data, rows, variant="plain")
    assert result["counts"] == {
        "answers": 3,
        "naming": 2,
        "hallucinated": 1,
        "mentions": 6,
        "wrong_mentions": 2,
        "found": 3,  # distinct
        "there": 4,
        "words": 10 + 6 + 3,  # two spaces make an empty word
    }
    assert result["CHAIRs"] == pytest.approx(100 / 3)
    assert result["CHAIRs_refine"] == 50
    assert result["CHAIRi"] == pytest.approx(100 / 3)
    assert result["correct_rate"] == 50
    assert result["object_correct_rate"] == pytest.approx(200 / 3)
    assert result["obj_rec"] == 75
    assert result["avg_word_len"] == pytest.approx(19 / 3)
    assert result["official"]["scorer"] == {
        "CHAIRs": "33.3",
        "CHAIRs_refine": "50.0",
        "CHAIRi": "33.3",
        "avg_word_len": "6.3",
    }
    assert result["official"]["summary"]["object_correct_rate"] == "66.67"
    assert result["official"]["summary"]["CHAIRs_refine"] == "50.00"
    assert (result["prompts"], result["variant"], result["language"]) == ("official", "plain", "plain")
    for name, pairs in result["items"].items():
        assert len(pairs) == 3
        share = sum(above for above, _ in pairs) / sum(below for _, below in pairs)
        assert result[name] == pytest.approx(share * (1 if name == "avg_word_len" else 100)), name


def test_a_constant_answer_and_no_answer(data):
    result = chair.score(data, answers(*["a puppy"] * 3), variant="plain")
    assert (result["CHAIRs"], result["CHAIRs_refine"]) == (pytest.approx(200 / 3),) * 2
    assert result["obj_rec"] == 25
    result = chair.score(data, answers("", "", ""), variant="plain")
    assert result["CHAIRs"] == 0
    assert all(math.isnan(result[name]) for name in ("CHAIRs_refine", "CHAIRi", "correct_rate", "object_correct_rate"))
    assert (result["obj_rec"], result["avg_word_len"]) == (0, 1)  # an empty text splits into one word


def test_released_rows_are_joined_by_picture_and_prompt(data):
    rows = [
        {"question_id": 0, "image_id": 9, "question": "Describe it.", "answer": "Assistant: sand"},
        {"question_id": 0, "image_id": 8, "prompt": "What is there?", "text": " a hound "},
        {"question_id": 1, "image_id": "7", "prompt": "What is there?", "text": "a bench"},
    ]
    result = chair.score(data, rows, variant="released", language=spaced())
    assert result["counts"]["words"] == 1 + 2 + 2
    assert result["items"]["CHAIRs"] == [[0, 1], [1, 1], [0, 1]]  # in the order of the questions
    with pytest.raises(ValueError, match="1 have no answer"):
        chair.score(data, rows[:2], variant="plain")
    with pytest.raises(ValueError, match="answered again"):
        chair.score(data, [*rows, rows[0]], variant="plain")
    with pytest.raises(ValueError, match="not among the questions"):
        chair.score(data, [*rows, rows[0] | {"image_id": 10}], variant="plain")
    with pytest.raises(ValueError, match="a key, or image_id and prompt"):
        chair.score(data, [{"question_id": 0, "text": "a"}], variant="plain")


def test_what_is_there(data):
    vocabulary = read_vocabulary(data)
    read = lambda text: find_objects(plain(vocabulary.nodes).lemmas(text), vocabulary)
    there = chair.read_ground_truth(data, [7, 8, 9], vocabulary, read)
    assert there == {7: {"bench", "hound"}, 8: {"potty"}, 9: {"creature"}}
    (data / "captions_train2014.json").unlink()
    with pytest.raises(ValueError, match=r"1 pictures \(first 7\) are in no captions_train2014"):
        chair.read_ground_truth(data, [7, 8, 9], vocabulary, read)
    assert chair.read_ground_truth(data, [8, 9], vocabulary, read) == {8: {"potty"}, 9: {"creature"}}
    with pytest.raises(ValueError, match="lacks 'hound'"):
        chair.read_ground_truth(data, [8], vocabulary._replace(nodes={"seat": "seat", "toilet": "toilet"}), read)
    write(data, "captions_val2014.json", '{"images": [')
    with pytest.raises(ValueError, match=r"captions_val2014\.json is not JSON"):
        chair.read_ground_truth(data, [8], vocabulary, read)


def test_questions_and_their_pictures(data, tmp_path):
    asked = chair.questions(data)
    assert [q.key for q in asked] == ["0", "1", "2"]
    assert asked[2].text == "Describe it."
    assert asked[2].row == {"question_id": 2, "image_id": 9, "prompt": "Describe it."}
    assert chair.write_pictures(data, tmp_path / "pictures") == 3
    with pytest.raises(ValueError, match=r"7.jpg is a file; name a folder to write pictures to"):
        chair.write_pictures(data, tmp_path / "pictures" / "7.jpg")
    assert [(tmp_path / "pictures" / q.image).read_bytes() for q in asked] == [b"p7", b"p8", b"p9"]
    write(data, "questions.jsonl", {"image_id": 7, "question": "What?", "image_path": "a/b.png"})
    assert chair.questions(data)[0].image == "a/b.png"
    write(data, "questions.jsonl", {"image_id": 7, "question": "What?"})
    with pytest.raises(ValueError, match="question 1 has no image_path"):
        chair.write_pictures(data, tmp_path)
    write(data, "questions.jsonl", {"image_id": 7, "question": "What?", "image": "é"})
    with pytest.raises(ValueError, match="question 1 has no image_path and no image in base64"):
        chair.write_pictures(data, tmp_path)
    write(data, "questions.jsonl", [{"image_id": 7, "question": "What?", "image": name} for name in ("YQ==", "Yg==")])
    with pytest.raises(ValueError, match="question 2 has another picture than one before of the same image_id"):
        chair.write_pictures(data, tmp_path)
    write(data, "questions.jsonl", {"question": "What?"})
    with pytest.raises(ValueError, match="question 1, has no image_id"):
        chair.questions(data)
    (data / "questions.jsonl").unlink()
    with pytest.raises(ValueError, match=r"obj_halbench_300_with_image.jsonl and questions.jsonl, has 0"):
        chair.questions(data)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (["puppy", "puppy", "hound"], ["hound", "hound"]),  # once by its own word, not by its node
        (["red/JJ puppy"], ["hound"]),
        (["puppy/NNS", "human/NNP", "seat/NNPS"], ["hound", "creature", "bench"]),
        (["old puppy"], []),  # a run of nouns is one name
        (["nice hot hound"], ["hound"]),  # two words that are one object outdo the run
        (["toilet", "seat"], ["potty"]),
        (["seat", "seat"], ["bench"]),
        (["puppy of/IN human"], ["hound", "creature"]),
        (["hot hound of/IN human"], ["hound"]),  # where there are two words, the rest is not read
        (["baby cat"], []),
        ([], []),
    ],
)
def test_objects_that_a_judge_lists(data, listed, expected):
    tagger = determined()
    assert find_listed_objects("four words in it", listed, read_vocabulary(data), tagger) == expected
    assert find_listed_objects("three words only", listed, read_vocabulary(data), tagger) == []


def test_a_list_in_a_reply():
    assert parse_list('["a", "b"]') == ["a", "b"]
    assert parse_list('I see:\n["a"]\n') == ["a"]
    assert parse_list("[]") == []
    for reply in ('["a"]\nThat is all.', "none\n[]", "none", "()", '{"a": 1}', "[1]", '["a"'):
        with pytest.raises(ValueError, match="JSON list"):
            parse_list(reply)


def test_judged_replies_are_scored_without_a_judge(data, tmp_path):
    rows = answers("Assistant: there are a puppy, another puppy", "one glass here too", "a hound")
    write(tmp_path, "prompt.txt", "Q {question} A {answer} {{")
    replies = {"Q What is there? A one glass here too {{": ["?", "?", '["glass", "glass"]']}
    seen = []

    def judge(prompt):
        seen.append(prompt)
        return replies[prompt].pop(0) if prompt in replies else '["puppy", "puppy"]'

    kept = list(chair.ask_judge(data, rows, tmp_path / "prompt.txt", judge, "j-1"))
    assert len(seen) == 4  # the third answer has two words, and names nothing unasked
    assert seen[0] == "Q What is there? A there are a puppy, another puppy {{"
    write(tmp_path, "replies.jsonl", "\n".join(map(json.dumps, kept)))
    score = lambda rows: chair.score(
        data, rows, variant="judged", replay=tmp_path / "replies.jsonl", language=spaced(), tagger=spaced()
    )
    # The tagger calls "a" a noun, so that "a puppy" is no object: what is tagged decides.
    assert score(rows)["counts"]["mentions"] == 0
    tagger = determined()
    result = chair.score(
        data, rows, variant="judged", replay=tmp_path / "replies.jsonl", language=spaced(), tagger=tagger
    )
    assert (result["judge"], result["tagger"]) == ("j-1", "determined")
    assert result["counts"]["mentions"] == 2  # by words, it would be four
    assert result["counts"]["wrong_mentions"] == 2  # the language knows no puppies in the reference caption
    with pytest.raises(ValueError, match=r"1 replies are about other answers \(first '2'\)"):
        score([*rows[:2], {"key": "2", "text": "another one"}])
    for wrong, match in (
        (kept[:2], "the judge's replies.* 1 have no answer"),
        ([*kept[:2], kept[2] | {"judge": "j-2"}], "j-1, j-2"),
        ([{k: v for k, v in row.items() if k != "judge"} for row in kept], "must name its judge"),
    ):
        write(tmp_path, "replies.jsonl", "\n".join(map(json.dumps, wrong)))
        with pytest.raises(ValueError, match=match):
            score(rows)


def test_a_reply_that_cannot_be_read_ends_the_asking(data, tmp_path):
    write(tmp_path, "prompt.txt", "{} {}")
    rows = answers(*["what a fine day it is"] * 3)
    with pytest.raises(ValueError, match="'0' cannot be read after 3 tries"):
        list(chair.ask_judge(data, rows, tmp_path / "prompt.txt", lambda prompt: "no idea", "j"))
    write(tmp_path, "prompt.txt", "{question}")
    with pytest.raises(ValueError, match=r"must hold \{question\} \{answer\} once each.*; it has \{question\}"):
        list(chair.ask_judge(data, rows, tmp_path / "prompt.txt", str, "j"))
    with pytest.raises(ValueError, match="is not there"):
        list(chair.ask_judge(data, rows, tmp_path / "nothing.txt", str, "j"))


def test_a_judge_goes_with_its_variant(data):
    with pytest.raises(ValueError, match="variant 'judged' and no other"):
        chair.score(data, answers("", "", ""), variant="judged")
    with pytest.raises(ValueError, match="variant must be one of released, judged, plain"):
        chair.score(data, answers("", "", ""), variant="original")


def fake_nltk(missing=None):
    def find(name):
        if name == missing:
            raise LookupError(
                f"\n*****\n  Resource \x1b[93m{name}\x1b[0m not found.\n  >>> nltk.download('{name}')\n*****"
            )

    class WordNetLemmatizer:
        def lemmatize(self, word):
            find("wordnet")
            return word.removesuffix("s")

    def word_tokenize(text):
        find("punkt_tab")
        return text.replace(".", " .").split()

    def pos_tag(tokens):
        find("averaged_perceptron_tagger_eng")
        return [(token, "NNS" if token.endswith("s") else "X") for token in tokens]

    stem = types.SimpleNamespace(WordNetLemmatizer=WordNetLemmatizer)
    return types.SimpleNamespace(__version__="0", stem=stem, word_tokenize=word_tokenize, pos_tag=pos_tag)


def test_nltk(monkeypatch, data):
    monkeypatch.setitem(sys.modules, "nltk", fake_nltk())
    language = nltk_language()
    assert language.name == "nltk 0"
    assert language.lemmas("hounds bark.") == ["hound", "bark", "."]
    assert language.tagged("hounds bark") == [("hound", "NNS"), ("bark", "X")]
    result = chair.score(data, answers("Hounds.", "Hounds.", "Hounds."))
    assert (result["language"], result["counts"]["mentions"]) == ("nltk 0", 3)  # "Hounds" is read in lower case
    for name in ("punkt_tab", "wordnet"):
        monkeypatch.setitem(sys.modules, "nltk", fake_nltk(name))
        with pytest.raises(ValueError, match=f"^NLTK's {name} is not .* run: python -m nltk.downloader {name}$"):
            nltk_language().lemmas("a")
    monkeypatch.setitem(sys.modules, "nltk", fake_nltk("averaged_perceptron_tagger_eng"))
    with pytest.raises(ValueError, match=r"downloader averaged_perceptron_tagger_eng$"):
        nltk_language().tagged("a")
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ValueError, match="pip install nltk"):
        nltk_language()


def test_spacy(monkeypatch):
    token = types.SimpleNamespace(lemma_="hound", tag_="NNS")

    def load(model):
        if model != "m":
            raise OSError("[E050] Can't find model")
        nlp = lambda text: [token] * len(text.split())
        nlp.meta = {"version": "3"}
        return nlp

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(__version__="1", load=load))
    assert spacy_language("m").name == "spacy 1, m 3"
    assert spacy_language("m").lemmas("hounds") == ["hound"]
    assert spacy_language("m").tagged("hounds") == [("hound", "NNS")]
    with pytest.raises(ValueError, match=r"^spaCy has no other on this machine; run: python -m spacy download other$"):
        spacy_language("other")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match="pip install spacy"):
        spacy_language("m")


def test_what_a_judge_lists_is_read_by_spacy_and_captions_by_nltk(monkeypatch, data, tmp_path):
    token = lambda word: types.SimpleNamespace(lemma_=word.removesuffix("s"), tag_="DT" if word == "a" else "NN")

    def load(model):
        nlp = lambda text: [token(word) for word in text.split()]
        nlp.meta = {"version": model[-3:]}
        return nlp

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(__version__="1", load=load))
    monkeypatch.setitem(sys.modules, "nltk", fake_nltk())
    rows = answers(*["what a fine day"] * 3)
    kept = [row | {"judge": "j", "reply": '["human", "humans", "seat"]'} for row in rows]
    write(tmp_path, "replies.jsonl", "\n".join(map(json.dumps, kept)))
    result = chair.score(data, rows, variant="judged", replay=tmp_path / "replies.jsonl")
    assert (result["tagger"], result["language"]) == ("spacy 1, en_core_web_trf trf", "nltk 0")
    assert result["counts"]["mentions"] == 3 * 2  # a human once, and a seat


def test_a_vocabulary_is_named_with_its_digest(data):
    before = read_vocabulary(data)
    write(data, "synonyms_refine.txt", SYNONYMS + "tree\n")
    after = read_vocabulary(data)
    assert isinstance(after, Vocabulary)
    assert before.source != after.source
    assert after.source.startswith("synonyms_refine.txt ")
