"""AMBER: what a description names that is not there, how much it covers, and answers to questions of yes and no.

In the generative part, a picture comes with words that are true of it and words that are likely to be made up. In the
discriminative one, a question asks about existence, an attribute or a relation, and "no" counts as the positive answer.
"""

import functools
import operator
from collections import Counter
from typing import NamedTuple

from etils import epath

from napo_jax.bias.words import words as split_words
from napo_jax.evals.amber_words import Alike, mark, read_table, read_words
from napo_jax.evals.answers import Question, choose, join, misfit, read_data
from napo_jax.evals.nlp import Language, is_noun, nltk_language, plain

NAME = "amber"

# What follows a question of the discriminative part.
PROMPTS = {"official": "", "yes_no": "\nPlease answer yes or no."}  # the second is VLMEvalKit's


class Variant(NamedTuple):
    """How answers are read."""

    strict: bool  # whether an answer must be "Yes" or "No" to the letter
    plain: bool  # whether every word counts as a noun, and only words that are equal are alike


VARIANTS = {
    "official": Variant(strict=True, plain=False),
    "normalised": Variant(strict=False, plain=False),  # the first word counts, whatever its case and punctuation
    "plain": Variant(strict=False, plain=True),  # needs neither NLTK nor spaCy; comparable with itself alone
}

_KINDS = {"attribute": ("state", "number", "action")}
_ATTRIBUTE = ("attribute", *_KINDS["attribute"])
_CLOSED = ("", "existence", *_ATTRIBUTE, "relation")  # "" is all questions of yes and no

# What can be asked and scored alone -> the file of its questions, and the groups that are reported.
PARTS = {
    "all": ("query_all.json", _CLOSED),
    "generative": ("query_generative.json", ()),
    "discriminative": ("query_discriminative.json", _CLOSED),
    "existence": ("query_discriminative-existence.json", ("existence",)),
    "attribute": ("query_discriminative-attribute.json", _ATTRIBUTE),
    "relation": ("query_discriminative-relation.json", ("relation",)),
}

_PUBLISHED = {"generative": 1004, "existence": 4924, "attribute": 4764 + 2072 + 792, "relation": 975 + 689}
_PUBLISHED["discriminative"] = sum(_PUBLISHED[part] for part in ("existence", "attribute", "relation"))
_PUBLISHED["all"] = _PUBLISHED["generative"] + _PUBLISHED["discriminative"]

_GENERATIVE = "generative"
_GROUPS = {  # that a type of question is in
    "discriminative-hallucination": ("", "existence"),
    "discriminative-attribute-state": ("", "attribute", "state"),
    "discriminative-attribute-number": ("", "attribute", "number"),
    "discriminative-attribute-action": ("", "attribute", "action"),
    "discriminative-relation": ("", "relation"),
    "relation": ("", "relation"),
}
_LAYOUTS = (("key", "text"), ("question_id", "text"), ("id", "response"))  # ours, the released code's, the official one
_ASKED = {"id": (int, str), "image": str, "query": str}  # a row of the file of questions
_START = 0.001  # Where the official script's denominators begin,
_EPSILON = {"existence": 0.001}  # and what is added to that of F1, else 0.0001.


def questions(data, *, prompts="official", part="all") -> list[Question]:
    """Reads what is asked.

    Args:
      data: the folder `data` of AMBER's code.
      prompts: a name out of `PROMPTS`.
      part: a name out of `PARTS`.
    """
    asked, _ = _read(data, prompts, part)
    return asked


def sizes(asked, *, part="all") -> dict[str, tuple[int, tuple[int, ...]]]:
    """Returns how many questions there are, and how many in that part of AMBER, by what is counted."""
    return {"questions": (len(asked), (_PUBLISHED[part],))}


