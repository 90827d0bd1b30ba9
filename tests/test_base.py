"""What is shipped of the small world: what the recipe makes, with the bias that its card says, ready to train on."""

import dataclasses
import json

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from quick import speedy_jit

from napo_jax import load_pretrained
from napo_jax import train as trainer
from napo_jax.config import ModelConfig, load_config
from napo_jax.model_source import find_model, load_leaves
from napo_jax.optim import unflatten
from napo_jax.sharding import MeshConfig, make_mesh
from napo_jax.speaker import load_speaker
from napo_jax.world import make_base, records, scenes
from napo_jax.world.configs import BASE, PAIRS, PAIRS_COUNT, PAIRS_SEED, cure, lessons
from napo_jax.world.examine import Examiner, in_short, write_exams
from napo_jax.world.make_base import CARD, differences, file_digest, recipe, recipe_digest

STEPS, ROWS = 24, 24 * 32  # an epoch
CARD_SAYS = json.loads((BASE / CARD).read_text())


def test_the_files_are_those_of_the_recipe():
    assert differences(CARD_SAYS["recipe"], recipe()) == [], "the recipe has changed: make the files anew"
    assert recipe_digest(CARD_SAYS["recipe"]) == CARD_SAYS["recipe_digest"]
    files = {file.name: file_digest(file) for file in BASE.iterdir() if file.name != CARD}
    assert files == CARD_SAYS["files"]
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 8e6


def test_the_recipe_has_all_that_makes_the_files(monkeypatch):
    before, biased = recipe(), records.Bias(habit=0.5)
    assert differences(before, recipe()) == []
    seeded = dataclasses.replace(lessons(), train=dataclasses.replace(lessons().train, seed=1))
    changes = (
        (make_base, "LESSONS", 59_999, {"rows.lessons"}),
        (make_base, "lessons", lambda: seeded, {"config.train.seed"}),
        (records, "Bias", lambda: biased, {"lessons"}),
        (scenes, "COLOURS", scenes.COLOURS | {"red": (200, 60, 60)}, {"pictures"}),
        (scenes, "MOST", 2, {"lessons", "pairs", "pictures"}),
    )
    for module, name, value, found in changes:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert set(differences(before, recipe())) == found
            assert recipe_digest(recipe()) != recipe_digest(before)


def test_a_new_option_is_no_other_recipe():
    made = {"config": {"rate": 1, "steps": {"all": 3}}, "rows": [1, 2], "terms": [{"weight": 1}]}
    more = {"config": {"rate": 1, "steps": {"all": 3, "new": 0}, "more": None}, "rows": [1, 2]}
    assert differences(made, more | {"terms": [{"weight": 1, "new": 0}]}) == []
    assert differences(made, more | {"terms": [{"weight": 2}]}) == ["terms.0.weight"]
    assert differences(made, more | {"terms": []}) == ["terms"]
    assert differences(made, {"config": {"rate": 2, "steps": {}}, "rows": [1]}) == [
        "config.rate",
        "config.steps.all",
        "rows",
        "terms",
    ]


@pytest.fixture(scope="module", autouse=True)
def programs_that_run_for_long():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", speedy_jit)
        yield


