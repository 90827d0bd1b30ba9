"""Several pictures in one prefix: from the columns of a file to the log-probs, with nothing of one row in another."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from quick import quick_jit
from released_prompts import tokenise_around_images
from torch_llava import params_of, tiny_config, torch_llava, torch_logits
from toy_tokenizer import toy_tokenizer

from napo_jax.arithmetic import step_flops
from napo_jax.config import Config, DataConfig, ModelConfig, load_config
from napo_jax.data.corruptions import ABAR, image_variants
from napo_jax.data.dataset import open_dataset
from napo_jax.data.images import normalise
from napo_jax.data.loader import Pictures
from napo_jax.data.prompts import Prompter, PromptError
from napo_jax.data.records import DataError, open_records
from napo_jax.decoding import Decoding
from napo_jax.generate import Generator, Prompt
from napo_jax.losses import dpo_loss
from napo_jax.methods import mfpo, mia_dpo
from napo_jax.model_source import find_model, random_shape
from napo_jax.models import IMAGE_SLOT, Groups, Llava
from napo_jax.models.packing import Packing
from napo_jax.objective import Objective
from napo_jax.plan import _batch, _bucket
from napo_jax.preview import as_text, summarise
from napo_jax.preview_page import write_page
from napo_jax.score import pictures_of
from napo_jax.term import Term

CONFIG = tiny_config(kv_heads=2, remat="none")
MODEL, TORCH = Llava(CONFIG), torch_llava(CONFIG, seed=21)
PARAMS, EACH, WORDS = params_of(TORCH), CONFIG.vision.image_tokens, CONFIG.text.vocab_size
logits = quick_jit(Llava.logits, static_argnums=0)
logps = quick_jit(Llava.logps, static_argnums=(0, 3, 4))


def ids_with(tokens, *starts, seed=0):
    """Returns int[tokens] with a picture's slots from each start."""
    ids = np.random.default_rng(seed).integers(1, WORDS, tokens)
    for start in starts:
        ids[start : start + EACH] = IMAGE_SLOT
    return ids


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- the model


def test_logits_of_two_pictures_are_those_of_transformers():
    ids = np.stack([ids_with(44, 1, 4 + EACH, seed=1), ids_with(44, 2, 2 + EACH, seed=2)])
    images = noise(2, 2, 28, 28, 3)
    want = torch_logits(TORCH, ids, images.reshape(4, 28, 28, 3), WORDS)
    got = np.asarray(logits(MODEL, PARAMS, jnp.asarray(ids), jnp.asarray(images)))
    scale = np.abs(want).max()
    assert np.abs(got - want).max() < 1e-4 * scale
    exchanged = logits(MODEL, PARAMS, jnp.asarray(ids), jnp.asarray(images[:, ::-1]))
    assert np.abs(exchanged - want).max() > 1e-2 * scale


CELLS = (0, 0, 1)


def groups_of_pictures():
    """Returns groups of 2, 1 and no pictures under two image variants; room for two in each."""
    prefixes = [ids_with(43, 1, 3 + EACH, seed=3), ids_with(30, 4, seed=4), ids_with(20, seed=5)]
    prefix, lengths = np.zeros((3, 2, 44), np.int32), np.zeros((3, 2), np.int32)
    for row, ids in enumerate(prefixes):
        prefix[row, :, : len(ids)], lengths[row] = ids, len(ids)
    answers = np.random.default_rng(6).integers(1, WORDS, (3, 3, 7)).astype(np.int32)
    answer_lengths = np.array([[7, 2, 4], [1, 5, 3], [2, 2, 6]], np.int32)
    return Groups(*map(jnp.asarray, (noise(3, 2, 2, 28, 28, 3, seed=7), prefix, lengths, answers, answer_lengths)))


@pytest.fixture(scope="module")
def shared():
    return logps(MODEL, PARAMS, groups_of_pictures(), CELLS, Packing(108, 20))


