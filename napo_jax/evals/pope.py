"""POPE: whether a model says "yes" to things that are not in the picture."""

import math
from collections import Counter

import numpy as np
from etils import epath

from napo_jax.evals.answers import Question, choose, join, read_data

NAME = "pope"

# How negatives were drawn. In the order of the names of their files, so that answers without ids come in the same.
SPLITS = ("adversarial", "popular", "random")

PROMPTS = {
    "llava": "{text}\nAnswer the question using a single word or phrase.",
    "plain": "{text}",  # as POPE's own files ask
}

VARIANTS = {
    "mean": "of the numbers of the splits, as LLaVA reports F1",
    "pooled": "the questions of all splits together",
}

_METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")
_CELLS = ("TP", "FP", "TN", "FN")  # the positive is yes
# Questions of a split. In the files that LLaVA pins, 90 of the random ones are missing.
_PUBLISHED = {"adversarial": (3000,), "popular": (3000,), "random": (3000, 2910)}
_LLAVA = "llava_pope_test.jsonl"  # LLaVA's question file: ids that are unique over the splits
_ROW = {"question_id": (int, str), "image": str, "text": str, "label": str}
_LLAVA_ROW = {"question_id": (int, str), "image": str, "text": str, "category": str}


def questions(data, *, prompts="llava", splits=SPLITS) -> list[Question]:
    """Returns what is asked; pictures are relative to the folder of COCO's val2014.

    Args:
      data: the folder that holds `coco_pope_random.json` and so on, or a folder one above. Any other word may stand
        for `coco`.
      prompts: a name out of `PROMPTS`.
      splits: those that are asked.
    """
    prompt = choose(PROMPTS, prompts, "prompts")
    if not splits or len(set(splits)) < len(splits) or not set(splits) <= set(SPLITS):
        raise ValueError(f"splits must be one or more of {', '.join(SPLITS)}, got {', '.join(splits) or 'none'}")
    return [
        Question(
            f"{split}/{row['question_id']}",
            prompt.format(text=row["text"]),
            row["image"],
            {"question_id": row["question_id"], "category": split, "label": row["label"]}
            | {"question": row["text"], "prompt": prompt.format(text=row["text"])},
        )
        for split in splits
        for row in _read_split(data, split)
    ]


def sizes(asked) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Returns how many questions each split has, and how many in POPE's own files, by what is counted."""
    splits = Counter(question.row["category"] for question in asked)
    return {f"{split} questions": (count, _PUBLISHED[split]) for split, count in splits.items()}


def score(data, rows, *, prompts="llava", variant="mean", splits=SPLITS) -> dict:
    """Turns answers into numbers.

    Args:
      data: the folder of the questions. For answers by `question_id` alone it also holds LLaVA's question file.
      rows: answers by `key`; or LLaVA's, by `question_id`; or POPE's, with a `question` and an `answer`, in the order
        of the questions, one split behind the other.
      prompts: a name out of `PROMPTS`, that the questions were asked by.
      variant: a name out of `VARIANTS`.
      splits: those that were asked.

    Returns:
      A dict for JSON: accuracy, precision, recall, f1 and yes_ratio in percent, over all and for each of the splits.
      `items` are sums over the questions about one picture, since answers about one picture are not independent.
    """
    choose(VARIANTS, variant, "variant")
    asked = questions(data, prompts=prompts, splits=splits)
    answers = join(asked, _name_answers(data, rows, asked))
    tables = _count(asked, answers)
    totals = {split: np.sum(table, axis=0) for split, table in tables.items()}
    scored = tables if variant == "mean" else {"all": sum(tables.values())}
    parts = {name: _ratios(np.sum(table, axis=0)) for name, table in scored.items()}
    return {
        "prompts": prompts,
        "variant": variant,
        **{name: _percent(ratios[name] for ratios in parts.values()) for name in _METRICS},
        "splits": {
            split: {name: _percent([r]) for name, r in _ratios(total).items()} for split, total in totals.items()
        },
        "official": {split: _official(*map(int, total)) for split, total in totals.items()},
        "counts": {
            split: {"questions": int(total.sum()), **dict(zip(_CELLS, map(int, total), strict=True))}
            for split, total in totals.items()
        },
        "items": {
            name: {part: [_ratios(cells)[name] for cells in table] for part, table in scored.items()}
            for name in _METRICS
        },
    }


