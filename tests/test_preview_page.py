"""The page shows what a batch holds, and what it shows is text, wherever the text comes from."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from napo_jax.config import DataConfig, ModelConfig
from napo_jax.data.corruptions import image_variants
from napo_jax.data.dataset import open_dataset
from napo_jax.data.images import MEAN, STD, normalise
from napo_jax.data.prompts import Prompter
from napo_jax.html_page import Markup, table
from napo_jax.losses import dpo_loss
from napo_jax.model_source import find_model
from napo_jax.objective import Objective
from napo_jax.preview import summarise
from napo_jax.preview_page import write_page
from napo_jax.term import Term

VARIANTS = ("clean", "diffusion", "shuffle_patches", "swap")
OBJECTIVE = Objective([Term(v, dpo_loss, "chosen", f"chosen@{v}") for v in VARIANTS[1:]])
HOSTILE = "</span></div><script>alert(1)</script><img src=x onerror=alert(2)>\"'>"


@pytest.fixture
def dataset(tmp_path):
    source = find_model(ModelConfig())
    config = DataConfig(made_up=5, batch_size=4, attention_multiple=8, cache=str(tmp_path))
    return open_dataset(config, OBJECTIVE, source.tokenizer, source.shape)


def page_of(dataset, tmp_path, groups):
    write_page(tmp_path / "page.html", dataset, summarise(dataset), OBJECTIVE, groups)
    return (tmp_path / "page.html").read_text()


def test_pictures_are_those_of_the_batch(dataset, tmp_path):
    page = page_of(dataset, tmp_path, 4)
    found = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]*)"', page)]
    batch = next(dataset.loader(rows=(0, 4))())
    variants = image_variants(normalise(batch.images), batch.seeds, VARIANTS, patch=dataset.vision.patch_size)
    want = np.clip(np.rint((np.asarray(variants) * STD + MEAN) * 255), 0, 255).astype(np.uint8)
    assert len(found) == 16
    for data, pixels in zip(found, want.reshape(16, *want.shape[2:]), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    assert len(set(found)) == 12  # a swapped picture is the clean one of another group
    shown = [int(number) for number in re.findall(r"<h3>Record (\d+)</h3>", page)]
    assert shown == batch.ids.tolist()


def test_no_token_and_no_prefix_becomes_markup(dataset, tmp_path, monkeypatch):
    """A vocabulary may have a token for "</" or for all of a tag; one of bytes, as in other tests, has none."""
    monkeypatch.setattr(Prompter, "read_answer", lambda self, ids: [HOSTILE] * 2)
    monkeypatch.setattr(Prompter, "read_prefix", lambda self, ids: HOSTILE)
    page = page_of(dataset, tmp_path, 1)
    tags, text = [], []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.handle_data = text.append
    parser.feed(page)
    assert "script" not in dict(tags)
    assert all(attributes["src"].startswith("data:image/png;base64,") for tag, attributes in tags if tag == "img")
    assert sum(tag == "img" for tag, _ in tags) == 4
    assert "".join(text).count(HOSTILE) == 1 + 2 * len(OBJECTIVE.cells)
    assert "default-src 'none'" in next(a["content"] for t, a in tags if t == "meta" and "http-equiv" in a)


def test_a_table_escapes_all_but_markup_and_puts_numbers_to_the_right():
    shown = table(("<b>", "n", "share"), [("<i>", None, 0.123), (Markup("<u>x</u>"), 1234, 1.0)])
    assert re.findall(r"<t[hd]( class=number)?>(.*?)</t[hd]>", shown) == [
        *[("", "&lt;b&gt;"), (" class=number", "n"), (" class=number", "share")],
        *[("", "&lt;i&gt;"), (" class=number", "-"), (" class=number", "12.3%")],
        *[("", "<u>x</u>"), (" class=number", "1,234"), (" class=number", "100.0%")],
    ]


def test_a_group_counts_its_prefix_once_for_each_image(dataset):
    summary, table = summarise(dataset), dataset.table
    totals = 4 * table.prefix_lengths + table.answer_lengths.sum(axis=1)
    assert summary["tokens"]["group"]["max"] == totals.max()
    assert summary["histogram"][0][0] == totals.min()
