"""One prefix for many answers gives the log-probs and gradients of one prefix each."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_jit
from torch_llava import params_of, tiny_config, torch_llava, torch_logits

from napo_jax.methods import napo
from napo_jax.models import IMAGE_SLOT, Groups, Llava
from napo_jax.models.layout import Layout

CONFIG = tiny_config(kv_heads=2, remat="none")
MODEL = Llava(CONFIG)
TORCH = torch_llava(CONFIG, seed=11)
PARAMS = params_of(TORCH)
token_logps = quick_jit(Llava.token_logps, static_argnums=(0, 3))
logits_of = quick_jit(Llava.logits, static_argnums=0)

FOUR_CELLS = (0, 0, 0, 0)  # NaPO: four answers on one image
TWO_IMAGES = (0, 0, 1)  # mDPO and MFPO: chosen and rejected on the clean image, chosen on the other
SHUFFLED = (1, 0, 1, 0)


def groups_for(cell_image, batch=3, prefix=24, answer=9, seed=0, slack=(0, 0)):
    """Returns groups of unequal lengths; `slack` adds padding tokens, filled with garbage, to prefixes and answers."""
    rng = np.random.default_rng(seed)
    images, cells = max(cell_image) + 1, len(cell_image)
    prefix_lengths = rng.integers(prefix - 6, prefix + 1, (batch, images))
    answer_lengths = rng.integers(1, answer + 1, (batch, cells))
    answer_lengths[0, 0] = answer
    ids = rng.integers(1, CONFIG.text.vocab_size, (batch, images, prefix))
    starts = rng.integers(0, prefix - 6 - CONFIG.vision.image_tokens, batch)
    for row, start in enumerate(starts):
        ids[row, :, start : start + CONFIG.vision.image_tokens] = IMAGE_SLOT
    answers = rng.integers(1, CONFIG.text.vocab_size, (batch, cells, answer))
    garbage = np.random.default_rng(seed + 99).integers(1, CONFIG.text.vocab_size, (batch, max(images, cells), 64))
    ids = np.concatenate([ids, garbage[:, :images, : slack[0]]], axis=2)
    answers = np.concatenate([answers, garbage[:, :cells, : slack[1]]], axis=2)
    size = CONFIG.vision.image_size
    return Groups(
        images=jnp.asarray(rng.normal(size=(batch, images, size, size, 3)), jnp.float32),
        prefix_ids=jnp.asarray(ids, jnp.int32),
        prefix_lengths=jnp.asarray(prefix_lengths, jnp.int32),
        answer_ids=jnp.asarray(answers, jnp.int32),
        answer_lengths=jnp.asarray(answer_lengths, jnp.int32),
    )


def one_by_one(groups, cell_image):
    """Yields (row, cell, sequence, prefix length, answer length): each answer behind its own unpadded prefix."""
    for row in range(groups.answer_ids.shape[0]):
        for cell, image in enumerate(cell_image):
            prefix, answer = int(groups.prefix_lengths[row, image]), int(groups.answer_lengths[row, cell])
            sequence = np.concatenate([groups.prefix_ids[row, image, :prefix], groups.answer_ids[row, cell, :answer]])
            yield row, cell, sequence, prefix, answer


@pytest.mark.parametrize("cell_image", [FOUR_CELLS, TWO_IMAGES, SHUFFLED])
def test_token_logps_equal_torch_answer_by_answer(cell_image):
    """T12: golden per-token log-probs, from logits of `transformers` over one plain sequence per answer."""
    groups = groups_for(cell_image)
    got = token_logps(MODEL, PARAMS, groups, cell_image)
    for row, cell, sequence, prefix, answer in one_by_one(groups, cell_image):
        image = np.asarray(groups.images[row, cell_image[cell]])[None]
        logits = torch_logits(TORCH, sequence[None], image, CONFIG.text.vocab_size)[0]
        want = jax.nn.log_softmax(logits[prefix - 1 : -1], axis=-1)[np.arange(answer), sequence[prefix:]]
        np.testing.assert_allclose(got[row, cell, :answer], want, rtol=1e-4, atol=1e-4)
        shifted = jax.nn.log_softmax(logits[prefix:], axis=-1)[np.arange(answer), sequence[prefix:]]
        assert np.max(np.abs(got[row, cell, :answer] - shifted)) > 1e-2  # off by one shows


def unshared(params, groups, cell_image):
    """Scores every cell as a group of its own, at the same padding."""
    cells = np.array(cell_image)
    count = len(cells)
    apart = Groups(
        images=groups.images[:, cells].reshape(-1, 1, *groups.images.shape[2:]),
        prefix_ids=groups.prefix_ids[:, cells].reshape(-1, 1, groups.prefix_ids.shape[2]),
        prefix_lengths=groups.prefix_lengths[:, cells].reshape(-1, 1),
        answer_ids=groups.answer_ids.reshape(-1, 1, groups.answer_ids.shape[2]),
        answer_lengths=groups.answer_lengths.reshape(-1, 1),
    )
    logps = MODEL.logps(params, apart, (0,))
    return type(logps)(*(value.reshape(-1, count) for value in logps))


def shared(params, groups, cell_image):
    return MODEL.logps(params, groups, cell_image)


def napo_of(logps):
    """Returns the paper's NaPO against a reference of its own, so that no weight or margin is at its start."""
    cells = {cell: (logps.sum[:, c], logps.mean[:, c]) for c, cell in enumerate(napo().cells)}
    reference = {cell: (-60.0 - 7 * c + 0 * s, -9.0 - c + 0 * m) for c, (cell, (s, m)) in enumerate(cells.items())}
    return napo()(cells, jax.lax.stop_gradient(reference))[0]


