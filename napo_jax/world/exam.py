"""The world's own questions: about pictures that follow every habit, and about those that break the one in question."""

from pathlib import Path

from napo_jax.evals.answers import Question, choose, join, read_data

NAME = "world"
PROMPTS = {"plain": "{text}"}
# An answer is right if its first sentence is the true one: what follows may be too much, and is no lie about this.
VARIANTS = ("first_sentence",)

_GROUPS = ("usual", "changed")
_ROW = dict.fromkeys(("key", "text", "group", "true", "habit"), str) | {"image": (str, type(None))}


def questions(data, *, prompts="plain") -> list[Question]:
    """Reads what is asked.

    Args:
      data: the folder that `exams.write_world` has written.
      prompts: a name out of `PROMPTS`.
    """
    choose(PROMPTS, prompts, "prompts")
    file = Path(data) / "world.jsonl"
    if not file.exists():
        raise ValueError(f"{file} is missing; python -m napo_jax.demo writes it")
    rows = read_data(file, _ROW)
    groups = {row["group"] for row in rows}
    if groups != set(_GROUPS):
        found = ", ".join(sorted(groups))
        raise ValueError(f"{file} has the groups {found}, expected {' and '.join(_GROUPS)}; write it again")
    return [Question(row["key"], row["text"], row["image"], row | {"prompt": row["text"]}) for row in rows]


def sizes(asked) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Returns nothing: no paper says how many questions there are to be."""
    return {}


def score(data, rows, *, prompts="plain", variant="first_sentence") -> dict:
    """Turns answers into numbers.

    Args:
      data: the folder of the questions.
      rows: answers by `key`.
      prompts: a name out of `PROMPTS`.
      variant: a name out of `VARIANTS`.

    Returns:
      A dict for JSON, in percent: `usual` and `changed`, the share of right answers about either kind of picture;
      `gap` between them, which is the bias; `habit`, the share of answers about changed pictures that say what is
      usual; and `flood`, the share of all answers that go on after what was asked.
    """
    choose(dict.fromkeys(VARIANTS), variant, "variant")
    asked = questions(data, prompts=prompts)
    answers = join(asked, rows)
    right = {group: [] for group in _GROUPS}
    habit, flood = [], []
    for question in asked:
        first, _, more = answers[question.key].partition(".")
        first, row = f"{first.strip()}.", question.row
        right[row["group"]].append([int(first == row["true"]), 1])
        flood.append([int(bool(more.strip())), 1])
        if row["group"] == "changed":
            habit.append([int(first == row["habit"]), 1])
    items = right | {"habit": habit, "flood": flood}
    counts = {name: [sum(column) for column in zip(*pairs, strict=True)] for name, pairs in items.items()}
    values = {name: 100 * above / below for name, (above, below) in counts.items()}
    gap = {"gap": values["usual"] - values["changed"]}
    return {"prompts": prompts, "variant": variant, **values, **gap, "counts": counts, "items": items}
