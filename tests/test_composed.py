"""Pictures among others: where each comes to lie, the words that name it, and which answers are good to reject."""

import functools
import io

import numpy as np
import pytest
from PIL import Image

from napo_jax.composed.asker import Composer
from napo_jax.composed.drawing import Drawn, Pool
from napo_jax.composed.misplaced import MOST_ON_TARGET, Said, Selection, edit_distance, why_not
from napo_jax.composed.pictures import cells_of_box, grid, inset, middle_cells, with_noise
from napo_jax.composed.wording import COUNTS, GRIDS, INSET_WORDS, name_picture, place_words
from napo_jax.data.images import fit
from napo_jax.models import IMAGE_SLOT
from napo_jax.models.clip import ClipConfig

COLOURS = [(20 * n, 255 - 20 * n, 60) for n in range(9)]


def plain(number, width=40, height=30):
    return Image.new("RGB", (width, height), COLOURS[number])


def png(picture):
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


# --- words


def test_the_words_of_a_cell_are_where_it_is():
    assert [place_words(2, place) for place in range(2)] == ["left", "right"]
    assert [place_words(3, place) for place in range(3)] == ["left", "middle", "right"]
    assert [place_words(4, place) for place in range(4)] == ["top left", "top right", "bottom left", "bottom right"]
    assert place_words(6, 4) == "bottom middle"
    assert [place_words(9, place) for place in (1, 3, 4, 8)] == ["top middle", "middle left", "centre", "bottom right"]
    for count in GRIDS:
        assert len({place_words(count, place) for place in range(count)}) == count


def test_a_question_names_its_picture():
    name = functools.partial(name_picture, question="<image>\nWhat is it?")
    assert name("sequence", 2, 1) == "Image 1: <image>\nImage 2: <image>\nIn Image 2: What is it?"
    assert name("grid", 4, 2) == "In the picture at the bottom left: What is it?"
    assert name("grid", 4, 2, labelled=True) == "In Image 3: What is it?"
    assert name("inset", 2, 0, wording=1) == f"{INSET_WORDS[1]}: What is it?"


# --- pictures


@pytest.mark.parametrize("count", GRIDS)
@pytest.mark.parametrize("labelled", [False, True])
def test_each_picture_of_a_grid_fills_its_own_cell(count, labelled):
    pictures = [plain(n, 40 + n, 30 + 3 * n) for n in range(count)]
    whole, boxes = grid(pictures, labelled=labelled)
    pixels = np.array(whole)
    for n, (left, top, right, bottom) in enumerate(boxes):
        assert (right - left, bottom - top) == (448, 448)
        scale = min(448 / pictures[n].width, 448 / pictures[n].height)
        width, height = int(pictures[n].width * scale), int(pictures[n].height * scale)
        cell = pixels[top:bottom, left:right]
        assert (cell[:height, :width] == COLOURS[n]).all()
        assert (cell[height:] == 255).all()
        assert (cell[:, width:] == 255).all()
        above = pixels[top - 40 : top, left:right]
        assert not labelled or ((above < 128).any() and (above > 250).any()), "a number stands above it"
    rows, columns = GRIDS[count]
    assert whole.size == (columns * 448, rows * (488 if labelled else 448))


def test_an_inset_lies_in_the_middle_and_fits_into_seven_tenths():
    whole, box = inset(plain(1, 20, 10), plain(2, 100, 200))
    assert box == (15, 82, 85, 117)  # 70 wide, as much as there is room for, and half as high
    pixels = np.array(whole)
    inside = np.zeros((200, 100), bool)
    inside[82:117, 15:85] = True
    assert (pixels[inside] == COLOURS[1]).all()
    assert (pixels[~inside] == COLOURS[2]).all()
    _, box = inset(plain(1, 1000, 2000), plain(2, 100, 100))
    assert box == (32, 15, 67, 85), "a larger picture becomes smaller"


