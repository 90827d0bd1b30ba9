"""Objectives: which cells they ask for, and what they make of log-probs."""

import dataclasses

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest

from napo_jax import Objective, Term, dpo_loss, napo_loss
from napo_jax.losses import anchor_loss, sft_loss, simpo_loss, single_sigmoid_loss, softmax_preference_loss
from napo_jax.methods import dpo, napo, napo_released
from napo_jax.term import split_cell

P = jax.sharding.PartitionSpec
CELLS = ("chosen", "rejected", "question_only", "image_only", "chosen@crop")


def batch(seed=0, shape=(8,), above=()):
    """Returns {cell: (sums, means)} with lengths between 20 and 60; the cells in `above` are 20 nats better."""
    rng = np.random.default_rng(seed)
    made = {}
    for cell in CELLS:
        sums = np.float32(rng.normal(-60, 9, shape)) + np.float32(20 * (cell in above))
        made[cell] = (sums, sums / np.float32(rng.integers(20, 60, shape)))
    return made


POLICY, REFERENCE = batch(0, above=("chosen",)), batch(1)


def mdpo(**options):
    return Objective(
        (
            Term("text", dpo_loss, "chosen", "rejected"),
            Term("image", dpo_loss, "chosen", "chosen@crop"),
            Term("anchor", anchor_loss, "chosen"),
        ),
        **options,
    )


# --- what is asked for -----------------------------------------------------------------------------------------------


def test_cells_and_images_are_the_ones_that_the_terms_need():
    assert napo().cells == ("chosen", "rejected", "question_only", "image_only")
    assert napo().image_variants == ("clean",)
    assert napo().cell_image == (0, 0, 0, 0)
    assert dpo().cells == ("chosen", "rejected")
    assert mdpo().cells == ("chosen", "rejected", "chosen@crop")
    assert mdpo().image_variants == ("clean", "crop")
    assert mdpo().cell_image == (0, 0, 1)
    sft = Objective((Term("sft", sft_loss, "chosen"),))
    assert (sft.cells, sft.cell_image, sft.reference_cells) == (("chosen",), (0,), ())
    assert napo().reference_cells == napo().cells
    three = Objective([Term(f"t{i}", anchor_loss, f"chosen@v{i}") for i in range(3)])
    assert (three.image_variants, three.cell_image) == (("v0", "v1", "v2"), (0, 1, 2))
    assert split_cell("chosen@crop") == ("chosen", "crop")
    assert split_cell("chosen") == ("chosen", "clean")


def test_objectives_are_values():
    """They compare and hash by content, so that they can be static arguments and keys of a cache."""
    assert napo() == napo()
    assert hash(napo()) == hash(napo())
    assert napo() != napo(beta=0.2)
    assert napo() != napo_released()
    assert Term("a", dpo_loss, "chosen", "rejected", options={"beta": 0.1, "label_smoothing": 0.0}) == Term(
        "a", dpo_loss, "chosen", "rejected", options=(("label_smoothing", 0.0), ("beta", 0.1))
    )
    assert dataclasses.replace(napo(), noise_scope="microbatch").terms == napo().terms


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.3])
def test_napo_equals_the_naive_twin(beta):
    want, terms = naive.napo_objective(POLICY, REFERENCE, beta)
    loss, metrics = napo(beta)(POLICY, REFERENCE)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-6)
    for name, (term_loss, q, weight) in terms.items():
        got = [metrics[f"{name}/{key}"] for key in ("loss", "q", "weight")]
        np.testing.assert_allclose(got, [term_loss, q, weight], rtol=1e-6)
    assert len({round(float(weight), 3) for _, _, weight in terms.values()}) == 3  # the twin told them apart


@pytest.mark.parametrize("beta", [0.1, 0.3])
def test_napo_as_released_equals_the_naive_twin(beta):
    """On micro-batches, each with a q of its own."""

    def margin(other, kind):
        i = ("sum", "mean").index(kind)
        h = {c: np.float64(POLICY[c][i]) - np.float64(REFERENCE[c][i]) for c in ("chosen", other)}
        return (h["chosen"] - h[other]).reshape(4, 2)

    want = np.mean(-naive.log_sigmoid(beta * margin("rejected", "sum")))
    for other, alpha, kind in (("question_only", 0.5, "mean"), ("image_only", 0.01, "sum")):
        q = np.array([naive.q_released(row, alpha) for row in margin(other, kind)])
        want += np.mean(naive.box_cox(beta * margin(other, "sum"), q[:, None]))
    cut = lambda source: {c: tuple(x.reshape(4, 2) for x in pair) for c, pair in source.items()}
    loss, metrics = napo_released(beta)(cut(POLICY), cut(REFERENCE))
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert [metrics[f"{name}/weight"] for name in ("preference", "language_bias", "vision_bias")] == [1, 1, 1]
    assert abs(float(loss - napo(beta)(POLICY, REFERENCE)[0])) > 0.1  # the two are not the same thing