def score(
    data,
    rows,
    *,
    prompts="official",
    variant="official",
    part="all",
    language: Language | None = None,
    alike: Alike | None = None,
) -> dict:
    """Turns answers into numbers.

    Args:
      data: the folder `data` of AMBER's code, and in it `similarity.json` (`amber_words.write_table`).
      rows: answers by `key`, by `question_id` with a `text`, or by `id` with a `response`.
      prompts: a name out of `PROMPTS`, that the questions were asked by.
      variant: a name out of `VARIANTS`.
      part: a name out of `PARTS`, that was asked.
      language: reads the nouns, if not NLTK.
      alike: whether a noun is like a word, if not what `similarity.json` says.

    Returns:
      A dict for JSON, in percent: CHAIR, Cover, Hal and Cog; accuracy, precision, recall and f1 of all questions and,
      as `existence/f1` and so on, of groups; and AMBER, the mean of 100 - CHAIR and f1.
    """
    read = choose(VARIANTS, variant, "variant")
    asked, annotations = _read(data, prompts, part)
    answers = _join(asked, rows)
    kinds = {question.key: annotations[question.key]["type"] for question in asked}
    described = [question for question in asked if kinds[question.key] == _GENERATIVE]
    result = {"prompts": prompts, "variant": variant, "part": part}
    found = []
    if described:
        words = read_words(data)
        language = language or (plain(words.vocabulary) if read.plain else nltk_language())
        made_by = "given"
        if alike is None:
            alike, made_by = (str.__eq__, "equal") if read.plain else read_table(data, words.vocabulary)
        result |= {"language": language.name, "similarity": made_by}
        known = frozenset(words.vocabulary)
        for question in described:
            nouns = [lemma for lemma, tag in language.tagged(answers[question.key]) if is_noun(tag) and lemma in known]
            truth, likely = (annotations[question.key][name] for name in ("truth", "hallu"))
            found.append(mark(nouns, truth, likely, words, alike))
    closed = [
        _Closed(q.image, _GROUPS[kinds[q.key]], annotations[q.key]["truth"], _read_answer(answers[q.key], read.strict))
        for q in asked
        if kinds[q.key] != _GENERATIVE
    ]
    values, official, counts, items = _describe(found) if found else ({}, {}, {}, {})
    for group in PARTS[part][1]:
        for whole, more in zip((values, official, counts, items), _decide(closed, group), strict=True):
            whole |= {f"{group}/{name}" if group else name: value for name, value in more.items()}
    for numbers in (values, official):
        if {"CHAIR", "f1"} <= numbers.keys():
            numbers["AMBER"] = (100 - numbers["CHAIR"] + numbers["f1"]) / 2
    return {**result, **values, "official": official, "counts": counts, "items": items}


class _Closed(NamedTuple):
    """A question of the discriminative part, and what was said."""

    image: str
    groups: tuple[str, ...]
    truth: str
    said: str | None  # "yes", "no", or neither


def _read(data, prompts, part):
    """Returns the questions of a part, and {key: annotation}."""
    file = epath.Path(data) / "query" / choose(PARTS, part, "part")[0]
    suffix = choose(PROMPTS, prompts, "prompts")
    truths = epath.Path(data) / "annotations.json"
    for needed in (file, truths):
        if not needed.exists():
            raise ValueError(f"{needed} is missing; name the folder data of AMBER's code")
    rows = read_data(truths, {"id": (int, str), "type": str})
    annotations = {str(row["id"]): row for row in rows}
    if len(annotations) < len(rows):
        ((twice, _),) = Counter(str(row["id"]) for row in rows).most_common(1)
        raise ValueError(f"{truths} has the id {twice} more than once; fetch the file again")
    asked = []
    for row in read_data(file, _ASKED):
        key = str(row["id"])
        if key not in annotations:
            raise ValueError(f"{truths} says nothing of question {key}; fetch the file again")
        _check(annotations[key], truths)
        text = row["query"] + ("" if annotations[key]["type"] == _GENERATIVE else suffix)
        asked.append(Question(key, text, row["image"], {"question_id": row["id"], "id": row["id"], "prompt": text}))
    return asked, annotations


