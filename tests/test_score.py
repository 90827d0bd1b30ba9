"""A batch under a model: each cell as if it were alone, with its own picture, question and answer."""

import dataclasses

import jax
import numpy as np
import pytest
from quick import quick_jit

from napo_jax.config import DataConfig
from napo_jax.data.byte_tokenizer import BYTE_VOCABULARY, byte_tokenizer
from napo_jax.data.corruptions import image_variants
from napo_jax.data.dataset import open_dataset
from napo_jax.data.images import MEAN, STD
from napo_jax.losses import dpo_loss
from napo_jax.models import Groups, Llava, LlavaConfig
from napo_jax.objective import Objective
from napo_jax.score import score, valid_cells
from napo_jax.term import Term, split_cell

THREE_IMAGES = Objective(
    (
        Term("text", dpo_loss, "chosen", "rejected"),
        Term("image", dpo_loss, "chosen", "chosen@shuffle_patches"),
        Term("masked", dpo_loss, "rejected", "question_only@region"),
    )
)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    tiny = LlavaConfig.tiny(remat="none", logits_chunk=256)
    text = dataclasses.replace(tiny.text, vocab_size=BYTE_VOCABULARY, max_positions=1024, layers=1)
    config = dataclasses.replace(tiny, text=text)
    cache = str(tmp_path_factory.mktemp("cache"))
    data = DataConfig(made_up=3, batch_size=2, max_tokens=1024, attention_multiple=8, cache=cache)
    dataset = open_dataset(data, THREE_IMAGES, byte_tokenizer(), config)
    order = dataset.order(shuffle=False, keep_rest=True)
    batches = list(dataset.loader(order, rows=(0, 2))(0, 2))
    return Llava(config), Llava(config).init(jax.random.key(0)), batches


def test_a_cell_is_scored_as_if_it_were_alone(setting):
    model, params, (batch, _) = setting
    patch, masks = model.config.vision.patch_size, batch.masks
    assert 0 < masks.sum() < masks.size
    got = quick_jit(lambda params, batch: score(model, params, batch, THREE_IMAGES))(params, batch)
    assert set(got) == set(THREE_IMAGES.cells)
    alone = quick_jit(lambda params, groups: model.logps(params, groups, (0,)))
    clean = (batch.images / np.float32(255) - MEAN) / STD
    for c, cell in enumerate(THREE_IMAGES.cells):
        pictures = image_variants(clean, batch.seeds, [split_cell(cell)[1]], masks=masks, patch=patch)
        prefix = batch.prefix_ids[:, None], batch.prefix_lengths[:, None]
        want = alone(params, Groups(pictures, *prefix, batch.answer_ids[:, [c]], batch.answer_lengths[:, [c]]))
        np.testing.assert_allclose(got[cell].sum, want.sum[:, 0], rtol=1e-5, err_msg=cell)
        np.testing.assert_allclose(got[cell].mean, want.mean[:, 0], rtol=1e-5, err_msg=cell)
    sums = np.stack([values.sum for values in got.values()])
    assert len(np.unique(sums.round(3))) == sums.size  # so that no two cells could be mistaken for each other


def test_filling_is_no_cell(setting):
    *_, (_, rest) = setting
    assert {tuple(valid.tolist()) for valid in valid_cells(rest, THREE_IMAGES).values()} == {(True, False)}
    empty = dataclasses.replace(rest, answer_lengths=rest.answer_lengths * np.array([0, 1, 1, 1], np.int32))
    assert not valid_cells(empty, THREE_IMAGES)["chosen"].any()