def test_a_shared_prefix_of_pictures_scores_as_answers_alone(shared):
    groups, counts = groups_of_pictures(), (2, 1, 0)
    for row, cell in np.ndindex(3, 3):
        image, count = CELLS[cell], counts[row]
        length, said = int(groups.prefix_lengths[row, image]), int(groups.answer_lengths[row, cell])
        ids = np.concatenate([groups.prefix_ids[row, image, :length], groups.answer_ids[row, cell, :said]])
        pictures = groups.images[row, image, :count] if count else jnp.zeros((1, 28, 28, 3))
        padded = jnp.asarray(np.concatenate([ids, np.zeros(60 - len(ids), int)]))  # one shape for each count
        out = logits(MODEL, PARAMS, padded[None], pictures[None] if count > 1 else pictures)[0]
        of_words = jax.nn.log_softmax(out[length - 1 : length - 1 + said])
        want = np.asarray(of_words)[np.arange(said), ids[length:]].sum()
        assert shared.sum[row, cell] == pytest.approx(want, abs=2e-4)


def test_a_picture_without_slots_is_seen_by_nobody(shared):
    groups = groups_of_pictures()
    other = groups.images.at[1, :, 1].set(9.0).at[2].set(-9.0)
    got = logps(MODEL, PARAMS, groups._replace(images=other), CELLS, Packing(108, 20))
    np.testing.assert_array_equal(got.sum, shared.sum)
    first = groups.images.at[0, :, 1].set(9.0)
    got = logps(MODEL, PARAMS, groups._replace(images=first), CELLS, Packing(108, 20))
    assert np.abs(got.sum[0] - shared.sum[0]).max() > 0.1


def test_a_picture_that_is_cut_is_no_number():
    groups = groups_of_pictures()
    cut = groups._replace(prefix_ids=groups.prefix_ids.at[0, :, 40].set(IMAGE_SLOT).at[1, :, 4].set(5))
    got = np.asarray(logps(MODEL, PARAMS, cut, CELLS, Packing(108, 20)).sum)
    assert np.isnan(got[:2]).all()
    assert np.isfinite(got[2]).all()


def test_an_answer_to_two_pictures_is_the_greedy_one(monkeypatch):
    monkeypatch.setattr(jax, "jit", quick_jit)
    ids = ids_with(42, 1, 3 + EACH, seed=8).astype(np.int32)
    images = noise(2, 28, 28, 3, seed=9)
    generator = Generator(MODEL, PARAMS, Decoding(max_tokens=4), eos=0, slots=4, prompt_tokens=48)
    alone = Prompt("one", ids_with(30, 2, seed=10).astype(np.int32), images[0])
    said = {answer.key: answer.ids for answer in generator([Prompt("two", ids, images), alone])}
    for prompt in (Prompt("two", ids, images), alone):
        sequence = prompt.ids
        for token in said[prompt.key]:
            padded = np.concatenate([sequence, np.zeros(60 - len(sequence), np.int32)])
            out = logits(MODEL, PARAMS, padded[None], jnp.asarray(prompt.image)[None])[0, len(sequence) - 1]
            assert out[token] >= out.max() - 1e-3
            sequence = np.append(sequence, np.int32(token))
    with pytest.raises(ValueError, match="a prompt with 2 pictures needs 32 places for its tokens, and has 16"):
        list(generator([Prompt("x", ids_with(30, 2).astype(np.int32), images)]))


# --- prompts


@pytest.fixture(scope="module")
def prompter():
    return Prompter(toy_tokenizer()[0], "llava_v1", image_tokens=3)


def test_pictures_stand_where_the_question_has_them_or_in_front(prompter):
    opening, ending = f"{prompter.template.system} USER: ", " ASSISTANT:"
    sentences = toy_tokenizer()[1]
    within = "Image 1: <image>\nImage 2: <image>\nIn Image 2, what is it?"
    for question, text in (
        (within, within),
        ("What is it?", "<image>\n<image>\nWhat is it?"),
        ("<image><image> What?", "<image><image> What?"),
    ):
        (ids,) = prompter.prefixes([question], slots=1, pictures=[2])
        assert ids == tokenise_around_images(f"{opening}{text}{ending}", sentences)
        whole = prompter.prefix(question, pictures=2)
        assert whole.count(IMAGE_SLOT) == 6
        assert prompter.read_prefix(whole) == f"<s>{opening}{text}{ending}"


def test_markers_unlike_the_pictures_are_an_error_in_their_place(prompter):
    questions = ["<image>", "One <image>?", "a <image> b <image> c <image>", "What is it?", "half \ud83d"]
    found = prompter.prefixes(questions, pictures=[1, 2, 2, 1, 2])
    assert [ids.reason if isinstance(ids, PromptError) else None for ids in found] == [
        None,
        "image_markers",
        "image_markers",
        None,
        "invalid_unicode",
    ]
    assert [found[0], found[3]] == prompter.prefixes(["<image>", "What is it?"])