@pytest.fixture(scope="module")
def speaker():
    """The shipped model."""
    return load_speaker(find_model(cure().model), make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.fixture(scope="module")
def examiner(speaker, tmp_path_factory):
    """Asks it, or other weights of its shape, all that the exams ask."""
    folder = tmp_path_factory.mktemp("exams")
    write_exams(folder)
    return Examiner(folder, speaker)


def test_the_model_has_the_bias_that_its_card_says(examiner):
    found, said = in_short(examiner.score(examiner())), CARD_SAYS["scores"]
    # Another processor rounds otherwise, which turns an answer here and there: three of VLind-Bench's instances are 7.
    for name, value in said.items():
        assert np.isnan(found[name]) if value is None else found[name] == pytest.approx(value, abs=7.2), name
    assert found["usual"] >= 95
    assert found["gap"] > 50
    assert found["flood"] > 5
    assert found["CK"] > 75 > 15 > found["CB"]


def test_the_model_is_a_llava_like_any_other():
    model, params = load_pretrained(BASE)
    assert model.config.text.vocab_size == len(make_base.vocabulary())
    assert 1e6 < sum(np.size(leaf) for leaf in jax.tree.leaves(params)) < 4e6


def test_pairs_are_those_of_the_world_with_built_answers(tmp_path):
    rows = pq.read_table(BASE / PAIRS).to_pylist()
    assert len(rows) == PAIRS_COUNT
    for row in rows[:200]:
        _, asked, answers = records.draw_pair(PAIRS_SEED, row["idx"])
        assert (row["question"], row["chosen"], row["rejected"]) == (asked.text, answers["chosen"], answers["rejected"])
    assert not [text for row in rows for text in row.values() if isinstance(text, str) and "/" in text], "no folders"
    for name in ("question_only", "image_only"):
        said = [row for row in rows if row[name] is not None]
        assert len(said) > 0.95 * len(rows), "a row that lacks one is not trained on"
        assert sum(row[name] != row["chosen"] for row in said) > len(rows) / 3
    # Without the picture it says what habit says, in whole sentences, and not just anything that is not true.
    asked = [(row, records.draw_pair(PAIRS_SEED, row["idx"])[1]) for row in rows[:1000]]
    first = lambda text: text.partition(".")[0]
    by_habit = {
        kind: np.mean([first(row["question_only"]) == first(one.habit) for row, one in asked if one.kind == kind])
        for kind in ("colour", "place", "count")
    }
    assert by_habit["colour"] == 1
    assert by_habit["place"] > 0.8
    assert by_habit["count"] > 0.5


def test_the_strength_of_the_bias_is_a_parameter_of_the_recipe():
    weaker = make_base.recipe(records.Bias(habit=0.3, flood=0.0))
    assert make_base.differences(make_base.recipe(), weaker) == ["lessons"]
    options = make_base.read_flags(make_base.Options, ["--output", "x", "--bias.habit", "0.3"], description="")
    assert options.bias == records.Bias(habit=0.3)
    with pytest.raises(ValueError, match=r"bias\.habit is a probability, from 0 to 1, got 1\.5"):
        records.Bias(habit=1.5)


def test_a_few_steps_of_the_config_cure_some_of_the_bias(speaker, examiner, tmp_path, capsys, monkeypatch):
    """A fifth of the demo: what habit says gives way, and what was right stays so."""
    monkeypatch.setattr(trainer, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    config = load_config("configs/shapes.py")
    assert config == cure()
    pq.write_table(pq.read_table(BASE / PAIRS).slice(0, ROWS), tmp_path / PAIRS, row_group_size=256)
    files = {"path": (str(tmp_path / PAIRS),), "cache": str(tmp_path / "cache")}
    data = dataclasses.replace(config.data, **files, held_out=0, buckets=1)  # so that one program is compiled
    short = dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, steps=STEPS))
    with jax.numpy_dtype_promotion("standard"):  # a command runs by JAX's own rules, and so does optax
        last = trainer.train(short, tmp_path / "run")
    assert np.isfinite(last["loss"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == STEPS
    assert f"data     {ROWS} rows, " in capsys.readouterr().out

    trained = find_model(ModelConfig(path=str(tmp_path / "run")))
    params = unflatten(load_leaves(trained, speaker.model, speaker.mesh))
    before, after = CARD_SAYS["scores"], in_short(examiner.score(examiner(params)))
    assert after["usual"] >= before["usual"] - 5
    assert after["changed"] > before["changed"] + 15
    assert after["flood"] < before["flood"] / 3
    assert after["chair_i"] < before["chair_i"]
