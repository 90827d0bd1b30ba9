"""Rows of several pictures: the attention behind an answer, the command that makes them, and a training on them."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from quick import quick_jit
from speaking_model import write_speaking_model
from test_build_regions import config_of, row
from torch_llava import params_of, tiny_config, torch_llava

from napo_jax import build_composed, building
from napo_jax.build_composed import Options, build, main
from napo_jax.command import exit_with_one_line
from napo_jax.composed.misplaced import Selection
from napo_jax.config import Config
from napo_jax.data.dataset import open_dataset
from napo_jax.data.images import decode, fit, normalise
from napo_jax.data.prompts import Prompter
from napo_jax.data.records import open_records
from napo_jax.decoding import Decoding
from napo_jax.journal import StoppedError
from napo_jax.methods import mia_dpo
from napo_jax.metrics import Console
from napo_jax.model_source import find_model, load_leaves
from napo_jax.models import IMAGE_SLOT, Groups, Llava
from napo_jax.models.looking import looks
from napo_jax.optim import OptimizerConfig, make_optimizer, split_trained
from napo_jax.sharding import make_mesh
from napo_jax.speaker import load_speaker
from napo_jax.step import Frozen, init_state, make_train_step
from napo_jax.world.configs import BASE, cure

logits = quick_jit(Llava.logits, static_argnums=0)
seen = quick_jit(looks, static_argnums=(0, 3))

# --- where answers look


def test_attention_is_that_of_transformers():
    """Golden: the attentions of `transformers`, over a whole sequence with two pictures, of every layer."""
    config = tiny_config(kv_heads=2, remat="none")
    model, each, words = torch_llava(config, seed=31), config.vision.image_tokens, config.text.vocab_size
    random = np.random.default_rng(0)
    lengths, said = (40, 37), (6, 3)
    prefix, answers = np.zeros((2, 1, 44), np.int32), random.integers(1, words, (2, 1, 8)).astype(np.int32)
    for number, length in enumerate(lengths):
        prefix[number, 0, :length] = random.integers(1, words, length)
        prefix[number, 0, 1 : 1 + each] = prefix[number, 0, 4 + each : 4 + 2 * each] = IMAGE_SLOT
    images = random.normal(size=(2, 1, 2, 28, 28, 3)).astype(np.float32)
    arrays = (images, prefix, np.array(lengths)[:, None], answers, np.array(said)[:, None])
    groups = Groups(*map(jnp.asarray, arrays))
    got = seen(Llava(config), params_of(model), groups, (0,))
    assert got.shape == (config.text.layers, 2, 1, 44)
    for number, (length, count) in enumerate(zip(lengths, said, strict=True)):
        ids = np.concatenate([prefix[number, 0, :length], answers[number, 0, :count]])[None]
        ids = torch.from_numpy(np.where(ids == IMAGE_SLOT, words, ids)).long()
        pixels = torch.from_numpy(images[number, 0].transpose(0, 3, 1, 2))
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=pixels, output_attentions=True)
        for layer, attention in enumerate(out.attentions):
            want = attention[0].mean(dim=0)[length:, :length].mean(dim=0).numpy()
            np.testing.assert_allclose(got[layer, number, 0, :length], want, atol=2e-6)
            last = attention[0].mean(dim=0)[-1, :length].numpy()
            assert np.abs(want - last).max() > 1e-4, "the last token's alone shows"
        assert not np.asarray(got[:, number, 0, length:]).any()


# --- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has a model, and two files: a damaged picture, and two chosen answers that are none or too long."""
    folder = tmp_path_factory.mktemp("composed")
    write_speaking_model(folder / "model")
    (folder / "in").mkdir()
    rows = [{name: value for name, value in row(number).items() if name != "boxes"} for number in range(9)]
    rows[2]["image"] = rows[2]["image"][:-40]
    rows[4]["chosen"], rows[5]["chosen"] = " ", "x" * 512
    for number, one in enumerate(rows):
        one["idx"] = number
    pq.write_table(pa.Table.from_pylist(rows[:5]), folder / "in" / "a.parquet", row_group_size=2)
    pq.write_table(pa.Table.from_pylist(rows[5:]), folder / "in" / "b.parquet")
    return folder


ANY = Selection(most_on_target=1.0, least_perplexity=0.0, longer=1e9, least_edited=0.0)