# --- files


def png(number, size=40):
    data = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size, size + 9, 3), np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def row(*pictures, question="What is it?"):
    images = [{"bytes": picture, "path": None} for picture in pictures]
    return {"images": images, "question": question, "chosen": "A cat.", "rejected": "A bus."}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    rows = [
        row(png(1), png(2), question="<image> or <image>?"),
        row(png(3)),
        row(png(4), png(5), png(6)),
        row(png(7), png(8), png(9), png(10)),
        row(png(11), png(12)[:-40]),
        row(png(13), png(14), question="Only <image>?"),
        row(),
        row(png(15), png(16), question="long " * 60),
        row(png(1), png(2), question="<image> or <image>?"),
    ]
    path = tmp_path_factory.mktemp("several") / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def dataset(file):
    data = DataConfig(
        path=(str(file),),
        pictures=3,
        batch_size=1,
        max_tokens=480,
        attention_multiple=8,
        cache=str(file.parent / "cache"),
    )
    source = find_model(ModelConfig())
    return open_dataset(data, mia_dpo(), source.tokenizer, source.shape)


def test_rows_of_too_many_and_of_damaged_pictures_are_counted(dataset, file):
    assert dataset.dropped == {
        "too_many_images": 1,
        "image_truncated": 1,
        "no_image": 1,
        "image_markers": 1,
        "prefix_too_long": 1,
    }
    assert dataset.table.pictures.tolist() == [2, 1, 3, 2]
    records = open_records(file, cache=file.parent / "cache")
    assert records.dropped["several_images"] == 7
    assert records[0].images == (png(3),)


def test_pictures_come_back_in_their_order(dataset):
    assert dataset.records.images(2) == dataset.records[2].images == (png(4), png(5), png(6))
    assert dataset.records.image(2) == png(4)
    keys = dataset.table.keys
    assert keys[0] == keys[3], "equal rows have equal keys"
    assert len(set(keys)) == 3


def test_the_list_of_pictures_comes_before_the_one(tmp_path):
    table = pa.Table.from_pylist([row(png(1), png(2)) | {"image": png(3)}])
    pq.write_table(table, tmp_path / "both.parquet")
    read = lambda pictures: open_records(tmp_path, cache=tmp_path / "cache", pictures=pictures)[0].images
    assert read(1) == (png(3),)
    assert read(2) == (png(1), png(2))


def test_parts_of_a_message_leave_their_pictures_in_place(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(ord(name)))
    text, mark = (lambda words: {"type": "text", "text": words}), {"type": "image"}
    message = lambda *parts: [{"role": "user", "content": list(parts)}]
    lines = [
        {"images": ["a.png", "b.png"], "prompt": message(text("Is "), mark, text(" like "), mark, text("?"))},
        {"images": ["a.png"], "prompt": message(text("What is it?"), mark)},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line | {"chosen": "Yes."}) + "\n" for line in lines))
    records = open_records(tmp_path / "rows.jsonl", cache=tmp_path / "cache", pictures=2)
    assert [record.question for record in records] == ["Is <image> like <image>?", "What is it?"]


# --- batches


def test_a_batch_has_each_picture_in_its_place_and_no_more_than_its_bucket_needs(dataset):
    look, sizes = Pictures(32), {}
    for batch in dataset.loader(dataset.order(keep_rest=True), rows=(0, 1))(0, 4):
        number, count = int(batch.ids[0]), len(dataset.records.images(int(batch.ids[0])))
        pictures = batch.images[0] if batch.bucket.pictures > 1 else batch.images
        assert len(pictures) == batch.bucket.pictures >= count
        for picture, data in zip(pictures, dataset.records.images(number), strict=False):
            np.testing.assert_array_equal(picture, look(data))
        assert not pictures[count:].any()
        assert (batch.prefix_ids[0] == IMAGE_SLOT).sum() == count * 16
        sizes[count] = batch.bucket.pictures
    assert sizes[1] == 1
    assert max(sizes.values()) == 3


