"""LoRA against `peft`, live, and through the training step: what trains, what is never there, what the reference is."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from loader_run import dataset_of
from quick import quick_jit
from torch_llava import params_of, tiny_config, torch_llava

from napo_jax.data.byte_tokenizer import BYTE_VOCABULARY
from napo_jax.methods import napo
from napo_jax.models import IMAGE_SLOT, Llava, LlavaConfig
from napo_jax.models.llama import Llama
from napo_jax.models.lora import TARGETS, Linear, LoraConfig, is_adapter, merge_adapters
from napo_jax.models.mixing import Prompts
from napo_jax.objective import Objective
from napo_jax.optim import OptimizerConfig, flatten, split_trained, unflatten
from napo_jax.reference import open_reference
from napo_jax.score import score, valid_cells
from napo_jax.sharding import MeshConfig, make_mesh, over_rows, shard_params
from napo_jax.step import Frozen, init_state, make_train_step, split_rows

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft

THEIRS = dict(zip(TARGETS, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), strict=True))


def close(got, want, tolerance):
    """Tells whether arrays agree, the tolerance being in units of the largest wanted entry."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.max(np.abs(got - want)) <= tolerance * np.max(np.abs(want))


def drawn(params, lora, seed=3):
    """Returns {path: leaf}: params, and adapters of which neither factor is 0."""
    leaves, rng = flatten(params), np.random.default_rng(seed)
    for path, leaf in list(leaves.items()):
        *_, group, name, kind = ("", *path.split("/"))[-4:]
        if path.startswith("language/layers/") and kind == "kernel" and name in lora.targets:
            layers, inputs, outputs = leaf.shape
            for factor, shape in (("lora_a", (inputs, lora.rank)), ("lora_b", (lora.rank, outputs))):
                values = rng.normal(size=(layers, *shape)) * shape[0] ** -0.5
                leaves[f"language/layers/{group}/{name}/{factor}"] = jnp.asarray(values, jnp.float32)
    return leaves


def made_up(shapes):
    """Returns {path: leaf} as `Llava.init` draws them, but for the shape of distributions: that takes no compiling."""
    rng = np.random.default_rng(0)
    constants = {"scale": 1.0, "bias": 0.0, "lora_b": 0.0}

    def draw(path, shape):
        if (name := path.rpartition("/")[2]) in constants:
            return np.full(shape, constants[name])
        return rng.normal(size=shape) * (shape[-2] ** -0.5 if name in ("kernel", "lora_a") else 0.02)

    return {path: jnp.asarray(draw(path, leaf.shape), jnp.float32) for path, leaf in shapes.items()}


def question(config, batch=2, words=14):
    """Returns ids int32[B, S] with an image in them, and images."""
    rng = np.random.default_rng(4)
    ids = rng.integers(1, config.text.vocab_size, (batch, config.vision.image_tokens + words))
    ids[:, 2 : 2 + config.vision.image_tokens] = IMAGE_SLOT
    return jnp.asarray(ids, jnp.int32), jnp.asarray(rng.normal(size=(batch, 28, 28, 3)), jnp.float32)


def torch_inputs(config, ids, images):
    ids = np.where(np.asarray(ids) == IMAGE_SLOT, config.text.vocab_size, np.asarray(ids))
    pixels = torch.from_numpy(np.array(images).transpose(0, 3, 1, 2))
    return {"input_ids": torch.from_numpy(ids).long(), "pixel_values": pixels}


def wrapped(config, lora):
    """Returns a `transformers` LLaVA in `peft`, and {our path: [its weight of each layer]}."""
    names = "|".join(THEIRS[name] for name in lora.targets)
    options = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=rf".*language_model.*\.({names})")
    model = peft.get_peft_model(torch_llava(config), options)
    ours = {theirs: name for name, theirs in THEIRS.items()}
    weights = {}
    for name, weight in model.named_parameters():
        if found := re.fullmatch(r".*\.layers\.\d+\.(self_attn|mlp)\.(\w+)\.lora_([AB])\.default\.weight", name):
            group = {"self_attn": "attention"}.get(found[1], found[1])
            path = f"language/layers/{group}/{ours[found[2]]}/lora_{found[3].lower()}"
            weights.setdefault(path, []).append(weight)
    return model, weights


