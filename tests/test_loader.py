"""Batches: the right pixels and ids, the same ones again in any process, and everything on its way to the devices."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from loader_run import BATCH, dataset_of, digest
from PIL import Image
from transformers.models.clip import CLIPImageProcessorPil
from transformers.models.llava import LlavaImageProcessorPil

from napo_jax.data.images import normalise
from napo_jax.data.loader import Loader, on_devices, process_rows
from napo_jax.data.order import NO_GROUP
from napo_jax.data.records import DataError

ROWS = 47


def jpeg(number):
    """Returns a picture of a shape of its own."""
    random = np.random.default_rng(number)
    size = random.integers(20, 90, 2)
    data = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(data, "JPEG")
    return data.getvalue()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A parquet file of rows that tell their number."""
    random = np.random.default_rng(0)
    text = lambda: " ".join(random.choice(["one", "two", "three"], random.integers(1, 25)))
    columns = {"image": [jpeg(i) for i in range(ROWS)], "question": [f"Which row? {i}" for i in range(ROWS)]}
    columns |= {name: [text() for _ in range(ROWS)] for name in ("chosen", "rejected", "question_only", "image_only")}
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=10)
    return path


@pytest.fixture(scope="module")
def dataset(file):
    return dataset_of(file, file.parent / "cache")


def run(file, *numbers):
    """Runs the loader in a process of its own; returns {step: (digest, ids)}."""
    command = [sys.executable, Path(__file__).parent / "loader_run.py", file, file.parent / "cache", *map(str, numbers)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return {int(step): (bits, [int(i) for i in ids.split(",")]) for step, bits, ids in lines}


def test_a_batch_is_what_its_records_say(dataset):
    """T8 and T20: pixels bit-equal to the processor's, ids those of the texts, row by row."""
    processor = LlavaImageProcessorPil(
        do_pad=True,
        do_rescale=False,
        do_normalize=False,
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
    )
    seen = 0
    for batch in dataset.loader()(0, 5):
        for row, number in enumerate(batch.ids):
            record = dataset.records[int(number)]
            want = (
                processor(Image.open(io.BytesIO(record.image)), return_tensors="np").pixel_values[0].transpose(1, 2, 0)
            )
            np.testing.assert_array_equal(batch.images[row], want)
            prefix = dataset.prompter.prefix(record.question)
            assert batch.prefix_ids[row, : batch.prefix_lengths[row]].tolist() == prefix
            for cell, name in enumerate(dataset.table.rules.cells):
                answer = batch.answer_ids[row, cell, : batch.answer_lengths[row, cell]]
                assert answer.tolist() == dataset.prompter.answers([record.answers[name]])[0]
            seen += 1
        total = batch.prefix_lengths + batch.answer_lengths.sum(axis=1)
        assert total.max() <= batch.bucket.tokens
        assert batch.prefix_ids.shape[1] == batch.bucket.prefix
        assert batch.valid.all()
    assert seen == 5 * BATCH


def test_the_crop_rule_is_plain_clip(file):
    dataset = dataset_of(file, file.parent / "cache", image_rule="crop")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    batch = next(iter(dataset.loader()()))
    for row, number in enumerate(batch.ids):
        image = Image.open(io.BytesIO(dataset.records[int(number)].image))
        want = processor(image, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
        np.testing.assert_allclose(normalise(batch.images)[row], want, atol=1e-6)


def test_an_epoch_is_every_row_once(dataset):
    order = dataset.order()
    numbers = np.concatenate([batch.ids for batch in dataset.loader()(0, order.steps_per_epoch)])
    assert len(numbers) == len(set(numbers.tolist())) == ROWS // BATCH * BATCH
    rest = dataset.order(shuffle=False, keep_rest=True)
    batches = list(dataset.loader(rest)(0, rest.steps_per_epoch))
    numbers = np.concatenate([batch.ids[batch.valid] for batch in batches])
    assert sorted(numbers.tolist()) == list(range(ROWS))
    filling = ~batches[-1].valid
    assert filling.sum() == rest.steps_per_epoch * BATCH - ROWS
    assert not batches[-1].images[filling].any()
    assert (batches[-1].answer_lengths[filling] == 0).all()
    assert (batches[-1].ids[filling] == NO_GROUP).all()


@pytest.fixture(scope="module")
def straight(file):
    """What a process prints that runs from the first step on."""
    return run(file, 0, 60, 0, 1, 0)


def test_a_new_process_goes_on_with_the_same_bits(file, straight):
    """T18: the next 50 batches, over several epochs, whether they are decoded in threads or in worker processes."""
    resumed = run(file, 10, 60, 0, 1, 0)
    assert len(resumed) == 50
    assert all(resumed[step] == straight[step] for step in range(10, 60))
    in_workers = run(file, 10, 20, 0, 1, 2)
    assert all(in_workers[step] == straight[step] for step in range(10, 20))
    assert len({bits for bits, _ in straight.values()}) == 60


def test_two_processes_share_the_records_of_each_step(file, straight):
    """The same set of records a step as one process has, each in one place only."""
    halves = [run(file, 10, 16, process, 2, 0) for process in (0, 1)]
    for step in range(10, 16):
        assert straight[step][1] == halves[0][step][1] + halves[1][step][1]


def test_the_position_is_saved_and_set(dataset):
    loader = dataset.loader()
    batches = loader()
    for _ in range(9):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    want = [digest(next(batches)) for _ in range(4)]
    other = loader()
    next(other)
    other.set_state(state)
    assert other.step == 9
    assert [digest(next(other)) for _ in range(4)] == want
    for change in ({"seed": 1}, {"seed": 0, "order": dataset.order(batch_size=3), "rows": (0, 3)}):
        with pytest.raises(ValueError, match="saved position is of other data or settings"):
            dataset.loader(**change)().set_state(state)
    shares = dataset.loader(rows=(0, 3))()
    shares.set_state(state)  # another number of processes is the same data
    assert next(shares).ids.tolist() == next(iter(loader(9))).ids[:3].tolist()


def test_a_position_is_of_the_same_texts_pixels_and_shapes(file, dataset, tmp_path):
    """What changes batches and not the order of groups is another run too."""
    state = dataset.loader()().get_state()
    table = pq.read_table(file)
    question = pa.array([text.replace("row", "one") for text in table["question"].to_pylist()])  # of equal lengths
    pq.write_table(table.set_column(1, "question", question), tmp_path / "rows.parquet")
    cache = file.parent / "cache"
    others = [dataset_of(tmp_path / "rows.parquet", tmp_path / "cache")]
    changes = ({"image_rule": "crop"}, {"exif": True}, {"attention_multiple": 16})
    others += [dataset_of(file, cache, **change) for change in changes]
    for other in others:
        assert other.order().fingerprint == dataset.order().fingerprint
        with pytest.raises(ValueError, match="saved position is of other data or settings"):
            other.loader()().set_state(state)


@pytest.mark.parametrize("exif", [False, True])
def test_pictures_are_turned_if_asked(tmp_path, exif):
    """A camera's note says that the left half, black, is to be the upper one."""
    half, note, data = Image.new("RGB", (40, 40), "white"), Image.Exif(), io.BytesIO()
    half.paste("black", (0, 0, 20, 40))
    note[0x0112] = 6
    half.save(data, "PNG", exif=note)
    names = ("question", "chosen", "rejected", "question_only", "image_only")
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": [data.getvalue()] * BATCH} | {name: ["a"] * BATCH for name in names}), path)
    batch = next(dataset_of(path, tmp_path / "cache", exif=exif).loader()())
    corner = batch.images[0][2:-2, 2:-2]
    assert (corner[0, -1] == (0 if exif else 255)).all()
    assert (corner[-1, 0] == (255 if exif else 0)).all()


def test_the_records_own_seed_stays(dataset):
    """What is random about a record is the same in every epoch, and other with another seed of the run."""

    def seeds(loader, epoch):
        steps = dataset.order().steps_per_epoch
        return {
            n: s
            for batch in loader(epoch * steps, (epoch + 1) * steps)
            for n, s in zip(batch.ids, batch.seeds, strict=True)
        }

    loader = dataset.loader()
    first, second, other = seeds(loader, 0), seeds(loader, 1), seeds(dataset.loader(seed=1), 0)
    both = set(first) & set(second)
    assert len(both) > 30
    assert all(first[n] == second[n] for n in both)
    assert len(set(first.values())) == len(first)
    assert not any(first[n] == other[n] for n in set(first) & set(other))


def test_worker_processes_get_a_small_pickle(dataset):
    assert len(pickle.dumps(dataset.loader()._steps)) < 200_000


def test_batches_are_spread_over_devices(dataset):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:3]), ("data",))
    place = NamedSharding(mesh, PartitionSpec("data"))
    loader = dataset.loader()
    plain, spread = list(loader(0, 7)), list(on_devices(loader(0, 7), place))
    assert [batch.bucket for batch in plain] == [batch.bucket for batch in spread]
    for one, other in zip(plain, spread, strict=True):
        assert other.images.sharding == place
        assert digest(one) == digest(jax.tree.map(np.asarray, other))