@pytest.mark.parametrize(("cell_image", "objective"), [(FOUR_CELLS, napo_of), (TWO_IMAGES, None), (SHUFFLED, None)])
def test_sharing_changes_no_logp_and_no_gradient(cell_image, objective):
    groups = groups_for(cell_image, seed=1)
    # Without an objective, random cotangents: every sum and mean pulls on its own.
    weights = np.random.default_rng(2).normal(size=(2, *groups.answer_lengths.shape)).astype(np.float32)
    reduce = objective or (lambda logps: (weights[0] * logps.sum + 20 * weights[1] * logps.mean).sum())

    @partial(quick_jit, static_argnums=0)
    def run(score, params):
        def loss(params):
            logps = score(params, groups, cell_image)
            return reduce(logps), logps

        gradients, logps = jax.grad(loss, has_aux=True)(params)
        return logps, gradients

    logps, gradients = run(shared, PARAMS)
    want_logps, want = run(unshared, PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), logps, want_logps)
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        got = dict(jax.tree_util.tree_leaves_with_path(gradients))[path]
        name = jax.tree_util.keystr(path)
        if "vision" in name:
            assert not np.any(got), f"{name} is frozen"
            assert not np.any(leaf)
        else:
            assert np.any(leaf), f"{name} gets no gradient: the comparison is empty"
            assert np.max(np.abs(got - leaf)) <= 1e-4 * np.max(np.abs(leaf)), name


def test_padding_changes_nothing():
    """T10 and T11: any bucket gives the same, whatever stands in the padding, and a token of id 0 or 2 is a token."""

    def loss(params, groups):
        logps = MODEL.logps(params, groups, TWO_IMAGES)
        return logps.mean.sum(), logps

    run = partial(quick_jit(jax.grad(loss, has_aux=True)), PARAMS)

    def padded(*slack):
        groups = groups_for(TWO_IMAGES, seed=3, slack=slack)
        return groups._replace(answer_ids=groups.answer_ids.at[:, :, 0].set(0).at[:, :, 1].set(2))

    want, want_logps = run(padded(0, 0))
    for slack in ((8, 0), (0, 7), (40, 55)):
        got, logps = run(padded(*slack))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), logps, want_logps)
        close = lambda a, b: np.max(np.abs(a - b)) <= 1e-5 * max(np.max(np.abs(b)), 1e-3)
        assert all(jax.tree.leaves(jax.tree.map(close, got, want))), slack


