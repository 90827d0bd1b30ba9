"""The chat: what `transformers` says, letter by letter, and what ends an answer, a chat or the command."""

import dataclasses
import io
import os
import random
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from quick import quick_jit
from torch_llava import tiny_config, torch_llava
from toy_tokenizer import toy_tokenizer, write_toy_tokenizer

from napo_jax import chat, speaker
from napo_jax.bias.masks import GENERIC
from napo_jax.command import exit_with_one_line
from napo_jax.data.byte_tokenizer import byte_tokenizer
from napo_jax.data.images import decode, fit, normalise
from napo_jax.data.prompts import Prompter
from napo_jax.models import IMAGE_SLOT

MOST = 40
QUESTIONS = "What is it?", "Is there a red bus on the left?"
TOKENIZER = toy_tokenizer()[0]
VOCABULARY = 800  # of the toy tokenizer

torch.set_num_threads(1)  # two get in each other's way on so small a model


@pytest.fixture(autouse=True)
def fast_compiles(monkeypatch):
    monkeypatch.setattr(chat.jax, "jit", quick_jit)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder, and two pictures in it."""
    folder = tmp_path_factory.mktemp("model")
    shape = tiny_config()
    shape = dataclasses.replace(shape, text=dataclasses.replace(shape.text, vocab_size=VOCABULARY, max_positions=512))
    model = torch_llava(shape, seed=1)
    with torch.no_grad():
        model.lm_head.weight[TOKENIZER.eos_token_id] *= 1.2  # said now and then
    model.save_pretrained(folder)
    write_toy_tokenizer(folder)
    for seed, name in enumerate(("a.png", "b.jpg")):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def by_torch(folder):
    """A function of a question, a picture's name or None, and options, to what `generate` says and if it ended."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()

    def without_image_token(module, inputs, logits):
        """Takes the row of the image token, which is no word, out of every distribution."""
        return torch.cat([logits[..., :-1], torch.full_like(logits[..., -1:], -1e9)], dim=-1)

    model.lm_head.register_forward_hook(without_image_token)
    prompter = Prompter(TOKENIZER, image_tokens=model.config.image_seq_length)

    def say(question, picture, **options):
        ids = np.array(prompter.prefix(question, image=picture is not None))
        ids = torch.from_numpy(np.where(ids == IMAGE_SLOT, VOCABULARY, ids))[None]
        pixels = {}
        if picture is not None:
            image = normalise(fit(decode((folder / picture).read_bytes()), 28, "pad"))
            pixels["pixel_values"] = torch.from_numpy(np.array(image).transpose(2, 0, 1))[None]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=MOST,
            eos_token_id=TOKENIZER.eos_token_id,
            pad_token_id=0,
            **pixels,
            **options,
        )[0, ids.shape[1] :]
        said = TOKENIZER.decode(out, skip_special_tokens=True).strip()
        spelt = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: c[0].encode("unicode_escape").decode(), said)
        return spelt, TOKENIZER.eos_token_id in out

    return say


class Keyboard(io.StringIO):
    """A standard input."""


class Terminal(Keyboard):
    """One that a person sits at."""

    def isatty(self):
        """Says so."""
        return True


def run(capsys, monkeypatch, folder, *argv, stdin=None):
    """Runs the command; returns its exit status, what it answered and what else it said."""
    monkeypatch.setattr(sys, "stdin", Keyboard("") if stdin is None else stdin)
    status = 0
    try:
        flags = ["--decoding.max-tokens", str(MOST), *map(str, argv)]
        exit_with_one_line(lambda: chat.main([*(["--checkpoint", str(folder)] if folder else []), *flags]))
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize("devices", [8, 2])
def test_answers_about_a_picture_are_those_of_transformers(capsys, monkeypatch, folder, by_torch, devices):
    """Four heads do not divide among eight devices, but among two."""
    some = jax.devices()[:devices]
    monkeypatch.setattr(chat.jax, "local_devices", lambda **_: some)
    stdin = Keyboard(f"{QUESTIONS[0]}\n\n  {QUESTIONS[1]} ")
    status, out, err = run(capsys, monkeypatch, folder, "--image", folder / "a.png", stdin=stdin)
    want = [by_torch(question, "a.png") for question in QUESTIONS]
    assert (status, out) == (0, "".join(f"{text}\n" for text, _ in want))
    cut = [f"cut off after {MOST} tokens: --decoding.max-tokens\n" for _, ended in want if not ended]
    assert err == f"{folder}, as float32 on {2 if devices == 2 else 1} x cpu\n" + "".join(cut)
    assert len(cut) == 1, "one is to end by itself, and one is not"
    others = [by_torch(question, picture)[0] for question in QUESTIONS for picture in ("b.jpg", None)]
    assert len({*others, *(text for text, _ in want)}) == 6, "the picture does not matter"


