"""launch/slurm.sbatch and launch/gpu_node.sh against stand-ins: how a run ends, and whether it is tried again."""

import signal
import subprocess
from pathlib import Path

import pytest
from stand_ins import World

LAUNCH = Path(__file__).parent.parent / "launch"
FLAGS = ["--config", "configs/debug.py", "--workdir", "runs/it's a", "--data.path", "*.parquet"]
JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2"}


@pytest.fixture
def world(tmp_path):
    made = []

    def make(**plan):
        made.append(World(tmp_path / "world", **plan))
        return made[0]

    yield make
    made[0].end()


def start(world, name, *options, **environment):
    words = ["bash", LAUNCH / name, "--python", "python", *options, "--", *FLAGS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=world.environment | environment, cwd=world.folder, **pipes)


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def slurm(world, *options, **environment):
    return finish(start(world, "slurm.sbatch", *options, **(JOB | environment)))


def test_every_node_runs_the_same_command_once(world):
    world = world()
    status, out, err = slurm(world, SLURM_CPUS_PER_TASK="8")
    assert status == 0, err
    assert sorted(world.calls("train")) == [["0", *FLAGS], ["1", *FLAGS]]
    assert world.calls("scontrol") == []
    (call,) = world.calls("srun")
    assert "--ntasks-per-node=1" in call
    assert out.count("step 1") == 2


def test_wrong_usage_of_one_task_is_not_tried_again(world):
    world = world(runs0=[134], runs1=[2])  # the other one was left alone
    status, _, err = slurm(world)
    assert status == 2
    assert world.calls("scontrol") == []
    assert "not tried again" in err


@pytest.mark.parametrize("ended", [1, 75, 143])
def test_another_end_puts_the_job_back(world, ended):
    world = world(runs0=[ended])
    status, _, err = slurm(world)
    assert status == 1
    assert world.calls("scontrol") == [["requeue", "77"]]
    assert f"ended with status {ended}: back in the queue" in err


def test_it_is_put_back_in_bounds(world):
    world = world(runs0=[1])
    assert slurm(world, "--retries", "3", SLURM_RESTART_COUNT="3")[0] == 1
    assert world.calls("scontrol") == []
    assert slurm(world, "--retries", "3", SLURM_RESTART_COUNT="2")[0] == 1
    assert len(world.calls("scontrol")) == 1


def test_a_job_that_cannot_be_put_back_says_so(world):
    status, _, err = slurm(world(runs0=[1], requeue=[1]))
    assert status == 1
    assert "submit it again" in err


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_job_has_every_task_save_before_it_is_put_back(world, number):
    world = world(runs0=["wait"], runs1=["wait"])
    process = start(world, "slurm.sbatch", **JOB)
    world.wait_for_runs(2)
    process.send_signal(number)
    status, _, err = finish(process)
    assert status == 1
    assert world.calls("scancel") == [["--signal=TERM", "77"]]
    assert list((world.folder / "running").iterdir()) == [], "both saved"
    assert "ended with status 143: back in the queue" in err
    assert world.calls("scontrol") == [["requeue", "77"]]


def test_one_machine_takes_all_its_gpus(world):
    world = world()
    status, out, err = finish(start(world, "gpu_node.sh", "--log", "all.log"))
    assert status == 0, err
    assert world.calls("train") == [["0", *FLAGS]]
    assert "8 GPUs" in err
    assert "step 1" in out
    assert "step 1" in (world.folder / "all.log").read_text()


def test_a_machine_without_gpus_does_not_train_on_its_cpu(world):
    status, _, err = finish(start(world(gpus=[0]), "gpu_node.sh"))
    assert status == 2
    assert "no GPU" in err


@pytest.mark.parametrize(("runs", "expected", "count"), [([1, 134, 0], 0, 3), ([2], 2, 1), ([1], 1, 3)])
def test_a_failure_on_one_machine_is_tried_again_in_bounds(world, runs, expected, count):
    world = world(runs0=runs)
    assert finish(start(world, "gpu_node.sh", "--poll", "0", "--retries", "2"))[0] == expected
    assert len(world.calls("train")) == count


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_on_one_machine_has_the_run_save_and_is_the_end(world, number):
    world = world(runs0=["wait"])
    process = start(world, "gpu_node.sh", "--poll", "0")
    world.wait_for_runs(1)
    process.send_signal(number)
    assert finish(process)[0] == 143
    assert len(world.calls("train")) == 1
    assert list((world.folder / "running").iterdir()) == []