def test_dpo_smooths_its_labels():
    h = {cell: np.float64(POLICY[cell][0]) - np.float64(REFERENCE[cell][0]) for cell in CELLS}
    want = np.mean(naive.dpo(h["chosen"], h["rejected"], 0, 0, 0.2, 0.1))
    np.testing.assert_allclose(dpo(0.2, 0.1)(POLICY, REFERENCE)[0], want, rtol=1e-6)


def test_a_fixed_q_is_an_option():
    term = Term("t", napo_loss, "chosen", "rejected", margin="mean", options={"q": 0.3, "beta": 0.2})
    h = {cell: np.float64(POLICY[cell][0]) - np.float64(REFERENCE[cell][0]) for cell in CELLS}
    loss, metrics = Objective((term,))(POLICY, REFERENCE)
    np.testing.assert_allclose(loss, np.mean(naive.box_cox(0.2 * (h["chosen"] - h["rejected"]), 0.3)), rtol=1e-6)
    np.testing.assert_allclose(metrics["t/q"], 0.3)


def test_dynamic_weights_compare_rewards():
    """Terms of different beta: gamma goes by beta times the margin (psi of Eq. 2), not by the margin alone."""
    terms = [
        Term("a", dpo_loss, "chosen", "rejected", weight="dynamic", options={"beta": 0.1}),
        Term("b", dpo_loss, "chosen", "image_only", weight="dynamic", options={"beta": 0.4}),
    ]
    h = {cell: np.float64(POLICY[cell][0]) - np.float64(REFERENCE[cell][0]) for cell in CELLS}
    want = naive.gamma([0.1 * (h["chosen"] - h["rejected"]), 0.4 * (h["chosen"] - h["image_only"])])
    _, metrics = Objective(terms)(POLICY, REFERENCE)
    np.testing.assert_allclose([metrics["a/weight"], metrics["b/weight"]], want, rtol=1e-6)


def test_every_term_reports():
    _, metrics = napo()(POLICY, REFERENCE)
    keys = ("loss", "margin", "accuracy", "q", "weight", "chosen_reward", "rejected_reward", "valid")
    assert set(metrics) == {"loss"} | {
        f"{name}/{key}" for name in ("preference", "language_bias", "vision_bias") for key in keys
    }
    h = {cell: POLICY[cell][0] - REFERENCE[cell][0] for cell in CELLS}
    margin = h["chosen"] - h["rejected"]
    np.testing.assert_allclose(metrics["preference/margin"], margin.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["preference/accuracy"], (margin > 0).mean())
    np.testing.assert_allclose(metrics["preference/chosen_reward"], 0.1 * h["chosen"].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["preference/rejected_reward"], 0.1 * h["rejected"].mean(), rtol=1e-5)
    assert metrics["preference/q"] == 0
    assert metrics["preference/valid"] == 1


def test_at_step_zero():
    """With policy = reference every reward is 0, DPO is ln 2, a NaPO term (1 - 2^-q) / q, and the weights uniform."""
    for objective, q, weight in ((napo(), 0.5, 1 / 3), (napo_released(), 1.0, 1.0)):
        loss, metrics = objective(POLICY, POLICY)
        at_zero = (1 - 2**-q) / q
        np.testing.assert_allclose(metrics["preference/loss"], np.log(2), rtol=1e-6)
        for name in ("language_bias", "vision_bias"):
            np.testing.assert_allclose(metrics[f"{name}/loss"], at_zero, rtol=1e-6)
            np.testing.assert_allclose(metrics[f"{name}/q"], q)
        np.testing.assert_allclose(loss, weight * (np.log(2) + 2 * at_zero), rtol=1e-6)
        for name in ("preference", "language_bias", "vision_bias"):
            np.testing.assert_allclose(metrics[f"{name}/weight"], weight, rtol=1e-6)
            for key in ("margin", "accuracy", "chosen_reward", "rejected_reward"):
                assert metrics[f"{name}/{key}"] == 0


