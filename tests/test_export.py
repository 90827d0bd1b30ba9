"""What a run has trained, written for others: `transformers` and `peft` load it, and compute what we do."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from etils import epath
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from quick import quick_jit
from torch_llava import params_of, tiny_config, torch_llava, torch_logits
from toy_tokenizer import toy_tokenizer, write_toy_tokenizer

from napo_jax import export, export_pretrained, load_pretrained, start, tensor_files, train
from napo_jax.checkpoint import Checkpoints
from napo_jax.command import exit_with_one_line
from napo_jax.config import Config, ModelConfig
from napo_jax.model_source import find_model, load_leaves
from napo_jax.models import IMAGE_SLOT, Llava
from napo_jax.models.lora import LoraConfig, is_adapter, merge_adapters
from napo_jax.optim import OptimizerConfig, flatten, split_trained, unflatten
from napo_jax.sharding import MeshConfig, make_mesh, replicated
from napo_jax.start import load_parts, make_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft

LORA = LoraConfig(rank=5, alpha=12.0, dropout=0.1, targets=("query", "out", "gate", "down"))
VOCABULARY = 800  # of the toy tokenizer
PROJECTOR = r".*/lora_[ab]|projector/.*"

logits_of = quick_jit(Llava.logits, static_argnums=0)


def small(lora=LORA):
    config = tiny_config(kv_heads=2, lora=lora)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=VOCABULARY))


def drawn(config, trainable=None, seed=0):
    """Returns {path: leaf} as if trained: far from 0, and far from any other seed's."""
    leaves = flatten(jax.eval_shape(Llava(config).init, jax.random.key(0)))
    trained, _ = split_trained(leaves, OptimizerConfig(trainable=trainable))
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=shape) * (shape[-2] if len(shape) > 1 else 4.0) ** -0.5
    return {path: jnp.asarray(draw(leaf.shape), jnp.float32) for path, leaf in trained.items()}


def save(workdir, model, lora, steps, source_step=None):
    """Writes the workdir of a run over a model, that of a step if it is a run, that saved {step: trained leaves}."""
    config = train.settings_of(Config(model=ModelConfig(path=str(model)), lora=lora))
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config | {"source_step": source_step}))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        for step, leaves in steps.items():
            checkpoints.save(step, {"params": leaves, "step": jnp.int32(step)}, {})
    return workdir


