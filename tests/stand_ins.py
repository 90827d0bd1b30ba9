"""Stand-ins for what the launch scripts call: they record what they are asked, do it in a folder, and fail as planned.

`gcloud` keeps slices as folders, with a folder for each worker, and its ssh runs the command in one of those: what the
scripts say to workers really runs. `srun` starts tasks, `scancel` signals them, `kubectl` records. The `python` on the
way plays the training, and ends as planned.

The plan is a file: lists by name, from which each call takes the first. No test needs a cloud, and none is reached.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("gcloud", "kubectl", "srun", "scancel", "scontrol", "nvidia-smi", "python3.11", "python3.12", "python3.13")
MESSAGES = {
    "capacity": "ERROR: (gcloud.compute.tpus) There is no more capacity in the zone; code 8",
    "quota": "ERROR: (gcloud.compute.tpus) RESOURCE_EXHAUSTED: Quota limit 'TPUS' has been exceeded",
    "denied": "ERROR: (gcloud.compute.tpus) PERMISSION_DENIED: permission 'tpu.nodes.create' denied",
}


class World:
    """The folder of one test: commands, their plan, and what they were asked."""

    def __init__(self, folder, script=None, **plan):
        """Makes the commands and the plan for a script; a `World` of an existing folder takes it as it is."""
        self.folder, self.script = Path(folder), script
        self.nodes, self.queue = self.folder / "nodes", self.folder / "queue"
        self._plan, self._calls = self.folder / "plan.json", self.folder / "calls.jsonl"
        if not self._plan.exists():
            (self.folder / "bin").mkdir(parents=True)
            self.plan(**plan)
            for name in (*NAMES, "python"):
                make_command(self.folder / "bin" / name)

    @property
    def environment(self):
        """The environment of a script that shall find the stand-ins."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "JAX_", "CLOUDSDK"))}
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        folder = str(self.folder)
        return kept | {"PATH": path, "STAND_INS": folder, "HOME": folder, "TMPDIR": folder}

    def plan(self, **plan):
        """Plans anew what happens."""
        self._plan.write_text(json.dumps(plan))

    def call(self, name, words):
        """Records a call."""
        with open(self._calls, "a") as file:
            file.write(json.dumps([name, *words]) + "\n")

    def calls(self, name, *words):
        """Returns the calls of a command, those that begin with these words."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [call[1:] for call in map(json.loads, lines) if call[: 1 + len(words)] == [name, *words]]

    def take(self, name, default=None):
        """Takes the next thing of a planned list; its last stays."""
        with open(self._plan, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            plan = json.load(file)
            planned = plan.get(name) or [default]
            value = planned.pop(0) if len(planned) > 1 else planned[0]
            file.seek(0)
            file.truncate()
            json.dump(plan, file)
        return value

    def make_node(self, name):
        """Makes a slice, with its workers."""
        for worker in range(self.take("workers", 2)):
            (self.nodes / name / str(worker)).mkdir(parents=True)
        (self.nodes / name / "state").write_text("READY")

    def end(self):
        """Ends what a test has left running."""
        for marker in self.folder.glob("running/*"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(marker.name), signal.SIGKILL)

    def wait_for_runs(self, count):
        """Waits until so many trainings run."""
        until = time.monotonic() + 20
        while len(list(self.folder.glob("running/*"))) < count:
            assert time.monotonic() < until
            time.sleep(0.02)


# A Python of a worker: it makes environments and installs nothing; what it trains is played below.
_PYTHON = """#!/bin/sh
case "$1 $2" in
    "-c "*) exit ;;
    "-m venv") for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python"; exit ;;
    "-m pip") echo "$*" >>"$STAND_INS/pip"; exit ;;