def test_gradients_take_q_and_weights_as_constants():
    def with_constants(policy):
        _, metrics = jax.lax.stop_gradient(napo()(POLICY, REFERENCE))
        total = 0.0
        for name, other in (
            ("preference", "rejected"),
            ("language_bias", "question_only"),
            ("vision_bias", "image_only"),
        ):
            pair = (policy["chosen"][0], policy[other][0], REFERENCE["chosen"][0], REFERENCE[other][0])
            losses, _ = dpo_loss(*pair) if other == "rejected" else napo_loss(*pair, q=metrics[f"{name}/q"])
            total += metrics[f"{name}/weight"] * losses.mean()
        return total

    got = jax.grad(lambda policy: napo()(policy, REFERENCE)[0])(POLICY)
    want = jax.grad(with_constants)(POLICY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), got, want)
    assert not np.any(got["chosen"][1])  # the mean margin moves q, and q is a constant


def test_metrics_carry_no_gradient():
    gradient = jax.grad(lambda policy: sum(napo()(policy, REFERENCE)[1].values()))(POLICY)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("rotten_cell", ["chosen", "rejected", "question_only", "image_only"])
def test_a_masked_cell_takes_its_terms_out_and_no_others(rotten_cell):
    """B4 again, one level up: an empty question_only answer must not touch the preference term or any statistic."""
    keep = np.arange(8) != 3
    where = {cell: keep if cell == rotten_cell else np.ones(8, bool) for cell in CELLS}
    spoilt = {**POLICY, rotten_cell: tuple(np.where(keep, x, np.nan) for x in POLICY[rotten_cell])}
    loss, metrics = napo()(spoilt, REFERENCE, where=where)
    _, clean = napo()(POLICY, REFERENCE)
    _, without = napo()(*[{c: tuple(x[keep] for x in source[c]) for c in CELLS} for source in (POLICY, REFERENCE)])
    for term in napo().terms:
        hit = rotten_cell in term.cells
        np.testing.assert_allclose(metrics[f"{term.name}/valid"], 7 / 8 if hit else 1)
        for key in ("loss", "margin", "accuracy", "q", "chosen_reward", "rejected_reward"):
            want = without if hit else clean
            np.testing.assert_allclose(metrics[f"{term.name}/{key}"], want[f"{term.name}/{key}"], rtol=1e-5)
    psi = {t.name: (without if rotten_cell in t.cells else clean)[f"{t.name}/margin"] for t in napo().terms}
    for name, margin in psi.items():
        np.testing.assert_allclose(metrics[f"{name}/weight"], margin / sum(psi.values()), rtol=1e-5)
    gradient = jax.grad(lambda policy: napo()(policy, REFERENCE, where=where)[0])(spoilt)
    assert np.isfinite(loss)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert gradient[rotten_cell][0][3] == 0


def test_nothing_valid_is_zero():
    where = {cell: np.zeros(8, bool) for cell in CELLS}
    loss, metrics = napo()(POLICY, REFERENCE, where=where)
    assert loss == 0
    assert all(np.isfinite(value) for value in metrics.values())


# --- the scope of the statistics -------------------------------------------------------------------------------------


def test_batch_scope_ignores_how_the_batch_was_cut():
    want_loss, want = napo()(POLICY, REFERENCE)
    cut = lambda source: {c: tuple(x.reshape(4, 2) for x in pair) for c, pair in source.items()}
    loss, metrics = napo()(cut(POLICY), cut(REFERENCE))
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, want)


def test_microbatch_scope_is_the_mean_of_microbatches():
    objective = dataclasses.replace(napo(), noise_scope="microbatch")
    cut = lambda source, i=slice(None): {c: tuple(x.reshape(4, 2)[i] for x in pair) for c, pair in source.items()}
    loss, metrics = objective({**cut(POLICY), "not asked for": "anything"}, cut(REFERENCE))
    each = [objective(cut(POLICY, i), cut(REFERENCE, i)) for i in range(4)]
    np.testing.assert_allclose(loss, np.mean([one[0] for one in each]), rtol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], np.mean([one[1][name] for one in each]), rtol=1e-5, atol=1e-7)
    assert abs(float(loss - napo()(POLICY, REFERENCE)[0])) > 1e-3