def read_answer(text) -> str:
    """Returns "no" if the first sentence of a text has the word "No", "no" or "not", and else "yes".

    >>> [read_answer(text) for text in ("No, not one.", "Yes. No", "NO", "no!", "")]
    ['no', 'yes', 'yes', 'yes', 'yes']
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"}.intersection(words) else "yes"


def _read_split(data, split):
    """Returns the rows of a split's file."""
    folder = epath.Path(data)
    found = [file for pattern in (f"*_pope_{split}.json", f"*/*_pope_{split}.json") for file in folder.glob(pattern)]
    if not found:
        raise ValueError(
            f"{folder} has no coco_pope_{split}.json; fetch POPE's question files (output/coco of its code)"
        )
    if len(found) > 1:
        raise ValueError(
            f"{folder} has several files for {split}: {', '.join(map(str, found))}; name the folder of one"
        )
    rows = read_data(found[0], _ROW)
    for number, row in enumerate(rows, 1):
        if row["label"] not in ("yes", "no"):
            raise ValueError(f"{found[0]}, question {number}, has the label {row['label']!r}; expected yes or no")
    return rows


def _name_answers(data, rows, asked):
    """Returns rows with a `key` and a `text` each."""
    if any("key" in row for row in rows):
        return rows
    if any("question_id" in row for row in rows):
        keys = _llava_keys(data, asked)
        return [
            row | {"key": keys.get(str(row.get("question_id")), f"question_id {row.get('question_id')}")}
            for row in rows
        ]
    if len(rows) != len(asked):
        raise ValueError(
            f"there are {len(rows)} answers without a key to {len(asked)} questions; there must be as many"
        )
    for number, (row, question) in enumerate(zip(rows, asked, strict=True), 1):
        if row.get("question") not in (question.row["question"], question.text):
            raise ValueError(
                f"answer {number} is to {row.get('question')!r}, but {question.key} asks {question.text!r}"
            )
    return [{"key": question.key, "text": row.get("answer")} for row, question in zip(rows, asked, strict=True)]


def _llava_keys(data, asked):
    """Returns {question_id: key} by LLaVA's question file, which has each split's questions in the split's order."""
    splits = {}
    for question in asked:
        splits.setdefault(question.row["category"], []).append(question)
    file = epath.Path(data) / _LLAVA
    if not file.exists():
        if len(splits) > 1:
            raise ValueError(
                f"{file} is missing; it says which split a question_id is of. Or score one split at a time"
            )
        return {str(question.row["question_id"]): question.key for question in asked}
    named = {}
    for row in read_data(file, _LLAVA_ROW):
        named.setdefault(row["category"], []).append(row)
    keys = {}
    for split, questions in splits.items():
        rows = named.get(split, [])
        if len(rows) != len(questions):
            # Its random split has 2910 questions, and POPE's file of today 3000.
            raise ValueError(
                f"{file} has {len(rows)} questions of {split}, POPE's file {len(questions)}; fetch both of one time"
            )
        for row, question in zip(rows, questions, strict=True):
            if row["image"] != question.image or not row["text"].startswith(question.row["question"]):
                raise ValueError(f"{file}: question {row['question_id']} is not {question.key} of POPE's file")
            keys[str(row["question_id"])] = question.key
    return keys


def _count(asked, answers):
    """Returns {split: int64[P, 4]}, for each picture the answers in each of `_CELLS`."""
    pictures = {image: i for i, image in enumerate(dict.fromkeys(question.image for question in asked))}
    tables = {question.row["category"]: np.zeros((len(pictures), len(_CELLS)), int) for question in asked}
    for question in asked:
        said = read_answer(answers[question.key])
        cell = _CELLS.index(("T" if said == question.row["label"] else "F") + ("P" if said == "yes" else "N"))
        tables[question.row["category"]][pictures[question.image], cell] += 1
    return tables


def _ratios(cells):
    """Returns {metric: [numerator, denominator]} of int[4]."""
    tp, fp, tn, fn = map(int, cells)
    total = tp + fp + tn + fn
    return {
        "accuracy": [tp + tn, total],
        "precision": [tp, tp + fp],
        "recall": [tp, tp + fn],
        "f1": [2 * tp, 2 * tp + fp + fn],
        "yes_ratio": [tp + fp, total],
    }


def _percent(ratios):
    """Returns the mean of ratios."""
    values = [100 * numerator / denominator if denominator else math.nan for numerator, denominator in ratios]
    return sum(values) / len(values)


def _official(tp, fp, tn, fn):
    """Returns the line that LLaVA's script prints: f1, accuracy, precision, recall and yes-ratio."""
    divide = lambda numerator, denominator: numerator / denominator if denominator else math.nan
    precision, recall = divide(tp, tp + fp), divide(tp, tp + fn)
    f1 = divide(2 * precision * recall, precision + recall)
    total = tp + fp + tn + fn
    return ", ".join(
        f"{value:.3f}" for value in (f1, divide(tp + tn, total), precision, recall, divide(tp + fp, total))
    )
