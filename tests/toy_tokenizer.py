"""A tokenizer like Llama's and small: one sentencepiece model, trained here, as two libraries read it."""

import functools
import io
import json
import pathlib
import random
import tempfile

import sentencepiece
import transformers

_TEXT = (
    "a the is are was in on at of with and or but not no yes there one two three several red blue green small large "
    "old young open closed wooden empty busy man woman child children dog cat horse bus car train street table chair "
    "window door tree grass water sky picture image photo left right next behind front holding sitting standing "
    "walking looking wearing riding playing eating shows features appears seems people person group background "
    "foreground shirt hat umbrella bicycle kitchen plate apple banana café naïve field river bridge building sign "
    "clock light shadow"
)
WORDS = _TEXT.split()


def sentences(count, seed):
    """Yields made-up sentences, with punctuation, numbers and now and then a run of spaces."""
    rng = random.Random(seed)
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(3, 14))
        for place in range(len(words)):
            words[place] += rng.choices(["", ",", ";", " -", f" {rng.randint(0, 3000)}", " "], [40, 4, 1, 1, 2, 1])[0]
        yield " ".join(words).capitalize() + rng.choice([".", ".", ".", "!", "?", ":"])


@functools.cache
def _model():
    """Returns a model with Llama's settings, as bytes."""
    prompts = ["A chat between a curious human and an assistant. USER: What is it? ASSISTANT: It is a dog."] * 40
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*sentences(2000, seed=0), *prompts]),
        model_writer=model,
        model_type="bpe",
        vocab_size=800,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_toy_tokenizer(folder):
    """Writes the files that a LLaVA checkpoint in the original layout has."""
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    folder = pathlib.Path(folder)
    (folder / "tokenizer.model").write_bytes(_model())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@functools.cache
def toy_tokenizer():
    """Returns the tokenizer of `transformers` and the `SentencePieceProcessor`, of one model; do not change them."""
    with tempfile.TemporaryDirectory() as folder:
        write_toy_tokenizer(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer, sentencepiece.SentencePieceProcessor(model_proto=_model())