def test_logits_and_gradients_are_those_of_peft():
    lora = LoraConfig(rank=5, alpha=12.0)
    config = tiny_config(kv_heads=2, lora=lora)
    theirs, weights = wrapped(config, lora)
    leaves = drawn(params_of(torch_llava(config)), lora)
    adapters = {path: leaf for path, leaf in leaves.items() if is_adapter(path)}
    assert adapters.keys() == weights.keys()
    with torch.no_grad():
        for path, layers in weights.items():
            for weight, layer in zip(layers, adapters[path], strict=True):
                weight.copy_(torch.from_numpy(np.array(layer.T)))
    ids, images = question(config)
    logits = theirs(**torch_inputs(config, ids, images)).logits[..., :-1]
    mix = np.random.default_rng(5).normal(size=logits.shape).astype(np.float32)
    (torch.log_softmax(logits, dim=-1) * torch.from_numpy(mix)).sum().backward()

    @quick_jit
    def gradient(adapters):
        def loss(adapters):
            logits = Llava(config).logits(unflatten(leaves, adapters), ids, images)
            return jnp.sum(jax.nn.log_softmax(logits) * mix), logits

        return jax.grad(loss, has_aux=True)(adapters)

    gradients, got = gradient(adapters)
    assert close(got, logits.detach(), 1e-4)
    for path, layers in weights.items():
        assert close(gradients[path], np.stack([weight.grad.T.numpy() for weight in layers]), 1e-4), path
    # Scaled as some do, by alpha and the root of the rank, they are others.
    rooted = {path: leaf * (5**0.5 if path.endswith("lora_b") else 1) for path, leaf in adapters.items()}
    assert not close(gradient(rooted)[1], logits.detach(), 1e-2)


def test_adapters_are_drawn_as_peft_draws_them():
    lora = LoraConfig(rank=16)
    config = tiny_config(lora=lora)
    torch.manual_seed(1)
    _, weights = wrapped(config, lora)
    draw = lambda key: {path: leaf for path, leaf in flatten(Llava(config).init(key)).items() if is_adapter(path)}
    ours = quick_jit(draw)(jax.random.key(1))
    for name in ("attention/query", "mlp/down"):
        path, shares = f"language/layers/{name}/lora_a", np.linspace(0, 1, 9)
        theirs = np.concatenate([weight.detach().numpy().ravel() for weight in weights[path]])
        bound = ours[path].shape[1] ** -0.5
        assert np.max(np.abs(ours[path])) <= bound
        np.testing.assert_allclose(np.quantile(ours[path], shares), np.quantile(theirs, shares), atol=0.08 * bound)
        assert not np.any(ours[path.replace("lora_a", "lora_b")])
        first, second, _ = np.asarray(ours[path])
        assert np.all(first != second)