@pytest.mark.parametrize(
    ("argv", "second", "asked"),
    [
        (("--mask", "image"), "without the picture (no_image)", (QUESTIONS[0], None)),
        (("--mask", "question"), "without the question (empty)", ("", "b.jpg")),
        (("--mask", "question", "--question-mask", "generic"), "without the question (generic)", (GENERIC, "b.jpg")),
    ],
    ids=["image", "question", "generic"],
)
def test_a_masked_answer_stands_below_the_other(capsys, monkeypatch, folder, by_torch, argv, second, asked):
    beams = 3 if "generic" in argv else 1
    argv = *argv, "--image", folder / "b.jpg", "--question", QUESTIONS[0], "--decoding.beams", beams
    status, out, _ = run(capsys, monkeypatch, folder, *argv)
    whole, masked = by_torch(QUESTIONS[0], "b.jpg", num_beams=beams)[0], by_torch(*asked, num_beams=beams)[0]
    assert (status, out) == (0, f"{second.replace('out', '', 1).partition(' (')[0]}:\n{whole}\n{second}:\n{masked}\n")
    assert whole != masked


def test_a_process_of_its_own_answers_a_pipe(folder, by_torch):
    """A question that cannot be asked is one line; no picture is asked about."""
    long = " ".join(["bus"] * 600)
    command = [sys.executable, "-m", "napo_jax.chat", "--checkpoint", folder, "--decoding.max-tokens", str(MOST)]
    questions = "\n".join([long, "<image> or <image>?", QUESTIONS[1]])
    done = subprocess.run(command, input=questions, capture_output=True, text=True, env=os.environ.copy())
    assert (done.returncode, done.stdout) == (0, by_torch(QUESTIONS[1], None)[0] + "\n")
    assert re.search(r"^error: the prompt has \d+ tokens, and there is room for 472: ask in fewer", done.stderr, re.M)
    assert "error: a question has one place for a picture, got 2 <image>\n" in done.stderr


def test_a_question_asked_again_is_drawn_anew_and_a_chat_repeats_itself(capsys, monkeypatch, folder):
    twice = lambda: Keyboard(f"{QUESTIONS[0]}\n{QUESTIONS[0]}\n")
    runs = [run(capsys, monkeypatch, folder, "--decoding.temperature", 1, stdin=twice())[1] for _ in range(2)]
    assert runs[0] == runs[1]
    half = len(runs[0]) // 2
    assert runs[0][:half] != runs[0][half:]


def test_the_second_question_compiles_nothing(capsys, monkeypatch, folder):
    compiled, seen = [], []
    listener = lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None

    class Counted(Keyboard):
        def readline(self, *size):
            seen.append(len(compiled))
            return super().readline(*size)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        stdin = Counted("\n".join([*QUESTIONS, "Why?"]) + "\n")
        run(capsys, monkeypatch, folder, "--image", folder / "a.png", stdin=stdin)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    loaded, first, *later = seen
    assert loaded < first
    assert set(later) == {first}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("aé熊🐻b", ["a", "", "é", "", "", "熊", "", "", "", "🐻", "b", ""]),
        (" a  b\n", ["", "a", "", "", "  b", "", ""]),
        ("", [""]),
    ],
)
def test_letters_come_when_they_are_whole(text, pieces):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert list(chat.spell(ids, tokenizer)) == pieces
    cut = list(chat.spell(ids[:-2], tokenizer))
    assert "".join(cut) == tokenizer.decode(ids[:-2]).strip()


