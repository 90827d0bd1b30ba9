"""A fault has one name, found in a fixed order; what people write has none."""

import numpy as np
import pytest

from napo_jax.bias.filters import FILTERS, find_fault


def fault(text, others=(), ended=True, **options):
    return find_fault(text, others=others, ended=ended, **options)


@pytest.mark.parametrize(
    ("text", "others", "ended", "expected"),
    [
        ("A red bus.", ["A blue bus.", None], True, None),
        ("", [], True, "empty"),
        (" \n\t\u3000", ["\u3000"], False, "empty"),  # equal and cut as well
        ("A red bus.", [None, "A red bus."], True, "equal"),
        ("\nA  red\tbus. ", ["A red bus."], False, "equal"),
        ("A red bus.", ["A  red bus.\n"], True, "equal"),
        ("a red bus.", ["A red bus."], True, None),
        ("None", [None], True, None),
        ("A red bus and", ["A red bus."], False, "cut"),
        ("the car " * 50, [], False, "cut"),
        ("the car " * 50, [], True, "repeats"),
    ],
)
def test_the_first_fault_that_fits_is_named(text, others, ended, expected):
    assert fault(text, others, ended) == expected


def test_filters_are_switched_off_and_their_order_is_fixed():
    worst = {"text": "", "others": [""], "ended": False}
    assert [find_fault(**worst, filters=FILTERS[i:]) for i in range(5)] == ["empty", "equal", "cut", None, None]
    assert find_fault(**worst, filters=FILTERS[::-1]) == "empty"
    assert find_fault("the car " * 50, others=[], ended=True, filters=("empty", "equal", "cut")) is None


def test_an_unknown_filter_is_refused():
    with pytest.raises(ValueError, match="empty, equal, cut, repeats, got long, loops"):
        fault("A bus.", filters=("loops", "empty", "long"))


@pytest.mark.parametrize(
    "text",
    [
        "very, very, very good",
        "no no no",
        "No. No. No. No.",
        "1. red car 2. red bus 3. red bike",
        "1. A red car.\n2. A red car.\n3. A red car.\n4. A blue car.",
        "a " * 11,
        "the man sees the dog " * 3,  # fifteen words, but said three times
        " ".join([*(f"w{i}" for i in range(129)), ""]) * 4,
        "Counterclockwise",
        "The total is 1,000,000,000,000.",
        "| colour | count |\n|--------|-------|\n| red | 2 |",
        "她非常非常非常高兴。",
        "图中有一只猫,一只狗,一只鸟和一只兔子。",
        "!" * 23,
    ],
)
def test_what_people_write_does_not_repeat(text):
    assert fault(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "a " * 12,
        "A red car. " * 4,
        "There is a dog. " + "The man, the car; " * 4 + "That is all.",
        "The Cat sat. the cat sat! THE CAT SAT? the cat, sat",
        " ".join([*(f"w{i}" for i in range(128)), ""]) * 4,
        "1 0 " * 6,
        "这是一只猫。" * 4,
        "ฉันเห็นแมว" * 4,
        "哈" * 12,
        "!" * 24,
        "The cat " + "!" * 300,
        "ha" * 12,
    ],
)
def test_loops_repeat(text):
    assert fault(text) == "repeats"


def repeats_naively(said):
    """Tries every place and every turn, straight from the definition."""
    for turn in range(1, 129):
        length = max(4 * turn, 12)
        for start in range(len(said) - length + 1):
            if said[start : start + length] == (said[start : start + turn] * length)[:length]:
                return True
    return False


def test_repeats_is_its_definition():
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(300):
        said = list(rng.choice(["a", "b", "c"], rng.integers(1, 30)))
        turn = list(rng.choice(["a", "b", "c"], rng.integers(1, 6)))
        said = said + (turn * 9)[: rng.integers(8, 24)] + said[::-1]
        seen.append(repeats_naively(said))
        assert (fault(" ".join(said)) == "repeats") == seen[-1], said
    assert 60 < sum(seen) < 240