@pytest.mark.parametrize("rule", ["pad", "crop"])
@pytest.mark.parametrize("size", [(120, 80), (80, 120), (96, 96)])
def test_cells_of_a_box_are_those_that_its_pixels_come_to(size, rule):
    box = (10, 20, 61, 70)
    picture = Image.new("RGB", size, "black")
    picture.paste("white", box)
    square = fit(picture, 96, rule).astype(float).mean(axis=-1)
    share = square.reshape(12, 8, 12, 8).mean(axis=(1, 3)) / 255
    cells = cells_of_box(box, *size, rule, 12)
    assert cells[share > 0.9].all()
    outside = share < 0.1 if rule == "crop" else share < 0.02
    assert not cells[outside].any()


def test_the_middle_of_the_published_code_is_16_of_24():
    mask = middle_cells(24)
    assert mask.sum() == 256
    assert mask[4:20, 4:20].all()


def test_noise_is_inside_its_box_and_no_pixel_wraps():
    before = Image.new("RGB", (60, 40), (250, 5, 128))
    after = np.array(with_noise(before, (10, 10, 50, 30), 49.0, np.random.default_rng(0)))
    inside = np.zeros((40, 60), bool)
    inside[10:30, 10:50] = True
    assert (after[~inside] == (250, 5, 128)).all()
    assert after[inside][:, 2].std() == pytest.approx(49, rel=0.1)
    assert (after[inside][:, 0] >= 100).mean() > 0.99, "what is over 255 stays white"


# --- what is drawn


def keys(count):
    return [f"{n % (count - 1):016x}{n:032x}" for n in range(count)]  # the first and the last have one picture


def test_what_is_drawn_is_the_records_own():
    pool, all_keys = Pool(keys(8)), keys(8)
    assert len(pool) == 7
    drawn = {key: pool.draw(key, (2, 3, 5), 0) for key in all_keys}
    assert {key: pool.draw(key, (2, 3, 5), 0) for key in reversed(all_keys)} == drawn
    assert {key: pool.draw(key, (2, 3, 5), 1) for key in all_keys} != drawn
    other = Pool(keys(8)[::-1])
    assert all(other.draw(key, (2, 3, 5), 0)[1:] == drawn[key][1:] for key in all_keys)


def test_others_are_other_pictures_and_all_of_them_come():
    pool, all_keys = Pool(keys(8)), keys(8)
    places, counts, seen = set(), set(), set()
    for seed in range(60):
        for number in (0, 3, 7):
            drawn = pool.draw(all_keys[number], (2, 4), seed)
            pictures = [all_keys[other][:16] for other in drawn.others]
            assert len({*pictures, all_keys[number][:16]}) == drawn.count
            assert 0 <= drawn.place < drawn.count
            places.add((drawn.count, drawn.place))
            counts.add(drawn.count)
            seen |= {(number, picture) for picture in pictures}
    assert counts == {2, 4}
    assert len(places) == 6
    assert len(seen) == 3 * 6


# --- what a model is asked

VISION = ClipConfig(image_size=96, patch_size=8)


class Letters:
    """As much of a `Prompter` as asking needs."""

    def prefix(self, question, pictures):
        """Returns the slots of each picture, a token behind each, and a token for each letter."""
        each = [*[IMAGE_SLOT] * VISION.image_tokens, 2]
        return [1, *each * pictures, *question.encode()]


@pytest.mark.parametrize(("place", "first"), [(0, 1), (1, 146), (2, 291)])
def test_the_target_of_a_sequence_is_the_slots_of_its_picture(place, first):
    drawn = Drawn([0, 1], place, 0, 0)
    others = [png(plain(1)), png(plain(2))]
    composed = Composer("sequence", released=False, exif=False).compose(png(plain(0)), others, "What?", drawn)
    assert composed.images == [*others[:place], png(plain(0)), *others[place:]]
    asked = Composer("sequence", released=True, exif=False).ask(composed, drawn, Letters(), VISION, "pad")
    assert np.flatnonzero(asked.on_target).tolist() == list(range(first, first + 144))
    np.testing.assert_array_equal(asked.pictures[place], fit(plain(0), 96, "pad"))