@pytest.mark.parametrize("tokenizer", [TOKENIZER, byte_tokenizer()], ids=["sentencepiece", "bytes"])
def test_pieces_make_up_the_whole_text(tokenizer):
    """Words, spaces, letters in bytes, halves of them, and words that are not shown."""
    rng, naive = random.Random(0), 0
    written = tokenizer("A naïve 熊, a 🐻 and  two\n\n👩‍👩‍👧 at the café .", add_special_tokens=False).input_ids
    for _ in range(200):
        ids = list(written)
        for _ in range(rng.randrange(6)):
            ids[rng.randrange(len(ids))] = rng.choice([0, 1, rng.randrange(3, 259), rng.randrange(len(tokenizer))])
        want = tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert "".join(chat.spell(ids, tokenizer)) == want
        naive += "".join(tokenizer.decode([i], skip_special_tokens=True) for i in ids).strip() == want
    assert naive < 20, "token by token would do"


class Babble:
    """In place of a Generator: says `text`, and is interrupted the first time."""

    text = "one\x1b[2J\ttwo\r\nthree"

    def __init__(self, *args, **options):
        self._answers = 0

    def stream(self, prompt):
        """Yields the tokens of the text."""
        self._answers += 1
        yield from byte_tokenizer()(self.text, add_special_tokens=False).input_ids
        if self._answers == 1:
            raise KeyboardInterrupt


SPELT = "one\\x1b[2J\ttwo\\r\nthree\n"


def test_ctrl_c_at_a_terminal_stops_the_answer_and_not_the_chat(capsys, monkeypatch):
    monkeypatch.setattr(speaker, "Generator", Babble)
    status, out, err = run(capsys, monkeypatch, None, stdin=Terminal("a\nb\n"))
    assert (status, out) == (0, 2 * SPELT)
    assert "what it says means nothing: name a model with --checkpoint\neach question stands alone" in err


def test_a_terminal_asks_for_questions_and_ctrl_c_in_their_place_ends_the_chat(capsys, monkeypatch):
    class Interrupted(Terminal):
        def readline(self, *size):
            if line := super().readline(*size):
                return line
            raise KeyboardInterrupt

    monkeypatch.setattr(speaker, "Generator", Babble)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    status, out, _ = run(capsys, monkeypatch, None, stdin=Interrupted("a\nb\n"))
    assert (status, out) == (130, f"> {SPELT}> {SPELT}> ")


@pytest.mark.parametrize("question", [(), ("--question", "a")], ids=["pipe", "one question"])
def test_ctrl_c_ends_the_command_where_nobody_asks_on(capsys, monkeypatch, question):
    monkeypatch.setattr(speaker, "Generator", Babble)
    status, out, err = run(capsys, monkeypatch, None, *question, stdin=Keyboard("a\nb\n"))
    assert (status, out) == (130, SPELT[:-1])
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--image", "no.png"), "No such file or directory: 'no.png'"),
        (("--image", __file__), f"{__file__}: the image is in no format that is read here"),
        (("--checkpoint", "nowhere"), "nowhere/config.json does not exist"),
        (("--mask", "image"), "name one, --image cat.jpg"),
        (("--mask", "question"), "name one, --image cat.jpg"),
        (("--mask", "image", "--image", "a.png", "--image-mask", "purple"), "no image mask 'purple'; there are kept, "),
        (("--image", "a.png", "--image-mask", "black"), "--image-mask says how --mask image is done, which is not"),
        (("--mask", "image", "--image", "a.png", "--question-mask", "generic"), "how --mask question is done, which"),
        (("--question", " "), "--question is empty"),
        (("--decoding.max-tokens", "2000"), "2000 and the model has 2048 positions, of which a prompt takes 1"),
        (("--question", "why " * 500), " tokens, and there is room for 528: ask in fewer words"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, monkeypatch, argv, message):
    monkeypatch.setattr(speaker, "Generator", Babble)
    status, out, err = run(capsys, monkeypatch, None, *argv)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert not [line for line in err.splitlines()[:-1] if "float32" not in line and "means nothing" not in line]