def test_the_rows_of_one_picture_are_the_same_data_under_both_settings(tmp_path):
    source = find_model(ModelConfig())
    pq.write_table(pa.Table.from_pylist([row(png(n)) for n in range(3)]), tmp_path / "one.parquet")
    data = DataConfig(path=(str(tmp_path / "one.parquet"),), batch_size=2, attention_multiple=8)
    prints = set()
    for pictures in (1, 2):
        data = dataclasses.replace(data, pictures=pictures, cache=str(tmp_path / f"cache{pictures}"))
        dataset = open_dataset(data, mia_dpo(), source.tokenizer, source.shape)
        prints.add((dataset.table.fingerprint, dataset.loader(rows=(0, 2)).fingerprint))
        assert next(dataset.loader(rows=(0, 2))()).images.shape == (2, 32, 32, 3)
    assert len(prints) == 1


def test_every_picture_has_the_image_variant(dataset):
    batch = next(batch for batch in dataset.loader(rows=(0, 1))() if batch.bucket.pictures == 3)
    objective = Objective((Term("picture", dpo_loss, "chosen", "chosen@diffusion"),))
    found = np.asarray(pictures_of(batch, objective, 8))
    assert found.shape == (1, 2, 3, 32, 32, 3)
    pixels = np.asarray(normalise(batch.images[0]))
    np.testing.assert_array_equal(found[0, 0], pixels)
    alone = image_variants(pixels[:1], batch.seeds, ("clean", "diffusion"), patch=8)
    np.testing.assert_array_equal(found[0, :, 0], np.asarray(alone)[0])
    noise = found[0, 1] - np.float32(np.sqrt(ABAR[500])) * found[0, 0]
    apart = [np.abs(noise[one] - noise[other]).mean() for one, other in ((0, 1), (0, 2), (1, 2))]
    assert min(apart) > 0.1, "each picture has noise of its own"


def test_variants_of_one_picture_are_refused_with_several(file):
    data = DataConfig(path=(str(file),), pictures=2, batch_size=1, cache=str(file.parent / "cache"))
    source = find_model(ModelConfig())
    with pytest.raises(ValueError, match="the image variant region, which is of one picture"):
        open_dataset(data, mfpo(), source.tokenizer, source.shape)
    with pytest.raises(ValueError, match=r"data\.pictures must be at least 1, got 0"):
        DataConfig(pictures=0)
    with pytest.raises(DataError, match="none of 9 rows"):
        open_dataset(dataclasses.replace(data, max_tokens=40), mia_dpo(), source.tokenizer, source.shape)


def test_the_preview_shows_every_picture(dataset, tmp_path):
    summary = summarise(dataset)
    assert summary["pictures"] == {"1": 1, "2": 2, "3": 1}
    assert "2              2 groups" in as_text(summary)
    write_page(tmp_path / "page.html", dataset, summary, mia_dpo(), 4)
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png") == 8
    assert page.count("<figcaption>clean, picture 3</figcaption>") == 1
    assert page.count("<figcaption>clean</figcaption>") == 1


def test_a_plan_knows_how_many_pictures(dataset):
    config = _planned(pictures=1)
    one, several = (_bucket(_planned(pictures=n), find_model(ModelConfig()).shape, None, 32, 8, []) for n in (1, 3))
    assert (several.pictures, several.prefix - one.prefix) == (3, 2 * 16)
    assert several.tokens - one.tokens == 2 * 16
    model = Llava(find_model(ModelConfig()).shape)
    shapes = [_batch(config, model, bucket, None).images.shape for bucket in (one, several)]
    assert shapes == [(4, 32, 32, 3), (4, 3, 32, 32, 3)]
    flops = lambda bucket: step_flops(model.config, bucket, 4, (0, 0), trained=())
    assert flops(several) - flops(dataclasses.replace(several, pictures=1)) > 0
    notes = []
    _bucket(_planned(pictures=3), model.config, None, 32, 8, notes)
    assert "and 32 more for 3 images" in notes[0]
    published = _bucket(load_config("configs/mia7b.py"), random_shape("7b"), None, 704, 256, [])
    assert (published.pictures, published.prefix) == (5, 3072)  # 704 and four times 576, up to a multiple of 128


def _planned(pictures):
    return Config(
        data=DataConfig(pictures=pictures, batch_size=4, attention_multiple=8, path=("nowhere.parquet",)),
        objective=mia_dpo(),
    )
