"""The study of the small world: noise turns pairs round, and methods differ in nothing but what they are."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from napo_jax.data.dataset import open_dataset
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
    write_pairs(folder / "pairs.parquet", 300, seed=9, pictures=True)
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
    table = pq.read_table(built)
    pictures = {"marked_region": table["region"], "retrieved_image": table["rejected_image"]}
    study.write_noisy(built, tmp_path / "noisy.parquet", 20, seed=3, pictures=pictures)
    orders = {}
    for method, objective in study.METHODS.items():
        data = dataclasses.replace(
            study.config_of(method).data, path=(str(tmp_path / "noisy.parquet"),), cache=str(tmp_path / "cache")
        )
        own = study.with_own_pairs(objective)
        for term in own.terms:
            assert term.preferred == (study.preferred_to(term.other) if term.other in study.BUILT else "chosen")
        dataset = open_dataset(data, own, world_tokenizer(), world_model())
        order = dataset.order()
        orders[method] = [dataset.table.records[order[number][1]].tolist() for number in range(12)]
    assert len(orders) == len(study.METHODS) == 12
    assert all(order == orders["napo"] for order in orders.values())


def test_the_search_and_the_study_share_no_exam_and_no_pairs(study):
    assert study.SEARCH_SEED not in study.SEEDS
    assert len(set(study.EXAM_SEEDS.values())) == 2
    runs = study.study_runs(dict.fromkeys(study.METHODS, 1e-4))
    assert len(runs) == len(set(runs)) == len(study.SEEDS) * (5 * len(study.NOISE) + len(study.QUIET))


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


def test_results_are_complete_and_the_page_shows_them(study):
    """Every method, noise and seed has its row, and the page's tables are made of them."""
    rows = json.loads(study.RESULTS.read_text())["rows"]
    wanted = [(m, n, s) for m in ("base", *study.METHODS) for n in study.NOISE for s in study.SEEDS]
    assert sorted((row["method"], row["noise"], row["seed"]) for row in rows) == sorted(wanted)
    columns = {"LP", "CB", "CK", "VP", "pope_f1", "chair_i", "accuracy"}
    assert all(columns <= row.keys() for row in rows)
    page = (Path(__file__).parents[1] / "docs" / "study.md").read_text()
    assert study.table(rows) in page
    assert study.differences(rows) in page
    assert study.pictured(rows) in page
