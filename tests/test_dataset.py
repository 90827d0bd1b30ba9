"""What a config says reaches the part that it is about, and what does not fit the model is refused."""

import base64
import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from napo_jax.config import DataConfig
from napo_jax.data.byte_tokenizer import BYTE_VOCABULARY, byte_tokenizer
from napo_jax.data.dataset import open_dataset
from napo_jax.data.prompts import TEMPLATES
from napo_jax.data.records import DataError
from napo_jax.data.regions import Region, read_region
from napo_jax.data.sources import RowError
from napo_jax.losses import dpo_loss, sft_loss, softmax_preference_loss
from napo_jax.methods import napo
from napo_jax.models import LlavaConfig
from napo_jax.objective import Objective
from napo_jax.term import Term

ANSWERS = ("chosen", "rejected", "question_only", "image_only")


def model_of(**text):
    tiny = LlavaConfig.tiny()
    text = {"vocab_size": BYTE_VOCABULARY, "max_positions": 1024} | text
    return dataclasses.replace(tiny, text=dataclasses.replace(tiny.text, **text))


def open_with(cache, objective=None, model=None, **options):
    config = DataConfig(**{"cache": str(cache), "batch_size": 2, "made_up": 8, "max_tokens": 1024} | options)
    return open_dataset(config, objective or napo(), byte_tokenizer(), model or model_of())


def test_more_tokens_than_the_model_has_positions_are_refused(tmp_path):
    assert open_with(tmp_path, max_tokens=1024).table.rules.max_tokens == 1024
    with pytest.raises(ValueError, match=r"data\.max_tokens is 1025, and the model has 1024 positions"):
        open_with(tmp_path, max_tokens=1025)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    """An id that the embedding has no row for would come out as NaN, or as another word, and never as an error."""
    largest = open_with(tmp_path).table.largest_id
    open_with(tmp_path, model=model_of(vocab_size=largest + 1))
    with pytest.raises(ValueError, match=f"gives the id {largest}, and the model knows {largest} ids"):
        open_with(tmp_path, model=model_of(vocab_size=largest))


def test_an_unknown_image_variant_is_refused(tmp_path):
    objective = Objective((Term("image", dpo_loss, "chosen", "chosen@sepia"),))
    with pytest.raises(ValueError, match=r"image variants \['sepia'\]; there are clean, crop"):
        open_with(tmp_path, objective)


def write_extras(file, regions, rejected=None):
    """Writes three rows with what a column of regions holds, and another picture each."""
    columns = {"image": [png(i) for i in range(3)], "question": ["What?"] * 3, "chosen": ["a", "b", "c"]}
    columns |= {"region": regions, "retrieved_image": rejected or [png(9 + i) for i in range(3)]}
    pq.write_table(pa.table(columns), file)


EXTRAS = Objective((Term("image", softmax_preference_loss, "chosen", ("chosen@region", "chosen@rejected_image")),))


def test_a_batch_has_the_regions_and_rejected_pictures_that_an_objective_needs(tmp_path):
    mask = np.arange(16).reshape(4, 4) % 3 == 0
    write_extras(tmp_path / "rows.parquet", [Region.of(mask, "pad").column] * 3)
    files = {"path": (str(tmp_path / "rows.parquet"),)}
    dataset = open_with(tmp_path, EXTRAS, **files)
    batch = next(dataset.loader(dataset.order(shuffle=False, keep_rest=True, batch_size=4), rows=(0, 4))())
    np.testing.assert_array_equal(batch.masks, [mask, mask, mask, np.zeros((4, 4), bool)])
    assert batch.rejected_images[:, 0, 0, 0].tolist() == [9, 10, 11, 0]
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 2, 0]
    plain = open_with(tmp_path, Objective((Term("text", sft_loss, "chosen"),)), **files)
    batch = next(plain.loader(rows=(0, 2))())
    assert batch.masks is None
    assert batch.rejected_images is None
    assert not set(plain.table.keys) & set(dataset.table.keys), "another picture or region is another record"


def test_a_row_without_what_an_objective_needs_is_counted(tmp_path):
    whole = Region.of(np.ones((4, 4)), "pad")
    regions = [whole.column, None, whole.column | {"bits": b"too long"}]
    rejected = [png(1)[:-30], png(2), png(3)]
    write_extras(tmp_path / "rows.parquet", regions, rejected)
    files = {"path": (str(tmp_path / "rows.parquet"),)}
    with pytest.raises(DataError, match="bad_region 1, no_region 1, rejected_image_truncated 1"):
        open_with(tmp_path, EXTRAS, **files)
    # As JSON has them, and a file that lacks a column.
    row = {"image": "a.png", "question": "What?", "chosen": "a", "rejected_image": "a.png"}
    (tmp_path / "a.png").write_bytes(png())
    region = whole.column | {"bits": base64.b64encode(whole.bits).decode()}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"region": region}) + "\n")
    assert open_with(tmp_path, EXTRAS, path=(str(tmp_path / "rows.jsonl"),)).records[0].region == whole
    (tmp_path / "less.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="has no column region for 'region'"):
        open_with(tmp_path, EXTRAS, path=(str(tmp_path / "less.jsonl"),))


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Region.of(np.ones((4, 4)), "crop"), "4 x 4 cells, image_rule crop, exif False, and this run needs"),
        (Region.of(np.ones((4, 4)), "pad", exif=True), "image_rule pad, exif True, and this run needs"),
        (Region.of(np.ones((5, 5)), "pad"), "cells that tile 32 pixels"),
    ],
    ids=["rule", "exif", "side"],
)
def test_regions_of_another_square_are_refused(tmp_path, region, message):
    write_extras(tmp_path / "rows.parquet", [region.column] * 3)
    with pytest.raises(DataError, match=message):
        open_with(tmp_path, EXTRAS, path=(str(tmp_path / "rows.parquet"),))


