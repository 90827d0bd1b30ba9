"""Debiased decoding, against the same done by hand with whole sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_jit
from torch_llava import tiny_config

from napo_jax import generate
from napo_jax.debias import Debias, calibrate, contrast, without_picture
from napo_jax.decoding import Decoding
from napo_jax.generate import Generator, Prompt
from napo_jax.models import IMAGE_SLOT, Llava

CONFIG = tiny_config(remat="none")
EOS, MOST, UNK = 25, 8, 7


@pytest.fixture(autouse=True)
def fast_compiles(monkeypatch):
    monkeypatch.setattr(generate.jax, "jit", quick_jit)


@pytest.fixture(scope="module")
def model():
    model = Llava(CONFIG)
    params = model.init(jax.random.key(5))
    # Louder than it begins, so that distributions are far from flat and the cut has something to cut.
    params["language"]["head"] = params["language"]["head"] * 30
    # The picture louder too, or it would change nothing that is said.
    params["projector"]["down"]["kernel"] = params["projector"]["down"]["kernel"] * 5
    return model, params


@pytest.fixture(scope="module")
def prompts():
    """Four of unequal lengths, three with a picture, in the middle of the text."""
    random = np.random.default_rng(0)
    made = []
    for number, words in enumerate((3, 9, 5, 14)):
        ids, image = random.integers(26, CONFIG.text.vocab_size, words).astype(np.int32), None
        if number != 1:
            image = random.normal(size=(28, 28, 3)).astype(np.float32) * 3
            ids = np.concatenate([[1, 2], np.full(CONFIG.vision.image_tokens, IMAGE_SLOT), ids]).astype(np.int32)
        made.append(Prompt(number, ids, image, seed=number))
    return made


def with_and_without(prompt, how):
    """Returns the prompt's texts, spelled out here on their own."""
    words = [token for token in prompt.ids.tolist() if token != IMAGE_SLOT]
    unk = words if prompt.image is None else [*words[:2], UNK, *words[2:]]
    return {"none": [words], "unk": [unk], "both": [words, unk]}[how]


def next_logits(model, texts, image):
    """Returns float64[V] for each of some texts."""
    net, params = model
    images = np.zeros((len(texts), 28, 28, 3), np.float32) if image is None else image[None]
    ids = np.zeros((len(texts), 64), np.int32)  # of one width, which is compiled once
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    values = _whole(net, params, ids, images)
    return [np.asarray(values[row, len(text) - 1], np.float64) for row, text in enumerate(texts)]


_whole = quick_jit(Llava.logits, static_argnums=0)


def by_hand(model, prompt, how, strength, plausible):
    """Decodes greedily in two passes a token over whole sequences, nothing kept."""
    said, cut = [], 0
    while len(said) < MOST:
        (seen,) = next_logits(model, [prompt.ids.tolist() + said], prompt.image)
        blind = np.mean(next_logits(model, [text + said for text in with_and_without(prompt, how)], None), axis=0)
        out = (1 + strength) * seen - strength * blind
        implausible = seen < seen.max() + np.log(plausible)
        cut += int(np.argmax(out) != np.argmax(np.where(implausible, -np.inf, out)))
        said.append(int(np.argmax(np.where(implausible, -np.inf, out))))
        if said[-1] == EOS:
            break
    return said, cut


def by_us(model, prompts, slots=4, mesh=None, **options):
    generator = Generator(
        *model, Decoding(max_tokens=MOST, **options), eos=EOS, unk=UNK, slots=slots, prompt_tokens=64, mesh=mesh
    )
    return {answer.key: answer.ids + [EOS] * answer.ended for answer in generator(prompts)}


@pytest.mark.parametrize("how", ["none", "unk", "both"])
def test_vdd_is_two_passes_by_hand(model, prompts, how):
    plain = by_us(model, prompts)
    strength, plausible = (1.0, 0.1) if how == "none" else (0.5, 0.02)
    got = by_us(model, prompts, debias=Debias(picture=how, strength=strength, plausible=plausible))
    want, cuts = zip(*[by_hand(model, prompt, how, strength, plausible) for prompt in prompts], strict=True)
    assert got == dict(enumerate(want))
    assert got[1] == plain[1], "without a picture there is nothing to hold against"
    assert sum(got[key] != plain[key] for key in (0, 2, 3)) >= 2, "the picture makes no difference"
    if how == "none":
        assert sum(cuts), "the plausibility cut was never of any matter"


def test_the_modes_differ(model, prompts):
    said = [by_us(model, prompts, debias=Debias(how, 4.0, 0.01)) for how in ("none", "unk", "both")]
    assert said[0] != said[1] != said[2] != said[0]


def test_beams_hear_the_same_in_every_stream(model, prompts):
    """Beams are exchanged; the prompts without a picture have to follow. In any company, too."""
    options = {"beams": 3, "debias": Debias(picture="both", strength=0.5)}
    one = Generator(*model, Decoding(max_tokens=MOST, **options), eos=EOS, unk=UNK, slots=1, prompt_tokens=64)
    answers = [answer for prompt in prompts for answer in one([prompt])]
    alone = {answer.key: answer.ids + [EOS] * answer.ended for answer in answers}
    assert alone == by_us(model, prompts, **options)
    for prompt in prompts:  # the score of what was said, by whole sequences
        said, total = alone[prompt.key], 0.0
        for at, token in enumerate(said):
            (seen,) = next_logits(model, [prompt.ids.tolist() + said[:at]], prompt.image)
            texts = with_and_without(prompt, "both")
            blind = np.mean(next_logits(model, [text + said[:at] for text in texts], None), axis=0)
            out = np.where(seen < seen.max() + np.log(0.1), -np.inf, 1.5 * seen - 0.5 * blind)
            total += out[token] - np.logaddexp.reduce(out)
        assert answers[prompt.key].score == pytest.approx(total / len(said), abs=2e-4)


