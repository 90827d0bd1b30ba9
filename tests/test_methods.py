"""The objectives of published methods: each against its equations in plain NumPy, and in a training."""

import dataclasses
import functools
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from quick import speedy_jit

from napo_jax import Objective, Term, methods
from napo_jax.config import load_config
from napo_jax.data.dataset import open_dataset
from napo_jax.logps import DetailedLogps, Edited, Logps
from napo_jax.losses import sft_loss
from napo_jax.model_source import find_model, load_leaves
from napo_jax.models import Llava
from napo_jax.optim import OptimizerConfig, make_optimizer, split_trained, unflatten
from napo_jax.score import score
from napo_jax.sharding import MeshConfig, make_mesh, replicated
from napo_jax.start import first_state
from napo_jax.step import Frozen, make_train_step
from napo_jax.world.configs import cure
from napo_jax.world.records import write_pairs

ROWS, STEPS = 6, 12
RNG = np.random.default_rng(3)


class Cells:
    """Log-probs of any cell, made up where they are asked for: of policy and reference, summed and averaged."""

    def __init__(self):
        self.policy, self.reference, self.tokens, self.kl = {}, {}, {}, {}
        self.policy_edited, self.reference_edited, self.edited_tokens = {}, {}, {}

    def of(self, objective):
        """Returns {cell: DetailedLogps} of the policy and of the reference."""
        for cell in objective.cells:
            self.policy[cell], self.reference[cell] = (np.float32(RNG.normal(-60, 6, ROWS)) for _ in range(2))
            self.tokens[cell] = np.float32(RNG.integers(20, 60, ROWS))
            self.policy_edited[cell], self.reference_edited[cell] = np.float32(RNG.normal(-12, 2, (2, ROWS)))
            self.edited_tokens[cell] = np.float32(RNG.integers(1, 9, ROWS))
            self.kl[cell] = np.float32(RNG.uniform(0, 9, ROWS))

        def give(sums, edited, kl):
            share = {cell: self.edited_tokens[cell] / self.tokens[cell] for cell in objective.cells}
            return {
                cell: DetailedLogps(
                    sums[cell],
                    sums[cell] / self.tokens[cell],
                    Edited(edited[cell], edited[cell] / self.edited_tokens[cell], share[cell]),
                    kl.get(cell),
                    sums[cell] / 30 + 2,
                )
                for cell in objective.cells
            }

        return give(self.policy, self.policy_edited, self.kl), give(self.reference, self.reference_edited, {})

    def h(self, cell, edited=0.0):
        """Returns the log-ratio of a cell; an edited token counts 1 + edited times."""
        one = lambda whole, part: np.float64(whole[cell]) + edited * np.float64(part[cell])
        return one(self.policy, self.policy_edited) - one(self.reference, self.reference_edited)

    def segment(self, cell, edited):
        """Returns the log-ratio of a cell over the weights of its tokens: CHiP's log pi_seg."""
        return self.h(cell, edited) / (np.float64(self.tokens[cell]) + edited * np.float64(self.edited_tokens[cell]))


def over(h, preferred, other, beta=0.1):
    return -naive.log_sigmoid(beta * (h(preferred) - h(other)))


def anchor(h, reward, beta=0.1):
    return -naive.log_sigmoid(beta * h("chosen") - reward)


def adavip(h):
    """As the paper writes it: minus the log of a sigmoid of minus a log of a sum."""
    others = [np.exp(0.1 * (h(cell) - h("chosen"))) for cell in ("rejected", "chosen@rejected_image")]
    return -naive.log_sigmoid(-np.log(sum(others)))


def chip(c):
    """The four terms of the paper; its segments are those of `Cells.segment`."""
    segment = -naive.log_sigmoid(0.5 * (c.segment("chosen", 2.0) - c.segment("rejected", 2.0)))
    token = 0.5 * np.float64(c.kl["chosen"]) - 0.5 * np.float64(c.kl["rejected"])
    pairs = over(c.h, "chosen", "rejected", 0.5) + over(c.h, "chosen", "chosen@diffusion", 0.5)
    return pairs + 3 * segment + 0.1 * token


def chip_released(c):
    """One sigmoid: what is added to the published z, and a token that differs counts four times."""
    h = lambda cell: c.h(cell, 3.0)
    z = (h("chosen") - h("rejected")) + (h("chosen") - h("chosen@diffusion"))
    return -naive.log_sigmoid(0.1 * (z - 0.1 * (np.float64(c.kl["rejected"]) - np.float64(c.kl["chosen"]))))