def test_a_microbatch_with_nothing_valid_is_not_averaged_in():
    objective = dataclasses.replace(napo_released(), noise_scope="microbatch")
    cut = lambda source, i=slice(None): {c: tuple(x.reshape(4, 2)[i] for x in pair) for c, pair in source.items()}
    where = {cell: np.ones((4, 2), bool) for cell in CELLS}
    where["question_only"] = np.array([[True, True], [False, False], [True, True], [True, True]])
    loss, metrics = objective(cut(POLICY), cut(REFERENCE), where=where)
    each = [objective(cut(POLICY, i), cut(REFERENCE, i))[1] for i in range(4)]
    for key in ("loss", "q", "margin", "accuracy", "chosen_reward"):
        want = np.mean([each[i][f"language_bias/{key}"] for i in (0, 2, 3)])
        np.testing.assert_allclose(metrics[f"language_bias/{key}"], want, rtol=1e-5)
    np.testing.assert_allclose(metrics["language_bias/valid"], 0.75)
    want = sum(metrics[f"{name}/loss"] for name in ("preference", "language_bias", "vision_bias"))
    np.testing.assert_allclose(loss, want, rtol=1e-6)


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
@pytest.mark.parametrize(("shape", "names"), [((8,), ("data",)), ((4, 2), ("data", "fsdp"))])
def test_eight_devices_equal_one(scope, shape, names):
    policy, reference = batch(2, (3, 16), above=("chosen",)), batch(3, (3, 16))
    where = {cell: np.random.default_rng(i).random((3, 16)) > 0.2 for i, cell in enumerate(CELLS)}
    objective = dataclasses.replace(napo(), noise_scope=scope)

    def run(policy, reference, where, axis_name=None):
        return objective(policy, reference, where=where, axis_name=axis_name)

    want_gradient, want = jax.grad(lambda p: run(p, reference, where), has_aux=True)(policy)
    mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))
    mapped = jax.shard_map(lambda *args: run(*args, axis_name=names), mesh=mesh, in_specs=P(None, names), out_specs=P())
    gradient, metrics = jax.jit(jax.grad(mapped, has_aux=True))(policy, reference, where)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), metrics, want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), gradient, want_gradient)