def test_the_place_of_the_picture():
    slots = [IMAGE_SLOT] * 3
    ids = np.array([1, 5, *slots, 6, 7], np.int32)
    tell = lambda how: [text.tolist() for text in without_picture(ids, Debias(picture=how), unk=9)]
    assert tell("off") == []
    assert tell("none") == [[1, 5, 6, 7]]
    assert tell("unk") == [[1, 5, 9, 6, 7]]
    assert tell("both") == [[1, 5, 6, 7], [1, 5, 9, 6, 7]]
    assert [text.tolist() for text in without_picture(ids[:2], Debias(picture="both"))] == [[1, 5], [1, 5]]


def test_contrast_by_hand():
    seen, blind = np.array([2.0, 1.9, -3.0, 0.0]), np.array([2.0, 0.5, -9.0, 1.0])
    got = contrast(jnp.float32(seen), [jnp.float32(blind), jnp.float32(blind + 2)], Debias("both", 0.5, 0.1))
    # The mean without a picture is blind + 1; log 0.1 is -2.3, so the third falls out though it gains the most.
    np.testing.assert_allclose(got, [1.5, 2.1, -np.inf, -1.0], atol=1e-6)


@pytest.mark.parametrize("rule", ["divide", "subtract"])
def test_calibration_by_hand(rule):
    """Yes in two spellings against no: 0.6 to 0.4 with the picture, 0.9 to 0.1 without."""
    seen = jnp.log(jnp.array([[0.05, 0.2, 0.1, 0.2, 0.45]]))  # yes: 1, 2; no: 3
    blind = jnp.log(jnp.array([[0.0001, 0.4, 0.05, 0.05, 0.4999]]))
    debias = Debias("none", labels=((1, 2), (3,)), rule=rule)
    got = np.exp(np.asarray(calibrate(seen, [blind], debias)[0], np.float64))
    if rule == "divide":
        yes, no = 0.6 / 0.9001, 0.4 / 0.1001
    else:
        yes, no = 0.0, (0.4 - 0.1001) - (0.6 - 0.9001)
    want = [0, yes / (yes + no) * 2 / 3, yes / (yes + no) / 3, no / (yes + no), 0]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_labels_that_are_alike_and_prompts_without_a_picture_stay_as_they_are():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]))
    for rule in ("divide", "subtract"):
        debias = Debias("none", labels=((0,), (1,)), rule=rule)
        got = np.exp(calibrate(logits, [logits], debias, jnp.array([True, False])))
        np.testing.assert_allclose(got[1], [0.625, 0.375, 0], rtol=1e-6)
        assert np.isfinite(got).all()
        assert got[0].sum() == pytest.approx(1)


def test_a_closed_answer_begins_with_the_calibrated_label(model, prompts):
    # The token that the first prompt likes best, and the one that its picture speaks for most: these two change places.
    (seen,) = next_logits(model, [prompts[0].ids.tolist()], prompts[0].image)
    (blind,) = next_logits(model, with_and_without(prompts[0], "none"), None)
    best, gained = int(np.argmax(seen)), int(np.argmax(seen - blind))
    assert best != gained
    others = [token for token in range(60, 64) if token not in (best, gained)]
    labels = ((best, others[0]), (gained,), (others[1],))
    said = by_us(model, prompts, debias=Debias("none", labels=labels))
    plain = by_us(model, prompts)
    changed = 0
    for prompt in prompts:
        (seen,) = next_logits(model, [prompt.ids.tolist()], prompt.image)
        (blind,) = next_logits(model, with_and_without(prompt, "none"), None)
        mass = lambda values: np.array([np.logaddexp.reduce(values[list(label)]) for label in labels])
        share = lambda values: np.exp(values - np.logaddexp.reduce(values))
        ratio = share(mass(seen)) / (1 if prompt.image is None else share(mass(blind)) + 1e-4)
        shares = {t: ratio[i] * np.exp(seen[t] - mass(seen)[i]) for i, label in enumerate(labels) for t in label}
        assert said[prompt.key][0] == max(shares, key=shares.get)
        changed += said[prompt.key][0] != max(shares, key=lambda token: seen[token])
        # What follows is said as ever: no contrast, and any token.
        rest = prompt._replace(ids=np.append(prompt.ids, np.int32(said[prompt.key][0])))
        follows = by_us(model, [rest])[prompt.key]
        assert said[prompt.key][1:] == follows[: MOST - 1] or said[prompt.key][0] == EOS
    assert changed, "calibration never made a difference"
    assert plain != said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"picture": "black"}, "debias.picture"),
        ({"picture": "none", "strength": -1.0}, "debias.strength must not be negative"),
        ({"picture": "none", "plausible": 0.0}, r"debias.plausible in \(0, 1\]"),
        ({"labels": ((1,), (2,))}, "set debias.picture"),
        ({"picture": "none", "labels": ((1,), ())}, "with a token each"),
        ({"picture": "none", "labels": ((1, 2), (2,))}, "share a token"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        Debias(**options)