def test_the_batch_changes_nothing():
    """T11: a row alone, and the cells in another order, score the same."""
    groups = groups_for(FOUR_CELLS, seed=4)
    want = token_logps(MODEL, PARAMS, groups, FOUR_CELLS)
    alone = token_logps(MODEL, PARAMS, jax.tree.map(lambda x: x[1:2], groups), FOUR_CELLS)
    valid = np.arange(want.shape[-1]) < np.asarray(groups.answer_lengths)[..., None]
    np.testing.assert_allclose(alone[valid[1:2]], want[1:2][valid[1:2]], rtol=1e-5)
    order = np.array([2, 0, 3, 1])
    turned = groups._replace(answer_ids=groups.answer_ids[:, order], answer_lengths=groups.answer_lengths[:, order])
    got = token_logps(MODEL, PARAMS, turned, FOUR_CELLS)
    np.testing.assert_allclose(got[valid[:, order]], want[:, order][valid[:, order]], rtol=1e-5)


def test_who_sees_whom_by_gradients():
    """No answer sees another, no prefix an answer, no position a later one; and what should be seen is."""
    layout = Layout(prefix_tokens=5, answer_tokens=3, prefixes=2, cell_image=TWO_IMAGES)
    lengths = jnp.array([[5, 4]], jnp.int32), jnp.array([[3, 3, 3]], jnp.int32)
    embeddings = jnp.asarray(np.random.default_rng(5).normal(size=(1, layout.tokens, CONFIG.text.width)), jnp.float32)
    from napo_jax.models.llama import Llama

    decoder = Llama(CONFIG.text, remat="none")
    from napo_jax.models.mixing import WholeGroups

    mix = WholeGroups(*lengths, None, layout, "xla")
    run = lambda x: decoder.apply({"params": PARAMS["language"]}, x, layout.positions(lengths[0]), mix)[0][0].sum(
        axis=-1
    )
    reach = np.any(np.asarray(quick_jit(jax.jacrev(run))(embeddings))[:, 0] != 0, axis=-1)  # [S, S]: row sees column

    streams = [*[("image 0", i) for i in range(5)], *[("image 1", i) for i in range(5)]]
    streams += [(f"cell {c}", t) for c in range(3) for t in range(3)]
    for row, (stream, place) in enumerate(streams):
        for column, (other, other_place) in enumerate(streams):
            sees = stream == other and other_place <= place
            if stream.startswith("cell"):
                image = TWO_IMAGES[int(stream[-1])]
                sees |= other == f"image {image}" and other_place < int(lengths[0][0, image])
            assert reach[row, column] == sees, f"{stream} {place} and {other} {other_place}"
    without_lengths = layout.mask()
    without_lengths[16:, 9] = False  # the second prefix is one token short
    np.testing.assert_array_equal(reach, without_lengths)


