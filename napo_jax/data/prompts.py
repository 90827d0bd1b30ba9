"""Texts -> the token ids of a prefix, and of answers that continue it.

Each segment of a text has its own ids. An answer's are those behind the offset at which "ASSISTANT:" ends, and not the
difference of two lengths. What a row says is text and nothing else: in it, `</s>` and ` ASSISTANT: ` are letters.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import tempfile

from etils import epath
from tokenizers import Tokenizer

from napo_jax.hub_files import copy_tokenizer
from napo_jax.models import IMAGE_SLOT

IMAGE = "<image>"
_TEXTS_AT_ONCE = 1024  # the offsets and pieces of one text take a hundred times its bytes


@dataclasses.dataclass(frozen=True)
class Template:
    """How a question is put to the model: `{system} USER: {question} ASSISTANT:`."""

    system: str
    roles: tuple[str, str] = ("USER", "ASSISTANT")
    separator: str = " "


TEMPLATES = {
    name: Template(
        f"A chat between a curious {who} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
    )
    for name, who in {"llava_v1": "human", "vicuna_v1": "user"}.items()
}


class PromptError(ValueError):
    """A text that cannot be tokenised as it should; `reason` is a short snake_case word to count it by."""

    def __init__(self, message, reason="prompt"):
        super().__init__(message)
        self.reason = reason


class Prompter:
    """Turns questions and answers into ids.

    It pickles, and a process that gets it imports `tokenizers` and not `transformers`.
    """

    def __init__(self, tokenizer, template="llava_v1", image_tokens=576):
        """Takes what it needs of a tokenizer.

        Args:
          tokenizer: as `load_tokenizer` returns it. Prefixes begin with BOS if its own texts do.
          template: a name in `TEMPLATES`.
          image_tokens: how many tokens a picture takes; `ClipConfig.image_tokens`.
        """
        if template not in TEMPLATES:
            raise ValueError(f"there is no template {template!r}; there are {', '.join(TEMPLATES)}")
        self.template, self.image_tokens = TEMPLATES[template], image_tokens
        self.eos, self._eos_text = tokenizer.eos_token_id, tokenizer.eos_token
        begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        self._bos, self._bos_text = ([tokenizer.bos_token_id], tokenizer.bos_token) if begins else ([], "")
        self._words = _without_markers(tokenizer.backend_tokenizer)
        user, assistant = self.template.roles
        self._opening = f"{self.template.system}{self.template.separator}{user}: "
        self._ending = f"{self.template.separator}{assistant}:"
        self._opening_ids = self._tokenise(self._opening)
        # An answer is read behind these words alone. Tokens that do not reach across the colon do not depend on what
        # stands before it either, so they are those of the whole text.
        self._context = f"{assistant}:"
        self._context_ids = self._tokenise(self._context)

    def prefix(self, question, image=True, pictures=1):
        """Returns what `prefixes` does for one question, or raises its PromptError."""
        (ids,) = self.prefixes([question], image, pictures=[pictures])
        if isinstance(ids, PromptError):
            raise ids
        return ids

    def prefixes(self, questions, image=True, slots=None, pictures=None):
        r"""Tokenises `{system} USER: <image>\n{question} ASSISTANT:`.

        As in the original code, the text before the picture and the text behind it are tokenised apart. An empty
        question gives the prompt of answers from the image alone, in which the newline stays.

        Args:
          questions: strings. One `<image>` in a question says that there is a picture: it is taken out, with the white
            space around what is left. Two are an error, "several_image_markers".
          image: whether there is a picture. Without it, its newline goes too, and the text is tokenised as one.
          slots: how many times IMAGE_SLOT stands in the place of the picture, `image_tokens` unless given: a table that
            keeps prefixes may keep one.
          pictures: int of each question, how many it has; None: one each. Several stand where their `<image>` do in the
            question, one for each picture; without any, in front of it, each in a line of its own. Another number of
            them is an error, "image_markers".

        Returns:
          list[list[int]]. A question that cannot be used has a PromptError in its place, not raised.
        """
        slots = self.image_tokens if slots is None else slots
        if image and pictures is not None and any(count > 1 for count in pictures):
            alone = [question for question, count in zip(questions, pictures, strict=True) if count == 1]
            found = iter(self.prefixes(alone, slots=slots))
            around = lambda question, count: _attempt(lambda text: self._around_pictures(text, count, slots), question)
            return [
                next(found) if count == 1 else around(question, count)
                for question, count in zip(questions, pictures, strict=True)
            ]
        opening = self._bos + (self._opening_ids + [IMAGE_SLOT] * slots if image else [])
        begin = "\n" if image else self._opening
        write = lambda question: f"{begin}{_without_image(question)}{self._ending}"
        return self._each(questions, write, lambda encoding: opening + encoding.ids)

    def _around_pictures(self, question, pictures, slots):
        """Returns the ids of the prefix of a question about several pictures; the texts between them stand apart."""
        question.encode()
        places = question.count(IMAGE)
        if not places:
            question = f"{IMAGE}\n" * pictures + question
        elif places != pictures:
            raise PromptError(f"a question about {pictures} pictures has {places} {IMAGE}", "image_markers")
        first, *texts = f"{self._opening}{question}{self._ending}".split(IMAGE)
        # Each text is read as one of its own, before which sentencepiece puts a space, also where it has one. Some fast
        # tokenizers then do not.
        eaten = self._tokenise(" a") == self._tokenise("a")
        behind = [self._tokenise(f" {text}" if eaten and text.startswith(" ") else text) for text in texts]
        behind = [[IMAGE_SLOT] * slots + ids for ids in behind]
        return [*self._bos, *self._tokenise(first), *itertools.chain.from_iterable(behind)]

    def answers(self, texts):
        """Tokenises ` {answer}` as it stands behind `ASSISTANT:`, and adds EOS: all that is trained, and no more.

        Args:
          texts: strings.

        Returns:
          list[list[int]]; of an empty answer, EOS alone. An answer that cannot be used has a PromptError in its place,
          not raised: "answer_joins_prompt" where a token holds both the end of the prompt and the answer's first
          letters, which no vocabulary of the Llama family has.
        """
        write = lambda text: f"{self._context} {text}" if text else self._context
        return self._each(texts, write, self._read_answer)

    def answer_spans(self, text) -> list[tuple[int, int]]:
        """Returns where each token of an answer, EOS aside, stands in its text: first and last character, exclusive."""
        encoding = self._words.encode(f"{self._context} {text}")
        begin = len(self._context) + 1  # and the space
        spans = (encoding.token_to_chars(i) for i in range(len(self._context_ids), len(encoding)))
        return [(max(start - begin, 0), max(end - begin, 0)) for start, end in spans]

    def _read_answer(self, encoding):
        end, first = len(self._context), len(self._context_ids)
        whole = len(encoding) >= first and encoding.token_to_chars(first - 1)[1] <= end
        if not whole or (len(encoding) > first and encoding.token_to_chars(first)[0] < end):
            raise PromptError(f"a token holds the end of {self._context!r} and more", "answer_joins_prompt")
        return [*encoding.ids[first:], self.eos]

    def _each(self, texts, write, read):
        """Returns read(the encoding of write(text)) for each text, with the PromptErrors that came up in place."""
        found = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            written = [_attempt(write, text) for text in texts[start : start + _TEXTS_AT_ONCE]]
            usable = [text for text in written if isinstance(text, str)]
            encodings = iter(self._words.encode_batch(usable))
            found += [_attempt(read, next(encodings)) if isinstance(text, str) else text for text in written]
        return found

    def _tokenise(self, text):
        return self._words.encode(text).ids

    def read_prefix(self, ids):
        """Returns the text of a prefix, BOS and one `<image>` for all slots of a picture included."""
        text = self._bos_text if ids[:1] == self._bos else ""
        for is_slot, run in itertools.groupby(ids, lambda token: token == IMAGE_SLOT):
            run = list(run)
            text += IMAGE * -(-len(run) // self.image_tokens) if is_slot else self._words.decode(run)
        return text

    def read_answer(self, ids):
        """Returns the text of each token of an answer, its first space and EOS included.

        A letter that takes several tokens stands at the last of them, and the others are empty.
        """
        anchor = self._context_ids[-1:]  # so that no token is taken for the start of a text, which loses its space
        known = len(self._words.decode(anchor))
        texts, held = [], []
        for place, token in enumerate(ids, start=1):
            held.append(token)
            text = self._words.decode(anchor + held)[known:] + (self._eos_text if token == self.eos else "")
            half = text.endswith("\N{REPLACEMENT CHARACTER}") and place < len(ids)
            texts.append("" if half else text)
            held = held if half else []
        return texts

    @functools.cached_property
    def fingerprint(self):
        """Digest of all that decides ids: the tokenizer, its BOS and EOS, the template and the image tokens."""
        parts = (self._words.to_str(), self._bos, self.eos, dataclasses.astuple(self.template), self.image_tokens)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _without_image(question):
    """Returns a question without its `<image>`."""
    count = question.count(IMAGE)
    if count > 1:
        raise PromptError(f"a question has one place for a picture, got {count} {IMAGE}", "several_image_markers")
    return question.replace(IMAGE, "").strip() if count else question


def _attempt(function, text):
    try:
        result = function(text)
        if isinstance(result, str):
            result.encode()
    except UnicodeEncodeError:
        return PromptError("a text holds half of a surrogate pair", "invalid_unicode")
    except PromptError as error:
        return error
    return result


def _without_markers(backend):
    """Returns a tokenizer of words alone: no text gives the id of `</s>`, `<image>` or another added token.

    The library can be told to pass over special tokens, but not over other added ones, such as an `<image>` that was
    added as a plain word. Here they leave the list of added tokens, the vocabulary, and the merges that would spell
    them. The token for unknown words stays, for those.
    """
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] not in ("BPE", "WordLevel"):
        raise ValueError(f"expected a tokenizer with a model of type BPE or WordLevel, got {model['type']}")
    added = {token["content"] for token in state["added_tokens"]}
    gone = added - {model["unk_token"]}
    model["vocab"] = {piece: token for piece, token in model["vocab"].items() if piece not in gone}
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not added & {*pair, "".join(pair)}]
    state |= {"added_tokens": [], "post_processor": None}
    return Tokenizer.from_str(json.dumps(state))


def load_tokenizer(path):
    """Loads a tokenizer from files alone.

    Args:
      path: a folder of a Hugging Face checkpoint.

    Returns:
      a fast tokenizer of `transformers`, which has EOS. Raises one line if the folder has none such.
    """
    from transformers import AutoTokenizer

    folder = epath.Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path} is no folder; expected one with the tokenizer of a Hugging Face checkpoint")
    with tempfile.TemporaryDirectory() as copy:  # `transformers` reads no bucket; and no code comes along
        copy_tokenizer(folder, copy)
        try:
            tokenizer = AutoTokenizer.from_pretrained(copy, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of any kind: KeyError, OSError, and plain Exception from the Rust side
            raise ValueError(
                f"{path} holds no tokenizer that can be read: {str(error).partition(chr(10))[0]}"
            ) from None
    if not tokenizer.is_fast:
        raise ValueError(f"{path} holds a slow tokenizer, {type(tokenizer).__name__}; expected a tokenizer.json")
    # Without its vocabulary, `transformers` makes a tokenizer that knows its special tokens and no words.
    if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):
        raise ValueError(f"{path} holds no vocabulary; expected tokenizer.json or tokenizer.model")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path} holds a tokenizer without an EOS token, which ends every answer")
    return tokenizer
