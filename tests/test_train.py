"""The command that users type: it trains, and whatever ends it, the same command goes on to the same bits."""

import json
import math
import signal
import subprocess
import sys

import pytest
from forked import Forked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from napo_jax import train
from napo_jax.command import exit_with_one_line

STEPS = 6
RATES = ("seconds_per_step", "examples_per_second", "tokens_per_second")
CONSTANT = ("--optimizer.schedule", "constant", "--optimizer.warmup", "0")  # so that any steps are one program


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def words(folder, name, *more):
    """Returns the words of a short run's command."""
    options = {"data.cache": folder / "cache", "data.made-up": 24, "data.batch-size": 4, "data.buckets": 1}
    options |= {"train.steps": STEPS, "train.checkpoint-every": 2, "workdir": folder / name}
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return ["--config", "configs/debug.py", *flags, *more]


def start(folder, name, *more, at_step=None):
    """Starts a run; one CPU device, as a user has."""
    return Forked("train", words(folder, name, *more), folder, at_step=at_step)


def finish(process, status=0):
    out, err = process.communicate(timeout=200)
    assert process.returncode == status, err[-3000:]
    return out, err


def lines(folder, name):
    """Returns {step: what was measured, without the rates}."""
    file = folder / name / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return {row.pop("step"): {key: value for key, value in row.items() if key not in RATES} for row in rows}


