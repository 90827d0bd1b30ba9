"""What is taken from a record, and what is left."""

import io

import numpy as np
import pytest
from PIL import Image

from napo_jax.bias.masks import GENERIC, IMAGE_MASKS, Asker, Recipe
from napo_jax.data.byte_tokenizer import byte_tokenizer
from napo_jax.data.corruptions import ABAR
from napo_jax.data.images import MEAN, STD
from napo_jax.data.prompts import Prompter, PromptError
from napo_jax.data.records import Record
from napo_jax.models import IMAGE_SLOT
from napo_jax.models.clip import ClipConfig

VISION = ClipConfig(image_size=32, patch_size=8, width=48, mlp_width=96, layers=3, heads=4)
PROMPTER = Prompter(byte_tokenizer(), image_tokens=VISION.image_tokens)
UNK, QUESTION = 0, "What colour is the bear?"


def record(seed=0, question=QUESTION, key="ab"):
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return Record(key, data.getvalue(), question, {}), (pixels / 255 - MEAN) / STD


def ask(row=None, name="a", seed=0, **recipe):
    return Asker(Recipe(**recipe), PROMPTER, VISION, unk=UNK, seed=seed)((3, 5), row or record()[0], name)


def text_of(prompt):
    return PROMPTER.read_prefix(prompt.ids.tolist())


def test_the_question_is_kept_whatever_the_picture_is():
    """B2: white and black pictures were shown without the question."""
    for mask in IMAGE_MASKS:
        assert text_of(ask(image=mask)).endswith(f"{QUESTION} ASSISTANT:"), mask


def test_no_picture_leaves_no_place_for_one():
    prompt = ask(image="no_image")
    assert prompt.image is None
    assert prompt.key == (3, 5)
    assert IMAGE_SLOT not in prompt.ids
    assert text_of(prompt).endswith(f"questions. USER: {QUESTION} ASSISTANT:")


def test_blank_keeps_the_places_and_fills_them_with_unknown_words():
    prompt, whole = ask(image="blank"), ask()
    assert prompt.image is None
    slots = whole.ids == IMAGE_SLOT
    assert slots.sum() == VISION.image_tokens
    np.testing.assert_array_equal(prompt.ids, np.where(slots, UNK, whole.ids))


def test_pictures_in_place_of_the_picture():
    row, pixels = record()
    np.testing.assert_allclose(ask(row).image, pixels, atol=1e-6)
    np.testing.assert_allclose(ask(row, image="black").image, np.broadcast_to(-MEAN / STD, (32, 32, 3)), atol=1e-6)
    np.testing.assert_allclose(ask(row, image="white").image, np.broadcast_to((1 - MEAN) / STD, (32, 32, 3)), atol=1e-6)
    assert not ask(row, image="mean").image.any()
    noise = ask(row, image="noise").image
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    noisy = ask(row, image="diffusion").image  # POVID and CHiP: step 500
    left = (noisy - np.sqrt(ABAR[500]) * pixels) / np.sqrt(1 - ABAR[500])
    assert abs(left.mean()) < 0.1
    assert abs(left.std() - 1) < 0.1
    for mask in ("black", "noise", "diffusion"):
        assert (ask(row, image=mask).ids == ask(row).ids).all()


def test_what_is_drawn_is_the_records_own():
    noise = lambda **options: ask(image="noise", **options).image
    np.testing.assert_array_equal(noise(), noise(name="b"))  # of two answers about a picture, one noise
    assert (noise() != noise(seed=1)).any()
    assert (noise() != noise(row=record(key="cd")[0])).any()
    seeds = {ask(row=record(key=key)[0], name=name, seed=seed).seed for key in "xy" for name in "ab" for seed in (0, 1)}
    assert len(seeds) == 8


def test_the_question_taken_away():
    row, pixels = record()
    empty, generic = ask(row, question="empty"), ask(row, question="generic")
    assert text_of(empty).endswith("USER: <image>\n ASSISTANT:")
    assert text_of(generic).endswith(f"USER: <image>\n{GENERIC} ASSISTANT:")
    for prompt in (empty, generic):
        np.testing.assert_allclose(prompt.image, pixels, atol=1e-6)
        assert "bear" not in text_of(prompt)


def test_lengths_are_known_before_pictures_are():
    for recipe in ({}, {"image": "no_image"}, {"image": "blank"}, {"question": "empty"}):
        asker = Asker(Recipe(**recipe), PROMPTER, VISION, unk=UNK)
        length, wrong = asker.lengths([QUESTION, "<image><image>"])
        assert length == len(ask(**recipe).ids)
        assert isinstance(wrong, PromptError) == ("question" not in recipe)


def test_a_question_that_cannot_be_asked():
    row = record(question="<image> and <image>")[0]
    with pytest.raises(PromptError, match="one place for a picture") as error:
        ask(row)
    assert error.value.reason == "several_image_markers"
    assert text_of(ask(row, question="empty")).endswith("USER: <image>\n ASSISTANT:")


def test_names_that_are_not_known():
    with pytest.raises(ValueError, match="there is no image mask 'grey'; there are kept, no_image, blank, crop"):
        Recipe(image="grey")
    with pytest.raises(ValueError, match="there is no question mask 'none'; there are kept, empty, generic"):
        Recipe(question="none")
    with pytest.raises(ValueError, match="there is nothing to ask"):
        Recipe(image="no_image", question="empty")
    for name in ("clean", "swap", "region"):  # they mask nothing, or need more than a picture
        with pytest.raises(ValueError, match="there is no image mask"):
            Recipe(image=name)
