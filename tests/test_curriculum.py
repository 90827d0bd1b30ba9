"""From easy to hard: each third of the rows in its turn, and on from any step to the same batches."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_dataset import open_with, png

from napo_jax.data.order import NO_GROUP, Order, Stages, thirds
from napo_jax.data.records import DataError
from napo_jax.losses import sft_loss
from napo_jax.objective import Objective
from napo_jax.term import Term

SFT = Objective((Term("text", sft_loss, "chosen"),))
BUCKET_OF = np.random.default_rng(0).integers(0, 3, 100)


def stages(steps=40, seed=0):
    """Returns a run over three stages of 40, 35 and 25 groups in batches of 8: 5, 4 and 3 steps a pass."""
    stage_of = np.repeat([0, 1, 2], [40, 35, 25])
    orders = [Order(np.where(stage_of == stage, BUCKET_OF, NO_GROUP), 8, seed=seed) for stage in range(3)]
    return Stages(orders, steps), stage_of


def test_thirds_are_by_rank():
    assert thirds(np.array([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])).tolist() == [2, 0, 1, 0, 1, 2]
    assert thirds(np.zeros(7)).tolist() == [0, 0, 0, 1, 1, 2, 2], "of equal ones, the earlier"
    assert np.bincount(thirds(np.random.default_rng(0).random(100))).tolist() == [34, 33, 33]


def test_a_stage_is_gone_through_as_often_as_the_others_before_the_next_begins():
    run, stage_of = stages(steps=24)  # two passes of each
    assert (run.steps_per_epoch, run.ends.tolist()) == (12, [10, 18, 24])
    for stage, steps in enumerate((range(10), range(10, 18), range(18, 24))):
        batches = np.stack([run[step][1] for step in steps])
        assert set(stage_of[batches.ravel()]) == {stage}, "a batch is of one stage alone"
        passes = batches.reshape(2, -1)
        assert all(len(set(one)) == len(one) for one in passes.tolist()), "at most once in a pass"
        assert passes[0].tolist() != passes[1].tolist(), "in another order"
    assert set(np.concatenate([run[step][1] for step in range(18, 21)])) != set(
        np.concatenate([run[step][1] for step in range(21, 24)])
    ), "what is over in one pass comes in another"
    assert set(stage_of[run[30][1]]) == {2}, "behind the end the last one goes on"


def test_any_step_is_a_function_of_the_seed_and_the_steps():
    (run, _), (again, _), (other, _) = stages(), stages(), stages(seed=1)
    for step in (39, 0, 17, 16, 18):
        assert run[step][0] == again[step][0]
        np.testing.assert_array_equal(run[step][1], again[step][1])
    assert len({run.fingerprint, other.fingerprint, stages(steps=41)[0].fingerprint}) == 3
    assert run.fingerprint == again.fingerprint


def write(file, difficulty):
    count = len(difficulty)
    columns = {"image": [png(i) for i in range(count)], "question": ["What?"] * count}
    columns |= {"chosen": ["word " * (1 + i % 5) for i in range(count)], "difficulty": difficulty}
    pq.write_table(pa.table(columns), file)


def test_a_config_trains_from_easy_to_hard(tmp_path):
    hard = np.random.default_rng(2).permutation(24) / 7
    write(tmp_path / "rows.parquet", hard.tolist())
    options = {"path": (str(tmp_path / "rows.parquet"),), "curriculum": "thirds", "held_out": 3}
    dataset = open_with(tmp_path, SFT, **options)
    assert dataset.config.batch_size == 2
    order = dataset.training_order(18)
    assert order.steps_per_epoch == 9, "three thirds of seven groups, in pairs"
    seen = [hard[dataset.table.records[order[step][1]]] for step in range(18)]
    for easy, next_one in ((seen[:6], seen[6:12]), (seen[6:12], seen[12:])):
        assert np.max(easy) < np.min(next_one)
    loader = dataset.loader(order, rows=(0, 2))
    straight, again = list(loader(0, 18)), loader()
    again.set_state({"step": 7, "data": loader.fingerprint})
    for expected in straight[7:9]:
        np.testing.assert_array_equal(next(again).ids, expected.ids)
    assert loader.fingerprint != dataset.loader(dataset.training_order(36), rows=(0, 2)).fingerprint
    together = dataclasses.replace(dataset, config=dataclasses.replace(dataset.config, curriculum="none"))
    assert isinstance(together.training_order(18), Order)


def test_rows_without_a_difficulty_are_counted_where_one_is_needed(tmp_path):
    write(tmp_path / "rows.parquet", [1.0, None, float("nan"), 2.0, 3.0, 2.0, 1.0, 0.0])
    files = {"path": (str(tmp_path / "rows.parquet"),)}
    assert open_with(tmp_path, SFT, curriculum="thirds", **files).dropped == {"no_difficulty": 2}
    assert open_with(tmp_path, SFT, **files).dropped == {}
    row = {"image": "a.png", "question": "What?", "chosen": "a", "difficulty": "hard"}
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"none of 1 rows .* no_difficulty 1"):
        open_with(tmp_path, SFT, curriculum="thirds", path=(str(tmp_path / "rows.jsonl"),))


def test_a_third_that_fills_no_batch_is_refused(tmp_path):
    write(tmp_path / "rows.parquet", [1.0, 2.0, 3.0, 4.0])
    dataset = open_with(tmp_path, SFT, path=(str(tmp_path / "rows.parquet"),), curriculum="thirds")
    with pytest.raises(ValueError, match="1 groups are too few for a batch of 2"):
        dataset.training_order(6)