@pytest.fixture(scope="module")
def straight(folder):
    """A run that nothing interrupts, started as users start it."""
    command = [sys.executable, "-m", "napo_jax.train", *words(folder, "straight")]
    out, _ = finish(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    assert "134,976 parameters train, 67,152 do not" in out
    assert f"step {STEPS}/{STEPS}" in out
    return lines(folder, "straight")


def test_a_run_logs_every_step_and_begins_at_its_reference(straight, folder):
    """T4: at the first step the policy is the cached reference, to the rounding of another batch."""
    assert list(straight) == list(range(1, STEPS + 1))
    for term in ("preference", "language_bias", "vision_bias"):
        assert abs(straight[1][f"{term}/chosen_reward"]) < 1e-4
        assert abs(straight[1][f"{term}/margin"]) < 1e-3
        assert {f"{term}/{key}" for key in ("margin", "accuracy", "q", "weight")} <= set(straight[1])
    assert straight[STEPS]["loss"] != straight[2]["loss"]
    config = json.loads((folder / "straight" / "config.json").read_text())
    assert config["train"]["steps"] == STEPS
    assert sorted(path.name for path in (folder / "straight" / "checkpoints").iterdir() if path.name.isdigit()) == list(
        "246"
    )


def test_a_killed_run_goes_on_to_the_same_bits(straight, folder):
    """T18: SIGKILL twice, the second time while it goes on; the losses are those of the uninterrupted run."""
    for step in (3, 5):
        finish(start(folder, "killed", at_step=(step, signal.SIGKILL)), -signal.SIGKILL)
    out, _ = finish(start(folder, "killed"))
    assert "goes on from step" in out
    assert lines(folder, "killed") == straight


def test_a_run_that_is_asked_to_stop_saves_first(straight, folder):
    process = start(folder, "asked", "--train.checkpoint-every", "100", at_step=(3, signal.SIGTERM))
    _, err = finish(process, 143)
    assert "the same command goes on from there" in err
    stopped = int(err.rpartition("saved step ")[2].partition(";")[0])
    assert 3 <= stopped < STEPS
    out, _ = finish(start(folder, "asked"))
    assert f"goes on from step {stopped}" in out
    assert lines(folder, "asked") == straight
    assert "nothing to do" in finish(start(folder, "asked"))[0]


def test_a_run_does_not_go_on_as_another(straight, folder, capsys):
    """What the saved leaves mean must be what it was, and config.json stays as it is."""
    before = (folder / "straight" / "config.json").read_text()
    for more, message in (
        (["--lora.rank", "2"], "began with lora.rank 0, and not 2"),
        (["--train.seed", "5"], "began with train.seed 0, and not 5"),
        (["--model.size", "7b"], "began with model.size None, and not '7b'"),
        (["--model.path", str(folder / "straight")], "model.path is the run's own workdir"),
    ):
        with pytest.raises(SystemExit) as stop:
            exit_with_one_line(lambda more=more: train.main(words(folder, "straight", "--train.steps", "20", *more)))
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("error: ") == 1
    assert (folder / "straight" / "config.json").read_text() == before


def test_at_the_start_it_is_the_reference_in_every_mode_also_after_a_resume(folder):
    """T4 and T6, through the command: a learning rate of nearly 0 keeps the policy where it was over a resume."""
    still = ["--optimizer.learning-rate", "1e-30", "--lora.rank", "4", "--lora.dropout", "0.5", "--optimizer.trainable"]
    still += [".*/lora_[ab]|projector/.*", "--train.checkpoint-every", "1", *CONSTANT]
    modes = dict.fromkeys(("cache", "live", "adapters_off"))
    for mode in modes:
        for steps, says in (("1", "step 0 of 1"), ("2", "goes on from step 1 of")):
            more = ("--train.reference", mode, "--train.steps", steps)
            assert says in finish(start(folder, mode, *still, *more))[0]
        modes[mode] = lines(folder, mode)
        for row in modes[mode].values():
            for term in ("preference", "language_bias", "vision_bias"):
                assert abs(row[f"{term}/chosen_reward"]) < 1e-5
                assert abs(row[f"{term}/rejected_reward"]) < 1e-5
                q = row[f"{term}/q"]
                assert q == pytest.approx(0.0 if term == "preference" else 0.5, abs=1e-5)
                closed = (1 - 2**-q) / q if q else math.log(2)
                assert row[f"{term}/loss"] == pytest.approx(closed, abs=1e-5)
                assert row[f"{term}/weight"] == pytest.approx(1 / 3)
    for step in (1, 2):
        for mode in ("live", "adapters_off"):
            assert modes[mode][step]["loss"] == pytest.approx(modes["cache"][step]["loss"], abs=1e-5)


def test_what_is_held_out_is_measured_and_the_best_is_kept(folder):
    more = ["--data.held-out", "5", "--train.evaluate-every", "2", "--train.checkpoint-every", "2", "--train.keep", "1"]
    more += ["--train.keep-best", "1", "--train.best-metric", "preference/margin", "--train.tensorboard"]
    more += ["--train.steps", "6", *CONSTANT]
    out, _ = finish(start(folder, "judged", *more))
    assert "24 groups, 5 of them held out" in out
    rows = [json.loads(line) for line in (folder / "judged" / "held_out.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    margins = {row["step"]: row["preference/margin"] for row in rows}
    assert margins[0] == pytest.approx(0, abs=1e-3)
    best = max((2, 4, 6), key=lambda step: (margins[step], step))
    kept = {int(path.name) for path in (folder / "judged" / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {6, best}
    assert len({row["image_ablated/margin"] for row in rows}) == 4
    events = EventAccumulator(str(folder / "judged" / "tensorboard")).Reload()
    found = {event.step: event.tensor_proto.float_val[0] for event in events.Tensors("held_out/preference/margin")}
    assert found == pytest.approx(margins, rel=1e-6)


def test_a_run_may_begin_where_another_ended(straight, folder):
    """A workdir as model: its adapters are merged, and the model it made is the new reference."""
    lora = ["--lora.rank", "4", *CONSTANT]
    finish(start(folder, "first", *lora, "--train.steps", "2"))
    out, _ = finish(start(folder, "second", "--model.path", str(folder / "first"), "--train.steps", "1"))
    assert f"start    step 0 of 1, from tiny and random with step 2 of {folder / 'first'}" in out
    assert "134,976 parameters train" in out
    second = lines(folder, "second")[1]
    assert abs(second["preference/margin"]) < 1e-3
    # The same batch under the model of before: with another policy and reference, and so another gradient.
    assert second["gradient_norm"] != pytest.approx(straight[1]["gradient_norm"], rel=1e-4)
    third = finish(start(folder, "third", "--model.path", str(folder / "second"), *lora, "--train.steps", "1"))[0]
    assert f"step 2 of {folder / 'first'} with step 1 of {folder / 'second'}" in third
    assert json.loads((folder / "third" / "config.json").read_text())["model"]["path"] == str(folder / "second")


def test_a_run_has_a_place_of_its_own_if_none_is_named(monkeypatch, tmp_path):
    named = []
    monkeypatch.setattr(train, "train", lambda config, workdir: named.append(workdir))
    train.main(["--config", "configs/debug.py"])
    train.main(["--config=configs/llava7b.py", "--train.steps", "3"])
    train.main(["--config", "configs/debug.py", "--workdir", "runs/b"])
    assert named == ["runs/debug", "runs/llava7b", "runs/b"]


def test_a_loss_that_is_no_number_ends_the_run(folder):
    rate = ["--optimizer.learning-rate", "1e30", "--optimizer.warmup", "0"]
    _, err = finish(start(folder, "broken", *rate), 1)
    assert "the update_norm of step 1 is inf" in err
    assert "no checkpoint was saved yet" in err
    kept = json.loads((folder / "broken" / "not_finite.json").read_text())
    assert len(kept["records"]) == 4
    assert kept["metrics"]["update_norm"] == "inf"
    assert not any(path.name.isdigit() for path in (folder / "broken" / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--workdir", "x", "--data.batch-size", "6", "--train.accumulate", "4"],
            "batch_size 6 does not divide into train.accumulate 4",
        ),
        (["--workdir", "x", "--data.batch-size", "12"], "12 does not divide into 1 micro-batches on 8 devices"),
        (["--workdir", "x", "--mesh.fsdp", "3"], "takes 3 devices, and there are 8"),
        (["--workdir", "x", "--train.steps", "0"], "train.steps must be at least 1"),
        (["--workdir", "x", "--train.reference", "adapters_off"], "there are no adapters: set lora.rank"),
        (
            ["--workdir", "x", "--train.keep-best", "1", "--train.evaluate-every", "5"],
            "needs groups to evaluate on: set data.held_out",
        ),
        (
            ["--workdir", "x", "--train.keep-best", "1", "--train.evaluate-every", "7"],
            "must be a multiple of train.evaluate_every 7",
        ),
        (["--workdir", "x", "--lora.rank", "2", "--lora.targets", "head"], "are no matrices of the decoder"),
        (
            ["--workdir", "x", "--lora.rank", "2", "--optimizer.trainable", ".*", "--data.batch-size", "8"],
            "beside its adapter: train one of them",
        ),
        (["--workdir", "x", "--data.held-out", "300", "--data.batch-size", "8"], "there are 256 groups in all"),
        (["--workdir", "x", "--model.path", "/no/such/model", "--data.batch-size", "8"], "/no/such/model"),
        (["--workdir", "x", "--data.path", "/no/such.parquet"], "names no file"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(more, message, capsys, tmp_path):
    argv = ["--config", "configs/debug.py", "--data.cache", str(tmp_path), *more]
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line(lambda: train.main(argv))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