# Merging.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merged_matrices_are_rounded_once(dtype):
    lora = LoraConfig(rank=4, alpha=6.0, targets=("query", "down"))
    rng = np.random.default_rng(0)
    shapes = {"attention/query": (3, 64, 32), "mlp/down": (3, 96, 64), "mlp/up": (3, 64, 96)}
    leaves = {f"language/layers/{name}/kernel": rng.normal(size=shape) for name, shape in shapes.items()}
    for name in ("attention/query", "mlp/down"):
        layers, inputs, outputs = shapes[name]
        leaves[f"language/layers/{name}/lora_a"] = rng.normal(size=(layers, inputs, 4))
        leaves[f"language/layers/{name}/lora_b"] = rng.normal(size=(layers, 4, outputs))
    leaves = {path: jnp.asarray(leaf, jnp.float32 if is_adapter(path) else dtype) for path, leaf in leaves.items()}
    mesh = make_mesh(MeshConfig(2, 2, 2))
    shardings, _ = shard_params(leaves, mesh)
    merged = {path: jax.device_put(leaf, shardings[path]) for path, leaf in leaves.items()}
    merge_adapters(merged, lora)
    assert sorted(merged) == sorted(path for path in leaves if path.endswith("kernel"))
    for path, got in merged.items():
        assert (got.dtype, got.sharding) == (dtype, shardings[path])
        want, module = np.asarray(leaves[path], np.float64), path.removesuffix("/kernel")
        if f"{module}/lora_a" in leaves:
            down, up = (np.asarray(leaves[f"{module}/{name}"], np.float64) for name in ("lora_a", "lora_b"))
            want = want + 1.5 * down @ up
            assert np.max(np.abs(want - np.asarray(leaves[path], np.float64))) > 1
        eps = float(jnp.finfo(dtype).eps)
        # Half of the last digit is what one rounding may do; the float32 sum before it adds next to nothing.
        assert np.all(np.abs(np.asarray(got, np.float64) - want) <= 0.502 * eps * np.abs(want) + 2e-6), path


def test_a_merged_model_is_the_model_with_adapters():
    lora = LoraConfig(rank=5, alpha=12.0)
    config = tiny_config(lora=lora)
    model, leaves = Llava(config), drawn(params_of(torch_llava(config)), lora)
    ids, images = question(config)
    run = quick_jit(Llava.logits, static_argnums=0)
    want, without = (
        run(model, unflatten(leaves), ids, images),
        run(model.without_adapters, unflatten(leaves), ids, images),
    )
    merged = dict(leaves)
    merge_adapters(merged, lora)
    got = run(model.without_adapters, unflatten(merged), ids, images)
    assert close(got, want, 1e-4)  # a whole model, whose sums are taken in another order; a block is held to 1e-5
    assert not close(without, want, 1e-1)


# Dropout.


@pytest.fixture(scope="module")
def decoder():
    """Returns how to run a decoder that drops, (its adapters, a key, its way of rematerialisation) -> a number."""
    lora = LoraConfig(rank=3, dropout=0.3)
    config = tiny_config(lora=lora)
    leaves = flatten(unflatten(drawn(params_of(torch_llava(config)), lora))["language"])
    x = jnp.asarray(np.random.default_rng(6).normal(size=(2, 14, config.text.width)), jnp.float32)
    positions, mix = jnp.tile(jnp.arange(14), (2, 1)), Prompts(jnp.full(2, 14, jnp.int32), "xla")

    def run(adapters, key, remat="none"):
        net, params = Llama(config.text, lora, remat=remat), {"params": unflatten(leaves, adapters)}
        return jnp.sum(jnp.sin(net.apply(params, x, positions, mix, rngs={"dropout": key})[0]))

    return run, {path: leaf for path, leaf in leaves.items() if is_adapter(path)}


def test_every_matrix_of_every_layer_drops_other_inputs(decoder):
    seen, found = {}, []

    def watch(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, nn.Dropout):
            name = context.module.path[-2]
            jax.debug.callback(lambda kept: seen.setdefault(name, []).append(np.asarray(kept)), out != 0, ordered=True)
        return out

    run = quick_jit(lambda key: decoder[0](decoder[1], key))
    for seed in (0, 0, 1):
        with nn.intercept_methods(watch):
            run(jax.random.key(seed))
        jax.effects_barrier()
        found.append(dict(seen))
        seen.clear()
    first, again, others = found
    assert set(first) == set(TARGETS)
    assert {len(layers) for layers in first.values()} == {3}
    flat = [mask.ravel() for layers in first.values() for mask in layers]
    for i, mask in enumerate(flat):
        assert abs(np.mean(mask) - 0.7) < 0.06
        for other in flat[:i]:
            if other.size == mask.size:
                # Independent ones agree in 0.7 0.7 + 0.3 0.3 of the places.
                assert abs(np.mean(mask == other) - 0.58) < 0.07
    for name, layers in first.items():
        np.testing.assert_array_equal(layers, again[name])
        assert np.mean(np.equal(layers, others[name])) < 0.65