def povid(h):
    return -naive.log_sigmoid(0.1 * (h("chosen") - 0.5 * h("rejected") - 0.5 * h("noisy_image@diffusion_pixels")))


def mean_margin(cells, name):
    """Returns the mean log-prob of the chosen answer less that of the rejected one, under policy or reference."""
    side = getattr(cells, name)
    chosen, rejected = (np.float64(side[cell]) / cells.tokens[cell] for cell in ("chosen", "rejected"))
    return chosen - rejected


# {name: (the objective, its loss of each row by the equations)}
METHODS = {
    "dpo": (methods.dpo(), lambda c: over(c.h, "chosen", "rejected")),
    "mfpo": (
        methods.mfpo(eta=0.3),
        lambda c: over(c.h, "chosen", "rejected") + over(c.h, "chosen", "chosen@region") + anchor(c.h, 0.3),
    ),
    "mdpo": (
        methods.mdpo(),
        lambda c: over(c.h, "chosen", "rejected") + over(c.h, "chosen", "chosen@crop") + anchor(c.h, 0.0),
    ),
    "mdpo_released": (
        methods.mdpo_released(),
        lambda c: over(c.h, "chosen", "rejected") + over(c.h, "chosen", "chosen@crop_anew") + anchor(c.h, 0.0),
    ),
    "rdpo": (
        methods.rdpo(image_weight=0.7),
        lambda c: over(c.h, "chosen", "rejected") + 0.7 * over(c.h, "chosen", "chosen@rejected_image"),
    ),
    "adavip": (methods.adavip(), lambda c: adavip(c.h)),
    "chip": (methods.chip(edited=2.0), chip),
    "chip_released": (methods.chip_released(), chip_released),
    "dense_dpo": (methods.dense_dpo(), lambda c: over(functools.partial(c.h, edited=4.0), "chosen", "rejected")),
    "povid": (methods.povid(), lambda c: povid(c.h)),
    "povid_released": (
        methods.povid_released(),
        lambda c: (over(c.h, "chosen", "rejected") + over(c.h, "chosen", "noisy_image")) / 2,
    ),
    "mia_dpo": (
        methods.mia_dpo(sft_weight=0.1),
        lambda c: over(c.h, "chosen", "rejected") - 0.1 * np.float64(c.policy["chosen"]),
    ),
    "robust_dpo": (
        methods.robust_dpo(flip_rate=0.2),
        lambda c: (0.8 * over(c.h, "chosen", "rejected") - 0.2 * over(c.h, "rejected", "chosen")) / 0.6,
    ),
    "ipo": (methods.ipo(beta=0.2), lambda c: (mean_margin(c, "policy") - mean_margin(c, "reference") - 2.5) ** 2),
    "hinge": (methods.hinge(), lambda c: np.maximum(0, 1 - 0.1 * (c.h("chosen") - c.h("rejected")))),
    "simpo": (methods.simpo(), lambda c: -naive.log_sigmoid(2 * mean_margin(c, "policy") - 1)),
    "reward": (  # its mean is about 0, of either sign
        methods.reward(centring_weight=0.05),
        lambda c: naive.reward(
            *(np.float64(c.policy[cell]) / 30 + 2 for cell in ("chosen", "rejected")), 0.05, "absolute"
        ),
    ),
    "kto_pair": (
        methods.kto_pair(),
        lambda c: naive.kto_pair(
            *(np.float64(side[cell]) for side in (c.policy, c.reference) for cell in ("chosen", "rejected")), 0.1
        ),
    ),
}
each_method = pytest.mark.parametrize("name", METHODS)


@each_method
def test_an_objective_is_the_mean_of_its_equations(name):
    objective, twin = METHODS[name]
    cells = Cells()
    policy, reference = cells.of(objective)
    loss, metrics = objective(policy, reference if objective.reference_cells else None)
    np.testing.assert_allclose(loss, np.mean(twin(cells)), rtol=1e-6)
    assert all(np.isfinite(value) for value in metrics.values())


def test_the_page_tells_what_each_costs():
    """Its table has every method, with the prefixes and answers that it computes, and its tokens over NaPO's."""
    page = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text()
    rows = {cells[0].strip("` "): cells for line in page.splitlines() if (cells := line.split("|")[1:-1])[:1]}
    for name, method in inspect.getmembers(methods, inspect.isfunction):
        if method.__module__ != methods.__name__ or name.startswith("_"):
            continue
        objective, cells = method(), [cell.strip() for cell in rows[name]]
        prefixes, answers = len(objective.image_variants), len(objective.cells)
        assert [int(cell) for cell in cells[4:6]] == [prefixes, answers], name
        assert float(cells[6]) == pytest.approx((prefixes * 640 + answers * 150) / 1240, abs=0.005), name
        config = cells[7].strip("`")
        assert not config or load_config(f"configs/{config}.py").objective == objective
        if cells[1] != "the same":
            assert re.findall("`(.*?)`", cells[1]) == list(objective.cells[1:]), name


