"""The words of AMBER's descriptions: which are true of a picture, which are made up, and which are alike."""

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from etils import epath

from napo_jax.evals.answers import misfit, read_object, read_text
from napo_jax.evals.nlp import load_spacy

_TABLE = "similarity.json"
_MODEL = "en_core_web_lg"
_ALIKE = 0.8  # Words are alike above this similarity.

Alike = Callable[[str, str], bool]


class Marks(NamedTuple):
    """What a description names.

    Attributes:
      hallucinated: of each noun, whether it is neither true of the picture nor harmless.
      covered: of each word that is true of the picture, whether it was named.
      made_up: of each word that is likely to be made up, whether it was.
    """

    hallucinated: list[bool]
    covered: list[bool]
    made_up: list[bool]


class Words(NamedTuple):
    """The lists that all pictures share.

    Attributes:
      association: a word -> what it may also be called.
      harmless: words that are never counted against a description.
    """

    association: dict[str, list[str]]
    harmless: frozenset[str]

    @property
    def vocabulary(self) -> list[str]:
        """All words that count, in order."""
        return list(dict.fromkeys(w for word, others in self.association.items() for w in (word, *others)))


def read_words(data) -> Words:
    """Reads `relation.json` and `safe_words.txt` of AMBER's folder `data`."""
    relation, safe = (epath.Path(data) / name for name in ("relation.json", "safe_words.txt"))
    for file in (relation, safe):
        if not file.exists():
            raise ValueError(f"{file} is missing; name the folder data of AMBER's code")
    association = read_object(relation, "fetch it again", {...: [str]})
    harmless = read_text(safe, "fetch it again").replace("\r\n", "\n").split("\n")
    return Words(association, frozenset(harmless))


def read_table(data, vocabulary: Iterable[str]) -> tuple[Alike, str]:
    """Reads which words are alike, as `write_table` wrote it.

    Args:
      data: the folder of `similarity.json`.
      vocabulary: all words that will be asked about.

    Returns:
      Whether two words are alike, and what said so.
    """
    file = epath.Path(data) / _TABLE
    if not file.exists():
        raise ValueError(
            f"{file} is missing; make it once, with spaCy and its {_MODEL}: "
            f"python -c 'from napo_jax.evals.amber_words import write_table as w; w(\"{data}\")'"
        )
    content = read_object(file, "fetch it again")
    if content.get("above") != _ALIKE or misfit(content, {"made_by": str, "alike": {...: [str]}}):
        raise ValueError(f"{file} must say which words are more alike than {_ALIKE}; make it again")
    table = {word: frozenset(others) for word, others in content["alike"].items()}
    if missing := [word for word in vocabulary if word not in table]:
        raise ValueError(f"{file} lacks {len(missing)} words of relation.json (first {missing[0]!r}); make it again")
    return lambda word, other: other in table[word], content["made_by"]


def write_table(data, similarity: Callable[[str, str], float] | None = None, made_by: str = "") -> None:
    """Writes `similarity.json`: of each word of the vocabulary, those that are alike.

    Args:
      data: AMBER's folder `data`.
      similarity: of two words; that of spaCy's word vectors if None.
      made_by: names it, where it is not spaCy's.
    """
    vocabulary = read_words(data).vocabulary
    if similarity is None:
        nlp, made_by = load_spacy(_MODEL)
        read = {word: nlp(word) for word in vocabulary}
        similarity = lambda word, other: read[word].similarity(read[other])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of words without a vector, which are like none but themselves
        alike = {word: [other for other in vocabulary if similarity(word, other) > _ALIKE] for word in vocabulary}
    content = {"made_by": made_by, "above": _ALIKE, "alike": alike}
    (epath.Path(data) / _TABLE).write_text(json.dumps(content))


def mark(nouns: Sequence[str], truth: Sequence[str], likely: Sequence[str], words: Words, alike: Alike) -> Marks:
    """Marks what a description names.

    A noun that is harmless marks nothing. One that is true of the picture, or is what a true word may be called, marks
    the first such word. Any other marks a word likely to be made up that it equals, and one that it is like; and then
    the first true word that it is like, without which it is hallucinated.

    Args:
      nouns: of the description, each a word of the vocabulary.
      truth: the words that are true of the picture.
      likely: the words that are likely to be made up.
      words: the lists that all pictures share.
      alike: whether a noun is like a word.
    """
    true_names, likely_names = _names(truth, words), _names(likely, words)
    hallucinated, covered, made_up = [False] * len(nouns), [False] * len(truth), [False] * len(likely)
    for i, noun in enumerate(nouns):
        if noun in words.harmless or _mark_first(covered, true_names, noun.__eq__):
            continue
        is_like = lambda word, noun=noun: alike(noun, word)
        _mark_first(made_up, likely_names, noun.__eq__)
        _mark_first(made_up, likely_names, is_like)
        hallucinated[i] = not _mark_first(covered, true_names, is_like)
    return Marks(hallucinated, covered, made_up)


def _names(listed, words):
    """Returns (name, index of the word that it marks): first all that they may be called, then the words."""
    try:
        also = [(name, i) for i, word in enumerate(listed) for name in words.association[word]]
    except KeyError as error:
        raise ValueError(f"relation.json has no word {error.args[0]!r}, which annotations.json has") from None
    return also + [(word, i) for i, word in enumerate(listed)]


def _mark_first(marks, names, fits):
    """Marks the word of the first name that fits; says whether there is one."""
    index = next((i for name, i in names if fits(name)), None)
    if index is not None:
        marks[index] = True
    return index is not None