def run(capsys, *argv):
    """Runs the command; returns what it printed."""
    export.main([str(word) for word in argv])
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face folder, and its weights as our leaves."""
    folder = tmp_path_factory.mktemp("base")
    model = torch_llava(small())
    model.save_pretrained(folder)
    write_toy_tokenizer(folder)
    return folder, flatten(params_of(model))


@pytest.fixture(scope="module")
def asked():
    """Tokens int32[B, S] with an image in them, and images."""
    config, rng = small(), np.random.default_rng(4)
    ids = rng.integers(3, 250, (2, config.vision.image_tokens + 12))
    ids[:, 2 : 2 + config.vision.image_tokens] = IMAGE_SLOT
    return jnp.asarray(ids, jnp.int32), jnp.asarray(rng.normal(size=(2, 28, 28, 3)), jnp.float32)


def answered(model, ids, images):
    """Returns the logits of the words, of a model of `transformers` or in `peft`."""
    config = model.config
    return torch_logits(model, ids, images, config.image_token_id)[..., : config.image_token_id]


def close(got, want):
    assert got.shape == want.shape
    return np.max(np.abs(got - want)) <= 1e-4 * np.max(np.abs(want))


def load_strictly(base, folder):
    """Returns a model of `transformers` with the adapters of a folder, all of which it knows, and has."""
    model = peft.PeftModel.from_pretrained(transformers.LlavaForConditionalGeneration.from_pretrained(base), folder)
    wanted = peft.get_peft_model_state_dict(model)
    given = peft.utils.save_and_load.load_peft_weights(str(folder), device="cpu")
    assert given.keys() == wanted.keys()
    assert all(torch.equal(given[name].float(), tensor) for name, tensor in wanted.items())
    return model.eval()


@pytest.mark.parametrize("trainable", [None, PROJECTOR], ids=["adapters", "adapters and projector"])
def test_peft_loads_the_adapters_and_computes_the_same(base, asked, tmp_path, capsys, trainable):
    folder, leaves = base
    trained = drawn(small(), trainable)
    workdir = save(tmp_path / "run", folder, LORA, {7: trained})
    out = tmp_path / "out"
    said = run(capsys, "--workdir", workdir, "--output", out, "--peft", "--dtype", "float32")
    assert f"step 7 of {workdir} -> {out}: float32 adapters of rank 5" in said
    assert sorted(file.name for file in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    model = load_strictly(folder, out)
    settings = model.peft_config["default"]
    assert (settings.base_model_name_or_path, settings.lora_dropout) == (str(folder), 0.1)
    assert settings.modules_to_save == (["multi_modal_projector"] if trainable else None)
    touched = [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(touched) == 4 * 3
    assert all(".language_model.layers." in name for name in touched)
    want = logits_of(Llava(small()), unflatten(leaves | trained), *asked)
    assert close(answered(model, *asked), want)
    # A file that lacks a tensor is seen as such.
    headers = dict(tensor_files.read_header(epath.Path(out / "adapter_model.safetensors")))
    headers.pop(next(iter(headers)))
    specs = {name: (np.dtype(np.float32), header.shape) for name, header in headers.items()}
    tensors = [header.read() for header in headers.values()]
    tensor_files.write_tensors(epath.Path(out / "adapter_model.safetensors"), specs, tensors)
    with pytest.raises((AssertionError, UserWarning)):
        load_strictly(folder, out)


def test_merged_weights_load_in_transformers_and_compute_the_same(base, asked, tmp_path, capsys):
    folder, leaves = base
    trained = drawn(small(), PROJECTOR)
    workdir = save(tmp_path / "run", folder, LORA, {7: trained})
    said = run(capsys, "--workdir", workdir, "--output", tmp_path / "out", "--dtype", "float32")
    assert said == f"{folder} with step 7 of {workdir} -> {tmp_path / 'out'}: float32 weights in the layout llava-hf\n"
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    want = logits_of(Llava(small()), unflatten(leaves | trained), *asked)
    assert close(answered(model, *asked), want)
    # Without the adapters, or with those of another seed, it would be another model.
    for others in (projector_of(trained), drawn(small(), PROJECTOR, seed=1)):
        drawn_else = leaves | {path: 0 * leaf for path, leaf in trained.items()} | others
        assert not close(answered(model, *asked), logits_of(Llava(small()), unflatten(drawn_else), *asked))
    words = "A red bus ?"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(words)["input_ids"] == toy_tokenizer()[0](words)["input_ids"]
    assert theirs.convert_tokens_to_ids("<image>") == VOCABULARY


def projector_of(leaves):
    return {path: leaf for path, leaf in leaves.items() if path.startswith("projector/")}


def test_weights_are_bfloat16_unless_asked_otherwise_and_go_into_the_original_layout(base, tmp_path, capsys):
    """Of a run that trained whole matrices, and its first checkpoint."""
    folder, leaves = base
    steps = {3: drawn(small(LoraConfig()), r".*/mlp/.*/kernel|language/norm/.*"), 5: {}}
    steps[5] = {path: leaf + 1 for path, leaf in steps[3].items()}
    workdir = save(tmp_path / "run", folder, LoraConfig(), steps)
    said = run(capsys, "--workdir", workdir, "--output", tmp_path / "out", "--layout", "llava", "--step", 3)
    assert f"step 3 of {workdir} -> {tmp_path / 'out'}: bfloat16 weights in the layout llava\n" in said
    _, params = load_pretrained(tmp_path / "out", jnp.bfloat16)
    got, want = flatten(params), leaves | steps[3]
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(leaf.astype(jnp.bfloat16)), err_msg=path)
    headers = tensor_files.read_header(epath.Path(tmp_path / "out" / "model.safetensors"))
    assert {header.dtype for _, header in headers} == {"BF16"}
    assert (tmp_path / "out" / "tokenizer.model").exists()
    last = run(capsys, "--workdir", workdir, "--output", tmp_path / "last")
    assert f"step 5 of {workdir}" in last


def test_a_run_over_a_run_is_exported_with_both(base, asked, tmp_path, capsys):
    folder, leaves = base
    first, second = drawn(small(), PROJECTOR), drawn(small(), None, seed=1)
    # The first run went on after the second had begun with its step 2.
    before = save(tmp_path / "before", folder, LORA, {2: first, 3: drawn(small(), PROJECTOR, seed=2)})
    after = save(tmp_path / "after", before, LORA, {4: second}, source_step=2)
    said = run(capsys, "--workdir", after, "--output", tmp_path / "out", "--dtype", "float32")
    assert f"{folder} with step 2 of {before} with step 4 of {after} -> " in said
    merged = leaves | first
    merge_adapters(merged, LORA)
    want = logits_of(Llava(small()), unflatten(merged | second), *asked)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert close(answered(model, *asked), want)

    said = run(capsys, "--workdir", after, "--output", tmp_path / "adapters", "--peft", "--dtype", "float32")
    assert f"they go over the model of step 2 of {before}: export that too, and load them over it" in said
    run(capsys, "--workdir", before, "--output", tmp_path / "base", "--dtype", "float32", "--step", 2)
    assert close(answered(load_strictly(tmp_path / "base", tmp_path / "adapters"), *asked), want)


def test_a_trained_model_is_exported(tmp_path, capsys, monkeypatch):
    """From the command that trains to `transformers` and `peft`, with a base that is in no file."""
    monkeypatch.setattr(jax, "jit", quick_jit)
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    leaves = {}  # what the run begins with

    def load(*args):
        loaded = load_leaves(*args)
        leaves.update({path: jnp.copy(leaf) for path, leaf in loaded.items()})
        return loaded

    monkeypatch.setattr(start, "load_leaves", load)
    flags = {"workdir": tmp_path / "run", "train.steps": 3, "train.checkpoint-every": 2, "data.made-up": 8}
    flags |= {"data.cache": tmp_path / "cache", "data.buckets": 1, "data.batch-size": 2, "lora.rank": 4}
    flags |= {"lora.dropout": 0.1, "optimizer.trainable": PROJECTOR, "optimizer.learning-rate": 0.05}
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    with jax.numpy_dtype_promotion("standard"):  # optax mixes counts with rates
        train.main(["--config", "configs/debug.py", "--train.reference", "adapters_off", *words])
    capsys.readouterr()
    out = tmp_path / "out"
    merged = run(capsys, "--workdir", tmp_path / "run", "--output", out, "--dtype", "float32")
    assert merged.splitlines() == [
        f"tiny and random with step 3 of {tmp_path / 'run'} -> {out}: float32 weights in the layout llava-hf",
        "no tokenizer goes along: the random model's takes text as bytes",
    ]
    said = run(capsys, "--workdir", tmp_path / "run", "--output", tmp_path / "peft", "--peft", "--dtype", "float32")
    assert said.endswith("they go over a random model, which is in no file\n")

    # The same by hand, adapters on: the model that it began with, and what the checkpoint holds.
    shape = find_model(ModelConfig()).shape
    model, adapted = Llava(shape), Llava(dataclasses.replace(shape, lora=LoraConfig(rank=4, dropout=0.1)))
    trained, _ = split_trained(
        flatten(jax.eval_shape(adapted.init, jax.random.key(0))), OptimizerConfig(trainable=PROJECTOR)
    )
    place = replicated(make_mesh(MeshConfig(fsdp=1)))
    like = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for path, leaf in trained.items()}
    trained = Checkpoints(tmp_path / "run" / "checkpoints").restore(3, {"params": like}, partial=True)[0]["params"]
    assert all(np.any(leaf) for leaf in trained.values())
    rng = np.random.default_rng(0)
    ids = jnp.asarray(np.concatenate([[[IMAGE_SLOT] * 16], rng.integers(3, 250, (1, 20))], axis=1), jnp.int32)
    images = jnp.asarray(rng.normal(size=(1, 32, 32, 3)), jnp.float32)
    want = logits_of(adapted, unflatten(leaves | trained), ids, images)
    assert not close(logits_of(model, unflatten(leaves), ids, images), want)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(out).eval()
    assert close(answered(theirs, ids, images), want)
    export_pretrained(model, unflatten(leaves), tmp_path / "base")
    assert close(answered(load_strictly(tmp_path / "base", tmp_path / "peft"), ids, images), want)


def test_export_pretrained_adds_adapters_and_load_pretrained_knows_none(base, tmp_path):
    folder, leaves = base
    trained = drawn(small())
    model, params = Llava(small()), unflatten(leaves | trained)
    export_pretrained(model, params, tmp_path / "out", "llava")
    merged = leaves | trained
    merge_adapters(merged, LORA)
    got, params_again = load_pretrained(tmp_path / "out", jnp.float32)
    assert got.config.lora.rank == 0
    for path, leaf in flatten(params_again).items():
        np.testing.assert_array_equal(leaf, merged[path])
    assert is_adapter(next(path for path in flatten(params) if path not in merged))  # the caller's are as they were
    with pytest.raises(ValueError, match=r"language/layers/attention/out/lora_a: expected .*, got none"):
        export_pretrained(model, unflatten(leaves), tmp_path / "other")
    with pytest.raises(ValueError, match="a checkpoint holds no LoRA adapters"):
        load_pretrained(folder, lora=LORA)


def test_what_is_frozen_is_loaded_in_the_type_that_computes(base, tmp_path):
    """And what trains beside the adapters in the optimizer's; both from the file itself, rounded once at most."""
    folder, leaves = base
    model = ModelConfig(path=str(folder), dtype="bfloat16")
    config = Config(model=model, lora=LORA, optimizer=OptimizerConfig(trainable=PROJECTOR))
    source = find_model(config.model)
    parts = load_parts(config, source, make_model(config, source.shape), make_mesh(MeshConfig(data=2, fsdp=4)))
    assert {path for path in parts.trained if not is_adapter(path)} == set(projector_of(leaves))
    for path, leaf in (parts.trained | parts.frozen).items():
        dtype = jnp.float32 if path in parts.trained else jnp.bfloat16
        assert leaf.dtype == dtype, path
        if not is_adapter(path):
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(leaves[path].astype(dtype)), err_msg=path)


