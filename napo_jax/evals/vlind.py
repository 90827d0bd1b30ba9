"""VLind-Bench: whether a model says what the picture shows where common sense says otherwise.

An instance is a pair of statements, one true of common sense and one of a counterfactual picture. Each part below asks
for both, and is right if both answers are: CK about a factual picture, VP about what is in the counterfactual one, CB
about the same in words, LP about the picture itself. CB counts instances that passed CK, and LP those that passed all
before.
"""

import reprlib
from typing import NamedTuple

from etils import epath

from napo_jax.evals.answers import NUMBER, Question, choose, join, read_data

NAME = "vlind"

_LEAST_VOTES = 2  # of the people who were asked whether a picture shows its context
_ALL = tuple(str(i) for i in range(12))

# The styles of picture that are scored.
VARIANTS = {"all": _ALL, "photorealistic": _ALL[:4], "illustration": _ALL[4:8], "cartoon": _ALL[8:]}


class Prompts(NamedTuple):
    """How the parts are asked, and which counterfactual picture VP and CB are asked about."""

    commonsense: str
    perception: str
    context: str
    image: str
    best: str  # "votes": the picture with the most; "best_img_id": the one that the benchmark names


_ONLY = "Only respond in True or False."
_FORGET = "Forget real-world common sense and just follow the information provided in the"
_SIMPLE = "Statement: {statement}\nBased on the image, is the given statement true or false?"
_IN_CONTEXT = "Context: {context}\nStatement: {statement}\nBased on the context, is the given statement true or false?"
_COMMONSENSE = "Statement: {statement}\nBased on common sense, is the given statement true or false?"

_RELEASED = Prompts(
    commonsense=f"{_COMMONSENSE} {_ONLY}",
    perception=f"{_SIMPLE} {_ONLY}",
    context=f"{_IN_CONTEXT} {_FORGET} context. {_ONLY}",
    image=f"{_SIMPLE} {_FORGET} image. {_ONLY}",
    best="votes",
)
PROMPTS = {
    "released": _RELEASED,  # NaPO's published code, for LLaVA
    "gpt4o": _RELEASED._replace(  # the benchmark's own, for GPT-4o
        commonsense="Statement: {statement}\nBased on the common sense, is the given statement true or false? " + _ONLY,
        best="best_img_id",
    ),
    "instructblip": Prompts(  # the benchmark's own, for InstructBLIP
        commonsense=f"{_ONLY}\n{_COMMONSENSE}",
        perception=f"{_ONLY}\n{_SIMPLE}",
        context=f"{_ONLY}\n{_IN_CONTEXT}",
        image=f"{_ONLY}\n{_SIMPLE}",
        best="best_img_id",
    ),
}

# Of the data set: all, and those with a good picture.
_PUBLISHED = (421, 302)
_TEXTS = ("concept", "context", "factual_context", "true_statement", "false_statement")
_TEXTS += ("existent_noun", "non-existent_noun")
_ROW = dict.fromkeys(_TEXTS, str) | {"context_id": (int, str), "best_img_id": (int, str)}
_ROW |= {"aggregated_human_label_good_images": {...: NUMBER}}

_FIELDS = ("a1_image", "a2_image", "b1", "b2", "c1_image", "c2_image")  # of the benchmark's own files of answers


class _Instance(NamedTuple):
    name: str  # the folder of its counterfactual pictures
    good: tuple[str, ...]  # ids of the pictures with enough votes
    row: dict


def questions(data, *, prompts="released") -> list[Question]:
    """Returns what is asked; pictures are relative to the benchmark's folder `images`.

    Args:
      data: the folder that holds `data.json`.
      prompts: a name out of `PROMPTS`.
    """
    prompts = choose(PROMPTS, prompts, "prompts")
    return [question for instance in _read_instances(data) for question in _ask(instance, prompts)]


