"""Intervals of two runs: paired, over conditional denominators, and only where the runs were asked the same."""

import json
import math

import numpy as np
import pytest
from test_evals_pope import data as pope_data  # noqa: F401  a fixture
from test_evals_pope import rows_of

from napo_jax.evals import pope
from napo_jax.evals.compare import as_text, compare

SAME = {"benchmark": "vlind", "prompts": "released", "variant": "all", "questions": "0123"}


def run(scale=100, **items):
    """A result whose numbers are those of its items."""
    items = {name: np.asarray(values, float).tolist() for name, values in items.items()}
    sums = {name: np.sum(values, axis=0) for name, values in items.items()}
    return SAME | {name: scale * n / d if d else math.nan for name, (n, d) in sums.items()} | {"items": items}


def answers(count, share, seed):
    """Instances of which a share is right."""
    right = np.random.default_rng(seed).random(count) < share
    return np.stack([right, np.ones(count)], 1)


def width(interval):
    return interval[1] - interval[0]


def test_the_interval_of_a_difference_is_that_of_pairs():
    """Two runs that agree on most instances: the interval is known from the instances on which they differ."""
    first = answers(1000, 0.5, 0)
    second = first.copy()
    second[:100, 0] = 1
    got = compare(run(CK=first), run(CK=second))["metrics"]["CK"]
    difference = second[:, 0] - first[:, 0]
    assert got["difference"]["value"] == pytest.approx(100 * difference.mean())
    paired = 2 * 1.96 * 100 * difference.std() / math.sqrt(1000)
    assert width(got["difference"]["interval"]) == pytest.approx(paired, rel=0.1)
    assert sum(got["difference"]["interval"]) / 2 == pytest.approx(100 * difference.mean(), abs=0.2)
    one = 2 * 1.96 * 100 * first[:, 0].std() / math.sqrt(1000)
    assert width(got["first"]["interval"]) == pytest.approx(one, rel=0.1)
    assert math.hypot(width(got["first"]["interval"]), width(got["second"]["interval"])) > 3 * paired  # not paired
    assert got["first"]["counts"] == [first[:, 0].sum(), 1000]


def test_denominators_are_drawn_with_their_numerators():
    """Of a ratio of sums, the interval by the delta method; dividing by a fixed sum would give another."""
    rng = np.random.default_rng(1)
    words = rng.integers(1, 20, 800).astype(float)
    first = np.stack([words / 2 + rng.normal(0, 0.5, 800), words], 1)
    got = compare(run(CHAIRi=first), run(CHAIRi=first))["metrics"]["CHAIRi"]
    ratio = first[:, 0].sum() / first[:, 1].sum()
    error = (first[:, 0] - ratio * first[:, 1]).std() / first[:, 1].mean() / math.sqrt(800)
    assert got["first"]["value"] == pytest.approx(100 * ratio)
    assert width(got["first"]["interval"]) == pytest.approx(2 * 1.96 * 100 * error, rel=0.1)
    fixed = first[:, 0].std() / first[:, 1].mean() / math.sqrt(800)
    assert fixed > 5 * error
    assert got["difference"] == {"value": 0, "interval": [0, 0], "undefined": 0}


def test_a_mean_of_parts():
    """Parts of other sizes weigh the same in the number, and an instance is drawn in all its parts at once."""
    right = answers(300, 0.7, 2)[:, 0]
    many = np.stack([3 * right, np.full(300, 3)], 1).tolist()
    few = np.stack([1 - right, np.ones(300)], 1).tolist()
    result = SAME | {"f1": 50.0, "items": {"f1": {"many": many, "few": few}}}
    got = compare(result, result)["metrics"]["f1"]["first"]
    assert got["value"] == pytest.approx(50)
    assert width(got["interval"]) < 1e-9  # what one part gains the other loses, if both are of the same draw


def test_resamples_without_a_denominator_are_left_out_and_counted():
    few = np.zeros((40, 2))
    few[0] = [1, 1]
    always = np.ones((40, 2))
    got = compare(run(LP=few), run(LP=always), resamples=4000)["metrics"]["LP"]
    assert got["first"]["undefined"] / 4000 == pytest.approx((1 - 1 / 40) ** 40, abs=0.03)
    assert got["second"]["undefined"] == 0
    assert got["difference"]["undefined"] == got["first"]["undefined"]
    assert (got["first"]["value"], got["first"]["interval"]) == (100, [100, 100])
    text = as_text(compare(run(LP=few), run(LP=always)))
    assert "resamples, which its interval is without" in text
    assert "1/1" in text


