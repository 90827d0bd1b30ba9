"""Words and their base forms: NLTK and spaCy as official scorers use them, and a plain reading without either."""

import contextlib
import importlib
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from napo_jax.bias.words import words

_ENDINGS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))  # of plurals


class Language(NamedTuple):
    """How a text is read.

    Attributes:
      name: says which programs and versions read, for the results.
      lemmas: text -> the base form of each token, as nouns.
      tagged: text -> (base form, Penn tag) of each token.
    """

    name: str
    lemmas: Callable[[str], list[str]]
    tagged: Callable[[str], list[tuple[str, str]]]


def is_noun(tag: str) -> bool:
    """Says whether a Penn tag is one of NN, NNS, NNP and NNPS."""
    return tag.startswith("NN")


def plain(vocabulary: Iterable[str]) -> Language:
    """Reads words without case and punctuation; one whose ending is a plural's becomes the singular that is known.

    Every word counts as a noun.

    Args:
      vocabulary: what is looked for, of one word or several.

    >>> plain(["wine glass", "bus"]).lemmas("Two glasses, and a bus's doors.")
    ['two', 'glass', 'and', 'a', 'bus', 'doors']
    """
    known = {part for entry in vocabulary for part in entry.split()}

    def base(word):
        word = word.removesuffix("'s")
        singulars = (word.removesuffix(end) + put for end, put in _ENDINGS if word.endswith(end))
        return next((form for form in (word, *singulars) if form in known), word)

    read = lambda text: [base(word) for word in words(text)]
    return Language("plain", read, lambda text: [(lemma, "NN") for lemma in read(text)])


def nltk_language() -> Language:
    """Reads with NLTK's tokenizer, tagger and WordNet lemmatizer; raises ValueError where it or data are missing."""
    nltk = _import("nltk")
    lemmatize = nltk.stem.WordNetLemmatizer().lemmatize

    def lemmas(text):
        with _nltk_data():
            return [lemmatize(token) for token in nltk.word_tokenize(text)]

    def tagged(text):
        with _nltk_data():
            return [(lemmatize(token), tag) for token, tag in nltk.pos_tag(nltk.word_tokenize(text))]

    return Language(f"nltk {nltk.__version__}", lemmas, tagged)


def spacy_language(model: str) -> Language:
    """Reads with a pipeline of spaCy; raises ValueError where it is missing."""
    nlp, name = load_spacy(model)
    return Language(
        name,
        lambda text: [token.lemma_ for token in nlp(text)],
        lambda text: [(token.lemma_, token.tag_) for token in nlp(text)],
    )


def load_spacy(model: str):
    """Returns a pipeline of spaCy and a name for it with both versions; raises ValueError where it is missing."""
    spacy = _import("spacy")
    try:
        nlp = spacy.load(model)
    except OSError:
        raise ValueError(f"spaCy has no {model} on this machine; run: python -m spacy download {model}") from None
    return nlp, f"spacy {spacy.__version__}, {model} {nlp.meta['version']}"


def _import(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"words are read with {name}; run: pip install {name}, or choose another variant") from None


@contextlib.contextmanager
def _nltk_data():
    """Turns NLTK's page about data that are missing into one line."""
    try:
        yield
    except LookupError as error:
        found = re.search(r"nltk\.download\('(\w+)'\)", str(error))
        if found is None:
            raise
        name = found[1]
        raise ValueError(f"NLTK's {name} is not on this machine; run: python -m nltk.downloader {name}") from None
