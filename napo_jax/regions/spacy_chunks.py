"""The things that a text names, by a model of spaCy in place of the lists of `regions.chunks`."""

import threading

from napo_jax.regions.chunks import Chunk, name_phrases


class SpacyChunks:
    """Finds noun chunks; may be called from several threads."""

    def __init__(self, name: str):
        """Loads a model; raises one line where there is no spaCy, no such model, or none that knows noun chunks.

        Args:
          name: of an installed model such as en_core_web_sm, or its folder.
        """
        try:
            import spacy
        except ImportError:
            raise ValueError("--spacy needs spaCy, which is not installed: pip install 'napo-jax[spacy]'") from None
        try:
            self._nlp = spacy.load(name)
        except OSError:
            raise ValueError(
                f"spaCy has no model {name!r}: name an installed one or a folder; python -m spacy download {name}, for "
                "example"
            ) from None
        try:
            self(".")
        except (NotImplementedError, ValueError) as error:  # of a language without them, or of a model without a parser
            raise ValueError(f"the spaCy model {name!r} finds no noun chunks: {error}") from None
        meta = self._nlp.meta
        self.version = f"{meta['lang']}_{meta['name']} {meta['version']}"

    def __call__(self, text: str) -> list[Chunk]:
        """Returns the things that a text names, in its order."""
        with self._lock:  # a pipeline is not said to bear more than one
            found = [(span.start_char, span.end_char, span.root.idx) for span in self._nlp(text).noun_chunks]
        return name_phrases(text, found)

    _lock = threading.Lock()
