"""Packed, the decoder computes less and the same."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from quick import quick_jit
from test_shared_prefix import CONFIG, FOUR_CELLS, MODEL, PARAMS, SHUFFLED, TWO_IMAGES, groups_for, napo_of

from napo_jax.models import IMAGE_SLOT, Llava, LlavaConfig, Packing, attention
from napo_jax.models.layout import Layout
from napo_jax.models.llama import LlamaConfig
from napo_jax.models.packing import reorder, take


def tightest(groups):
    """Returns the packing without a place to spare in the longest group."""
    answers = np.asarray(groups.answer_lengths).sum(axis=1)
    tokens = np.asarray(groups.prefix_lengths).sum(axis=1) + answers
    return Packing(int(tokens.max()), int(answers.max()))


def ragged(cell_image, seed, **options):
    """Returns groups with garbage in the padding, empty answers, and a row without a picture."""
    groups = groups_for(cell_image, seed=seed, slack=(4, 3), **options)
    ids = np.array(groups.prefix_ids)
    ids[2][ids[2] == IMAGE_SLOT] = 7  # no picture
    ids[:, :, -1] = IMAGE_SLOT  # a slot in the padding is no slot
    lengths = groups.answer_lengths.at[0, 1].set(0).at[1, 0].set(0).at[1, -1].set(1)
    return groups._replace(prefix_ids=jnp.asarray(ids), answer_lengths=lengths)


def pulled(logps):
    """Returns a loss on which every sum and mean pulls on its own."""
    weights = np.random.default_rng(2).normal(size=(2, *logps.sum.shape)).astype(np.float32)
    return (weights[0] * logps.sum + 20 * weights[1] * logps.mean).sum()


@partial(quick_jit, static_argnums=(0, 1, 3, 5))
def logps_and_gradient(model, loss, params, packing, groups, cell_image):
    def run(params):
        logps = model.logps(params, groups, cell_image, packing)
        return loss(logps), logps

    gradient, logps = jax.grad(run, has_aux=True)(params)
    return logps, gradient


CASES = {
    "napo, without a place to spare": (FOUR_CELLS, napo_of, (0, 0), {"remat": "dots"}),
    "two images, with more places than the layout, a tower that learns, and token weights": (
        SHUFFLED,
        pulled,
        (99, 25),
        {"remat": "full", "logits_chunk": 4, "freeze_vision": False},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_packing_changes_no_logp_and_no_gradient(case):
    cell_image, loss, more, options = CASES[case]
    groups = ragged(cell_image, seed=21)
    packing = tightest(groups)
    packing = Packing(packing.tokens + more[0], packing.answer_tokens + more[1])
    if "weights" in case:
        weights = np.random.default_rng(8).uniform(0, 4, groups.answer_ids.shape)
        groups = groups._replace(token_weights=jnp.asarray(weights, jnp.float32))
        assert packing.tokens > groups.prefix_ids[0].size + groups.answer_ids[0].size
        assert packing.answer_tokens > groups.answer_ids[0].size
    model = Llava(dataclasses.replace(CONFIG, **options))
    plain = Llava(dataclasses.replace(model.config, remat="none"))
    want_logps, want = logps_and_gradient(plain, loss, PARAMS, None, groups, cell_image)
    logps, gradient = logps_and_gradient(model, loss, PARAMS, packing, groups, cell_image)
    assert (logps.sum[0, 1], logps.mean[1, 0]) == (0, 0), "an empty answer"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), logps, want_logps)
    idle = "unused" if "learns" in case else "vision"
    for (path, leaf), got in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(gradient), strict=True):
        name = jax.tree_util.keystr(path)
        assert np.any(leaf) != (idle in name), f"{name}: the comparison is empty"
        # What is added to all keys alike changes no attention: there the gradient is 0, and what is left is rounding.
        rounding = 1e-5 if name.endswith("['key']['bias']") else 0.0
        assert np.max(np.abs(got - leaf)) <= 1e-4 * np.max(np.abs(leaf)) + rounding, name


@partial(quick_jit, static_argnums=1)
def score(groups, packing, params):
    return MODEL.logps(params, groups, SHUFFLED, packing), MODEL.predictors(params, groups, SHUFFLED, packing)


def test_a_group_that_does_not_fit_is_never_silent():
    """One token too many, or one answer token, makes all of its row NaN; its neighbours are as before."""
    groups = groups_for(SHUFFLED, seed=26)._replace(
        prefix_lengths=jnp.array([[24, 24], [20, 20], [23, 20]]),
        answer_lengths=jnp.array([[9, 2, 3, 1], [9, 5, 1, 1], [9, 4, 1, 1]]),
    )
    spoilt = np.array([True, True, False])  # 63 and 56 tokens, but 15 and 16 of answers
    want, _ = score(groups, None, PARAMS)
    got, hidden = score(groups, Packing(62, 15), PARAMS)
    for got_logps, want_logps in zip(got, want, strict=True):
        assert np.isnan(got_logps[spoilt]).all()
        np.testing.assert_allclose(got_logps[~spoilt], want_logps[~spoilt], rtol=1e-5)
    assert np.isnan(hidden[spoilt]).all(), "so that the gradient is NaN too"
    assert np.isfinite(hidden[~spoilt]).all()


def test_a_picture_that_lost_tokens_spoils_its_own_cells():
    groups = groups_for(SHUFFLED, seed=27)
    lengths = jnp.array([[3, 5, 3, 1], [2, 6, 1, 1], [2, 4, 1, 1]])
    ids = np.array(groups.prefix_ids)
    ids[1, 0, np.flatnonzero(ids[1, 0] == IMAGE_SLOT)[0]] = 7
    groups = groups._replace(prefix_ids=jnp.asarray(ids), answer_lengths=lengths)
    got, _ = score(groups, Packing(62, 15), PARAMS)
    np.testing.assert_array_equal(np.isnan(got.sum), [[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])


def test_kl():
    """Against log-probs over the vocabulary in float64, from hidden states that were not packed."""
    groups = ragged(SHUFFLED, seed=25)
    reference = jax.tree.map(lambda x: 1.1 * x, PARAMS)
    logs = []
    for params in (reference, PARAMS):
        logits = np.float64(score(groups, None, params)[1]) @ np.float64(params["language"]["head"])
        logs.append(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    want = np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)
    token_kl = quick_jit(MODEL.token_kl, static_argnums=(3, 4))
    got = token_kl(PARAMS, reference, groups, SHUFFLED, tightest(groups))
    counted = np.arange(got.shape[2]) < np.asarray(groups.answer_lengths)[..., None]
    np.testing.assert_allclose(got[counted], want[counted], rtol=1e-4, atol=1e-5)
    assert not np.any(got[~counted])


def test_bfloat16():
    groups = ragged(SHUFFLED, seed=28)
    model = Llava(dataclasses.replace(CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    got = quick_jit(model.logps, static_argnums=(2, 3))(params, groups, SHUFFLED, tightest(groups))
    want, _ = score(groups, None, PARAMS)
    there = np.asarray(groups.answer_lengths) > 0
    np.testing.assert_allclose(got.mean[there], want.mean[there], atol=0.1)


def test_splash_interpreted(monkeypatch):
    """The kernel of the TPU gets the layout that its static mask is made for."""
    monkeypatch.setitem(attention._BACKENDS, "splash", partial(attention._splash, interpret=True))
    text = LlamaConfig(113, width=128, mlp_width=64, layers=1, heads=1, kv_heads=1, max_positions=256)
    config = LlavaConfig(text, CONFIG.vision, remat="none")
    params = quick_jit(Llava(config).init)(jax.random.key(0))
    groups = groups_for(TWO_IMAGES, batch=2, prefix=40, answer=16, seed=29)
    run = lambda backend, packing: quick_jit(Llava.logps, static_argnums=(0, 3, 4))(
        Llava(dataclasses.replace(config, attention=backend)), params, groups, TWO_IMAGES, packing
    )
    got, want = run("splash", tightest(groups)), run("xla", None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


# --- the order itself ------------------------------------------------------------------------------------------------


order_of = quick_jit(Packing.order, static_argnums=(0, 4))


def order_for(cell_image, packing, batch, seed, shortest=1):
    """Returns an order of random lengths over prefixes of 5 and answers of 4, and the lengths."""
    rng = np.random.default_rng(seed)
    layout = Layout(5, 4, max(cell_image) + 1, cell_image)
    prefix_lengths = rng.integers(shortest, 6, (batch, layout.prefixes), dtype=np.int32)
    answer_lengths = rng.integers(0, 5, (batch, layout.cells), dtype=np.int32)
    return order_of(packing, layout, prefix_lengths, answer_lengths, 99), prefix_lengths, answer_lengths


@pytest.mark.parametrize("cell_image", [FOUR_CELLS, TWO_IMAGES, SHUFFLED])
def test_order_equals_a_naive_twin(cell_image):
    """Each row laid out token by token, a token being (stream, which, place)."""
    size, answer_size = 26, 16
    order, prefix_lengths, answer_lengths = order_for(cell_image, Packing(size, answer_size), 40, seed=30)
    order = jax.tree.map(np.asarray, order)
    answer_names = [("answer", c, t) for c in range(len(cell_image)) for t in range(4)]
    names = [("prefix", m, i) for m in range(max(cell_image) + 1) for i in range(5)] + answer_names
    for row, (prefix, answer) in enumerate(zip(prefix_lengths, answer_lengths, strict=True)):
        answers = [("answer", c, t) for c, n in enumerate(answer) for t in range(n)]
        tokens = [("prefix", m, i) for m, n in enumerate(prefix) for i in range(n)] + answers
        end = lambda c, prefix=prefix: ("prefix", cell_image[c], prefix[cell_image[c]] - 1)
        before = [("answer", c, t - 1) if t else end(c) for _, c, t in answers]
        nowhere = lambda found, size, nothing: [*found, *[nothing] * (size - len(found))]
        among = lambda wanted, given: [given.index(x) if x in given else len(given) for x in wanted]
        absent = lambda places, count, size: [size if place == count else place for place in places]
        want = {
            "layout_places": nowhere(among(tokens, names), size, len(names)),
            "packed_places": absent(among(names, tokens), len(tokens), size),
            "answer_layout_places": nowhere(among(answers, answer_names), answer_size, len(answer_names)),
            "answer_packed_places": absent(among(answer_names, answers), len(answers), answer_size),
            "predictor_places": nowhere(among(before, tokens), answer_size, size),
            "fits": True,
        }
        for name, places in want.items():
            np.testing.assert_array_equal(getattr(order, name)[row], places, err_msg=name)


def test_lengths_outside_the_layout_do_not_fit():
    lengths = jnp.array([[6, 6], [6, 0], [7, 6], [6, 6]]), jnp.array([[2, 4, 2], [2, 2, 2], [2, 2, 2], [2, 5, 2]])
    layout = Layout(6, 4, 2, TWO_IMAGES)
    np.testing.assert_array_equal(order_of(Packing(30, 15), layout, *lengths, 10).fits, [True, False, False, False])


def test_more_positions_than_the_model_has_do_not_fit():
    """Held against the lengths: the places that attention has may be more than any group fills."""
    lengths = jnp.array([[6, 6], [6, 5], [5, 5]]), jnp.array([[2, 4, 2], [4, 2, 4], [3, 4, 4]])
    layout = Layout(6, 4, 2, (0, 0, 1))
    for most, fits in ((10, [True, True, True]), (9, [False, False, True]), (8, [False, False, False])):
        np.testing.assert_array_equal(order_of(Packing(30, 15), layout, *lengths, most).fits, fits)


@pytest.mark.parametrize("cell_image", [FOUR_CELLS, SHUFFLED])
def test_derivatives_equal_those_of_indexing(cell_image):
    """Against the scatter that JAX derives, with slopes at padding too: there is nothing they could reach."""
    order, *_ = order_for(cell_image, Packing(28, 18), 9, seed=31)
    rng = np.random.default_rng(31)
    draw = lambda *shape: np.float32(rng.normal(size=shape))

    @partial(quick_jit, static_argnums=0)
    def pull(function, x, slope):
        out, backward = jax.vjp(function, x)
        return out, backward(slope)[0]

    def same(function, plain, x, *shape):
        slope = draw(*shape)
        got, want = pull(function, x, slope), pull(plain, x, slope)
        return all(np.allclose(*pair, rtol=1e-6, atol=1e-6) for pair in zip(got, want, strict=True))

    places, cells = len(order.packed_places[0]), len(cell_image)
    flat = lambda x: x.reshape(9, cells * 4)
    assert same(order.pack, lambda x: take(x, order.layout_places), draw(9, places, 2, 3), 9, 28, 2, 3)
    assert same(order.unpack, lambda x: take(x, order.packed_places), draw(9, 28, 3), 9, places, 3)
    assert same(order.predictors, lambda x: take(x, order.predictor_places), draw(9, 28, 3), 9, 18, 3)
    plain = lambda x: take(flat(x), order.answer_layout_places)
    assert same(order.pack_answers, plain, draw(9, cells, 4), 9, 18)
    plain = lambda x: take(x, order.answer_packed_places).reshape(9, cells, 4)
    assert same(order.unpack_answers, plain, draw(9, 18), 9, cells, 4)
    twice = np.zeros((9, 2), np.int32)  # what is read twice is no reordering, and shows
    assert not same(lambda x: reorder(x, twice, twice), lambda x: take(x, twice), draw(9, 2, 3), 9, 2, 3)


def test_image_tokens_fill_slots_in_their_order():
    """Slots with words between them, as those of several pictures, and a prefix without any."""
    order, *_ = order_for(SHUFFLED, Packing(28, 18), 6, seed=34, shortest=4)
    rng = np.random.default_rng(34)
    slots = np.zeros((6, 2, 5), bool)
    for row, image in np.ndindex(6, 2):
        slots[row, image, rng.choice(4, 2, replace=False)] = True
    slots[3, 1] = False
    words, features = (np.float32(rng.normal(size=shape)) for shape in ((6, 28, 3), (6, 2, 2, 3)))
    got, pull = quick_jit(lambda *x: jax.vjp(lambda *x: order.fill_slots(*x, slots), *x))(words, features)
    slope = np.float32(rng.normal(size=words.shape))
    want, d_words, d_features = words.copy(), slope.copy(), np.zeros_like(features)
    for row, image in np.ndindex(6, 2):
        for n, slot in enumerate(np.flatnonzero(slots[row, image])):
            place = order.packed_places[row, image * 5 + slot]
            want[row, place], d_words[row, place] = features[row, image, n], 0
            d_features[row, image, n] = slope[row, place]
    np.testing.assert_array_equal(got, want)
    for gradient, wanted in zip(pull(slope), (d_words, d_features), strict=True):
        np.testing.assert_array_equal(gradient, wanted)


@pytest.mark.parametrize("sizes", [(10, 10), (10, 0)])
def test_a_packing_without_room_is_refused(sizes):
    with pytest.raises(ValueError, match="needs places for answers and for prefixes, got"):
        Packing(*sizes)


# --- the program -----------------------------------------------------------------------------------------------------


def test_the_layers_gradient_has_no_scatter():
    groups = groups_for(TWO_IMAGES, seed=32)

    def scatters(packing):
        """Counts the scatters within loops, and all of them."""
        gradient = jax.grad(lambda p: MODEL.logps(p, groups, TWO_IMAGES, packing).sum.sum())
        found = {True: 0, False: 0}

        def walk(jaxpr, inside):
            for equation in jaxpr.eqns:
                found[inside] += equation.primitive.name.startswith("scatter")
                for sub in jaxprs_in_params(equation.params):
                    walk(sub, inside or equation.primitive.name == "scan")

        walk(jax.make_jaxpr(gradient)(PARAMS).jaxpr, False)
        return found

    assert scatters(tightest(groups)) == {True: 0, False: 1}  # the one left looks words up
    assert scatters(None)[False] > 1, "the count counts"


def test_the_arithmetic_falls_with_the_places():
    """By hand: a place costs 6 flops a weight of the layer, and one of an answer 8 a weight of the head besides."""
    text = LlamaConfig(512, width=384, mlp_width=1024, layers=1, heads=4, kv_heads=2, max_positions=256)
    model = Llava(LlavaConfig(text, CONFIG.vision, remat="none", logits_chunk=1024))
    params = jax.eval_shape(model.init, jax.random.key(0))
    groups = groups_for(FOUR_CELLS, batch=2, prefix=60, answer=40)
    layer, head = 384 * 384 * 3 + 3 * 384 * 1024, 384 * 512

    def flops(packing):
        run = jax.value_and_grad(lambda params: model.logps(params, groups, FOUR_CELLS, packing).sum.sum())
        return jax.jit(run).lower(params).cost_analysis()["flops"]

    full = flops(None)  # 60 + 4 * 40 places
    for packing in (Packing(220, 160), Packing(180, 120), Packing(120, 80)):
        less = 2 * (6 * layer * (220 - packing.tokens) + 8 * head * (160 - packing.answer_tokens))
        np.testing.assert_allclose(flops(packing), full - less, rtol=0.01)


def test_packed_rows_stay_on_their_device():
    """With the batch over eight devices, the program moves what it moves unpacked: gradients, and no activations."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    groups = groups_for(TWO_IMAGES, batch=8, seed=33)
    spread = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))), groups)
    params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
    kinds = "all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce"

    def moves(packing):
        run = jax.value_and_grad(lambda p, groups: MODEL.logps(p, groups, TWO_IMAGES, packing).mean.sum())
        program = quick_jit(run).lower(params, spread).compile().as_text()
        return re.findall(rf" ({kinds})(?:-start)?\(", program)

    assert set(moves(tightest(groups))) == {"all-reduce"}