def sizes(asked) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Returns how many instances are asked about, and how many there are in the data set, by what is counted."""
    return {"instances": (sum(question.row["part"] == "a1" for question in asked), _PUBLISHED)}


def score(data, rows, *, prompts="released", variant="all") -> dict:
    """Turns answers into numbers.

    Args:
      data: the folder that holds `data.json`.
      rows: answers by `key`, or instances as the benchmark's and NaPO's own code write them, with a `response` in
        each of the fields `<model>_pred_a1_image` or `<model>_a1_image` and so on.
      prompts: a name out of `PROMPTS`, that the questions were asked by.
      variant: a name out of `VARIANTS`.

    Returns:
      A dict for JSON: CK, VP, CB and LP in percent, and CB_accuracy and LP_accuracy, which no instance is left out of.
    """
    style = choose(VARIANTS, variant, "variant")
    answers = join(questions(data, prompts=prompts), _unfold(rows))
    said = {key: read_answer(text) for key, text in answers.items()}

    def right(instance, part, image=""):
        return said[f"{instance.name}/{part}1{image}"] == "True" and said[f"{instance.name}/{part}2{image}"] == "False"

    items = {name: [] for name in ("CK", "VP", "CB", "LP", "CB_accuracy", "LP_accuracy")}
    pictures = 0
    for instance in _read_instances(data):
        good = [image for image in instance.good if image in style]
        if not good:
            continue
        pictures += len(good)
        a, b, c = (int(right(instance, part)) for part in "abc")
        d = sum(right(instance, "d", f"/{image}") for image in good) / len(good)
        items["CK"].append([a, 1])
        items["VP"].append([b, 1])
        items["CB"].append([a * c, a])
        items["LP"].append([d * a * b * c, a * b * c])
        items["CB_accuracy"].append([c, 1])
        items["LP_accuracy"].append([d, 1])
    if not pictures:
        raise ValueError(f"{data} has no picture of the style {variant} with {_LEAST_VOTES} votes or more")
    totals = {name: _add(contributions) for name, contributions in items.items()}
    values = {name: _percent(name, *total) for name, total in totals.items()}
    return {
        "prompts": prompts,
        "variant": variant,
        **values,
        # The official script prints 0 for 0/0.
        "official": {name: f"{value if totals[name][1] else 0:.1f}" for name, value in values.items()},
        "counts": {
            "instances": len(items["CK"]),
            "pictures": pictures,
            "answers": len(said),
            "neither_true_nor_false": list(said.values()).count("NA"),
            **totals,
        },
        "items": items,
    }


def read_answer(text) -> str:
    r"""Returns "True" or "False", whichever stands first in a text as a word of its own, or "NA".

    Only commas and full stops are taken off words.

    >>> [read_answer(text) for text in ("True.", "It is\nfalse, not true", "TRUE!", "")]
    ['True', 'False', 'NA', 'NA']
    """
    said = text.lower().replace("\n", " ").replace(",", "").replace(".", "").split(" ")
    return next((word.title() for word in said if word in ("true", "false")), "NA")


def _read_instances(data):
    """Returns the instances that have a good picture; the others are not asked about."""
    file = epath.Path(data) / "data.json"
    if not file.exists():
        raise ValueError(f"{file} is missing; fetch the data set klee972/VLind-Bench and name the folder of data.json")
    instances = []
    for row in read_data(file, _ROW):
        votes = row["aggregated_human_label_good_images"]
        if good := tuple(image for image, count in votes.items() if count >= _LEAST_VOTES):
            instances.append(_Instance(_name(row), good, row))
    return instances


def _name(row):
    return f"{row['concept']}/{row['context_id']}_{row['context']}"


def _ask(instance, prompts):
    """Returns the questions of an instance."""
    name, row = instance.name, instance.row
    real, false = row["true_statement"], row["false_statement"]  # what is true of the counterfactual picture
    votes = row["aggregated_human_label_good_images"]
    best = max(votes, key=votes.get) if prompts.best == "votes" else row["best_img_id"]
    best = f"counterfactual/{name}/{best}.jpg"
    factual = f"factual/{row['concept']}/{row['context_id']}_{row['factual_context']}/0.jpg"
    there, not_there = (f"There is {row[noun]} in the given image." for noun in ("existent_noun", "non-existent_noun"))
    asked = [
        ("a1", prompts.commonsense.format(statement=false), factual),
        ("a2", prompts.commonsense.format(statement=real), factual),
        ("b1", prompts.perception.format(statement=there), best),
        ("b2", prompts.perception.format(statement=not_there), best),
        ("c1", prompts.context.format(context=row["context"], statement=real), best),
        ("c2", prompts.context.format(context=row["context"], statement=false), best),
    ]
    for image in instance.good:
        picture = f"counterfactual/{name}/{image}.jpg"
        asked.append((f"d1/{image}", prompts.image.format(statement=real), picture))
        asked.append((f"d2/{image}", prompts.image.format(statement=false), picture))
    return [
        Question(f"{name}/{part}", text, picture, {"concept": row["concept"], "part": part, "prompt": text})
        for part, text, picture in asked
    ]


def _unfold(rows):
    """Returns a row for each answer, where rows are instances as the benchmark's own code writes them."""
    ending = "_a1_image"
    models = {field.removesuffix(ending) for row in rows for field in row if field.endswith(ending)}
    if not models:
        return rows
    if len(models) > 1:
        raise ValueError(f"the answers are of several models: {', '.join(sorted(models))}; keep the fields of one")
    (model,) = models
    answers = []
    for number, row in enumerate(rows, 1):
        said = {field[:2]: row[f"{model}_{field}"] for field in _FIELDS if f"{model}_{field}" in row}
        try:
            for part in ("d1", "d2"):
                said |= {f"{part}/{image}": answer for image, answer in row.get(f"{model}_{part}", {}).items()}
            answers += [_unfold_answer(f"{_name(row)}/{part}", answer) for part, answer in said.items()]
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"the answers' instance {number} is not as VLind-Bench's code writes it: {error!r}"
            ) from None
    return answers


def _unfold_answer(key, said):
    text, answer = said["response"], said.get("answer")
    if answer is not None and answer != read_answer(text):
        answer, text = reprlib.repr(answer), reprlib.repr(text)
        raise ValueError(f"{key!r}: the 'answer' {answer} is not what the 'response' {text} says")
    return {"key": key, "text": text}


def _add(contributions):
    """Adds up, in plain order as the official script does."""
    total = [0, 0]
    for numerator, denominator in contributions:
        total = [total[0] + numerator, total[1] + denominator]
    return total


def _percent(name, numerator, denominator):
    if not denominator:
        return float("nan")
    # The official script's own order, which decides ties of its rounding.
    return numerator * 100 / denominator if name.endswith("accuracy") else numerator / denominator * 100
