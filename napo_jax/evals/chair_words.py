"""The objects that a text names, by the rule of Object HalBench: from its words, or from what a judge lists."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from etils import epath

from napo_jax.evals.answers import read_text
from napo_jax.evals.nlp import Language, is_noun

_FILES = ("synonyms_refine.txt", "synonyms.txt")
_SHORT = 3  # Answers of so few words are not shown to a judge: they name nothing.

# A young animal is no person, and a passenger train carries none for this purpose.
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_PAIRS = {
    "home plate": "home plate",
    "train track": "train track",
    **{f"{age} {animal}": animal for animal in _ANIMALS for age in ("baby", "adult")},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}


class Vocabulary(NamedTuple):
    """The words that count as objects.

    Attributes:
      nodes: a word -> the word that stands for it and its synonyms.
      pairs: two base forms in a row -> what they are read as.
      source: the name and a digest of the file that it was read from.
    """

    nodes: dict[str, str]
    pairs: dict[str, str]
    source: str


def read_vocabulary(data) -> Vocabulary:
    """Reads the list of synonyms of a folder: a node on each line, then its synonyms, with commas between."""
    files = [epath.Path(data) / name for name in _FILES]
    there = [file for file in files if file.exists()]
    if len(there) != 1:
        raise ValueError(
            f"{data} must hold one of {' and '.join(_FILES)}, has {len(there)}; the first comes with RLHF-V's scorer, "
            "the second with the original CHAIR"
        )
    (file,) = there
    nodes = {}
    for line in read_text(file, "fetch it again").splitlines():
        if line.strip():
            entries = [entry.strip() for entry in line.strip().split(", ")]
            nodes |= dict.fromkeys(entries, entries[0])
    pairs = {word: word for word in nodes if " " in word} | _PAIRS
    return Vocabulary(nodes, pairs, f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}")


def find_objects(lemmas: Sequence[str], vocabulary: Vocabulary) -> list[str]:
    """Returns the node of every mention of an object, in order, repeats kept.

    Args:
      lemmas: the base forms of a text's words.
      vocabulary: the words that count.
    """
    merged = [word for word, _ in _merge(lemmas, vocabulary.pairs)]
    return _nodes(merged, vocabulary)


def parse_list(reply: str) -> list[str]:
    """Returns the objects that a judge lists: a JSON list, alone or as the last line of the reply.

    Raises:
      ValueError: there is none.
    """
    lines = [reply] + ([reply.strip().split("\n")[-1]] if '["' in reply else [])
    for line in lines:
        try:
            named = json.loads(line)
        except (ValueError, RecursionError):  # a reply of ten thousand brackets is no list either
            continue
        if isinstance(named, list) and all(isinstance(name, str) for name in named):
            return named
    raise ValueError(f"expected a JSON list of texts, got {reply!r}")


def find_listed_objects(caption: str, listed: Iterable[str], vocabulary: Vocabulary, tagger: Language) -> list[str]:
    """Returns the node of every object that a judge listed, those of equal base form once.

    Args:
      caption: the answer that was judged; a very short one names nothing.
      listed: what the judge found in it.
      vocabulary: the words that count.
      tagger: reads each of the judge's objects.
    """
    if is_short(caption):
        return []
    found = []
    for name in listed:
        tokens = tagger.tagged(f"a {name}")
        pairs = [word for word, paired in _merge([lemma for lemma, _ in tokens], vocabulary.pairs) if paired]
        found += pairs or _noun_runs(tokens)
    return _nodes(list(dict.fromkeys(found)), vocabulary)


def is_short(caption: str) -> bool:
    """Says whether an answer is so short that no judge is asked about it."""
    return len(caption.split()) <= _SHORT


def _merge(lemmas, pairs):
    """Returns (word, whether it was two), pairs taken from the left."""
    merged = []
    i = 0
    while i < len(lemmas):
        pair = pairs.get(" ".join(lemmas[i : i + 2]))
        merged.append((lemmas[i], False) if pair is None else (pair, True))
        i += 1 if pair is None else 2
    return merged


def _noun_runs(tokens):
    """Returns what stands between words that are no nouns, each run as one name."""
    runs = [[]]
    for lemma, tag in tokens:
        if is_noun(tag):
            runs[-1].append(lemma)
        elif runs[-1]:
            runs.append([])
    return [" ".join(run) for run in runs if run]


def _nodes(names, vocabulary):
    if "toilet" in names and "seat" in names:
        names = [name for name in names if name != "seat"]  # "the seat of the toilet" is no chair
    return [vocabulary.nodes[name] for name in names if name in vocabulary.nodes]