def test_a_number_that_is_nowhere_defined():
    got = compare(run(LP=np.zeros((5, 2))), run(LP=np.ones((5, 2))))["metrics"]["LP"]
    assert np.isnan([got["first"]["value"], *got["first"]["interval"], got["difference"]["value"]]).all()
    assert got["second"]["value"] == 100
    as_json = json.loads(json.dumps(run(LP=np.zeros((5, 2)))).replace("NaN", "null"))
    assert math.isnan(compare(as_json, as_json)["metrics"]["LP"]["difference"]["value"])


def test_metrics_in_any_unit():
    first, second = answers(50, 0.5, 3), answers(50, 0.7, 4)
    assert compare(run(6, score=first), run(6, score=second))["metrics"]["score"]["first"]["value"] == pytest.approx(
        6 * first[:, 0].mean()
    )
    nothing = compare(run(6, score=answers(50, 0, 0)), run(6, score=second))["metrics"]["score"]
    assert nothing["difference"]["value"] == pytest.approx(6 * second[:, 0].mean())


def test_the_same_seed_gives_the_same_and_metrics_share_their_draws():
    first, second = answers(60, 0.5, 5), answers(60, 0.6, 6)
    once = compare(run(CK=first, VP=first), run(CK=second, VP=second))
    assert once == compare(run(CK=first, VP=first), run(CK=second, VP=second))
    assert once["metrics"]["CK"] == once["metrics"]["VP"]
    assert once["metrics"]["CK"] == compare(run(CK=first), run(CK=second))["metrics"]["CK"]
    other = compare(run(CK=first), run(CK=second), seed=1)["metrics"]["CK"]
    assert other["difference"]["value"] == once["metrics"]["CK"]["difference"]["value"]
    assert other["difference"]["interval"] != once["metrics"]["CK"]["difference"]["interval"]


@pytest.mark.parametrize("field", [*SAME, "judge"])
def test_what_was_asked_otherwise_is_not_compared(field):
    first = run(CK=answers(9, 0.5, 0))
    with pytest.raises(ValueError, match=f"the {field} of the two differ, .* and other; no comparison"):
        compare(first, first | {field: "other"})


def test_results_that_are_not_whole_are_refused():
    first = run(CK=answers(9, 0.5, 0))
    with pytest.raises(ValueError, match="a result without questions, items cannot be compared"):
        compare(first, {name: first[name] for name in first if name not in ("questions", "items")})
    with pytest.raises(ValueError, match="the two have different metrics"):
        compare(first, run(VP=answers(9, 0.5, 0)))
    with pytest.raises(ValueError, match="the two have different instances of CK"):
        compare(first, run(CK=answers(8, 0.5, 0)))
    with pytest.raises(ValueError, match="the values of CK do not fit their items"):
        compare(first, run(CK=answers(9, 0.7, 1)) | {"CK": 3.0})
    with pytest.raises(ValueError, match="CK is 0, but its items give"):
        compare(first, first | {"CK": 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": []}, r"a result has \[\] as items"),
        ({"items": {}}, r"a result has \{\} as items"),
        ({"items": 3}, "a result has 3 as items"),
        ({"items": {"CK": []}}, "items of CK that are no pairs"),
        ({"items": {"CK": {}}}, "items of CK that are no pairs"),
        ({"items": {"CK": [[1, 1, 1], [0, 1, 1]]}}, "items of CK that are no pairs"),
        ({"items": {"CK": [[1, "a"]]}}, "items of CK that are no pairs"),
        ({"items": {"CK": [[1, math.nan]]}}, "items of CK that are no pairs"),
        ({"items": {"CK": [[10**400, 1]]}}, "items of CK that are no pairs"),
        ({"items": {"CK": {"a": [[1, 1]], "b": [[1, 1], [1, 1]]}}}, "items of CK that are no pairs"),
        ({"CK": "a"}, "a result has 'a' as CK, expected a number"),
        ({"CK": 10**400}, "as CK, expected a number"),
        ({"CK": True}, "as CK, expected a number"),
        ({"items": {"VP": [[1, 1]]}}, "a result has 'nothing' as VP, expected a number"),
        ({"gap": "a"}, "a result has 'a' as gap, expected a number"),
    ],
)
def test_a_damaged_result_is_one_line(change, message):
    broken = run(CK=[[1, 1], [0, 1]]) | change
    with pytest.raises(ValueError, match=f"{message}[^\n]*; score its answers again$"):
        compare(broken, broken)


