"""The reference's log-probs: the right ones for each row, computed once, and never those of something else."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from loader_run import dataset_of
from quick import quick_jit
from reference_run import BATCH, PIECE, ROWS, WEIGHTS, open_quickly, quick_score, values_of
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from napo_jax import reference, reference_cache, scorer
from napo_jax.data.byte_tokenizer import BYTE_VOCABULARY, byte_tokenizer
from napo_jax.data.dataset import open_dataset
from napo_jax.data.loader import Pictures
from napo_jax.data.made_up import MadeUpRecords
from napo_jax.data.order import NO_GROUP
from napo_jax.losses import dpo_loss, simpo_loss
from napo_jax.methods import napo
from napo_jax.models import Llava, LlavaConfig
from napo_jax.objective import Objective
from napo_jax.reference import open_reference
from napo_jax.reference_cache import Pieces, cache_settings, weights_digest
from napo_jax.score import score, valid_cells
from napo_jax.sharding import MeshConfig, make_mesh, shard_params
from napo_jax.term import Term


@pytest.fixture
def quick(monkeypatch):
    """Puts `quick_score` in the model's place, and makes pieces small."""
    monkeypatch.setattr(scorer, "score", quick_score)
    monkeypatch.setattr(reference, "PIECE_ROWS", PIECE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def dataset(folder):
    """What `reference_run.py` opens too."""
    return dataset_of(None, folder, made_up=ROWS, batch_size=BATCH, buckets=1)


@pytest.fixture(scope="module")
def straight(dataset, tmp_path_factory):
    """The values of a call that nothing interrupts."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(scorer, "score", quick_score)
        return values_of(open_quickly(tmp_path_factory.mktemp("straight"), dataset), dataset)


def write_rows(path, rows, **changes):
    """Writes a parquet file of (picture, number) rows; `changes` are {number: another chosen answer}."""
    columns = {
        "image": [MadeUpRecords(100).image(picture) for picture, _ in rows],
        "question": [f"Which row? {number}" for _, number in rows],
        "chosen": [changes.get(f"row{number}", f"The {'very ' * (number % 5)}first.") for _, number in rows],
        "rejected": [f"The {'other ' * (number % 3)}one {number}." for _, number in rows],
        "question_only": [f"It is {number}." for _, number in rows],
        "image_only": ["A picture." for _ in rows],
    }
    pq.write_table(pa.table(columns), path)
    return path


# With the model: the values are those of `score`.


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A tiny model, its cache filled in batches of 8 and opened again, and the same rows in other batches."""
    folder = tmp_path_factory.mktemp("real")
    tiny = LlavaConfig.tiny()
    config = dataclasses.replace(
        tiny, text=dataclasses.replace(tiny.text, vocab_size=BYTE_VOCABULARY, max_positions=1024)
    )
    model = Llava(config)
    random = np.random.default_rng(0)
    # Wide, so that rows differ by more than rounding does; and drawn here, which compiles nothing.
    draw = lambda path, x: jnp.asarray(random.normal("scale" in str(path), 0.1, x.shape), x.dtype)
    params = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))
    dataset = dataset_of(None, folder, made_up=21, batch_size=8, buckets=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(jax, "jit", quick_jit)
        first = open_reference(folder, dataset, napo(), model, params)
        again = open_reference(folder, dataset, napo(), model, params)
    other = dataset_of(None, folder, made_up=21, batch_size=5, buckets=1, attention_multiple=128)
    assert other.buckets[0] not in dataset.buckets
    scored = quick_jit(lambda batch: score(model, params, batch, napo()))
    batches = [(batch, scored(batch)) for batch in other.loader()(0, other.order().steps_per_epoch)]
    return first, again, batches


def test_t6_cached_values_are_those_of_score_in_other_batches_and_buckets(real):
    first, again, batches = real
    assert first.deviation is None
    assert 0 <= again.deviation < 1e-5
    spread = []
    for cache in (first, again):
        for batch, online in batches:
            attached = cache.attach(batch).reference
            assert set(attached) == set(online)
            for cell, logps in attached.items():
                np.testing.assert_allclose(logps.sum, online[cell].sum, rtol=1e-5)
                np.testing.assert_allclose(logps.mean, online[cell].mean, rtol=1e-5)
                spread.extend(logps.mean)
    assert np.std(spread) > 0.05  # far from what the tolerance lets pass


def test_t4_with_policy_equal_to_reference_nothing_is_preferred_also_after_a_resume(real):
    first, again, batches = real
    batch, policy = batches[0]
    for cache in (first, again):
        attached = cache.attach(batch).reference
        loss, metrics = napo()(policy, attached, where=valid_cells(batch, napo()))
        for name in ("preference", "language_bias", "vision_bias"):
            assert abs(metrics[f"{name}/chosen_reward"]) < 1e-5
            assert abs(metrics[f"{name}/rejected_reward"]) < 1e-5
            q = float(metrics[f"{name}/q"])
            closed = (1 - 2**-q) / q if q else math.log(2)
            assert float(metrics[f"{name}/loss"]) == pytest.approx(closed, abs=1e-5)
        assert float(metrics["preference/loss"]) == pytest.approx(math.log(2), abs=1e-5)
        # The rows of another batch would be seen.
        rolled = jax.tree.map(lambda x: np.roll(x, 1), attached)
        _, wrong = napo()(policy, rolled, where=valid_cells(batch, napo()))
        assert abs(float(wrong["preference/loss"]) - math.log(2)) > 1e-3
        assert np.isfinite(loss)


# T19: rows find their values by their record, on any number of devices and processes.


def by_hand(dataset, weights):
    """Returns what `quick_score` must give each record, computed from the dataset's parts."""
    table, pictures = dataset.table, Pictures(dataset.vision.image_size)
    values = {}
    for group, number in enumerate(table.records):
        prefix, answers = table.tokens(group)
        pixels = int(pictures(dataset.records.image(int(number))).astype(np.int64).sum()) % 1009
        sums = [
            -float((np.arange(1, len(ids) + 1) * ids).sum() + prefix.sum() + pixels) * weights
            for ids in (answers[name] for name in ("chosen", "rejected", "question_only", "image_only"))
        ]
        values[int(number)] = [(total, total / len(ids)) for total, ids in zip(sums, answers.values(), strict=True)]
    return values


def test_each_row_has_its_own_values_and_filling_has_zeros(dataset, straight):
    want = by_hand(dataset, WEIGHTS.sum())
    assert sorted(straight) == [NO_GROUP, *range(ROWS)]
    assert straight[NO_GROUP] == [(0, 0)] * 4
    for number, values in want.items():
        np.testing.assert_allclose(straight[number], values, rtol=1e-6)
    assert len({tuple(values) for values in straight.values()}) == ROWS + 1


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_t19_seven_rows_on_a_few_devices(devices, folder, tmp_path, quick):
    dataset = dataset_of(None, folder, made_up=7, batch_size=8, buckets=2)
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    params = {"weights": jax.device_put(WEIGHTS, NamedSharding(mesh, PartitionSpec("fsdp")))}
    values = values_of(open_quickly(tmp_path, dataset, mesh=mesh, params=params), dataset)
    want = by_hand(dataset, WEIGHTS.sum())
    assert len(want) == 7
    for number, row in want.items():
        np.testing.assert_allclose(values[number], row, rtol=1e-6)
    # One cache for all meshes: what eight devices wrote, one takes.
    done = []
    assert values_of(open_quickly(tmp_path, dataset, progress=done.append), dataset) == values
    assert done == []


def start(*arguments):
    command = [sys.executable, Path(__file__).parent / "reference_run.py", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )


def result(process):
    """Returns the JSON that a process printed last."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-2000:]
    return json.loads(out.splitlines()[-1])


def test_t19_two_processes_share_the_work_and_not_a_disk(straight, tmp_path):
    """Their devices lie interleaved in the mesh, so that a batch comes back in another order than it was loaded."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    processes = [start(tmp_path, i, 2, port, 0) for i in (0, 1)]
    try:
        outcomes = [result(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    values = json.loads(json.dumps(sorted(straight.items())))
    for outcome in outcomes:
        assert outcome["batches"] == [-(-ROWS // BATCH), 0]  # the second time, none
        assert outcome["deviations"] == [None, 0]
        assert outcome["values"] == [values, values]
    assert len(list(tmp_path.glob("reference0/*/*.parquet"))) == -(-ROWS // PIECE)
    assert not list(tmp_path.glob("reference1/*/*"))


def test_a_row_that_is_there_twice(folder, tmp_path, quick):
    rows = [(i, i) for i in (0, 1, 2, 3, 1, 4, 1)]
    dataset = dataset_of(write_rows(folder / "twice.parquet", rows), folder, batch_size=2, buckets=2)
    assert len(set(dataset.table.keys)) == 5
    for _ in range(2):  # as computed, and as read
        values = values_of(open_quickly(tmp_path, dataset), dataset)
        assert values[1] == values[4] == values[6]
        np.testing.assert_allclose(values[6], by_hand(dataset, WEIGHTS.sum())[6], rtol=1e-6)
        assert len({tuple(row) for row in values.values()}) == 6
    files = list(tmp_path.glob("*/*.parquet"))
    assert sum(pq.read_metadata(file).num_rows for file in files) == 5


# T5 and B6: a value is of one model, one prompt, one picture.


def test_t5_b6_every_ingredient_has_its_own_folder(folder):
    """The folder changes with everything that decides a value, and with nothing else."""
    tiny = LlavaConfig.tiny()
    text = dataclasses.replace(tiny.text, vocab_size=2 * BYTE_VOCABULARY, max_positions=1024)
    tiny = dataclasses.replace(tiny, text=text)
    rows = [(i, i) for i in range(4)]
    file = write_rows(folder / "rows.parquet", rows)
    params = {"a": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "b": jnp.ones(3, jnp.float32)}
    weights = weights_digest(params)
    crop = Objective((Term("image", dpo_loss, "chosen", "chosen@crop"),))
    black = Objective((Term("image", dpo_loss, "chosen", "chosen@black"),))
    spelling = byte_tokenizer().backend_tokenizer.to_str().replace('"a":', '"?":').replace('"b":', '"a":')
    other = Tokenizer.from_str(spelling.replace('"?":', '"b":'))
    other = PreTrainedTokenizerFast(tokenizer_object=other, bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    def folder_of(file=file, config=tiny, objective=None, tokenizer=None, model=None, weights=weights, **options):
        base = dataset_of(None, folder, made_up=1).config
        paths = {"path": (str(file),), "cache": str(folder), "buckets": 2}
        data = dataclasses.replace(base, **(paths | options))
        objective = objective or napo()
        dataset = open_dataset(data, objective, tokenizer or byte_tokenizer(), config)
        settings = cache_settings(dataset, objective, model or config, weights)
        return Pieces(folder, settings, objective.reference_cells).folder

    def changed(leaf, value):
        return weights_digest(params | {leaf: value})

    wider_vision = dataclasses.replace(tiny, vision=dataclasses.replace(tiny.vision, image_size=40))
    other_theta = dataclasses.replace(tiny, text=dataclasses.replace(text, rope_theta=5000.0))
    other_eps = dataclasses.replace(tiny, vision=dataclasses.replace(tiny.vision, norm_eps=1e-6))
    reweighted = Objective(tuple(dataclasses.replace(term, weight=1.0) for term in napo().terms))
    folders = {
        "as it is": folder_of(),
        "a weight": folder_of(weights=changed("b", params["b"].at[1].set(1.0000001))),
        "places of weights": folder_of(weights=changed("a", params["a"][:, ::-1])),
        "shape of weights": folder_of(weights=changed("a", params["a"].reshape(3, 2))),
        "type of weights": folder_of(weights=changed("b", params["b"].astype(jnp.bfloat16))),
        "tokenizer": folder_of(tokenizer=other),
        "template": folder_of(template="vicuna_v1"),
        "picture size and image tokens": folder_of(config=wider_vision),
        "picture rule": folder_of(image_rule="crop"),
        "exif": folder_of(exif=True),
        "dtype": folder_of(model=dataclasses.replace(tiny, dtype=jnp.bfloat16)),
        "rope": folder_of(model=other_theta),
        "norm": folder_of(model=other_eps),
        "max tokens": folder_of(max_tokens=1000),
        "long answers": folder_of(long_answers="drop"),
        "a text": folder_of(file=write_rows(folder / "text.parquet", rows, row2="Another.")),
        "a picture": folder_of(file=write_rows(folder / "picture.parquet", [(9, 0), *rows[1:]])),
        "a row less": folder_of(file=write_rows(folder / "less.parquet", rows[:3])),
        "order of rows": folder_of(file=write_rows(folder / "reversed.parquet", rows[::-1])),
        "cells": folder_of(objective=Objective(napo().terms[:2])),
        "an image variant": folder_of(objective=crop),
        "another image variant": folder_of(objective=black),
        "seed of what is drawn": folder_of(objective=crop, seed=1),
    }
    assert [name for name in folders if list(folders.values()).count(folders[name]) > 1] == []
    for same in (
        {"batch_size": 2, "buckets": 1, "attention_multiple": 16, "workers": 1, "seed": 3},  # nothing is drawn
        {"model": dataclasses.replace(tiny, attention="xla", remat="none", logits_chunk=8, freeze_vision=False)},
        {"objective": reweighted},
        {"weights": weights_digest(jax.tree.map(np.asarray, params))},
    ):
        assert folder_of(**same) == folders["as it is"], same
    assert folder_of(objective=black, seed=1) == folders["another image variant"]


def test_t5_rows_in_another_order_keep_their_values(folder, tmp_path, quick):
    rows = [(i, i) for i in range(9)]
    forth = dataset_of(write_rows(folder / "forth.parquet", rows), folder, batch_size=2, buckets=2)
    back = dataset_of(write_rows(folder / "back.parquet", rows[::-1]), folder, batch_size=2, buckets=2)
    one, other = (values_of(open_quickly(tmp_path, dataset), dataset) for dataset in (forth, back))
    assert len(list(tmp_path.iterdir())) == 2
    assert {8 - number: row for number, row in other.items() if number != NO_GROUP} == {
        number: row for number, row in one.items() if number != NO_GROUP
    }
    assert one != other


def test_b6_a_piece_of_another_cache_is_refused(dataset, tmp_path, quick):
    mine = open_quickly(tmp_path, dataset)
    other = open_quickly(tmp_path, dataset, params={"weights": WEIGHTS * 2})
    assert mine.folder != other.folder
    piece = sorted(other.folder.glob("*.parquet"))[0]
    piece.copy(mine.folder / "copied.parquet")
    with pytest.raises(ValueError, match=r"copied\.parquet holds values of other settings .* delete it"):
        open_quickly(tmp_path, dataset)
    (mine.folder / "copied.parquet").write_bytes(piece.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"copied\.parquet is damaged .* delete it"):
        open_quickly(tmp_path, dataset)


def move(folder, column, step):
    """Adds to a column of all pieces."""
    for piece in folder.glob("*.parquet"):
        table = pq.read_table(piece)
        moved = pa.array(table[column].to_numpy() + np.float32(step))
        pq.write_table(table.set_column(table.column_names.index(column), column, moved), piece)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_t5_values_that_are_not_the_models_are_found_on_opening(dtype, tolerance, kind, dataset, tmp_path, quick):
    # Values of the size that log-probs have, where float32 tells such a difference.
    options = {"params": {"weights": WEIGHTS * np.float32(2**-22)}}
    options["model"] = Llava(LlavaConfig.tiny(dtype=jnp.dtype(dtype)))
    cache = open_quickly(tmp_path, dataset, **options)
    assert open_quickly(tmp_path, dataset, **options).deviation == 0
    next(cache.folder.glob("*.parquet")).unlink()  # a partial cache is looked at too, before it is completed
    tokens = {1} if kind == "mean" else {len(dataset.table.tokens(group)[1]["rejected"]) for group in range(ROWS)}
    move(cache.folder, f"rejected/{kind}", 2 * tolerance * max(tokens))
    with pytest.raises(ValueError, match=rf"another reference: rejected of record \d+ has the {kind}") as error:
        open_quickly(tmp_path, dataset, **options)
    assert "\n" not in str(error.value)
    move(cache.folder, f"rejected/{kind}", 0.8 * tolerance * min(tokens) - 2 * tolerance * max(tokens))
    assert 0 < open_quickly(tmp_path, dataset, **options).deviation < tolerance


def test_a_batch_of_other_data_is_refused(dataset, folder, tmp_path, quick):
    cache = open_quickly(tmp_path, dataset)
    for strange in (
        dataset_of(None, folder, made_up=ROWS, batch_size=BATCH, seed=1),
        dataset_of(None, folder, made_up=ROWS + 5, batch_size=ROWS + 5, seed=1),
    ):
        batch = next(strange.loader()())
        with pytest.raises(ValueError, match=r"record \d+ of a batch is not the one whose reference is in"):
            cache.attach(batch)


def test_weights_are_digested_where_they_lie():
    shapes = {"language/head": (64, 96), "language/layers/mlp/down/kernel": (3, 32, 64), "vision/patch/kernel": (12, 8)}
    random = np.random.default_rng(0)
    params = {path: jnp.asarray(random.normal(size=shape), jnp.bfloat16) for path, shape in shapes.items()}
    want = weights_digest(params)
    for sizes in ((1, 8, 1), (2, 2, 2)):
        mesh = make_mesh(MeshConfig(*sizes))
        shardings, _ = shard_params(params, mesh)
        spread = {path: jax.device_put(leaf, shardings[path]) for path, leaf in params.items()}
        assert weights_digest(spread, mesh) == want
    nested = {"vision": {"patch": {"kernel": params["vision/patch/kernel"]}}}
    assert weights_digest(nested) == weights_digest({"vision/patch/kernel": params["vision/patch/kernel"]})
    bits = np.asarray(params["language/head"]).view(np.uint16)
    digests = {want}
    for row, column, bit in random.integers([0, 0, 0], [64, 96, 16], (4, 3)):
        flipped = bits.copy()
        flipped[row, column] ^= 1 << bit
        digests.add(weights_digest(params | {"language/head": flipped.view(jnp.bfloat16)}))
    swapped = bits.copy()
    swapped[[3, 40]] = swapped[[40, 3]]
    digests.add(weights_digest(params | {"language/head": swapped.view(jnp.bfloat16)}))
    assert len(digests) == 6


def test_the_digest_needs_no_memory():
    leaf = jax.ShapeDtypeStruct((4, 512, 512), jnp.bfloat16)
    memory = jax.jit(reference_cache._hash_sums).lower(leaf).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 10_000


# What is computed stays, whatever happens.


@pytest.mark.parametrize("moment", ["while it writes", "between writes"])
def test_t5_a_call_that_dies_goes_on_where_it_stopped(moment, dataset, straight, tmp_path, quick, monkeypatch):
    """Dies again and again, each time one piece or batch later."""
    write, kept = pq.write_table, 0
    for count in range(1, 4):
        done = []

        def half(table, file, count=count):
            if len(list(tmp_path.glob("*/*.parquet"))) == count:
                file.write(b"PAR1 and no more")
                raise KeyboardInterrupt
            write(table, file)

        def progress(now, count=count, done=done):
            done.append(now.done)
            if moment == "between writes" and len(done) == 1 + count:
                raise KeyboardInterrupt

        if moment == "while it writes":
            monkeypatch.setattr(reference_cache.pq, "write_table", half)
        with pytest.raises(KeyboardInterrupt):
            open_quickly(tmp_path, dataset, progress=progress)
        monkeypatch.setattr(reference_cache.pq, "write_table", write)
        stored = sum(pq.read_metadata(file).num_rows for file in tmp_path.glob("*/*.parquet"))
        assert stored % PIECE == 0
        assert done[0] <= kept + BATCH  # nothing that was there was computed again, but for the rest of its batch
        assert max(kept, done[-1] - PIECE - BATCH) <= stored
        kept = stored
    assert 0 < kept < ROWS
    cache = open_quickly(tmp_path, dataset)
    assert cache.deviation == 0
    assert values_of(cache, dataset) == straight
    assert values_of(open_quickly(tmp_path, dataset), dataset) == straight


def test_t5_a_process_that_is_killed_loses_one_piece_at_most(dataset, straight, tmp_path, quick):
    root, kept = tmp_path / "reference0", 0
    for wait in np.random.default_rng().uniform(0, 0.5, 2):
        process = start(tmp_path, 0, 1, 0, 0.3)
        deadline = time.monotonic() + 60
        while len(list(root.glob("*/*.parquet"))) == kept and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(wait)
        process.kill()
        _, error = process.communicate()
        pieces = [len(pq.read_table(file)) for file in root.glob("*/*.parquet")]
        assert len(pieces) > kept, (wait, error[-2000:])
        assert sum(rows != PIECE for rows in pieces) <= 1  # the last one, had this machine let it finish
        kept = len(pieces)
    done = []
    assert values_of(open_quickly(root, dataset, progress=done.append), dataset) == straight
    assert kept == -(-ROWS // PIECE) or done[0].done <= kept * PIECE + BATCH


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_value_that_is_no_number_is_never_written(bad, dataset, tmp_path, quick, monkeypatch):
    order = dataset.order(shuffle=False, keep_rest=True)
    number = int(dataset.table.records[order[5][1][2]])

    def score_with_one_bad(model, params, batch, objective, **options):
        logps = quick_score(model, params, batch, objective, **options)
        rejected = logps["rejected"]
        return logps | {"rejected": rejected._replace(mean=jnp.where(batch.ids == number, bad, rejected.mean))}

    monkeypatch.setattr(scorer, "score", score_with_one_bad)
    with pytest.raises(ValueError, match=rf"the reference gives rejected of record {number} the mean log-prob {bad}:"):
        open_quickly(tmp_path, dataset)
    pieces = [pq.read_table(file) for file in tmp_path.glob("*/*.parquet")]
    assert sum(map(len, pieces)) == 5 * BATCH // PIECE * PIECE
    assert all(np.isfinite(piece["rejected/mean"].to_numpy()).all() for piece in pieces)


def test_progress_tells_rates_and_what_is_left_by_tokens(folder, tmp_path, quick, monkeypatch):
    dataset = dataset_of(None, folder, made_up=ROWS, batch_size=BATCH, buckets=2)
    clock = iter(range(100, 10_000, 2))
    monkeypatch.setattr(reference, "time", type("Clock", (), {"monotonic": staticmethod(lambda: next(clock))}))
    seen = []
    open_quickly(tmp_path, dataset, progress=seen.append)
    assert [now.done for now in seen] == [*range(BATCH, ROWS, BATCH), ROWS]
    assert all(now.total == ROWS for now in seen)
    assert [now.rows_per_second for now in seen[:2]] == [2, 2]
    assert seen[-1].rows_per_second == ROWS / 20
    order = dataset.order(shuffle=False, keep_rest=True)
    tokens = [dataset.buckets[order[step][0]].tokens for step in range(10)]
    assert len(set(tokens)) == 2
    assert seen[2].seconds_left == pytest.approx(6 / sum(tokens[:3]) * sum(tokens[3:]))
    assert seen[-1].seconds_left == 0
    assert str(seen[0]._replace(seconds_left=3725.4)) == f"reference: 4 of {ROWS} rows, 2.0 rows/s, 1:02:05 left"


# What cannot be cached is said in one line.


def test_what_cannot_be_done_is_refused(dataset, tmp_path, quick, monkeypatch):
    swap = Objective((Term("image", dpo_loss, "chosen", "chosen@swap"),))
    with pytest.raises(ValueError, match=r"the picture of chosen@swap changes with the rest of its batch.* live"):
        open_quickly(tmp_path, dataset, objective=swap)
    simpo = Objective((Term("text", simpo_loss, "chosen", "rejected"),))
    with pytest.raises(ValueError, match="no term of the objective reads a reference"):
        open_quickly(tmp_path, dataset, objective=simpo)
    with pytest.raises(ValueError, match="a batch of 4 groups for the reference does not divide among 8 devices"):
        open_quickly(tmp_path, dataset, mesh=make_mesh(MeshConfig()))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="over a mesh, and none is given"):
        open_quickly(tmp_path, dataset)
    assert not list(tmp_path.iterdir())
