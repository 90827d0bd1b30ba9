"""Judges: a prompt from the user's own template, and a file of what was replied, so that scores need no judge."""

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from napo_jax.evals.answers import Question, join

Judge = Callable[[str], str]  # a prompt -> the reply

_SLOT = re.compile(r"\{(\w*)\}")


def read_template(path, slots: Sequence[str]) -> Callable[[Mapping[str, str]], str]:
    """Reads a judge's prompt with a place for each of some texts, `{name}`, or `{}` for all of them in order.

    Args:
      path: a text file.
      slots: the names.

    Returns:
      {name: text} -> the prompt. Braces in the texts stay what they are.
    """
    path = epath.Path(path)
    if not path.exists():
        raise ValueError(f"{path} is not there; it is to hold the judge's prompt with {_named(slots)} in it")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; write the judge's prompt again") from None
    pieces = _SLOT.split(text.replace("\r\n", "\n"))
    names = pieces[1::2]
    if names == [""] * len(slots):
        names = list(slots)
    if sorted(names) != sorted(slots):
        wanted = f"{_named(slots)} once each, or {{}} {len(slots)} times"
        raise ValueError(f"{path} must hold {wanted}; it has {_named(names)}")
    return lambda texts: pieces[0] + "".join(texts[name] + rest for name, rest in zip(names, pieces[2::2], strict=True))


def _named(slots):
    return " ".join(f"{{{name}}}" for name in slots) or "no slot"


def record_replies(
    judge: Judge,
    name: str,
    prompts: Mapping[str, str],
    answers: Mapping[str, str],
    parse: Callable,
    *,
    tries: int = 1,
    at_once: int = 1,
) -> Iterator[dict]:
    """Yields a row of the replay file, {"key", "text", "judge", "reply"}, for each prompt, in their order.

    Args:
      judge: what replies; where several are asked at once, from several threads.
      name: of the judge, with its version; it is part of the result.
      prompts: {key: prompt}.
      answers: {key: text} of what is judged, kept beside the reply.
      parse: raises ValueError for a reply that cannot be read, which is then asked for again.
      tries: how often at most.
      at_once: how many replies are waited for at a time.
    """
    waiting = deque()
    with ThreadPoolExecutor(at_once) as pool:
        for key, prompt in prompts.items():
            waiting.append((key, pool.submit(_ask, judge, key, prompt, parse, tries)))
            if len(waiting) == at_once:
                yield _row(name, answers, *waiting.popleft())
        while waiting:
            yield _row(name, answers, *waiting.popleft())


def _row(name, answers, key, reply):
    return {"key": key, "text": answers[key], "judge": name, "reply": reply.result()}


def _ask(judge, key, prompt, parse, tries):
    """Returns the first reply that can be read."""
    for _ in range(tries):
        reply = judge(prompt)
        try:
            parse(reply)
        except ValueError as error:
            why = error
        else:
            return reply
    raise ValueError(f"the reply about {key!r} cannot be read after {tries} tries: {why}")


def match_replies(
    questions: Sequence[Question], rows: Sequence[Mapping[str, Any]], answers: Mapping[str, str]
) -> tuple[dict[str, str], str]:
    """Returns what was replied about each answer, {key: reply}, and by whom.

    Args:
      questions: all of the benchmark.
      rows: as `record_replies` yields them; or responses of the chat API as they came, one for each question in order.
      answers: {key: text} of what is scored now.

    Raises:
      ValueError: replies are missing or left over, several judges replied, or they saw other answers.
    """
    keys = [question.key for question in questions]
    from_api = "choices" in rows[0] if rows else False
    if from_api:
        if len(rows) != len(keys):
            raise ValueError(f"there are {len(rows)} responses of the chat API to {len(keys)} questions; bring all")
        rows = [_from_api(key, row) for key, row in zip(keys, rows, strict=True)]
    try:
        replies = join(questions, rows, text="reply")
    except ValueError as error:
        raise ValueError(f"the judge's replies: {error}") from None
    judges = {str(row.get("judge")) for row in rows}
    if len(judges) != 1 or "None" in judges:
        raise ValueError(f"every reply must name its judge, and all the same; found {', '.join(sorted(judges))}")
    seen = {str(row["key"]): row["text"] for row in rows if "text" in row}
    if not from_api and (others := [key for key in keys if seen.get(key) != answers[key]]):
        raise ValueError(f"{len(others)} replies are about other answers (first {others[0]!r}); ask the judge again")
    return replies, judges.pop()


def _from_api(key, row):
    try:
        return {"key": key, "reply": row["choices"][0]["message"]["content"], "judge": row["model"]}
    except (LookupError, TypeError):
        raise ValueError(f"the judge's response about {key!r} has no choices[0].message.content and model") from None
