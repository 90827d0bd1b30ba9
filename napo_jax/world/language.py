"""The world's tokenizer: a token for each word, and one for each sentence that is always the same."""

import re

from napo_jax.data.byte_tokenizer import as_hugging_face
from napo_jax.data.prompts import TEMPLATES
from napo_jax.world.questions import LOOK, STATEMENTS, all_words

# Said before or after every question, word for word: as one token each, they cost a small model next to nothing.
SENTENCES = (
    *(template.system for template in TEMPLATES.values()),
    *(text.rpartition("\n")[2] for text in STATEMENTS.values()),
    LOOK,
)
_PIECES = r"\w+|[^\w\s]|\n"


def vocabulary() -> list[str]:
    """Returns all tokens; their places are their ids."""
    words = sorted(
        {word for text in [*all_words(), "USER: ASSISTANT:\n"] for word in re.findall(_PIECES, _plain(text))}
    )
    return ["<unk>", "<s>", "</s>", *SENTENCES, *words]


def world_tokenizer():
    """Returns a fast Hugging Face tokenizer of the world's words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    ids = {word: number for number, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    whole = "|".join(re.escape(sentence) for sentence in sorted(SENTENCES, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{whole}|{_PIECES}"), behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(
        prefix="##", cleanup=True
    )  # words with spaces between, none before a full stop
    return as_hugging_face(tokenizer)


def _plain(text):
    """Returns a text without the sentences that are tokens, and without the names of what is filled in."""
    for sentence in SENTENCES:
        text = text.replace(sentence, "")
    return re.sub(r"\{\w+\}", "", text)