def test_a_region_comes_back_from_its_bits():
    mask = np.random.default_rng(0).random((7, 7)) < 0.3
    region = Region.of(mask, "pad")
    assert len(region.bits) == 7  # 49 cells
    np.testing.assert_array_equal(region.mask, mask)
    assert read_region(region.column) == region
    with pytest.raises(ValueError, match="must be square"):
        Region.of(np.ones((3, 4)), "pad")
    for name, wrong in (("side", 6), ("side", True), ("rule", "stretch"), ("exif", 1), ("bits", "?"), ("bits", 7)):
        with pytest.raises(RowError, match="bad_region"):
            read_region(region.column | {name: wrong})


def png(value=0, exif=None):
    data = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(data, "PNG", **({"exif": exif} if exif else {}))
    return data.getvalue()


def test_columns_and_image_root_come_from_the_config(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png())
    rows = [{"picture": "a.png", "asked": f"Which? {i}"} | dict.fromkeys(ANSWERS, "A.") for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"path": (str(tmp_path / "rows.jsonl"),), "image_root": str(tmp_path / "pictures")}
    dataset = open_with(tmp_path, columns={"image": "picture", "question": "asked"}, **options)
    assert [question for _, question, _ in dataset.records.texts()] == ["Which? 0", "Which? 1", "Which? 2"]
    with pytest.raises(DataError, match="no column"):
        open_with(tmp_path, **options)


def test_a_missing_answer_column_is_said_before_rows_are_read(tmp_path):
    """And not as so many rows without the answer."""
    row = {"image": [png()], "question": ["Which?"], "chosen": ["A."], "rejected": ["B."]}
    pq.write_table(pa.table(row), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="has no column question_only or question_only_None for"):
        open_with(tmp_path, path=(str(tmp_path / "rows.parquet"),))


def test_numbers_and_choices_come_from_the_config(tmp_path):
    one = open_with(tmp_path)
    assert one.prompter.template == TEMPLATES["llava_v1"]
    assert open_with(tmp_path, template="vicuna_v1").prompter.template == TEMPLATES["vicuna_v1"]
    assert len(open_with(tmp_path, buckets=1).buckets) == 1
    assert len(one.buckets) > 1
    for bucket in open_with(tmp_path, attention_multiple=256).buckets:
        assert (bucket.prefix + 4 * bucket.answer) % 256 == 0
    rules = open_with(tmp_path, long_answers="drop", identical="drop").table.rules
    assert (rules.long_answers, rules.identical) == ("drop", "drop")
    assert (one.order().batch_size, open_with(tmp_path, batch_size=3).order().batch_size) == (2, 3)


def test_a_seed_decides_made_up_records_their_order_and_their_own_seeds(tmp_path):
    one, other = open_with(tmp_path, seed=0), open_with(tmp_path, seed=1)
    assert one.records[0] != other.records[0]
    assert [one.order().seed, other.order().seed] == [0, 1]
    row = [{"image": png(i), "question": f"Which? {i}"} | dict.fromkeys(ANSWERS, "A.") for i in range(2)]
    pq.write_table(pa.Table.from_pylist(row), tmp_path / "rows.parquet")
    path = (str(tmp_path / "rows.parquet"),)
    seeds = [next(open_with(tmp_path, path=path, seed=seed).loader()()).seeds.tolist() for seed in (0, 1)]
    assert not set(seeds[0]) & set(seeds[1])


def test_worker_processes_decode_if_the_config_says_so(tmp_path, monkeypatch):
    """What is broken in this process alone is met by its threads, and not by another process."""
    here, there = open_with(tmp_path), open_with(tmp_path, workers=1)

    def broken(self, number):
        raise DataError("decoded here")

    monkeypatch.setattr(type(here.records), "image", broken)
    with pytest.raises(DataError, match="decoded here"):
        next(here.loader()())
    assert next(there.loader()()).images.any()


def test_one_path_may_be_a_string():
    assert DataConfig(path="rows.parquet").path == ("rows.parquet",)


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"threads": 0}, {"made_up": 0}, {"buckets": 0}, {"seed": -1}, {"workers": -1}]
)
def test_senseless_numbers_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        DataConfig(**wrong)