def run(folder, name, **options):
    """Composes; returns the rows of both files by their number, the summary, and what was said."""
    said = io.StringIO()
    options = {"piece": 4, "slots": 4, "batch": 2, "decoding": Decoding(max_tokens=6), "selection": ANY} | options
    whole = Options(input=(str(folder / "in"),), output=str(folder / name), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_composed, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        patch.setattr(jax, "jit", quick_jit)  # of what generates
        summary = build(config_of(folder, cache=str(folder / "cache")), whole, Console(said))
    tables = [pq.read_table(file).to_pylist() for file in sorted((folder / name).glob("*.parquet"))]
    return {row["idx"]: row for table in tables for row in table}, summary, said.getvalue()


@pytest.fixture(scope="module")
def sequences(folder):
    return run(folder, "sequences", pictures=(2,))


def test_a_sequence_has_the_rows_picture_where_its_question_says(folder, sequences):
    rows, summary, said = sequences
    faults = {"image_truncated": 1, "no_chosen": 1, "chosen_too_long": 1}
    assert summary["counts"].pop("composed") == len(rows) == 6
    assert summary["counts"] == faults
    assert "train with --data.pictures 2" in said
    before = {row["idx"]: row for name in "ab" for row in pq.read_table(folder / "in" / f"{name}.parquet").to_pylist()}
    more, *_ = run(folder, "kept", pictures=(2, 3), rejected="kept")
    assert len(more) == 6
    assert len({(one["composed"]["pictures"], one["composed"]["place"]) for one in more.values()}) > 1
    for number, one in [*rows.items(), *more.items()]:
        count, place = one["composed"]["pictures"], one["composed"]["place"]
        pictures = [image["bytes"] for image in one["images"]]
        assert pictures[place - 1] == before[number]["image"]
        assert len(set(pictures)) == len(pictures) == count
        assert one["question"].count("<image>") == count
        assert one["question"].endswith(f"In Image {place}: {before[number]['question']}")
        assert one["chosen"] == before[number]["chosen"]
        assert one.keys() == (before[number].keys() - {"image"}) | {"images", "composed", "on_target"}


def test_the_rejected_answer_is_the_models_with_its_share_of_attention(folder, sequences):
    """By hand, nothing kept and nothing padded away: the greedy answer, and the attention of layer 1 of two."""
    rows, config = sequences[0], config_of(folder)
    source, mesh = find_model(config.model), make_mesh(config.mesh, jax.devices()[:1])
    speaker = load_speaker(source, mesh, dtype="float32")
    prompter = Prompter(source.tokenizer, "llava_v1", source.shape.vision.image_tokens)
    for one in list(rows.values())[:2]:
        pixels = normalise(np.stack([fit(decode(image["bytes"]), 32, "pad") for image in one["images"]]))
        ids = np.array(prompter.prefix(one["question"], pictures=2), np.int32)
        padded, said = np.zeros(320, np.int32), []
        padded[: len(ids)] = ids
        while len(said) < 6 and said[-1:] != [source.tokenizer.eos_token_id]:
            last = len(ids) + len(said) - 1
            said.append(int(np.argmax(logits(speaker.model, speaker.params, padded[None], pixels[None])[0, last])))
            padded[last + 1] = said[-1]
        said = [token for token in said if token != source.tokenizer.eos_token_id]
        assert one["rejected"] == speaker.spell(said)
        prefix, answer = np.zeros((2, 1, 1, 310), np.int32)
        prefix[0, 0, : len(ids)], answer[0, 0, : len(said)] = ids, said
        lengths = [jnp.array([[len(tokens)]], jnp.int32) for tokens in (ids, said)]
        groups = Groups(pixels[None, None], prefix, lengths[0], answer[:, :, :6], lengths[1])
        attention = np.asarray(seen(speaker.model, speaker.params, groups, (0,)))[1, 0, 0]
        slots = attention[prefix[0, 0] == IMAGE_SLOT].reshape(2, -1).sum(axis=1)
        assert one["on_target"] == pytest.approx(slots[one["composed"]["place"] - 1] / slots.sum(), abs=1e-4)


def test_what_was_said_is_kept_and_chosen_from_anew(folder, sequences, monkeypatch):
    asked = []

    def stop(signal):
        asked.append(signal)
        if len(asked) == 12:
            raise StoppedError("asked", 143)

    monkeypatch.setattr(building, "raise_if_asked", stop)
    with pytest.raises(StoppedError):
        run(folder, "stopped", pictures=(2,))
    monkeypatch.undo()
    rows, summary, said = run(folder, "stopped", pictures=(2,))
    assert "5 to go" in said or "4 to go" in said  # of 9, in pieces of 4 and 1, and 4
    assert rows == sequences[0]
    assert "all of that is done" in run(folder, "stopped", pictures=(2,))[2]
    shares = sorted(one["on_target"] for one in rows.values())
    half = Selection(most_on_target=(shares[2] + shares[3]) / 2, least_perplexity=0.0, longer=1e9, least_edited=0.0)
    fewer, summary, said = run(folder, "stopped", pictures=(2,), selection=half)
    assert "0 to go" in said
    assert fewer == {number: one for number, one in rows.items() if one["on_target"] < half.most_on_target}
    assert summary["counts"]["looks_at_target"] == 3
    with pytest.raises(ValueError, match="was begun with form"):
        run(folder, "stopped", form="grid")


def test_a_grid_and_an_inset_are_one_picture_and_may_keep_their_answers(folder, monkeypatch):
    monkeypatch.setattr(build_composed, "find_model", None)  # no model is asked
    rows, summary, said = run(folder, "grids", form="grid", rejected="kept", pictures=(4,))
    assert summary["counts"]["composed"] == len(rows) == 6
    assert {one["rejected"] for one in rows.values()} == {"A bus."}
    assert all(decode(one["images"][0]["bytes"]).size == (896, 896) for one in rows.values())
    assert "train with --data.pictures 1" in said
    records = open_records(folder / "grids", cache=folder / "cache")  # one picture is what every command reads
    assert len(records) == 6
    rows, *_ = run(folder, "insets", form="inset", rejected="kept", variant="released")
    assert all(len(one["images"]) == 1 for one in rows.values())
    assert "all of that is done" in run(folder, "insets", form="inset", rejected="kept", variant="released")[2]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "say what to read and where to write"),
        (["--input", "{0}/in", "--output", "{0}/in"], "would be written over"),
        (["--input", "{0}/sequences", "--output", "{0}/other"], "has a column composed already"),
        (
            ["--input", "{0}/in", "--output", "{0}/o", "--form", "grid", "--pictures", "5"],
            "grid has 2, 3, 4, 6, 9 pict",
        ),
        (["--input", "{0}/in", "--output", "{0}/other", "--layer", "2"], "layer must be from 0 to 1, got 2"),
        (["--input", "{0}/in", "--output", "{0}/other", "--form", "grid"], "there are 8 pictures, and 9 are to stand"),
        (["--input", "{0}/in", "--output", "{0}/o", "--decoding.max-tokens", "99999"], "leaves no room for a prompt"),
    ],
)
def test_what_cannot_be_used_is_one_line(arguments, line, folder, sequences, capsys):
    argv = ["--config", "configs/debug.py", f"--model.path={folder / 'model'}", f"--data.cache={folder / 'cache'}"]
    argv += [word.format(folder) for word in arguments]
    with pytest.raises(SystemExit) as ended:
        exit_with_one_line(lambda: main(argv))
    assert ended.value.code == 2
    assert line in capsys.readouterr().err