def test_an_empty_answer_is_zero_and_finite():
    """T3: no 0/0 in the mean, in value or in gradient."""
    groups = groups_for(FOUR_CELLS, seed=6)
    groups = groups._replace(answer_lengths=groups.answer_lengths.at[1, 2].set(0))

    def loss(params):
        logps = MODEL.logps(params, groups, FOUR_CELLS)
        return sum(jax.tree.leaves(jax.tree.map(jnp.sum, logps))), logps

    gradients, logps = quick_jit(jax.grad(loss, has_aux=True))(PARAMS)
    assert (logps.sum[1, 2], logps.mean[1, 2]) == (0, 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


def test_a_picture_that_lost_tokens_is_never_silent():
    """T1: after a careless truncation the row is NaN, and its neighbours are as before."""
    groups = groups_for(FOUR_CELLS, seed=13)
    want = token_logps(MODEL, PARAMS, groups, FOUR_CELLS)
    ids = np.array(groups.prefix_ids)
    first = np.flatnonzero(ids[1, 0] == IMAGE_SLOT)[0]
    valid = np.arange(want.shape[-1]) < np.asarray(groups.answer_lengths)[..., None]
    for change, spoilt in ((7, True), (IMAGE_SLOT, True), (None, False)):
        changed = ids.copy()
        if change is None:
            changed[1, 0][changed[1, 0] == IMAGE_SLOT] = 7  # no picture at all is a prefix like any other
        else:
            changed[1, 0, first + (0 if change == 7 else CONFIG.vision.image_tokens)] = change
        got = token_logps(MODEL, PARAMS, groups._replace(prefix_ids=jnp.asarray(changed)), FOUR_CELLS)
        assert np.isnan(got[1]).all() == spoilt
        assert np.isfinite(got[1][valid[1]]).all() != spoilt
        for row in (0, 2):
            np.testing.assert_allclose(got[row][valid[row]], want[row][valid[row]], rtol=1e-5)


def test_token_weights():
    groups = groups_for(TWO_IMAGES, seed=7)
    weights = np.float32(np.random.default_rng(8).uniform(0, 4, groups.answer_ids.shape))
    tokens = np.asarray(token_logps(MODEL, PARAMS, groups, TWO_IMAGES))
    weighed = groups._replace(token_weights=jnp.asarray(weights))
    logps = quick_jit(Llava.logps, static_argnums=(0, 3))(MODEL, PARAMS, weighed, TWO_IMAGES)
    for row, cell in np.ndindex(*groups.answer_lengths.shape):
        n = int(groups.answer_lengths[row, cell])
        want = np.sum(np.float64(tokens[row, cell, :n]) * weights[row, cell, :n])
        np.testing.assert_allclose(logps.sum[row, cell], want, rtol=1e-5)
        np.testing.assert_allclose(logps.mean[row, cell], want / weights[row, cell, :n].sum(), rtol=1e-5)


def test_chunks_change_nothing():
    groups = groups_for(FOUR_CELLS, seed=9)

    def run(chunk):
        model = Llava(dataclasses.replace(CONFIG, logits_chunk=chunk))
        return quick_jit(jax.value_and_grad(lambda p: model.logps(p, groups, FOUR_CELLS).sum.sum()))(PARAMS)

    want, want_gradient = run(9)
    for chunk in (1, 4, 64):
        got, got_gradient = run(chunk)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        heads = (gradient["language"]["head"] for gradient in (got_gradient, want_gradient))
        np.testing.assert_allclose(*heads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["logps", "kl"])
def test_no_logits_outlive_their_chunk(loss):
    """In the whole gradient program there is no array over [T, V], and none of more than one chunk over V."""
    config = dataclasses.replace(CONFIG, logits_chunk=4, remat="full")
    model, vocab = Llava(config), CONFIG.text.vocab_size
    groups = groups_for(FOUR_CELLS, batch=2, answer=16)
    if loss == "logps":
        run = lambda params: model.logps(params, groups, FOUR_CELLS).sum.sum()
    else:
        run = lambda params: model.token_kl(params, PARAMS, groups, FOUR_CELLS).sum()
    program = jax.jit(jax.grad(run)).lower(PARAMS).compile().as_text()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", program)]
    over_vocab = [dims for dims in re.findall(r"f32\[([\d,]+)\]", program) if str(vocab) in dims.split(",")]
    of_tokens = [
        d for d in over_vocab if np.prod([int(n) for n in d.split(",")]) // vocab not in (1, CONFIG.text.width)
    ]
    assert sizes
    assert of_tokens, "the chunk itself should be there"
    assert max(np.prod([int(n) for n in d.split(",")]) for d in of_tokens) <= 2 * 4 * 4 * vocab


def test_kl_to_the_reference():
    groups = groups_for(FOUR_CELLS, seed=10)
    reference = jax.tree.map(lambda x: 1.1 * x, PARAMS)
    token_kl = lambda params, reference: MODEL.token_kl(params, reference, groups, FOUR_CELLS)
    run = quick_jit(token_kl)
    got = run(PARAMS, reference)
    for row, cell, sequence, prefix, answer in list(one_by_one(groups, FOUR_CELLS))[:4]:
        image, whole = groups.images[row, 0][None], len(sequence)
        ids = jnp.asarray(np.pad(sequence, (0, 40 - whole)))[None]  # of one width, which is compiled once
        logs = [
            np.float64(jax.nn.log_softmax(logits_of(MODEL, params, ids, image)[0, :whole], axis=-1))
            for params in (reference, PARAMS)
        ]
        want = np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)[prefix - 1 : -1]
        np.testing.assert_allclose(got[row, cell, :answer], want, rtol=1e-3, atol=1e-4)
    assert not np.any(run(PARAMS, PARAMS) > 1e-5)
    into_reference = quick_jit(jax.grad(lambda r: token_kl(PARAMS, r).sum()))(reference)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(into_reference))