def test_parameter_gradients_inside_shard_map_and_pmap():
    """Both conventions give the gradient of the global loss: shard_map sums it itself, pmap users take `pmean`."""
    inputs = {cell: np.random.default_rng(i).normal(size=16).astype(np.float32) for i, cell in enumerate(CELLS)}

    def logps(scale, inputs):
        return {cell: (20 * scale * x, scale * x) for cell, x in inputs.items()}

    def loss(scale, inputs, axis_name=None):
        return napo()(logps(scale, inputs), logps(jnp.float32(0.5), inputs), axis_name=axis_name)[0]

    scale = jnp.float32(0.7)
    want = jax.grad(loss)(scale, inputs)
    assert abs(want) > 1e-3
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    inside = jax.shard_map(
        lambda s, x: jax.grad(loss)(s, x, "data"), mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    np.testing.assert_allclose(jax.jit(inside)(scale, inputs), want, rtol=1e-5)

    def step(scale, inputs):
        return jax.lax.pmean(jax.grad(loss)(scale, inputs, "data"), "data")

    rows = {cell: x.reshape(8, 2) for cell, x in inputs.items()}
    mapped = jax.pmap(step, axis_name="data", in_axes=(None, 0))(scale, rows)
    np.testing.assert_allclose(mapped, np.full(8, want), rtol=1e-5)


# --- other methods, each one function and one Term -------------------------------------------------------------------


def test_mdpo():
    h = {cell: np.float64(POLICY[cell][0]) - np.float64(REFERENCE[cell][0]) for cell in CELLS}
    want = np.mean(
        -naive.log_sigmoid(0.1 * (h["chosen"] - h["rejected"]))
        - naive.log_sigmoid(0.1 * (h["chosen"] - h["chosen@crop"]))
        - naive.log_sigmoid(0.1 * h["chosen"])
    )
    loss, metrics = mdpo()(POLICY, REFERENCE)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(metrics["anchor/margin"], h["chosen"].mean(), rtol=1e-6)
    assert "anchor/rejected_reward" not in metrics


def test_many_cells_in_one_term():
    others = ("rejected", "chosen@crop")
    h = {cell: np.float64(POLICY[cell][0]) - np.float64(REFERENCE[cell][0]) for cell in CELLS}
    rejected = np.stack([h[cell] for cell in others])
    cases = {
        softmax_preference_loss: ({}, naive.softmax_preference(h["chosen"], rejected, 0, 0 * rejected, 0.1)),
        single_sigmoid_loss: (
            {"chosen_weight": 2.0, "rejected_weights": (1.0, 1.0)},
            naive.single_sigmoid(h["chosen"], rejected, 0, 0 * rejected, 0.1, 2.0, (1.0, 1.0)),
        ),
    }
    for loss_function, (options, want) in cases.items():
        objective = Objective((Term("cells", loss_function, "chosen", others, options=options),))
        loss, metrics = objective(POLICY, REFERENCE)
        np.testing.assert_allclose(loss, np.mean(want), rtol=1e-6)
        nearest = h["chosen"] - rejected.max(axis=0)
        np.testing.assert_allclose(metrics["cells/margin"], nearest.mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics["cells/accuracy"], (nearest > 0).mean())
        np.testing.assert_allclose(metrics["cells/rejected_reward"], 0.1 * rejected.max(axis=0).mean(), rtol=1e-5)
        assert hash(objective) is not None


def test_losses_without_a_reference_on_token_means():
    objective = Objective(
        (
            Term("simpo", simpo_loss, "chosen", "rejected", logps="mean", options={"target_margin": 0.5}),
            Term("sft", sft_loss, "chosen", weight=0.2, logps="mean"),
        )
    )
    assert objective.reference_cells == ()
    loss, metrics = objective(POLICY)
    chosen, rejected = (np.float64(POLICY[cell][1]) for cell in ("chosen", "rejected"))
    want = np.mean(naive.simpo(chosen, rejected, 2.0, 0.5)) - 0.2 * np.mean(chosen)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(metrics["simpo/margin"], (chosen - rejected).mean(), rtol=1e-5)


def test_a_term_reads_the_reference_only_if_its_loss_does():
    """So a neighbour that needs one changes nothing, and the reference model scores no cell in vain."""
    simpo = Term("simpo", simpo_loss, "chosen", "rejected")
    mixed = Objective((simpo, Term("dpo", dpo_loss, "chosen", "image_only"), Term("sft", sft_loss, "chosen@crop")))
    assert mixed.reference_cells == ("chosen", "image_only")
    _, metrics = mixed(POLICY, {cell: REFERENCE[cell] for cell in mixed.reference_cells})
    _, alone = Objective((simpo,))(POLICY)
    assert [metrics[name] == alone[name] for name in alone if name != "loss"] == [True] * (len(alone) - 1)
    np.testing.assert_allclose(metrics["sft/margin"], np.mean(POLICY["chosen@crop"][0]), rtol=1e-6)


def test_a_method_from_outside_needs_one_function_and_one_term():
    def squared_loss(policy_chosen_logps, policy_rejected_logps, *, scale, where):
        return jnp.where(where, scale * (policy_chosen_logps - policy_rejected_logps) ** 2, 0), {}

    objective = Objective((Term("mine", squared_loss, "chosen", "rejected", options={"scale": 2.0}),))
    want = np.mean(2 * (POLICY["chosen"][0] - POLICY["rejected"][0]) ** 2)
    np.testing.assert_allclose(objective(POLICY)[0], want, rtol=1e-6)


def test_fixed_and_dynamic_weights_mix():
    """The dynamic terms share their weights among themselves; an anchor beside them keeps its own."""
    anchored = Objective((*napo().terms, Term("anchor", anchor_loss, "chosen", weight=0.25)))
    loss, metrics = anchored(POLICY, REFERENCE)
    plain, without = napo()(POLICY, REFERENCE)
    np.testing.assert_allclose(loss, plain + 0.25 * metrics["anchor/loss"], rtol=1e-6)
    assert metrics["vision_bias/weight"] == without["vision_bias/weight"]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Term("t", dpo_loss, "chosen", "Rejected!"), r"term 't': 'Rejected!' is no cell"),
        (lambda: Term("t", dpo_loss, "chosen@", "rejected"), "is no cell"),
        (
            lambda: Term("t", dpo_loss, "chosen", "rejected", options={"bta": 0.1}),
            "dpo_loss has no option 'bta'; it has",
        ),
        (lambda: Term("t", dpo_loss, "chosen", "rejected", options={"where": None}), "has no option 'where'"),
        (lambda: Term("t", dpo_loss, "chosen"), "dpo_loss takes another cell, got other=None"),
        (lambda: Term("t", sft_loss, "chosen", "rejected"), "sft_loss takes no other cell, got other='rejected'"),
        (lambda: Term("t", single_sigmoid_loss, "chosen", ("a", "b")), "needs the option 'rejected_weights'"),
        (
            lambda: Term("t", dpo_loss, "chosen", "rejected", weight="dyn"),
            "weight must be a finite number or 'dynamic', got 'dyn'",
        ),
        (
            lambda: Term("t", anchor_loss, "chosen", weight="dynamic"),
            "needs the summed margin of two cells",
        ),
        (lambda: Term("t", dpo_loss, "chosen", "rejected", margin="avg"), "margin must be 'sum' or 'mean', got 'avg'"),
        (lambda: Objective(()), "at least one term"),
        (lambda: Objective(napo().terms * 2), "need different names"),
        (lambda: mdpo(noise_scope="micro"), "noise_scope must be 'batch' or 'microbatch', got 'micro'"),
        (lambda: napo()({"chosen": POLICY["chosen"]}, REFERENCE), r"policy lacks the cells \['rejected', "),
        (lambda: napo()(POLICY), r"reference lacks the cells \['chosen', .*it has \[\]"),
        (lambda: napo()(POLICY, REFERENCE, where={"chosen": np.ones(8, bool)}), "where lacks the cells"),
        (lambda: napo()(batch(0, (2, 2, 2)), batch(1, (2, 2, 2))), r"must be \[B\] or \[A, B\], got 3 dimensions"),
        (
            lambda: napo()({**POLICY, "rejected": (np.float32([1.0]), np.float32([1.0]))}, REFERENCE),
            r"policy\['rejected'\] sum has shape \(1,\), but policy\['chosen'\] sum has shape \(8,\)",
        ),
        (
            lambda: dpo()(POLICY, {**REFERENCE, "rejected": (np.float32([1.0]), np.float32([1.0]))}),
            r"reference\['rejected'\] sum has shape \(1,\), but policy\['chosen'\] sum has shape \(8,\)",
        ),
        (
            lambda: dpo()(POLICY, REFERENCE, where={"chosen": np.ones(5, bool), "rejected": np.ones(8, bool)}),
            r"where has shape \(5,\), but policy\['chosen'\] has shape \(8,\)",
        ),
        (
            lambda: dpo()(POLICY, REFERENCE, where={"chosen": np.ones(8), "rejected": np.ones(8, bool)}),
            "where must be bool, got float32",
        ),
        (lambda: Term("t", dpo_loss, "chosen", ("rejected", "image_only")), "does not take these cells"),
        (lambda: Term("t", softmax_preference_loss, "chosen", "rejected"), "does not take these cells"),
        (lambda: Term("t", dpo_loss, "chosen", "chosen"), r"its cells must differ, got \('chosen', 'chosen'\)"),
        (lambda: Term("t", dpo_loss, "chosen", "rejected@clean"), "write 'rejected' for 'rejected@clean'"),
        (lambda: Term("", dpo_loss, "chosen", "rejected"), "a name must be a lower-case word, got ''"),
        (lambda: Term("t", dpo_loss, "chosen", "rejected", weight=float("nan")), "weight must be a finite number"),
        (
            lambda: Term("t", napo_loss, "chosen", "rejected", weight="dynamic", logps="mean"),
            "needs the summed margin of two cells",
        ),
        (
            lambda: Term("t", lambda policy_chosen_logps, **rest: None, "chosen"),
            r"must name all it takes, got the parameter \*\*rest",
        ),
        (
            lambda: Term("t", lambda policy_chosen_logps, policy_rejected_logps: (0, {}), "chosen", "a"),
            "does not take these cells and options",
        ),
        (
            lambda: Term(
                "t",
                lambda policy_chosen_logps, policy_rejected_logps: (policy_chosen_logps, {}),
                "chosen",
                "a",
                "dynamic",
            ),
            r"needs chosen_rewards and rejected_rewards, got the stats \[\]",
        ),
        (
            lambda: Term("t", dpo_loss, "chosen", "rejected", options={"label_smoothing": 1.5}),
            r"label_smoothing must be in \[0, 1\), got 1.5",
        ),
    ],
)
def test_mistakes_are_refused_with_a_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()