def test_what_is_computed_again_drops_the_same(decoder):
    """The gradient under rematerialisation is the one without."""
    run, adapters = decoder
    gradient = quick_jit(jax.grad(run), static_argnums=2)
    want, other = (gradient(adapters, jax.random.key(seed)) for seed in (2, 3))
    for path, slope in gradient(adapters, jax.random.key(2), "full").items():
        assert close(slope, want[path], 1e-4), path
    assert not any(close(other[path], slope, 1e-2) for path, slope in want.items())


def test_dropout_changes_no_expectation():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 40)), jnp.float32)
    linear = lambda rate: Linear(7, LoraConfig(rank=3, dropout=rate), name="up")
    params = {
        "kernel": jnp.zeros((40, 7)),
        "lora_a": jax.random.normal(jax.random.key(1), (40, 3)),
        "lora_b": jax.random.normal(jax.random.key(2), (3, 7)),
    }
    run = lambda rate, key: linear(rate).apply({"params": params}, x, rngs={"dropout": key})
    want = linear(0.4).apply({"params": params}, x)
    np.testing.assert_array_equal(run(0.0, jax.random.key(3)), want)
    many = quick_jit(jax.vmap(lambda key: run(0.4, key)))(jax.random.split(jax.random.key(4), 4000))
    error = jnp.std(many, axis=0) / 4000**0.5
    assert jnp.min(error) > 0
    assert jnp.max(jnp.abs(jnp.mean(many, axis=0) - want) / error) < 5


# Through the training step.

TINY = LlavaConfig.tiny(remat="none", logits_chunk=256, lora=LoraConfig(rank=4, alpha=8.0, dropout=0.2))
MODEL = Llava(
    dataclasses.replace(
        TINY, text=dataclasses.replace(TINY.text, vocab_size=BYTE_VOCABULARY, max_positions=1024, layers=1)
    )
)
PARAMS = made_up(flatten(jax.eval_shape(MODEL.init, jax.random.key(0))))
TRAINED, FROZEN = split_trained(PARAMS, OptimizerConfig(trainable=r".*/lora_[ab]|projector/.*"))
PROJECTOR = {path: leaf for path, leaf in TRAINED.items() if path.startswith("projector/")}
RATE, SEED = 0.3, 7


class Seeing(Objective):
    """An objective that shows the log-probs that it is given."""

    def __call__(self, policy, reference=None, **options):
        """Returns the loss and the metrics, with {cell: Logps} of both models."""
        loss, metrics = super().__call__(policy, reference, **options)
        return loss, metrics | jax.lax.stop_gradient({"reference": reference, "policy": policy})


PLAIN = napo()
SEEING = Seeing(**{field.name: getattr(PLAIN, field.name) for field in dataclasses.fields(Objective)})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return dataset_of(None, tmp_path_factory.mktemp("cache"), batch_size=4, made_up=12, buckets=1)


@pytest.fixture(scope="module")
def batch(dataset):
    return next(dataset.loader(rows=(0, 4))())


@functools.cache
def step_of(objective, **options):
    return quick_jit(make_train_step(MODEL, objective, optax.sgd(RATE), seed=SEED, **options))


def trajectory(batch, reference_at, steps=10):
    """Trains for some steps; returns the trained leaves and what each step saw.

    Args:
      batch: the `Batch` of every step.
      reference_at: maps a state to the `Frozen.reference` of its step.
      steps: how many.
    """
    state, seen = init_state(TRAINED, optax.sgd(RATE)), []
    for _ in range(steps):
        state, metrics = step_of(SEEING)(state, Frozen(FROZEN, reference_at(state)), batch)
        seen.append(jax.device_get(metrics))
    return state.params, seen


