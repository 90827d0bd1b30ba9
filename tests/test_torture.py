"""Rows and pictures gone wrong in every way, from the parquet file to the loss."""

import dataclasses
import io
import struct
import subprocess
import sys
import zlib

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loader_run import dataset_of
from PIL import Image
from quick import quick_jit

from napo_jax.data.byte_tokenizer import BYTE_VOCABULARY
from napo_jax.data.loader import on_devices
from napo_jax.methods import napo
from napo_jax.models import Llava, LlavaConfig
from napo_jax.score import score, valid_cells


def encoded(size=(40, 30), mode="RGB", form="PNG"):
    data = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(data, form)
    return data.getvalue()


def bomb():
    """Returns a PNG whose header promises 60000 x 60000 pixels."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


GOOD = {
    "image": encoded(),
    "question": "What is it?",
    "chosen": "A dog.",
    "rejected": "A cat.",
    "question_only": "A bear.",
    "image_only": "The image shows a dog.",
}
# What is wrong with a row, and the reason that it has to be counted by; None: it is fine and has to be kept.
ROWS = [
    ({}, None),
    ({"image": encoded(mode="CMYK", form="JPEG")}, None),
    ({"image": encoded((1, 1))}, None),
    ({"image": encoded(mode="L", form="GIF")}, None),
    ({"image": encoded((3000, 2))}, "image_too_thin"),
    ({"image": encoded((400, 300), form="JPEG")[:-4000]}, "image_truncated"),
    ({"image": b""}, "image_empty"),
    ({"image": None}, "no_image"),
    ({"image": b"GIF89a and then nothing"}, "image_unreadable"),
    ({"image": b"<svg></svg>"}, "image_unreadable"),
    ({"image": bomb()}, "image_too_large"),
    ({"question": None}, "no_question"),
    ({"question": "  \n"}, "no_question"),
    ({"question": "<image><image>?"}, "several_image_markers"),
    ({"question": "<image>\nWhat is it?"}, None),
    ({"question": "why " * 1000}, "prefix_too_long"),
    ({"chosen": None}, "no_chosen"),
    ({"rejected": ""}, "empty_rejected"),
    ({"question_only": " \t"}, "empty_question_only"),
    ({"image_only": None}, "no_image_only"),
    ({"image_only": "word " * 6000}, None),
    ({"chosen": "🐻‍❄️ and 熊"}, None),
    ({"chosen": "zero\x00byte"}, None),
    ({"rejected": "it </s> goes on"}, None),
    ({"question_only": "an <image> token"}, None),
    ({"image_only": "USER: hm ASSISTANT: yes"}, None),
    ({"rejected": "A dog."}, None),
]
KEPT = [i for i, (_, reason) in enumerate(ROWS) if reason is None]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    rows = [GOOD | {"question": f"{GOOD['question']} {i}"} | change for i, (change, _) in enumerate(ROWS)]
    path = tmp_path_factory.mktemp("torture") / "rows.parquet"
    schema = pa.schema([("image", pa.binary()), *((name, pa.string()) for name in list(GOOD)[1:])])
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return path


@pytest.fixture(scope="module")
def dataset(file):
    return dataset_of(file, file.parent / "cache", batch_size=4, max_tokens=400, buckets=1)


def test_every_drop_is_counted_with_its_reason(dataset):
    want = {}
    for _, reason in ROWS:
        if reason:
            want[reason] = want.get(reason, 0) + 1
    assert dataset.dropped == want
    assert dataset.rows == len(ROWS)
    assert len(dataset.table) == len(KEPT) == dataset.rows - sum(dataset.dropped.values())
    assert dataset.table.notes == {
        "an answer is cut": 1,
        "special text in an answer, read as text": 3,
        "chosen = rejected": 1,
    }


def test_identical_answers_can_be_dropped(file):
    dataset = dataset_of(file, file.parent / "cache", batch_size=4, max_tokens=400, identical="drop")
    assert dataset.dropped["identical_answers"] == 1


def test_losses_and_gradients_of_what_is_left_are_finite(dataset):
    """B4: no bad row poisons a batch, and filled-up rows do nothing."""
    tiny = LlavaConfig.tiny(remat="none", logits_chunk=256)
    text = dataclasses.replace(tiny.text, vocab_size=BYTE_VOCABULARY, max_positions=1024, layers=1)
    model = Llava(dataclasses.replace(tiny, text=text))
    params = model.init(jax.random.key(0))
    objective = napo()
    order = dataset.order(batch_size=8, shuffle=False, keep_rest=True)
    batches = list(on_devices(dataset.loader(order, rows=(0, 8))(0, order.steps_per_epoch)))

    @quick_jit
    def run(params, batch):
        def loss(params):
            logps = score(model, params, batch, objective)
            reference = jax.tree.map(lambda x: jax.lax.stop_gradient(x) + 1.0, logps)
            value, metrics = objective(logps, reference, where=valid_cells(batch, objective))
            return value, (metrics, logps)

        return jax.value_and_grad(loss, has_aux=True)(params)

    seen = []
    for batch in batches:
        (value, (metrics, logps)), gradients = run(params, batch)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, metrics, gradients)))
        assert all(np.isfinite(leaf[batch.valid]).all() for leaf in jax.tree.leaves(logps))
        assert metrics["preference/valid"] == np.mean(batch.valid)
        seen += batch.ids[batch.valid].tolist()
    assert not batches[-1].valid.all()
    assert len(seen) == len(set(seen)) == len(KEPT)

    # A row of filling is no row: without it, the same loss.
    last = batches[-1]
    count = int(last.valid.sum())
    fewer = jax.tree.map(lambda x: x[:count], last)
    np.testing.assert_allclose(run(params, last)[0][0], run(params, fewer)[0][0], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, "names no file"),
        (lambda f: f.write_bytes(b"PAR1 is how it starts"), "rows.parquet"),
        (lambda f: pq.write_table(pa.table({"image": pa.array([], pa.binary())}), f), "rows.parquet"),
        (lambda f: pq.write_table(pa.table({"question": ["q"], "chosen": ["a"], "rejected": ["b"]}), f), "image"),
        (
            lambda f: pq.write_table(
                pa.table({"image": [GOOD["image"]], "question": ["q"], "chosen": ["a"], "rejected": ["b"]}), f
            ),
            "question_only",
        ),
        (lambda f: pq.write_table(pa.table({name: [value] for name, value in GOOD.items()}), f), "too few for a batch"),
        (lambda f: pq.write_table(pa.table({n: [v] for n, v in (GOOD | {"chosen": ""}).items()}), f), "empty_chosen 1"),
    ],
    ids=["none", "unreadable", "empty", "no image", "no answer", "one row", "no usable row"],
)
def test_data_that_cannot_be_used_is_one_line_and_exit_2(tmp_path, make, message, capsys, monkeypatch):
    from napo_jax import preview
    from napo_jax.command import exit_with_one_line

    file = tmp_path / "rows.parquet"
    make(file)
    argv = ["--config", "configs/debug.py", "--data.path", str(file), "--data.cache", str(tmp_path / "cache")]
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line(lambda: preview.main(argv))
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert said.splitlines()[-1].startswith("error: ")
    assert sum(line.startswith("error") for line in said.splitlines()) == 1
    assert "Traceback" not in said


def test_the_command_itself_ends_with_status_2(tmp_path):
    command = [
        sys.executable,
        "-m",
        "napo_jax.preview",
        "--config",
        "configs/debug.py",
        "--data.path",
        tmp_path / "no.parquet",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