def test_a_few_batches_are_on_their_way(dataset):
    """The devices never wait for what could have been sent: two batches more than were used have been read."""
    read = []

    def watched():
        for batch in dataset.loader()(0, 6):
            read.append(batch)
            yield batch

    batches = on_devices(watched())
    next(batches)
    assert len(read) == 3
    assert len(list(batches)) == 5


def test_a_run_that_is_past_its_end_has_no_batch_left(dataset):
    batches = dataset.loader()(7, 5)
    assert list(batches) == []


def test_a_batch_axis_that_processes_share_is_refused(dataset, monkeypatch):
    """Each process has rows of its own; a sharding that gives two of them the same rows would mix them in silence."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="not split over all 2 processes"):
        next(on_devices(dataset.loader(rows=(0, 6))(0, 1), NamedSharding(mesh, PartitionSpec("data"))))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_divide_a_batch_among_them(monkeypatch, count):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    shares = []
    for index in range(count):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shares += range(*process_rows(6))
    assert shares == list(range(6))


def test_a_batch_that_does_not_divide_is_refused(monkeypatch, dataset):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="a batch of 6 groups does not divide among 4 processes"):
        Loader(dataset.records, dataset.table, dataset.buckets, dataset.order(), None)


def test_a_picture_that_has_gone_stops_the_run_with_its_name(dataset, monkeypatch):
    """All pictures were read once when the records were made: a bad one now is a fault of the disk, not of the data."""
    loader = dataset.loader(threads=1)
    monkeypatch.setattr(type(dataset.records), "image", lambda self, number: b"gone")
    with pytest.raises(DataError, match=r"the picture of record \d+ has changed or its disk fails"):
        next(loader())