def test_a_number_that_is_made_of_others_has_its_interval():
    """The difference of two shares of other instances: its variance is the sum of theirs."""
    usual, changed = answers(900, 0.8, 0), answers(400, 0.3, 1)
    first = run(usual=usual, changed=changed)
    first["gap"] = first["usual"] - first["changed"]
    second = run(usual=usual, changed=answers(400, 0.6, 2))
    second["gap"] = second["usual"] - second["changed"]
    comparison = compare(first, second)
    gap = comparison["metrics"]["gap"]
    assert gap["first"]["value"] == first["gap"]
    error = 100 * math.hypot(usual[:, 0].std() / 30, changed[:, 0].std() / 20)
    assert width(gap["first"]["interval"]) == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert gap["difference"]["value"] == pytest.approx(second["gap"] - first["gap"])
    # What the two have in common cancels: the difference is that of `changed` alone.
    low, high = comparison["metrics"]["changed"]["difference"]["interval"]
    assert gap["difference"]["interval"] == pytest.approx([-high, -low])
    assert gap["first"]["counts"] is None
    row = next(line for line in as_text(comparison).splitlines() if line.startswith("gap"))
    assert f"{first['gap']:.2f} [" in row
    with pytest.raises(ValueError, match=r"gap is 1\.0, but what it is made of gives"):
        compare(first, second | {"gap": 1.0})
    nothing = run(usual=usual, changed=np.zeros((400, 2))) | {"gap": None}
    assert math.isnan(compare(nothing, second)["metrics"]["gap"]["difference"]["value"])


def test_half_of_two_numbers():
    """AMBER's own, (100 - CHAIR + f1) / 2."""
    result = run(CHAIR=answers(90, 0.2, 0), f1=answers(80, 0.7, 1))
    result["AMBER"] = (100 - result["CHAIR"] + result["f1"]) / 2
    got = compare(result, result)["metrics"]["AMBER"]["first"]
    assert got["value"] == pytest.approx(result["AMBER"])
    assert got["interval"][0] < got["value"] < got["interval"][1]


def test_other_weights_at_one_path_are_said():
    first = run(CK=answers(9, 0.5, 0)) | {"model": "a", "weights": "12ab"}
    assert "weights: A 12ab, B 34cd" in as_text(compare(first, first | {"weights": "34cd"})).splitlines()


def test_real_results_through_their_files(pope_data):  # noqa: F811
    said = {"first": rows_of(pope_data), "second": rows_of(pope_data, lambda question: question.row["label"])}
    results = [
        SAME | {"benchmark": "pope", "decoding": {"beams": beams}} | pope.score(pope_data, rows)
        for beams, rows in zip((1, 3), said.values(), strict=True)
    ]
    comparison = compare(*json.loads(json.dumps(results)))
    assert comparison == json.loads(json.dumps(comparison))
    f1 = comparison["metrics"]["f1"]
    assert (f1["first"]["value"], f1["second"]["value"]) == pytest.approx((170 / 3, 100))
    assert f1["difference"]["value"] == pytest.approx(130 / 3)
    assert f1["first"]["counts"] == [2 + 4 + 2, 5 + 5 + 4]
    lines = as_text(comparison, ("a.json", "b.json")).splitlines()
    assert lines[0] == "benchmark pope, prompts llava, variant mean; 95% intervals over 2000 resamples"
    assert lines[1:4] == ["A: a.json", "B: b.json", "decoding: A {'beams': 1}, B {'beams': 3}"]
    row = next(line for line in lines if line.startswith("f1"))
    assert "56.67 [" in row
    assert "+43.33 [" in row
    assert row.split()[-2:] == ["8/14", "12/12"]


def test_fifteen_thousand_instances_take_a_moment():
    first = answers(15_000, 0.5, 7)
    got = compare(run(accuracy=first), run(accuracy=answers(15_000, 0.5, 8)))
    assert width(got["metrics"]["accuracy"]["first"]["interval"]) == pytest.approx(
        2 * 196 * 0.5 / math.sqrt(15_000), rel=0.1
    )
