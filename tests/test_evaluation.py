"""The groups held out: none is trained on, and what is said of them is what one plain batch says."""

import dataclasses

import jax
import numpy as np
import pytest
from loader_run import dataset_of
from quick import quick_jit
from test_step import MODEL, PARAMS

from napo_jax import scorer
from napo_jax.data.dataset import _hold_out
from napo_jax.data.order import NO_GROUP
from napo_jax.data.store import PICTURE_DIGITS
from napo_jax.evaluation import HeldOut, with_ablation
from napo_jax.logps import Logps
from napo_jax.methods import napo, napo_released
from napo_jax.optim import unflatten
from napo_jax.reference import open_reference
from napo_jax.score import score
from napo_jax.sharding import MeshConfig, make_mesh

HELD_OUT = 7
TREE = unflatten(PARAMS)
OTHER = jax.tree.map(lambda leaf: leaf * (2.5 if leaf.ndim > 1 else 1.0), TREE)


@pytest.fixture(autouse=True)
def fast_compiles(monkeypatch):
    monkeypatch.setattr(scorer.jax, "jit", quick_jit)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return dataset_of(None, tmp_path_factory.mktemp("cache"), batch_size=4, made_up=20, buckets=1, held_out=HELD_OUT)


@pytest.fixture(scope="module")
def batch(dataset):
    """All groups held out, in one batch under the plain objective."""
    order = dataset.order(held_out=True, batch_size=HELD_OUT, shuffle=False)
    return next(dataset.loader(order, rows=(0, HELD_OUT))())


def test_no_group_is_on_both_sides(dataset):
    drawn = lambda order: {int(g) for step in range(order.steps_per_epoch) for g in order[step][1]} - {NO_GROUP}
    keep = {"shuffle": False, "keep_rest": True}
    train, held = drawn(dataset.order(**keep)), drawn(dataset.order(held_out=True, **keep))
    assert (len(train), len(held)) == (13, 7)
    assert train | held == drawn(dataset.order(held_out=None, **keep)) == set(range(20))
    assert drawn(dataset.order()) <= train
    assert dataset.order().steps_per_epoch == 3
    assert dataset.order().fingerprint != dataset.order(held_out=None).fingerprint


def test_a_picture_goes_to_one_side_with_all_its_rows():
    keys = [f"{picture:0{PICTURE_DIGITS}x}{row:032x}" for picture in range(30) for row in range(4)]
    held = _hold_out(keys, 10, seed=0).reshape(30, 4)
    assert (held.sum(axis=1) % 4 == 0).all()
    assert held.sum() == 12  # whole pictures, and no more of them than needed
    assert not _hold_out(keys, 0, seed=0).any()
    assert (_hold_out(keys, 10, seed=1) != held.ravel()).any()
    with pytest.raises(ValueError, match=r"data\.held_out is 120, and there are 120 groups in all"):
        _hold_out(keys, 120, seed=0)


@pytest.mark.parametrize("objective", [napo(), napo_released()], ids=["paper", "released"])
def test_an_evaluation_is_one_batch_under_the_objective(dataset, batch, objective):
    """Scored in batches of 4 with a filled one, and with the black picture beside; held against one plain batch."""
    policy, reference = (quick_jit(lambda tree: score(MODEL, tree, batch, objective))(tree) for tree in (TREE, OTHER))
    want = objective(policy, reference)[1]
    got = HeldOut(dataset, objective, MODEL, (MODEL, OTHER))(TREE)
    # A margin is a difference of four sums of several hundred, each rounded to 3e-5; a dynamic weight is its share of
    # the sum of them all.
    close = 2e-4
    share = close / sum(float(want[f"{term.name}/margin"]) for term in objective.terms)
    for name, value in want.items():
        least = {"margin": close, "weight": share}.get(name.rpartition("/")[2], 1e-5)
        assert got[name] == pytest.approx(float(value), rel=1e-5, abs=least), (name, share)
    assert 0 < share < 1e-3, "the comparison of weights is empty"
    assert got["loss"] != pytest.approx(float(objective(policy, policy)[1]["loss"]), rel=1e-3), "the reference is empty"

    black = dataclasses.replace(batch, images=np.zeros_like(batch.images))
    without = quick_jit(lambda tree: score(MODEL, tree, black, objective))(TREE)["chosen"]
    adds = np.asarray(policy["chosen"].sum - without.sum)
    assert got["image_ablated/margin"] == pytest.approx(adds.mean(), abs=1e-4)
    assert got["image_ablated/accuracy"] == pytest.approx(np.mean(adds > 0))
    assert abs(adds.mean()) > 1e-3, "the comparison is empty"


def test_a_model_that_cannot_see_gains_nothing_from_the_picture(dataset):
    blind = unflatten({path: leaf * (0 if "projector/down" in path else 1) for path, leaf in PARAMS.items()})
    got = HeldOut(dataset, napo(), MODEL, (MODEL, OTHER))(blind)
    assert got["image_ablated/margin"] == got["image_ablated/accuracy"] == 0


def test_a_cached_reference_and_a_mesh_give_the_same(dataset, tmp_path):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    cached = open_reference(tmp_path, dataset, napo(), MODEL, OTHER)
    alone = HeldOut(dataset, napo(), MODEL, cached)(TREE)
    live = HeldOut(dataset, napo(), MODEL, (MODEL, OTHER))(TREE)
    spread = HeldOut(dataset, napo(), MODEL, cached, mesh=mesh)(jax.device_put(TREE, jax.NamedSharding(mesh, jax.P())))
    for other in (live, spread):
        assert other == pytest.approx(alone, rel=1e-5, abs=2e-4)


def test_the_added_term_weighs_nothing():
    """Not even in the dynamic weights of the others."""
    random = np.random.default_rng(0)
    draw = lambda cells: {cell: Logps(*random.normal(size=(2, 5)).astype(np.float32)) for cell in cells}
    policy, reference = draw(with_ablation(napo()).cells), draw(napo().cells)
    plain, more = napo()(policy, reference)[1], with_ablation(napo())(policy, reference)[1]
    for name, value in plain.items():
        np.testing.assert_array_equal(more[name], value, err_msg=name)
    difference = policy["chosen"].sum - policy["chosen@black"].sum
    assert float(more["image_ablated/margin"]) == pytest.approx(difference.mean(), rel=1e-6)