def drift(seen):
    """Returns how far the reference's log-probs go from those of the first step."""
    first = seen[0]["reference"]
    return max(
        np.max(np.abs(logps.sum - first[cell].sum)) for metrics in seen for cell, logps in metrics["reference"].items()
    )


@pytest.fixture(scope="module")
def adapters_off(batch):
    """The reference as `train.reference adapters_off` has it: the trained leaves as they were, without adapters."""
    return trajectory(batch, lambda state: PROJECTOR)


def test_the_reference_stays_to_the_bit_while_the_projector_trains(batch, adapters_off):
    """T15: adapters off alone would not do, as the projector moves."""
    params, seen = adapters_off
    assert drift(seen) == 0.0
    for path, leaf in params.items():
        assert np.any(np.asarray(leaf) != np.asarray(TRAINED[path])), path
    for cell, logps in seen[0]["policy"].items():
        np.testing.assert_allclose(logps.sum, seen[0]["reference"][cell].sum, rtol=1e-6)  # adapters begin at 0
        assert np.max(np.abs(seen[-1]["policy"][cell].sum - logps.sum)) > 0.2
    # With the projector as it is by then, the reference drifts by this very measure.
    _, wrong = trajectory(batch, lambda state: {path: state.params[path] for path in PROJECTOR})
    assert drift(wrong) > 0.05


@pytest.fixture(scope="module")
def cached(batch, dataset, tmp_path_factory):
    """The batch with the reference's log-probs from the cache."""
    reference = unflatten(PROJECTOR, FROZEN)
    cache = open_reference(tmp_path_factory.mktemp("reference"), dataset, napo(), MODEL.without_adapters, reference)
    return cache.attach(batch)


def test_all_three_references_agree(batch, cached, adapters_off):
    """A second model, at every step, and the cache give what the model without adapters does."""
    _, live = trajectory(batch, lambda state: TRAINED, steps=3)
    for metrics, other in zip(adapters_off[1], live, strict=False):
        assert other["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
        for cell, logps in metrics["reference"].items():
            np.testing.assert_allclose(other["reference"][cell], logps, rtol=1e-5)
            np.testing.assert_allclose(cached.reference[cell], logps, rtol=1e-5)


# Neither factor is 0, so that all of the adapters have a gradient.
STARTED = {path: leaf for path, leaf in drawn(unflatten(PARAMS), TINY.lora).items() if path in TRAINED}


def test_both_passes_of_a_micro_batch_on_a_mesh_drop_what_one_device_drops_once(cached):
    """Held against jax.grad of the objective of two micro-batches' log-probs, each computed once, on one device."""
    mesh, number = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4]), jnp.int32(3)
    shardings, _ = shard_params(PARAMS, mesh)
    put = lambda leaves: {path: jax.device_put(leaf, shardings[path]) for path, leaf in leaves.items()}
    state = dataclasses.replace(init_state(put(STARTED), optax.sgd(RATE)), step=number)
    with jax.set_mesh(mesh):
        batch = jax.device_put(cached, over_rows(mesh))
        after, _ = step_of(PLAIN, mesh=mesh, accumulate=2)(state, Frozen(put(FROZEN)), batch)

    parts = split_rows(cached, 2, shards=2)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(SEED), number), 2)

    @quick_jit
    def gradient(trained, keys):
        def loss(trained):
            one = lambda part: score(MODEL, unflatten(trained, FROZEN), part[0], PLAIN, dropout=part[1])
            where = jax.vmap(lambda part: valid_cells(part, PLAIN))(parts)
            return PLAIN(jax.lax.map(one, (parts, keys)), parts.reference, where=where)[0]

        return jax.grad(loss)(trained)

    def errors(want):
        """Yields how far each leaf's gradient is from a wanted one, in units of its largest entry."""
        for path, leaf in STARTED.items():
            got = (np.asarray(leaf) - np.asarray(after.params[path])) / RATE
            # A difference of rounded parameters, hence the absolute part.
            yield max(0.0, np.max(np.abs(got - want[path])) - 1e-5) / np.max(np.abs(want[path]))

    assert max(errors(gradient(STARTED, keys))) < 1e-4
    assert min(errors(gradient(STARTED, keys[::-1]))) > 1e-3
    assert min(errors(gradient(STARTED, jax.random.split(keys[0])))) > 1e-3


