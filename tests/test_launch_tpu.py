"""launch/tpu_pod.sh against a stand-in for gcloud: what it creates and runs, and how it goes on."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from stand_ins import World

ROOT = Path(__file__).parent.parent
SLICE = ["--name", "a-run", "--zone", "z1", "--type", "v5litepod-8", "--version", "image", "--poll", "0"]
# With what a shell would take apart, twice.
FLAGS = ["--config", "configs/debug.py", "--workdir", "gs://bucket/it's $HOME/a", "--data.path", "gs://b/*.parquet"]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The script in a small tree of its own, with files that git knows, does not know, and ignores."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "launch", tree / "launch")
    for name in ("napo_jax/train.py", "pyproject.toml", "old.py", "runs/metrics.jsonl"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("as committed")
    (tree / ".gitignore").write_text("runs/")
    git = ["git", "-C", tree, "-c", "user.name=n", "-c", "user.email=e", "-c", "init.defaultBranch=main"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    (tree / "napo_jax/train.py").write_text("as changed")
    (tree / "new config.py").write_text("never added")
    (tree / "old.py").unlink()
    return tree / "launch/tpu_pod.sh"


@pytest.fixture
def world(tmp_path, script):
    made = []

    def make(**plan):
        made.append(World(tmp_path / "world", script, **plan))
        return made[0]

    yield make
    made[0].end()


def launch(world, *options, flags=FLAGS):
    words = ["bash", world.script, *SLICE, *options, *(["--", *flags] if flags else [])]
    return subprocess.run(words, env=world.environment, capture_output=True, text=True, timeout=60)


def verbs(world):
    """Returns what gcloud was asked, but for what only asks back."""
    return [" ".join(call[2:4]) for call in world.calls("gcloud") if call[3] not in ("describe", "ssh")]


def test_a_slice_is_made_and_all_workers_run_the_same_command(world):
    world = world(workers=[3])
    done = launch(world)
    assert done.returncode == 0, done.stderr
    assert verbs(world) == ["tpu-vm create", "tpu-vm scp"]
    (create,) = world.calls("gcloud", "compute", "tpus", "tpu-vm", "create")
    assert create[4:] == ["a-run", "--version=image", "--accelerator-type=v5litepod-8", "--zone=z1"]
    runs = world.calls("train")
    assert sorted(runs) == [[worker, *FLAGS] for worker in "012"]
    assert "step 1" in done.stdout
    assert "ended with status 0" in done.stdout
    installed = [line for line in (world.folder / "pip").read_text().splitlines() if " install " in line]
    assert len(installed) == 3
    assert all(line.endswith("/napo_jax-a-run/tree[tpu,gcs]") for line in installed)
    # The tree as it is, and each worker's own log beside it.
    for worker in "012":
        beside = world.nodes / "a-run" / worker / "napo_jax-a-run"
        assert (beside / "tree/napo_jax/train.py").read_text() == "as changed"
        assert (beside / "tree/new config.py").exists()
        assert not any((beside / "tree" / name).exists() for name in (".git", "old.py", "runs"))
        assert "step 1" in (beside / "run.log").read_text()


def test_all_options_reach_gcloud(world):
    world = world()
    more = ["--project", "p1", "--spot", "--create-flag=--network=n1", "--extras", "tpu", "--workers", "2"]
    done = launch(world, *more, "--delete-after")
    assert done.returncode == 0, done.stderr
    (create,) = world.calls("gcloud", "compute", "tpus", "tpu-vm", "create")
    assert {"--project=p1", "--spot", "--network=n1"} <= set(create)
    assert all("--project=p1" in call and "--zone=z1" in call for call in world.calls("gcloud"))
    assert verbs(world)[-1] == "tpu-vm delete"
    assert not (world.nodes / "a-run").exists()
    assert "tree[tpu]" in (world.folder / "pip").read_text()


def test_refused_capacity_is_asked_for_again(world):
    world = world(create=["capacity", "capacity", None])
    done = launch(world)
    assert done.returncode == 0, done.stderr
    assert verbs(world).count("tpu-vm create") == 3
    assert "no capacity in z1" in done.stderr


@pytest.mark.parametrize("refusal", ["denied", "quota"])
def test_another_refusal_is_not(world, refusal):
    world = world(create=[refusal])
    done = launch(world)
    assert done.returncode == 1
    assert verbs(world) == ["tpu-vm create"]
    assert "ERROR: (gcloud" in done.stderr


def test_capacity_is_waited_for_in_bounds(world):
    world = world(create=["capacity"])
    done = launch(world, "--capacity-wait", "0")
    assert done.returncode == 1
    assert "--capacity-wait" in done.stderr


def test_what_gcloud_cannot_tell_is_not_taken_for_an_absent_slice(world):
    world = world(describe=["ERROR: (gcloud.auth) Your credentials are invalid"])
    done = launch(world)
    assert done.returncode == 1
    assert verbs(world) == []
    assert "credentials are invalid" in done.stderr


def test_a_slice_that_is_there_is_used(world):
    world = world()
    world.make_node("a-run")
    assert launch(world).returncode == 0
    assert verbs(world) == ["tpu-vm scp"]


@pytest.mark.parametrize(("state", "then"), [("STOPPED", "tpu-vm start"), ("PREEMPTED", "tpu-vm delete")])
def test_a_slice_that_is_no_longer_there_is_brought_back(world, state, then):
    world = world()
    world.make_node("a-run")
    (world.nodes / "a-run/state").write_text(state)
    assert launch(world).returncode == 0
    assert verbs(world)[0] == then


def test_a_preempted_slice_is_made_anew_and_the_run_goes_on(world):
    world = world(runs0=["preempt", 0], runs1=[143, 0])
    done = launch(world, "--spot")
    assert done.returncode == 0, done.stderr
    assert verbs(world) == ["tpu-vm create", "tpu-vm scp", "tpu-vm delete", "tpu-vm create", "tpu-vm scp"]
    runs = world.calls("train")
    assert sorted(run[0] for run in runs) == ["0", "0", "1", "1"]
    assert all(run[1:] == FLAGS for run in runs), "a resume is the same command"
    assert "slice a-run: LOST" in done.stderr
    assert "retry 1 of 10" in done.stderr


@pytest.mark.parametrize("step", ["scp", "tar -xzf", "start", "status"])
def test_a_worker_that_refuses_once_is_asked_again(world, step):
    world = world(refuse=[["1", step], ["0", "nothing"]] if step in ("scp", "start") else [["0", step], None])
    done = launch(world)
    assert done.returncode == 0, done.stderr
    # No worker was started twice, and none was left out.
    assert sorted(run[0] for run in world.calls("train")) == ["0", "1"]


def test_a_worker_that_never_answers_ends_it_in_bounds(world):
    world = world(refuse=[["1", "install"]])
    done = launch(world, "--retries", "1")
    assert done.returncode == 1
    assert "try 5 of 5" in done.stderr
    assert "1 retries are used up" in done.stderr
    assert world.calls("train") == []


def test_a_failure_is_tried_again_in_bounds(world):
    world = world(runs0=[1])
    done = launch(world, "--retries", "2")
    assert done.returncode == 1
    assert [run[0] for run in world.calls("train")].count("0") == 3
    assert "the run ended with status 1" in done.stderr
    assert "2 retries are used up" in done.stderr


def test_a_worker_that_vanishes_is_a_failure(world):
    world = world(runs0=["vanish", 0])
    done = launch(world)
    assert done.returncode == 0, done.stderr
    assert "ended with status 137" in done.stderr


@pytest.mark.parametrize("plan", [{"runs0": [2]}, {"runs0": [75], "runs1": [2]}])
def test_wrong_usage_on_any_worker_is_not_tried_again(world, plan):
    world = world(**plan)
    done = launch(world)
    assert done.returncode == 2, done.stderr
    assert [run[0] for run in world.calls("train")].count("0") == 1
    assert "not tried again" in done.stderr


def test_a_queued_slice_is_waited_for(world):
    world = world(queue=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    done = launch(world, "--queued", "--spot")
    assert done.returncode == 0, done.stderr
    (create,) = world.calls("gcloud", "compute", "tpus", "queued-resources", "create")
    assert {"--node-id=a-run", "--runtime-version=image", "--spot"} <= set(create)
    assert "slice a-run: WAIT" in done.stderr


def test_a_queued_slice_that_was_taken_away_is_queued_again(world):
    world = world(queue=["SUSPENDED", "ACTIVE"])
    world.queue.mkdir()
    (world.queue / "a-run").write_text("a-run")
    done = launch(world, "--queued")
    assert done.returncode == 0, done.stderr
    assert verbs(world)[:2] == ["queued-resources delete", "queued-resources create"]
    (delete,) = world.calls("gcloud", "compute", "tpus", "queued-resources", "delete")
    assert {"--force", "--quiet"} <= set(delete)


def test_several_slices_run_the_same_command(world):
    world = world()
    done = launch(world, "--slices", "2")
    assert done.returncode == 0, done.stderr
    (create,) = world.calls("gcloud", "compute", "tpus", "queued-resources", "create")
    assert {"--node-count=2", "--node-prefix=a-run"} <= set(create)
    assert sorted(run[0] for run in world.calls("train")) == ["0", "0", "1", "1"]
    assert {path.name for path in world.nodes.iterdir()} == {"a-run-0", "a-run-1"}


def test_a_run_that_goes_on_is_followed_and_stopped_for_good(world):
    world = world(runs0=["wait"], runs1=["wait"])
    environment = world.environment
    words = ["bash", world.script, *SLICE, "--", *FLAGS]
    first = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    world.wait_for_runs(2)
    first.send_signal(signal.SIGKILL)  # the laptop is closed
    first.wait()
    second = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = next(line for line in second.stderr if "goes on" in line)
    assert "following worker 0" in said
    stop = subprocess.run([*words[:6], "--stop"], env=environment, capture_output=True, timeout=60)
    assert stop.returncode == 0, stop.stderr
    _, err = second.communicate(timeout=60)
    assert second.returncode == 143, err
    assert "stopped; the same command goes on" in err
    assert len(world.calls("train")) == 2
    # Given again, it does.
    world.plan(runs0=[0], runs1=[0])
    assert launch(world).returncode == 0
    assert len(world.calls("train")) == 4


def test_deleting_deletes(world):
    world = world()
    world.make_node("a-run")
    assert launch(world, "--delete", flags=[]).returncode == 0
    assert not (world.nodes / "a-run").exists()
    assert launch(world, "--delete", "--queued", flags=[]).returncode == 0
    assert verbs(world) == ["tpu-vm delete", "queued-resources delete"]


def test_a_slice_of_another_size_than_asked_for_is_not_run_on(world):
    """And deleted if it was to be: it costs as much as one that runs."""
    world = world()
    done = launch(world, "--workers", "9", "--delete-after")
    assert done.returncode == 2
    assert "slice a-run of type v5litepod-8 has 2 workers, and --workers is 9" in done.stderr
    assert world.calls("train") == []
    assert verbs(world) == ["tpu-vm create", "tpu-vm delete"]


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--stop", "--delete"], "--stop and --delete are one or the other"), (["--create-flag="], "unknown argument")],
)
def test_what_cannot_be_meant_is_refused(world, options, says):
    world = world()
    done = launch(world, *options, flags=[])
    assert (done.returncode, world.calls("gcloud")) == (2, [])
    assert says in done.stderr


def test_a_dry_run_shows_it_all_and_asks_nobody(world):
    world = world()
    done = launch(world, "--dry-run", "--slices", "2")
    assert done.returncode == 0, done.stderr
    assert world.calls("gcloud") == []
    order = ("tar -C", "queued-resources create a-run", "scp", "worker.sh\\ install", "worker.sh\\ start", "follow")
    places = [done.stdout.index(part) for part in order]
    assert places == sorted(places)
    assert done.stdout.count("scp") == 2
    assert all(line.startswith("+ ") for line in done.stdout.splitlines())