def test_a_sum_of_methods_costs_the_union_of_its_cells(world):
    """In the arithmetic that the compiler counts: terms that share cells are free, but for a few numbers a group."""
    data, tokenizer, shape, _, (trained, frozen) = world
    both = Objective((*methods.napo(weight=1.0).terms, *methods.mfpo().terms[1:]))
    union = Objective(tuple(Term(f"t{i}", sft_loss, cell) for i, cell in enumerate(both.cells)))
    assert (union.cells, union.cell_image) == (both.cells, both.cell_image)
    columns = {"question_only": "rejected", "image_only": "noisy_image"}
    data = dataclasses.replace(data, columns=data.columns | columns)

    def flops(objective):
        dataset = open_dataset(data, objective, tokenizer, shape)
        batch = next(dataset.loader(rows=(0, data.batch_size))())
        reference = {cell: Logps(*np.zeros((2, data.batch_size), np.float32)) for cell in objective.reference_cells}

        def loss(trained):
            logps = score(Llava(shape), unflatten(trained, frozen), batch, objective)
            return objective(logps, reference)[0]

        return jax.jit(jax.grad(loss)).lower(trained).cost_analysis()["flops"]

    assert flops(both) == pytest.approx(flops(union), rel=0.01)
    assert flops(both) < 0.8 * (flops(methods.napo()) + flops(methods.mfpo()))


def test_no_two_methods_are_one():
    assert len({objective for objective, _ in METHODS.values()}) == len(METHODS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pairs of the small world with all that any method needs, and its base model."""
    folder = tmp_path_factory.mktemp("methods")
    write_pairs(folder / "pairs.parquet", 64, seed=5, pictures=True)
    table = pq.read_table(folder / "pairs.parquet")
    table = table.filter(
        [
            len(one + other) < 70
            for one, other in zip(*(table[name].to_pylist() for name in ("chosen", "rejected")), strict=True)
        ]
    )
    rejected = table["rejected"].to_pylist()
    # What a model says to noise has little to do with the picture: what was rejected elsewhere.
    table = table.append_column("noisy_image", pa.array(rejected[1:] + rejected[:1], pa.string()))
    pq.write_table(table, folder / "all.parquet")
    config = cure()
    data = dataclasses.replace(
        config.data,
        path=(str(folder / "all.parquet"),),
        cache=str(folder / "cache"),
        columns={"noisy_image": "noisy_image"},
        batch_size=8,
        buckets=1,
        held_out=0,
    )
    source = find_model(config.model)
    shape = dataclasses.replace(source.shape, remat="none", freeze_vision=True)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    leaves = load_leaves(source, Llava(shape), mesh)
    return data, source.tokenizer, shape, mesh, split_trained(leaves, OptimizerConfig())


@each_method
def test_it_learns_what_it_prefers(name, world):
    """Twelve steps on eight pairs of the small world: the margin of every preference rises."""
    objective, _ = METHODS[name]
    data, tokenizer, shape, mesh, (trained, frozen) = world
    if objective.needs_rewards:
        head = {"reward/kernel": jnp.zeros((shape.text.width, 1)), "reward/bias": jnp.zeros(1)}
        trained = trained | jax.device_put(head, replicated(mesh))
    dataset = open_dataset(data, objective, tokenizer, shape)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=2e-4, schedule="constant", warmup=0.0), STEPS)
    step = speedy_jit(make_train_step(Llava(shape), objective, optimizer))
    begin, _ = first_state(trained, optimizer, mesh)  # in its places, so that the step is compiled once
    state = begin(jax.tree.map(jnp.copy, trained))
    reference = Frozen(frozen, trained if objective.reference_cells else None)
    margins = []
    with jax.numpy_dtype_promotion("standard"):
        batch = next(dataset.loader(rows=(0, data.batch_size))())
        for _ in range(STEPS):
            state, metrics = step(state, reference, batch)
            margins.append([float(metrics[f"{term.name}/margin"]) for term in objective.terms])
    margins = np.array(margins)
    assert np.isfinite(margins).all()
    for term, column in zip(objective.terms, margins.T, strict=True):
        assert np.mean(column[-4:]) > np.mean(column[:4]), (name, term.name, column)
