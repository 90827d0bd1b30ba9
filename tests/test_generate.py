"""Generation, token for token as `transformers` does it, in any company."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from quick import quick_jit
from torch_llava import params_of, tiny_config, torch_llava

from napo_jax import generate
from napo_jax.debias import Debias
from napo_jax.decoding import Decoding, begin, choose
from napo_jax.generate import Generator, Prompt
from napo_jax.models import IMAGE_SLOT, Llava
from napo_jax.models.llava import layers_apart
from napo_jax.optim import flatten, unflatten
from napo_jax.sharding import MeshConfig, make_mesh, shard_params

EOS, MOST = 25, 16  # an end that the random model likes to say
CONFIG = tiny_config(remat="none")


torch.set_num_threads(1)  # two get in each other's way on so small a model


@pytest.fixture(autouse=True)
def fast_compiles(monkeypatch):
    monkeypatch.setattr(generate.jax, "jit", quick_jit)


def speaking_model(config):
    """Returns a model of `transformers` that says words and never the image token."""
    model = torch_llava(config, seed=3)

    def without_image_token(module, inputs, logits):
        """Takes the row of the image token, which is no word, out of every distribution."""
        return torch.cat([logits[..., :-1], torch.full_like(logits[..., -1:], -1e9)], dim=-1)

    model.lm_head.register_forward_hook(without_image_token)
    return model


@pytest.fixture(scope="module")
def torch_model():
    return speaking_model(CONFIG)


@pytest.fixture(scope="module")
def params(torch_model):
    return params_of(torch_model)


@pytest.fixture(scope="module")
def prompts():
    """Seven of unequal lengths, five with a picture."""
    random = np.random.default_rng(0)
    made = []
    for number, words in enumerate((3, 9, 5, 14, 1, 7, 20)):
        ids = random.integers(3, CONFIG.text.vocab_size, words)
        image = None
        if number not in (1, 4):
            image = random.normal(size=(28, 28, 3)).astype(np.float32)
            ids = np.concatenate([[1], np.full(CONFIG.vision.image_tokens, IMAGE_SLOT), ids])
        made.append(Prompt(number, ids.astype(np.int32), image, seed=number))
    return made


def by_torch(model, prompt, **options):
    """Returns the new tokens of `generate`, up to and with the end."""
    ids = torch.from_numpy(np.where(prompt.ids == IMAGE_SLOT, CONFIG.text.vocab_size, prompt.ids))[None].long()
    pixels = {}
    if prompt.image is not None:
        pixels["pixel_values"] = torch.from_numpy(prompt.image.transpose(2, 0, 1))[None]
    options = {"do_sample": False, "max_new_tokens": MOST} | options
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=EOS, pad_token_id=0, **pixels, **options
    )
    new = out[0, ids.shape[1] :].tolist()
    return new[: new.index(EOS) + 1] if EOS in new else new


def by_us(params, prompts, slots=4, mesh=None, config=CONFIG, apart=None, **options):
    """Returns {key: tokens, with the end}."""
    decoding = Decoding(**{"max_tokens": MOST} | options)
    if apart is None:
        apart = mesh is None  # a mesh stands for accelerators, which go through the layers in a loop
    generator = Generator(
        Llava(config), params, decoding, eos=EOS, slots=slots, prompt_tokens=64, mesh=mesh, apart=apart
    )
    return {answer.key: answer.ids + [EOS] * answer.ended for answer in generator(prompts)}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"beams": 3}, {}),
        ({"beams": 5}, {}),
        ({"beams": 3, "length_penalty": -1.0}, {}),
        ({"beams": 3, "early_stopping": True}, {}),
        ({"beams": 3, "length_penalty": 0.0}, {}),
    ],
    ids=["greedy", "3 beams", "5 beams", "short answers", "early stopping", "no penalty"],
)
def test_token_for_token_as_transformers(torch_model, params, prompts, ours, theirs):
    got = by_us(params, prompts, **ours)
    names = {"num_beams": ours.get("beams", 1)} | {name: ours[name] for name in ours if name != "beams"} | theirs
    want = {prompt.key: by_torch(torch_model, prompt, **names) for prompt in prompts}
    assert got == want
    lengths = {len(ids) for ids in want.values()}
    assert MOST in lengths, "none is cut off"
    assert len(lengths) > 3, "hardly any ends early"


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}], ids=["greedy", "drawn"])
def test_a_loop_over_layers_says_the_same(params, prompts, options):
    assert by_us(params, prompts, apart=False, **options) == by_us(params, prompts, **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)], ids=["32", "16"])
def test_a_prompt_is_read_the_same_by_layer_and_in_a_loop(params, prompts, dtype, tolerance):
    """By layer, the last token of a prompt is alone in the last one; the tolerance is of the largest logit."""
    config = dataclasses.replace(CONFIG, dtype=dtype, param_dtype=dtype)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    ids, lengths = np.zeros((2, 64), np.int32), np.array([len(prompt.ids) for prompt in prompts[:2]])
    for row, prompt in zip(ids, prompts, strict=False):
        row[: len(prompt.ids)] = prompt.ids
    images = jnp.stack([prompts[0].image, np.zeros_like(prompts[0].image)])
    read = jax.jit(Llava(config).prompts)
    loop, kept = read(params, images, ids, lengths)
    by_layer, kept_by_layer = read(layers_apart(params), images, ids, lengths)
    np.testing.assert_allclose(by_layer, loop, rtol=0, atol=tolerance * np.max(np.abs(loop)))
    for layer, of_layer in enumerate(kept_by_layer):
        for got, all_layers in zip(of_layer, kept, strict=True):
            want = np.asarray(all_layers[layer], np.float32)
            np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=0, atol=tolerance * np.max(np.abs(want)))
    for too_long in (params, layers_apart(params)):  # said in silence, it would be of another token
        assert np.isnan(read(too_long, images, ids, lengths + 64)[0]).all()


def test_slots_are_filled_while_others_go_on(params, prompts):
    """One long answer in two slots: those that wait behind it are answered in the other slot."""
    lengths = {key: len(ids) for key, ids in by_us(params, prompts).items()}
    turn = sorted(prompts, key=lambda prompt: -lengths[prompt.key])
    longest, short = turn[0], [prompt for prompt in turn if lengths[prompt.key] * 3 < MOST]
    assert lengths[longest.key] == MOST
    assert len(short) >= 2
    said = list(by_us(params, [longest, *short], slots=2))
    assert said.index(longest.key) >= 2


@pytest.mark.parametrize("mesh", [None, MeshConfig(1, 4, 2)], ids=["apart", "in a loop"])
def test_heads_that_share_keys(prompts, mesh):
    """Two heads read the keys of one."""
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, kv_heads=2))
    model = speaking_model(config)
    mesh = None if mesh is None else make_mesh(mesh)
    got = by_us(params_of(model), prompts, mesh=mesh, config=config, beams=3)
    assert got == {prompt.key: by_torch(model, prompt, num_beams=3) for prompt in prompts}


def test_beams_are_no_greedy_choice(params, prompts):
    assert by_us(params, prompts, beams=3) != by_us(params, prompts)


@pytest.mark.parametrize("options", [{"beams": 3}, {"temperature": 0.8, "top_p": 0.9}], ids=["beams", "drawn"])
def test_an_answer_does_not_depend_on_its_company(params, prompts, options):
    """T21: alone, in one batch with the others, in a few slots that are filled again, and in any turn."""
    together = by_us(params, prompts, slots=7, **options)
    decoding = Decoding(max_tokens=MOST, **options)
    one = Generator(Llava(CONFIG), params, decoding, eos=EOS, slots=1, prompt_tokens=64)
    alone = {answer.key: answer.ids + [EOS] * answer.ended for prompt in prompts for answer in one([prompt])}
    assert alone == together == by_us(params, prompts[::-1], slots=4, **options)


@pytest.mark.parametrize(("mesh", "slots"), [(MeshConfig(2, 4), 8), (MeshConfig(1, 2, 4), 4)], ids=str)
def test_any_mesh_says_the_same(params, prompts, mesh, slots):
    """Slots are cut over rows of devices, heads over tensor; there are fewer prompts than places for them."""
    mesh = make_mesh(mesh)
    leaves = flatten(params)
    places, _ = shard_params(leaves, mesh)
    cut = unflatten({path: jax.device_put(leaf, places[path]) for path, leaf in leaves.items()})
    options = {"beams": 3, "debias": Debias("both", 0.3)}
    assert by_us(cut, prompts, slots, mesh, **options) == by_us(params, prompts, **options)


def test_what_a_mesh_keeps_is_cut_and_no_device_asks_another_for_it(params):
    """With whole copies of the model, all say two numbers: how many of their slots are done, and how far these are."""
    mesh = make_mesh(MeshConfig(8, 1))
    with jax.set_mesh(mesh):
        generator = Generator(
            Llava(CONFIG),
            params,
            Decoding(beams=3, max_tokens=MOST),
            eos=EOS,
            slots=16,
            prompt_tokens=64,
            mesh=mesh,
            apart=False,
        )
        state = generator._empty()
        for leaf in jax.tree.leaves(state.streams):
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size
        text = generator._go_on.lower(params, state, MOST, 8, MOST).compile().as_text()
    sent = re.findall(r"= (\S+) (?:all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)", text)
    assert sent == ["s32[]", "s32[]"]


def test_what_is_kept_is_written_in_place(params):
    """Read and written by the same step, it would be copied at every token if it were written after it is read."""
    generator = Generator(
        Llava(CONFIG), params, Decoding(beams=3, max_tokens=MOST), eos=EOS, slots=2, prompt_tokens=64, apart=True
    )
    state = generator._empty()
    text = generator._go_on.lower(generator._params, state, MOST, 2, MOST).compile().as_text()
    for kept in state.streams[0].kept[0][2:]:
        shape = re.escape(f"f32[{','.join(map(str, kept.shape))}]")
        assert re.search(rf"= {shape}\S* (?:fusion|scatter|dynamic-update-slice)\(", text), "nothing is written"
        assert not re.search(rf"= {shape}\S* copy\(", text)


@pytest.mark.parametrize("options", [{}, {"beams": 3}, {"beams": 3, "apart": False}], ids=["greedy", "beams", "loop"])
def test_windows_over_what_was_said_change_nothing(params, prompts, monkeypatch, options):
    plain = by_us(params, prompts, **options)
    monkeypatch.setattr(generate, "_FIRST_WINDOW", 3)  # and then 6 and 12
    assert by_us(params, prompts, **options) == plain


def test_tokens_as_they_are_said(params, prompts):
    whole = by_us(params, prompts)
    decoding = Decoding(max_tokens=MOST)
    one = Generator(Llava(CONFIG), params, decoding, eos=EOS, slots=1, prompt_tokens=64)
    for prompt in prompts:
        assert list(one.stream(prompt)) == [token for token in whole[prompt.key] if token != EOS]
    first = one.stream(prompts[0])
    next(first)
    first.close()  # whoever listens may stop; the next answer is none the worse for it
    assert list(one.stream(prompts[6])) == [token for token in whole[6] if token != EOS]
    with pytest.raises(ValueError, match="none is final before the end"):
        next(
            Generator(Llava(CONFIG), params, Decoding(beams=2, max_tokens=MOST), slots=1, prompt_tokens=64).stream(
                prompts[0]
            )
        )


def test_whoever_hears_a_stream_does_not_get_its_mesh(params, prompts):
    mesh, decoding = make_mesh(MeshConfig(1, 1), jax.devices()[:1]), Decoding(max_tokens=MOST)
    one = Generator(Llava(CONFIG), params, decoding, eos=EOS, slots=1, prompt_tokens=64, mesh=mesh)
    tokens = one.stream(prompts[0])
    next(tokens)
    assert jax.sharding.get_abstract_mesh().empty
    tokens.close()


def test_what_is_drawn_repeats_itself_and_follows_its_seeds(params, prompts):
    drawn = by_us(params, prompts, temperature=1.0)
    assert drawn == by_us(params, prompts, temperature=1.0)
    assert drawn != by_us(params, prompts, temperature=1.0, seed=1)
    other = by_us(params, [prompt._replace(seed=prompt.seed + 100) for prompt in prompts], temperature=1.0)
    assert all(other[key] != drawn[key] for key in drawn if len(drawn[key]) > 2)


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.8, "temperature": 0.5}])
def test_tokens_are_drawn_by_their_probabilities(options):
    """A chi-square test against probabilities by hand."""
    decoding = Decoding(**{"max_tokens": 2, "temperature": 1.5} | options)
    logits = np.random.default_rng(1).normal(size=12).astype(np.float32) * 2
    draws = 20_000
    search = begin(draws, decoding)._replace(done=jnp.zeros(draws, bool), seeds=jnp.arange(draws, dtype=jnp.uint32))
    search = jax.jit(lambda s: choose(s, jnp.broadcast_to(logits, (draws, 1, 12)), decoding, EOS))(search)
    counts = np.bincount(np.asarray(search.tokens[:, 0, 0]), minlength=12)

    scores = logits.astype(np.float64) / decoding.temperature
    order = np.argsort(-scores)
    keep = order[: decoding.top_k] if decoding.top_k else order
    p = np.exp(scores[keep]) / np.exp(scores[keep]).sum()
    keep = keep[: np.searchsorted(np.cumsum(p), decoding.top_p) + 1]  # the first that reaches the share is kept
    p = np.exp(scores[keep]) / np.exp(scores[keep]).sum()
    assert counts.sum() == counts[keep].sum() == draws
    likely = p * draws > 5
    chi = np.sum((counts[keep] - p * draws)[likely] ** 2 / (p * draws)[likely])
    assert chi < 40, (counts[keep], p * draws)  # eleven degrees of freedom: once in 20,000


def test_of_two_tokens_that_are_nearly_as_likely_the_likelier_one_is_said():
    """Their log-probs are one number in float32; their logits are not."""
    logits = np.zeros((1, 1, 32_000), np.float32)
    logits[..., 7], logits[..., 9] = 1.0, np.nextafter(np.float32(1), np.float32(2))
    decoding = Decoding(max_tokens=2)
    search = choose(begin(1, decoding)._replace(done=jnp.zeros(1, bool)), jnp.asarray(logits), decoding, EOS)
    assert search.tokens[0, 0, 0] == 9
    log_probs = jax.nn.log_softmax(logits[0, 0])
    assert log_probs[7] == log_probs[9], "argmax of log-probs would say 9 too"


def test_beams_that_are_drawn_end_by_their_scores():
    """An end is final only among the best `beams` of what is drawn; the order of the drawing must not matter."""
    end, draws = 0, 4000
    p = np.array([0.05, 0.4, 0.3, 0.2, 0.05])
    decoding = Decoding(beams=2, max_tokens=4, temperature=1.0)
    search = begin(draws, decoding)._replace(done=jnp.zeros(draws, bool), seeds=jnp.arange(draws, dtype=jnp.uint32))
    logits = jnp.broadcast_to(jnp.log(p).astype(jnp.float32), (draws, 2, 5))
    search = jax.jit(lambda s: choose(s, logits, decoding, end))(search)
    # Four of five tokens are drawn, and two of them are likelier than the end, whatever the fifth one is.
    assert not search.is_finished.any()
    first = np.bincount(np.asarray(search.tokens[:, 0, 0]), minlength=5)
    assert first[1] > 0.8 * draws  # the best that was drawn comes first


def test_a_prompt_that_is_too_long_is_refused(params):
    words = np.full(70, 3, np.int32)
    with pytest.raises(ValueError, match="a prompt has 70 tokens, and there is room for 1 to 64"):
        by_us(params, [Prompt(0, words)])
    with pytest.raises(ValueError, match="a prompt has 0 tokens, and there is room"):
        by_us(params, [Prompt(0, words[:0])])
    with pytest.raises(ValueError, match="seed of a prompt must be from 0 to"):
        by_us(params, [Prompt(0, words[:3], seed=-1)])
    places, picture = np.full(CONFIG.vision.image_tokens, IMAGE_SLOT, np.int32), np.zeros((28, 28, 3), np.float32)
    for ids, image, message in (
        (places, None, "with no picture needs 0 places"),
        (places[1:], picture, "with a picture needs"),
        (words[:3], picture, "with a picture needs"),
        (places, picture * np.nan, "picture holds numbers that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            by_us(params, [Prompt(0, ids, image)])
    with pytest.raises(ValueError, match="exceed the model's 256 positions"):
        Generator(Llava(CONFIG), params, Decoding(max_tokens=200), prompt_tokens=64)
    for options, message in (
        ({"beams": 0}, "beams and max_tokens must be at least 1"),
        ({"top_k": 3}, "need a temperature above 0"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Decoding(**options)
