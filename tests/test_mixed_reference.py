"""Two references as one: by the published formula, and in a training that knows nothing of it."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from quick import quick_jit
from speaking_model import write_speaking_model

from napo_jax import train as training
from napo_jax.config import load_config
from napo_jax.data.order import NO_GROUP
from napo_jax.logps import Logps
from napo_jax.metrics import Console
from napo_jax.mixed_reference import MixedReference, Mixing, mix
from napo_jax.sharding import make_mesh

RANDOM = np.random.default_rng(4)
TOKENS = np.float32(RANDOM.integers(10, 40, (2, 5)))


def side():
    sums = np.float32(RANDOM.uniform(-40, -21, (2, 5)))
    return {name: Logps(sums[i], sums[i] / TOKENS[i]) for i, name in enumerate(("chosen", "rejected"))}


FIRST, SECOND = side(), side()


def published(extra, initial, weight, clip):
    """r1 + r2 - log(a e^r1 + (1 - a) e^r2), with r1 clipped about r2; weight is that of r1, 1 - a."""
    r2 = np.float64(initial)
    r1 = np.clip(np.float64(extra), r2 * (1 + clip), r2 * (1 - clip))
    return r1 + r2 - np.log((1 - weight) * np.exp(r1) + weight * np.exp(r2))


def test_by_the_published_formula():
    """Its a is that of the extra reference's distance, but stands at the initial policy."""
    a1, a2 = (np.abs(np.float64(one["chosen"].sum) - one["rejected"].sum) for one in (SECOND, FIRST))
    a = a1 / (a1 + a2 + 1e-6)
    b_w, b_l = (np.abs(np.float64(FIRST[name].sum) + SECOND[name].sum) / 2 for name in ("chosen", "rejected"))
    s = b_w / (b_w + b_l)
    for weight, extra in (("released", 1 - a), ("surer", a), (0.3, 0.3)):
        got = mix(FIRST, SECOND, Mixing("x", weight=weight, clip=0.2))
        fixed = mix(FIRST, SECOND, Mixing("x", weight=weight, clip=0.2, fixed_clip=True))
        for i, (name, clip) in enumerate((("chosen", 0.2 * s), ("rejected", 0.2 * (1 - s)))):
            want = published(SECOND[name].sum, FIRST[name].sum, extra, clip)
            np.testing.assert_allclose(got[name].sum, want, rtol=1e-5)
            np.testing.assert_allclose(got[name].mean, want / TOKENS[i], rtol=1e-5)
            want = published(SECOND[name].sum, FIRST[name].sum, extra, 0.2)
            np.testing.assert_allclose(fixed[name].sum, want, rtol=1e-5)


def test_equal_references_mix_to_themselves_and_either_may_come_first():
    for weight in ("surer", "released", 0.7):
        same = mix(FIRST, FIRST, Mixing("x", weight=weight))
        for name in FIRST:
            np.testing.assert_allclose(same[name].sum, FIRST[name].sum, rtol=1e-6)
    wide = Mixing("x", weight="surer", clip=0.99, fixed_clip=True)
    one, other = mix(FIRST, SECOND, wide), mix(SECOND, FIRST, wide)
    for name in FIRST:
        np.testing.assert_allclose(one[name].sum, other[name].sum, rtol=1e-5)


def test_rows_that_only_fill_a_batch_stay_at_zero():
    nothing = {name: Logps(np.zeros(2, np.float32), np.zeros(2, np.float32)) for name in FIRST}
    for name, logps in mix(nothing, nothing, Mixing("x")).items():
        assert not np.any(logps.sum), name
        assert not np.any(logps.mean), name


def test_other_answers_are_clipped_as_rejected_ones():
    more = lambda side: side | {"question_only": side["rejected"], "chosen@crop": side["chosen"]}
    got = mix(more(FIRST), more(SECOND), Mixing("x"))
    np.testing.assert_array_equal(got["question_only"].sum, got["rejected"].sum)
    np.testing.assert_array_equal(got["chosen@crop"].sum, got["chosen"].sum)
    lone = {"noisy": FIRST["chosen"]}
    mix(lone, lone, Mixing("x", weight=0.5, fixed_clip=True))
    with pytest.raises(ValueError, match="needs the cell chosen, rejected"):
        mix(lone, lone, Mixing("x"))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"weight": 1.5}, "must be from 0 to 1, surer or released, got 1.5"),
        ({"weight": "mine"}, "got mine"),
        ({"clip": 1.0}, "clip must be at least 0 and below 1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(options, line):
    with pytest.raises(ValueError, match=line):
        Mixing("x", **options)


def test_a_training_is_held_to_the_mixture(tmp_path, monkeypatch):
    """At its first step the policy is the first reference: so that the margins are those of first and mixture."""
    write_speaking_model(tmp_path / "second")
    config = load_config("configs/debug.py")
    seen = []

    class Seen(MixedReference):
        def __init__(self, *parts):
            super().__init__(*parts)
            seen.append(self)

        def attach(self, batch):
            seen.append(batch.ids)
            return super().attach(batch)

    monkeypatch.setattr(training, "MixedReference", Seen)
    monkeypatch.setattr(training, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
    monkeypatch.setattr(jax, "jit", quick_jit)
    data = dataclasses.replace(
        config.data, made_up=8, batch_size=4, buckets=1, held_out=0, cache=str(tmp_path / "cache")
    )
    steps = dataclasses.replace(
        config.train, steps=1, second=Mixing(str(tmp_path / "second"), weight=0.4, clip=0.5, fixed_clip=True)
    )
    config = dataclasses.replace(config, data=data, train=steps)
    with jax.numpy_dtype_promotion("standard"):
        training.train(config, tmp_path / "run", Console(io.StringIO()))
    (first, *_) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    mixed, ids = seen[:2]
    assert NO_GROUP not in ids
    policy, reference = mixed.first.logps(ids), mixed.logps(ids)
    for term in config.objective.terms:
        h = [np.float64(policy[cell].sum) - reference[cell].sum for cell in (term.preferred, term.other)]
        assert np.abs(h[0]).min() > 0.1, "the second one says otherwise"
        assert first[f"{term.name}/margin"] == pytest.approx(np.mean(h[0] - h[1]), rel=1e-3, abs=1e-2)
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["train"]["second"]["path"] == str(tmp_path / "second")
    other = dataclasses.replace(config, train=dataclasses.replace(steps, second=Mixing()))
    with pytest.raises(ValueError, match=r"began with train\.second"):
        training.train(other, tmp_path / "run", Console(io.StringIO()))


def test_a_second_reference_needs_the_cache():
    steps = load_config("configs/debug.py").train
    with pytest.raises(ValueError, match=r"train\.second\.path needs train\.reference cache, and it is live"):
        dataclasses.replace(steps, reference="live", second=Mixing("x"))
