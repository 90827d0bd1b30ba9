"""Charts: round ticks, spikes that stay, one scale for all that is drawn, lines that can be told apart."""

import itertools
import math
import random
import re

import numpy as np
import pytest

from napo_jax.charts import Line, chart, running_mean, thin, ticks


def test_ticks_are_round_and_within():
    draw = random.Random(1)
    ranges = [(draw.uniform(-1, 1) * 10.0 ** draw.randint(-9, 9), 10.0 ** draw.uniform(-9, 9)) for _ in range(500)]
    for low, size in ranges:
        if size < 1e-6 * abs(low):
            continue
        found = ticks(low, low + size)
        gap = found[1] - found[0]
        assert 2 <= len(found) <= 6
        mantissa = gap / 10.0 ** math.floor(math.log10(gap) + 1e-6)
        assert min(abs(mantissa - 1), abs(mantissa - 2), abs(mantissa - 5)) < 1e-3
        assert low <= found[0] < low + gap * 1.0001
        assert low + size - gap * 1.0001 < found[-1] <= low + size
        assert all(abs(tick / gap - round(tick / gap)) < 1e-3 for tick in found)
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0, 0.7) == [0, 0.2, 0.4, 0.6]  # not 0.6000000000000001
    assert ticks(0, 1, whole=True) == [0, 1]


def test_thinning_keeps_what_can_be_seen():
    draw = random.Random(2)
    points = [(3 * i, draw.gauss(0, 1)) for i in range(9_000)]
    points[4321], points[7000] = (3 * 4321, 50.0), (3 * 7000, -60.0)
    kept = thin(points, 100)
    assert {points[0], points[4321], points[7000], points[-1]} <= set(kept) <= set(points)
    assert kept == sorted(kept)
    assert len(kept) <= 202
    for column in range(100):
        values = [v for i, (_, v) in enumerate(points) if i * 100 // 9_000 == column]
        here = [v for s, v in kept if s // 3 * 100 // 9_000 == column]
        assert (min(here), max(here)) == (min(values), max(values))
    assert thin(points[:200], 100) == points[:200]


def test_a_mean_is_drawn_where_there_is_noise():
    draw = random.Random(3)
    points = [(i, math.sin(i / 300) + draw.gauss(0, 0.3)) for i in range(3_000)]
    mean = running_mean(points, 50)
    assert len(mean) == 50
    for step, value in mean:
        assert value == pytest.approx(np.mean([v for s, v in points if abs(s - step) <= 50]))
        assert abs(value - math.sin(step / 300)) < 0.2
    spiked = running_mean([*points[:1000], (1000, 1e30), *points[1001:]], 50)
    assert spiked[-1] == mean[-1], "a value that dwarfs the others spoils those behind it"
    assert running_mean([(i, math.sin(i / 300)) for i in range(3_000)]) == []
    assert running_mean(points[:39]) == []


def test_points_ticks_and_marks_have_one_scale():
    line = Line("a", "a", [(0, -1.0), (5, 1.0), (10, 0.5)], 0.5, [(5, 0.0)])
    drawn = chart("A", [line], 10, 10)
    corners = [tuple(map(int, pair.split(","))) for pair in re.search(r'points="(.*?)"', drawn)[1].split()]
    heights = {
        float(text.replace("−", "-")): float(y)
        for y, text in re.findall(r'<text x="-8" y="([\d.]+)%"[^>]*>([^<]*)<', drawn)
    }
    across = {int(text): float(x) for x, text in re.findall(r'<text x="([\d.]+)%" y="100%"[^>]*>(\d+)<', drawn)}
    assert [x for x, _ in corners] == [0, 500, 1000]
    assert heights.keys() == {-1, -0.5, 0, 0.5, 1}
    assert [y for _, y in corners] == pytest.approx([10 * heights[v] for v in (-1, 1, 0.5)], abs=1)
    assert heights[-1] > heights[0] > heights[1]
    assert across == {0: 0, 2: 20, 4: 40, 6: 60, 8: 80, 10: 100}
    mark = re.search(r'<svg x="([\d.]+)%" y="([\d.]+)%"><g class="mark"', drawn)
    assert (float(mark[1]), float(mark[2])) == (50, heights[0])
    assert "a, held out, step 5: 0" in drawn


NUMBERS = (0.0, 5e-324, 1e-310, 1e-299, 1.0, 1 + 2**-52, 1e16, 1e300, 1.5e300, 1.7e308, -1e308, -1.0)


@pytest.mark.parametrize("looks", [{}, {"zero": False}, {"share": True}, {"share": True, "limits": (0, 1)}])
def test_whatever_the_numbers_there_is_a_chart(looks):
    draw = random.Random(4)
    many = [[draw.choice(NUMBERS) for _ in range(count)] for count in (1, 50, 900)]
    for values in (*many, *itertools.product(NUMBERS, NUMBERS)):
        points = list(enumerate(values))
        drawn = chart("A", [Line("a", "a", points, values[-1], points[:2])], len(values), len(values), **looks)
        for numbers in re.findall(r' (?:points|x|y|y1|cx|cy)="([^"]*)"', drawn):
            assert all(abs(float(number)) <= 1000 for number in re.split(r"[ ,]", numbers.replace("%", "")))
        assert all(len(label) < 12 for label in re.findall(r'text-anchor="end">([^<]*)<', drawn))


def test_lines_can_be_told_apart_without_colour():
    lines = [Line(name, name, [(0, 0.0), (1, 1.0)], 1.0, [(1, 1.0)]) for name in "abcdef"]
    drawn = chart("A", lines, 1, 1)
    assert len(set(re.findall(r'class="line "[^>]*stroke-dasharray="([^"]*)" points', drawn))) == 6
    assert len(set(re.findall(r'class="mark"[^>]*><title>.*?</title>(<.*?>)', drawn)[:4])) == 4