def _check(annotation, file):
    kind, truth = annotation.get("type"), annotation.get("truth")
    if kind == _GENERATIVE:
        fits = misfit(annotation, {"truth": [str], "hallu": [str]}) is None
    else:
        fits = kind in _GROUPS and truth in ("yes", "no")
    if not fits:
        raise ValueError(f"{file}, id {annotation['id']}, is not an annotation of AMBER; fetch the file again")


def _join(asked, rows):
    if not rows:
        return join(asked, rows)
    for key, text in _LAYOUTS:
        if key in rows[0] and text in rows[0]:
            return join(asked, rows, key=key, text=text)
    layouts = ", ".join(f"{key} and {text}" for key, text in _LAYOUTS)
    raise ValueError(f"answers must have one of {layouts}; the first has {', '.join(rows[0])}")


def _read_answer(text, strict):
    said = text if strict else " ".join(split_words(text)[:1]).title()
    return {"Yes": "yes", "No": "no"}.get(said)


def _describe(found):
    """Returns values, the official numbers, counts, and items, of marked descriptions."""
    items = {
        "CHAIR": [[sum(marks.hallucinated), len(marks.hallucinated)] for marks in found],
        "Cover": [[sum(marks.covered), len(marks.covered)] for marks in found],
        "Hal": [[int(any(marks.hallucinated)), 1] for marks in found],
        "Cog": [[sum(marks.made_up), len(marks.made_up)] for marks in found],
    }
    counts = {name: _total(pairs) for name, pairs in items.items()}
    share = lambda above, name: above / _add(below for _, below in items[name]) * 100
    official = {name: round(share(counts[name][0], name), 1) for name in items}
    official["Hal"] = round(100 - share(len(found) - counts["Hal"][0], "Hal"), 1)  # from those without, so not the same
    return {name: _percent(*pair) for name, pair in counts.items()}, official, counts, items


def _decide(closed, group):
    """Returns the same of a group of questions of yes and no; items are of pictures, with all questions about one."""
    pictures = {answer.image: [] for answer in closed}
    for answer in closed:
        if group in answer.groups:
            pictures[answer.image].append(answer)
    items = {name: [] for name in ("accuracy", "precision", "recall", "f1")}
    for answers in pictures.values():
        right, right_no, said_no, truth_no = _tally(answers)
        items["accuracy"].append([right, len(answers)])
        items["precision"].append([right_no, said_no])
        items["recall"].append([right_no, truth_no])
        items["f1"].append([2 * right_no, said_no + truth_no])
    counts = {name: _total(pairs) for name, pairs in items.items()}
    official = _official_closed([answer for answer in closed if group in answer.groups], group)
    return {name: _percent(*pair) for name, pair in counts.items()}, official, counts, items


def _official_closed(answers, group):
    # The official script keeps a total of each kind of attribute, and adds these, with what they began with.
    by_kind = [[answer for answer in answers if kind in answer.groups] for kind in _KINDS.get(group, (group,))]
    right, right_no, said_no, truth_no = zip(*map(_tally, by_kind), strict=True)
    percent = lambda above, below: round(
        sum(above) / functools.reduce(operator.add, (_add([1] * n) for n in below)) * 100, 1
    )
    precision, recall = percent(right_no, said_no), percent(right_no, truth_no)
    p, r = precision / 100, recall / 100
    f1 = round(2 * p * r / (p + r + _EPSILON.get(group, 0.0001)) * 100, 1)
    return {"accuracy": percent(right, map(len, by_kind)), "precision": precision, "recall": recall, "f1": f1}


def _tally(answers):
    """Returns how many are right, rightly no, said no, and no in truth."""
    return (
        sum(answer.said == answer.truth for answer in answers),
        sum(answer.said == answer.truth == "no" for answer in answers),
        sum(answer.said == "no" for answer in answers),
        sum(answer.truth == "no" for answer in answers),
    )


def _add(numbers):
    """Adds one after the other, as the official script does, from where it starts."""
    return functools.reduce(operator.add, numbers, _START)


def _total(pairs):
    return [sum(above for above, _ in pairs), sum(below for _, below in pairs)]


def _percent(numerator, denominator):
    return numerator / denominator * 100 if denominator else float("nan")