def computed(jaxpr):
    """Yields (primitive, shape) of all arrays that a program computes, at any depth."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield equation.primitive.name, variable.aval.shape
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from computed(inner)


def step_arrays(batch, *, accumulate=1, **options):
    """Returns (primitive, shape) of all that a step computes, where AdamW trains what it does by default."""
    model = Llava(dataclasses.replace(MODEL.config, **options))
    leaves, optimizer = flatten(jax.eval_shape(model.init, jax.random.key(0))), optax.adamw(1e-3)
    trained, frozen = split_trained(leaves, OptimizerConfig())
    frozen = {path: jax.ShapeDtypeStruct(leaf.shape, model.config.dtype) for path, leaf in frozen.items()}
    reference = {path: leaf for path, leaf in trained.items() if not is_adapter(path)}
    state = jax.eval_shape(lambda leaves: init_state(leaves, optimizer), trained)
    step = make_train_step(model, napo(), optimizer, accumulate=accumulate)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes counts with rates
        return list(computed(jax.make_jaxpr(step)(state, Frozen(frozen, reference), batch).jaxpr))


@pytest.mark.parametrize(("dtype", "remat", "accumulate"), [(jnp.float32, "none", 1), (jnp.bfloat16, "full", 2)])
def test_nothing_of_a_matrix_size_is_computed(batch, dtype, remat, accumulate):
    """Neither A B nor a gradient of a matrix, nor a copy of one; without adapters the same search finds them."""
    sizes = {(64, 64), (64, 160), (160, 64)}
    found = lambda arrays: {name for name, shape in arrays if shape[-2:] in sizes and shape[:-2] in ((), (1,))}
    options = {"dtype": dtype, "remat": remat, "accumulate": accumulate}
    assert found(step_arrays(batch, **options)) == set()
    assert found(step_arrays(batch, **options, lora=LoraConfig())) >= {"dot_general", "scan"}


def test_dots_stores_a_product_and_not_its_parts(batch):
    """What the forward pass hands to the backward one, by token: as much as without adapters."""
    tokens = (4, batch.bucket.tokens)

    def stored(lora):
        arrays = step_arrays(batch, remat="dots", lora=lora)
        return sorted(shape for name, shape in arrays if name == "scan" and shape[1:3] == tokens)

    assert stored(LoraConfig(rank=4)) == stored(LoraConfig())


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank must be a whole number and not negative, .* got -1, 16.0 and 0.0"),
        ({"rank": 2.0}, "rank must be a whole number"),
        ({"alpha": 0.0}, "alpha positive"),
        ({"alpha": float("nan")}, "alpha positive"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\)"),
        ({"targets": ("query", "q_proj")}, r"\['q_proj'\] are no matrices of the decoder; those are query, key"),
        ({"targets": "query"}, "must be several names, got 'query'"),
        ({"rank": 1, "targets": ()}, "name a matrix, or set lora.rank to 0"),
    ],
)
def test_senseless_adapters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


def test_which_leaves_train_beside_adapters():
    trained, frozen = split_trained(PARAMS, OptimizerConfig())
    assert all(map(is_adapter, trained))
    assert not any(map(is_adapter, frozen))
    assert len(trained) == 2 * len(TARGETS)
    assert sorted(set(TRAINED) - set(trained)) == [
        f"projector/{x}/{y}" for x in ("down", "up") for y in ("bias", "kernel")
    ]
    for rule, message in (
        (".*/lora_b", "leaves out language/layers/attention/.*/lora_a: both factors of an adapter train"),
        ("projector/.*", "leaves out language/layers/.*: both factors"),
        (".*", "trains language/layers/.*/kernel beside its adapter: train one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            split_trained(PARAMS, OptimizerConfig(trainable=rule))