@pytest.mark.parametrize("form", ["grid", "inset"])
def test_the_target_in_one_picture_is_where_its_pixels_are(form):
    """By colour: the patches that the model sees white are those of the true picture."""
    white, others = Image.new("RGB", (64, 64), "white"), [png(Image.new("RGB", (64, 64), "black"))]
    drawn = Drawn([0], 1 if form == "grid" else 0, 0, 5)
    composer = Composer(form, released=False, exif=False)
    composed = composer.compose(png(white), others, "What?", drawn)
    asked = composer.ask(composed, drawn, Letters(), VISION, "pad")
    share = asked.pictures[0].astype(float).mean(axis=-1).reshape(12, 8, 12, 8).mean(axis=(1, 3)).reshape(-1) / 255
    target = asked.on_target[asked.ids == IMAGE_SLOT]
    assert target[share > 0.9].all()
    assert not target[share < 0.1].any()
    assert 10 < target.sum() < 144
    released = Composer(form, released=True, exif=False)
    noisy = released.ask(released.compose(png(white), others, "What?", drawn), drawn, Letters(), VISION, "pad")
    again = released.ask(released.compose(png(white), others, "What?", drawn), drawn, Letters(), VISION, "pad")
    np.testing.assert_array_equal(noisy.pictures, again.pictures)
    assert np.abs(noisy.pictures.astype(float) - asked.pictures).mean() > 5
    if form == "inset":
        np.testing.assert_array_equal(noisy.on_target[noisy.ids == IMAGE_SLOT], middle_cells(12).reshape(-1))


# --- what is rejected


def test_the_edit_distance_is_the_shortest_way():
    @functools.cache
    def shortest(one, other):
        if not one or not other:
            return len(one) + len(other)
        if one[0] == other[0]:
            return shortest(one[1:], other[1:])
        return 1 + min(shortest(one[1:], other), shortest(one, other[1:]), shortest(one[1:], other[1:]))

    random = np.random.default_rng(0)
    for _ in range(40):
        one, other = (tuple(random.integers(0, 3, random.integers(0, 7))) for _ in range(2))
        assert edit_distance(one, other) == shortest(one, other)


def said(text="There is one red bus.", on_target=0.1, perplexity=2.0, ended=True):
    return Said(text, ended, perplexity, on_target, None)


CHOSEN = "There are two green cats."


@pytest.mark.parametrize(
    ("answer", "selection", "fault"),
    [
        (said(), {}, None),
        (said(" "), {}, "answer_empty"),
        (said(f" {CHOSEN}"), {}, "answer_equal"),
        (said(ended=False), {}, None),
        (said(on_target=0.8), {}, None),
        (said(on_target=0.81), {}, "looks_at_target"),
        (said(on_target=0.6), {"most_on_target": 0.5}, "looks_at_target"),
        (said(perplexity=1.1), {}, "perplexity"),
        (said(perplexity=9.0), {"most_perplexity": 8.0}, "perplexity"),
        (said("Yes."), {}, "length_ratio"),
        (said("Cats. " * 21), {}, "length_ratio"),
        (said("There are two green dogs."), {"least_edited": 0.21}, "edit_distance"),
        (said("There are two green dogs."), {}, None),
        (Said(None, False, None, None, "prefix_too_long"), {}, "prefix_too_long"),
    ],
)
def test_an_answer_is_rejected_that_looked_elsewhere_and_is_no_other_kind_of_answer(answer, selection, fault):
    assert why_not(answer, CHOSEN, "sequence", 2, Selection(**selection)) == fault


def test_how_much_may_be_looked_at_goes_by_form_and_number():
    assert {form: tuple(of) for form, of in MOST_ON_TARGET.items()} == COUNTS
    for form, count, most in (("sequence", 5, 0.6), ("grid", 9, 0.3), ("grid", 2, 0.7), ("inset", 2, 0.8)):
        assert why_not(said(on_target=most - 0.01), CHOSEN, form, count, Selection()) is None
        assert why_not(said(on_target=most + 0.01), CHOSEN, form, count, Selection()) == "looks_at_target"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"most_on_target": 0.0}, "most_on_target must be above 0"),
        ({"least_perplexity": 3.0, "most_perplexity": 2.0}, "is above most_perplexity"),
        ({"longer": 0.5}, "longer must be at least 1"),
        ({"least_edited": 1.5}, "least_edited from 0 to 1"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Selection(**options)