def test_remat_changes_no_number():
    groups = groups_for(TWO_IMAGES, seed=11)

    def run(remat):
        model = Llava(dataclasses.replace(CONFIG, remat=remat))
        return quick_jit(jax.grad(lambda p: model.logps(p, groups, TWO_IMAGES).mean.sum()))(PARAMS)

    want = run("none")
    for remat in ("dots", "full"):
        close = lambda a, b: np.max(np.abs(a - b)) <= 1e-5 * max(np.max(np.abs(b)), 1e-3)
        assert all(jax.tree.leaves(jax.tree.map(close, run(remat), want))), remat


def test_a_thawed_tower_learns():
    groups = groups_for(FOUR_CELLS, seed=12)
    model = Llava(dataclasses.replace(CONFIG, freeze_vision=False))
    gradients = quick_jit(jax.grad(lambda p: model.logps(p, groups, FOUR_CELLS).sum.sum()))(PARAMS)
    vision = {**gradients["vision"]}
    unused = vision.pop("unused")
    assert all(np.any(leaf) for leaf in jax.tree.leaves(vision))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(unused))


def test_the_tower_runs_once_per_image_and_never_its_last_layer():
    """Counted in the program: products of the tower over B M images, and layers - 1 turns of its scan."""
    groups = groups_for(FOUR_CELLS, batch=3)
    jaxpr = str(jax.make_jaxpr(lambda p: MODEL.logps(p, groups, FOUR_CELLS))(PARAMS))
    tokens, width = CONFIG.vision.image_tokens + 1, CONFIG.vision.width
    assert f"f32[3,{tokens},{width}]" in jaxpr
    assert f"f32[12,{tokens},{width}]" not in jaxpr
    assert f"length={CONFIG.vision.layers - 1}" in jaxpr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g._replace(images=g.images[:, :0]), "images: expected"),
        (lambda g: g._replace(images=g.images[..., :20, :]), "images: expected"),
        (lambda g: g._replace(images=g.images[:, None, None]), "images: expected"),
        (lambda g: g._replace(images=jnp.zeros(g.images.shape, jnp.uint8)), "normalised float.*got uint8"),
        (lambda g: g._replace(prefix_lengths=g.prefix_lengths[0]), "prefix_lengths: expected"),
        (lambda g: g._replace(answer_ids=g.answer_ids[:2]), "answer_ids: expected 3, got 2"),
        (lambda g: g._replace(answer_lengths=g.answer_lengths[:, :2]), "answer_lengths: expected"),
        (lambda g: g._replace(answer_ids=g.answer_ids[:, :3], answer_lengths=g.answer_lengths[:, :3]), "cell_image"),
        (lambda g: g._replace(token_weights=jnp.ones((1,))), "token_weights: expected"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(change, message):
    """T13: nothing is sliced to fit."""
    with pytest.raises(ValueError, match=message):
        MODEL.logps(PARAMS, change(groups_for(FOUR_CELLS)), FOUR_CELLS)


@pytest.mark.parametrize("images", [1, 4])
def test_logits_refuses_images_that_are_not_one_for_each_row(images):
    """Sixteen tokens of one picture could fill the slots of two rows; nothing is spread to fit."""
    groups = groups_for(FOUR_CELLS, batch=2)
    with pytest.raises(ValueError, match="images: expected"):
        MODEL.logits(PARAMS, groups.prefix_ids[:, 0], jnp.zeros((images, 28, 28, 3)))


def test_impossible_layouts_are_refused():
    with pytest.raises(ValueError, match=r"cell_image \(0, 2\) names an image variant outside 0 to 1"):
        Layout(4, 2, 2, (0, 2))
    long = groups_for(FOUR_CELLS, prefix=256)
    with pytest.raises(ValueError, match="exceed the model's 256 positions"):
        MODEL.logps(PARAMS, long, FOUR_CELLS)