class Bucket(MemoryFileSystem):
    """A store like Google's."""

    protocol = ("gs",)


def test_a_bucket_takes_the_files(base, tmp_path, capsys, monkeypatch):
    bucket = Bucket()
    where = lambda path: bucket if str(path).startswith("gs://") else LocalFileSystem()
    monkeypatch.setattr(epath.backend.fsspec_backend, "fs", where)
    bucket.mkdir("gs://models")
    workdir = save(tmp_path / "run", base[0], LORA, {1: drawn(small())})
    run(capsys, "--workdir", workdir, "--output", "gs://models/a/adapters", "--peft")
    run(capsys, "--workdir", workdir, "--output", "gs://models/a/whole")
    files = {name.partition("models/a/")[2] for name in bucket.find("gs://models/a")}
    assert {"adapters/adapter_config.json", "adapters/adapter_model.safetensors"} <= files
    assert {"whole/config.json", "whole/model.safetensors", "whole/tokenizer.json"} <= files
    assert not any("partial" in name for name in files)


def test_what_cannot_be_exported_is_one_line_and_exit_2(base, tmp_path, capsys):
    folder, _ = base
    adapters, whole = drawn(small()), drawn(small(LoraConfig()), "language/norm/.*")
    runs = {
        "lora": save(tmp_path / "lora", folder, LORA, {1: adapters}),
        "full": save(tmp_path / "full", folder, LoraConfig(), {1: whole}),
        "empty": save(tmp_path / "empty", folder, LORA, {}),
        "norm": save(tmp_path / "norm", folder, LORA, {1: adapters | whole}),
        "half": save(tmp_path / "half", folder, LORA, {1: drawn(small(), ".*/lora_[ab]|projector/up/.*")}),
        "moved": save(tmp_path / "moved", tmp_path / "gone", LORA, {1: adapters}),
        "none": tmp_path / "none",
    }
    (tmp_path / "empty" / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "full" / "file").write_text("")
    for name, more, message in (
        (None, [], "say which run and where to: --workdir runs/a --output model"),
        ("none", [], "none is no workdir of a run that has saved a checkpoint"),
        ("empty", [], "has no checkpoint yet"),
        ("lora", ["--step", "2"], "has no checkpoint of step 2; it has [1]"),
        ("full", ["--peft"], "has no LoRA adapters: leave out --peft"),
        ("lora", ["--peft", "--layout", "llava"], "--peft writes for transformers alone: leave out --layout llava"),
        ("lora", ["--output", str(tmp_path / "full")], "full exists; expected a path where a new folder can be made"),
        ("lora", ["--output", str(tmp_path / "full" / "file")], "file exists"),
        ("norm", ["--peft"], "language/norm/scale has trained beside the adapters, one of 1 leaves"),
        ("half", ["--peft"], "of the projector only projector/up/bias, projector/up/kernel has trained"),
        ("moved", [], "gone"),
        ("lora", ["--outptu", "x"], "Unrecognized options: --outptu"),
    ):
        argv = [] if name is None else ["--workdir", str(runs[name]), "--output", str(tmp_path / "out"), *more]
        with pytest.raises(SystemExit) as stop:
            exit_with_one_line(lambda argv=argv: export.main(argv))
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert message in said
        assert said.count("\n") == 1
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    run(capsys, "--workdir", runs["lora"], "--output", tmp_path / "out", "--peft")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*(set(runs) - {"none"}), "out"])
