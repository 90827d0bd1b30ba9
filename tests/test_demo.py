"""The demo: every part of the method, one behind the other, on a few pairs."""

import dataclasses
import io
import json

import jax
import pytest

from napo_jax import demo
from napo_jax import train as trainer
from napo_jax.bias import work
from napo_jax.demo import Options, as_table
from napo_jax.metrics import Console
from napo_jax.sharding import make_mesh
from napo_jax.world import examine
from napo_jax.world.configs import cure

FEW = {name: exam._replace(many=6) for name, exam in examine.EXAMS.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the folder of a short demo, its scores, and what it said."""
    folder, said = tmp_path_factory.mktemp("demo") / "run", io.StringIO()

    config = cure()
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=3e-3, warmup=0.0),  # to see a difference soon
        data=dataclasses.replace(config.data, batch_size=8, buckets=1, held_out=4),
        train=dataclasses.replace(config.train, steps=4, log_every=1, evaluate_every=2),
    )
    # A command runs by JAX's own rules; optax, in a whole training, does not keep to those of the other tests.
    one = jax.devices()[:1]  # as a laptop has
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        for module in (demo, work, trainer):
            patch.setattr(module, "make_mesh", lambda config, *_: make_mesh(config, one))
        patch.setattr(demo, "cure", lambda: config)
        patch.setattr(examine, "EXAMS", FEW)
        scores = demo.demo(Options(workdir=str(folder), pairs=40), Console(said))
    return folder, scores, said.getvalue()


def test_every_part_leaves_what_it_made(run):
    folder, scores, said = run
    assert set(scores) == {"before", "after"}
    answers = {label: (folder / "run" / "evals" / label / "world.jsonl").read_text() for label in scores}
    assert answers["before"] != answers["after"]
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    for label, numbers in scores.items():
        made_by = set()
        for name in FEW:
            scored = json.loads((folder / "run" / "evals" / label / f"{name}.json").read_text())
            assert scored["benchmark"] == name
            made_by.add((scored["model"], scored["weights"]))
            answers = (folder / "run" / "evals" / label / f"{name}.jsonl").read_text().splitlines()
            assert len(answers) >= 6
        assert len(made_by) == 1
        assert numbers["usual"] == json.loads((folder / "run" / "evals" / label / "world.json").read_text())["usual"]
    samples = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]
    assert len({sample["question"] for sample in samples}) == len(samples) > 2
    assert all((folder / "run" / sample["picture"]).exists() and sample["before"] for sample in samples)
    page = (folder / "run" / "report.html").read_text()
    assert "<h1>Demo: the small world&#x27;s model before and after NaPO</h1>" in page
    assert as_table(scores) in said


def test_the_table_has_a_line_for_each_number(run):
    _, scores, _ = run
    lines = as_table(scores).splitlines()
    assert len(lines) == 1 + len(scores["before"])
    gap = next(line for line in lines if "gap" in line)
    assert [float(value) for value in gap.split()[-2:]] == pytest.approx(
        [scores["before"]["gap"], scores["after"]["gap"]], abs=0.05
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 3}, "pairs must be at least 96, a batch and what is held out, got 3"),
        ({"seed": -1}, "seed must not be negative"),
        ({"workdir": "gs://bucket/a"}, "must be a folder of this machine"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


def test_a_folder_that_is_in_use_is_left_alone(run):
    folder, _, _ = run
    with pytest.raises(ValueError, match="is there already; name a new folder"):
        demo.demo(Options(workdir=str(folder)))
