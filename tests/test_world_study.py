"""The study of the small world: noise turns pairs round, and methods differ in nothing but what they are."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from napo_jax.data.dataset import open_dataset
from napo_jax.world.configs import cure
from napo_jax.world.language import world_tokenizer
from napo_jax.world.model import world_model
from napo_jax.world.records import write_pairs

FILE = Path(__file__).parents[1] / "benchmarks" / "world_study.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("world_study", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Returns a file of pairs with answers as a builder leaves them: one of the first kind is missing."""
    folder = tmp_path_factory.mktemp("study")
    write_pairs(folder / "pairs.parquet", 300, seed=9)
    table = pq.read_table(folder / "pairs.parquet")
    language = [f"The star is {number}." for number in range(300)]
    language[7] = None
    table = table.append_column("question_only", pa.array(language))
    table = table.append_column("image_only", pa.array([f"There is a star. {number}" for number in range(300)]))
    pq.write_table(table, folder / "built.parquet")
    return folder / "built.parquet"


@pytest.mark.parametrize("noise", [0, 40])
def test_noise_turns_its_share_of_either_kind_of_pair_round(study, built, tmp_path, noise):
    study.write_noisy(built, tmp_path / "noisy.parquet", noise, seed=3)
    before, after = pq.read_table(built).to_pylist(), pq.read_table(tmp_path / "noisy.parquet").to_pylist()
    assert before.pop(7)["question_only"] is None, "a row without all answers is nobody's"
    turned = {}
    for name in study.BUILT:
        turned[name] = set()
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            assert new["chosen"] == old["chosen"]
            pair = new[study.preferred_to(name)], new[name]
            if pair != (old["chosen"], old[name]):
                assert pair == (old[name], old["chosen"])
                turned[name].add(number)
        assert len(turned[name]) / 299 == pytest.approx(noise / 100, abs=0.08)
    assert noise == 0 or turned["question_only"] != turned["image_only"]


def test_every_method_sees_the_same_rows_in_the_same_order(study, built, tmp_path):
    study.write_noisy(built, tmp_path / "noisy.parquet", 20, seed=3)
    columns = {study.preferred_to(name): study.preferred_to(name) for name in study.BUILT}
    orders = {}
    for method, objective in study.METHODS.items():
        data = dataclasses.replace(
            cure().data,
            path=(str(tmp_path / "noisy.parquet"),),
            columns=columns,
            cache=str(tmp_path / "cache"),
            buckets=1,
            held_out=0,
        )
        own = study.with_own_pairs(objective)
        for term in own.terms:
            assert term.preferred == ("chosen" if term.other in (None, "rejected") else study.preferred_to(term.other))
        dataset = open_dataset(data, own, world_tokenizer(), world_model())
        order = dataset.order()
        orders[method] = [dataset.table.records[order[number][1]].tolist() for number in range(12)]
    assert len(orders) == 6
    assert all(order == orders["napo"] for order in orders.values())


def test_the_search_and_the_study_share_no_exam_and_no_pairs(study):
    assert study.SEARCH_SEED not in study.SEEDS
    assert len(set(study.EXAM_SEEDS.values())) == 2
    runs = study.study_runs(dict.fromkeys(study.METHODS, 1e-4))
    assert len(runs) == len(set(runs)) == len(study.SEEDS) * ((len(study.METHODS) - 1) * len(study.NOISE) + 1)


def test_an_interval_by_hand(study):
    assert study.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.0 ± 2.0"  # 2.78 times 1.58 / sqrt(5)
    assert study.interval([7.0]) == "7.0 (1/5)", "runs that broke down are not passed over in silence"
    assert study.interval([1.0, 3.0]) == "2.0 ± 12.7 (2/5)"
    assert study.interval([7.0], exact=True) == "7.0"
    assert study.interval([]) == "-"


def test_the_search_goes_on_until_the_best_rate_is_between_others(study, tmp_path, monkeypatch):
    accuracy = {rate: 50.0 - abs(number - 8) for number, rate in enumerate(study.RATES)}  # far from the middle
    one, done = study.Study(tmp_path), []

    def run(runs, exams):
        for method, noise, seed, rate in runs:
            assert (noise, seed, exams) == (study.SEARCH_NOISE, study.SEARCH_SEED, "search_exams")
            done.append((method, rate))
            found = {"accuracy": accuracy[rate] if rate < study.RATES[10] else None}
            one._result(method, noise, seed, rate).write_text(json.dumps(found))

    monkeypatch.setattr(one, "run", run)
    with pytest.raises(ValueError, match="the search for dpo is not done"):
        one.best_rates()
    one.search(study.METHODS)
    assert one.best_rates() == dict.fromkeys(study.METHODS, study.RATES[8])
    assert len(done) == len(set(done)) == 6 * len(study.METHODS)  # from the 5th to the 10th
    monkeypatch.setattr(study, "SEEDS", (1, 2))
    with pytest.raises(ValueError, match="of another base model or recipe"):
        study.Study(tmp_path)