# --- a training


def test_twenty_steps_on_two_pictures_of_the_world_raise_the_margin(tmp_path):
    """The world's pairs, each picture beside another one: its base model learns to prefer the true answer."""
    (tmp_path / "in").mkdir()
    pq.write_table(pq.read_table(BASE / "pairs.parquet").slice(0, 24), tmp_path / "in" / "pairs.parquet")
    data = dataclasses.replace(cure().data, path=(str(tmp_path / "out"),), cache=str(tmp_path / "cache"), pictures=2)
    data = dataclasses.replace(data, batch_size=4, held_out=0, buckets=1)
    config = Config(model=cure().model, data=dataclasses.replace(data, pictures=2), objective=mia_dpo(beta=0.1))
    options = Options((str(tmp_path / "in"),), str(tmp_path / "out"), pictures=(2,), rejected="kept")
    build(config, options, Console(io.StringIO()))
    source = find_model(config.model)
    dataset = open_dataset(config.data, config.objective, source.tokenizer, source.shape)
    assert dataset.table.pictures.tolist() == [2] * 24
    model = Llava(dataclasses.replace(source.shape, remat="none"))
    leaves = load_leaves(source, model, make_mesh(config.mesh, jax.devices()[:1]))
    leaves = {path: jnp.asarray(np.asarray(leaf)) for path, leaf in leaves.items()}  # on no mesh, as a step's are
    trained, frozen = split_trained(leaves, OptimizerConfig())
    optimizer = make_optimizer(OptimizerConfig(learning_rate=2e-4, warmup=0.0, schedule="constant"), 20)
    step = quick_jit(make_train_step(model, config.objective, optimizer))
    state, frozen, margins = init_state(trained, optimizer), Frozen(frozen, trained), []
    for batch in dataset.loader(rows=(0, 4))(0, 20):
        assert batch.images.shape[:2] == (4, 2)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes counts with rates
            state, metrics = step(state, frozen, batch)
        margins.append(float(metrics["preference/margin"]))
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert min(margins[15:]) > 1, margins