esac
"""


def make_command(path):
    """Makes the command of a name."""
    start = _PYTHON if path.name.startswith("python") else "#!/bin/sh\n"
    path.write_text(f'{start}exec {sys.executable} -SE {__file__} {path.name} "$@"\n')
    path.chmod(0o755)


def fail(message, status=1):
    print(message, file=sys.stderr)
    raise SystemExit(status)


def gcloud(world, words):
    """Plays the TPU commands of gcloud."""
    what, verb, *rest = words[2:]
    positional = [word for word in rest if not word.startswith("--")]
    options = dict(word[2:].partition("=")[::2] for word in rest if word.startswith("--"))
    name = positional[0]
    node, queued = world.nodes / name, world.queue / name
    if verb == "create":
        if (planned := world.take("create")) in MESSAGES:
            fail(MESSAGES[planned])
        if what == "tpu-vm":
            world.make_node(name)
        else:
            world.queue.mkdir(exist_ok=True)
            slices = int(options.get("node-count", 1))
            queued.write_text("\n".join([name] if slices == 1 else [f"{name}-{i}" for i in range(slices)]))
    elif verb == "describe":
        if not (node if what == "tpu-vm" else queued).exists():
            fail(world.take("describe") or f"ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource {name} was not found")
        if "networkEndpoints" in options["format"]:
            print(len([worker for worker in node.iterdir() if worker.is_dir()]))
        elif what == "tpu-vm":
            print((node / "state").read_text())
        else:
            state = world.take("queue", "ACTIVE")
            for node in queued.read_text().split() if state == "ACTIVE" else ():
                if not (world.nodes / node).exists():
                    world.make_node(node)
            print(state)
    elif verb == "delete":
        for node in queued.read_text().split() if what != "tpu-vm" and queued.exists() else [name]:
            shutil.rmtree(world.nodes / node, ignore_errors=True)
        queued.unlink(missing_ok=True)
    elif verb == "start":
        (node / "state").write_text("READY")
    else:
        connect(world, verb, positional, options)


def connect(world, verb, positional, options):
    """Plays ssh and scp to the workers of a slice."""
    node = world.nodes / positional[-1 if verb == "scp" else 0].partition(":")[0]
    if not node.exists() or (node / "state").read_text() != "READY":
        fail(f"ssh: connect to {node.name}: Connection timed out", 255)
    workers = sorted(worker.name for worker in node.iterdir() if worker.is_dir())
    worst = 0
    for worker in workers if options["worker"] == "all" else [options["worker"]]:
        home, command = node / worker, options.get("command", "scp")
        refused = world.take("refuse")
        if refused and refused[0] == worker and refused[1] in command:
            print(f"ssh: worker {worker}: Connection refused", file=sys.stderr)
            worst = 255
        elif verb == "scp":
            shutil.copy(positional[0], home / positional[1].partition(":")[2])
        else:
            done = subprocess.run(["bash", "-c", command], env=os.environ | {"HOME": str(home)}, cwd=home)
            worst = max(worst, done.returncode)
    raise SystemExit(worst)


def python(world, words):
    """Plays a training."""
    home = Path(os.environ["HOME"])
    worker = os.environ.get("SLURM_PROCID", home.name if home.parent.parent == world.nodes else "0")
    world.call("train", [worker, *words[2:]])
    print("step 1", flush=True)
    end = world.take(f"runs{worker}", 0)
    if end == "wait":  # until it is told to end
        marker = world.folder / "running" / str(os.getpid())

        def stopped(*_):
            marker.unlink()
            raise SystemExit(143)

        signal.signal(signal.SIGTERM, stopped)
        marker.parent.mkdir(exist_ok=True)
        marker.touch()
        while True:
            time.sleep(0.02)
    if end == "preempt":
        (home.parent / "state").write_text("PREEMPTED")
        end = 143
    if end == "vanish":  # the machine starts again, and nothing is written of how it ended
        os.kill(os.getppid(), signal.SIGKILL)
    raise SystemExit(end)


def srun(world, words):
    """Plays srun: starts a task on each node, and ends with the greatest status."""
    command = words[next(i for i, word in enumerate(words) if not word.startswith("--")) :]
    tasks, folder = int(os.environ.get("SLURM_JOB_NUM_NODES", 1)), world.folder / "tasks"
    folder.mkdir(exist_ok=True)
    started = []
    for task in range(tasks):
        environment = os.environ | {"SLURM_PROCID": str(task)}
        started.append(subprocess.Popen(command, env=environment, start_new_session=True))
        (folder / str(started[-1].pid)).touch()
    signal.signal(signal.SIGTERM, lambda *_: [os.killpg(task.pid, signal.SIGKILL) for task in started])
    status = max(task.wait() if task.returncode is None else 0 for task in started)
    raise SystemExit(status if status >= 0 else 128 - status)


def scancel(world, words):
    """Plays scancel: signals all processes of all tasks."""
    number = getattr(signal, f"SIG{words[0].partition('=')[2]}")
    for task in (world.folder / "tasks").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(task.name), number)


def main(name, words):
    """Plays one command."""
    world = World(os.environ["STAND_INS"])
    if not name.startswith("python"):
        world.call(name, words)
    if name == "gcloud":
        gcloud(world, words)
    elif name.startswith("python"):
        python(world, words)
    elif name == "srun":
        srun(world, words)
    elif name == "scancel":
        scancel(world, words)
    elif name == "scontrol":
        raise SystemExit(world.take("requeue", 0))
    elif name == "nvidia-smi":
        for gpu in range(world.take("gpus", 8)):
            print(f"GPU {gpu}: NVIDIA (UUID: GPU-{gpu})")
    elif name == "kubectl":
        if "apply" in words:
            (world.folder / "applied.yaml").write_text(sys.stdin.read())
        if "get" in words:
            print(world.take("jobset", ""), end="")
        raise SystemExit(world.take("kubectl", 0))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
