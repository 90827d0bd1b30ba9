"""Runs of several real processes, one of which is harmed at a chosen moment.

As a program this is a nursery: a process that has imported all that training needs and has touched no device yet. It
forks the processes of one run after the other, so that none of them spends its time on imports; each is then a process
like any other, that joins the others by address and number. Harm is done from outside the package, by replacing what
a process is about to call.
"""

import contextlib
import ctypes
import faulthandler
import functools
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

HEARTBEAT = 10  # seconds; JAX's own choice is 100, which would make each drill take that long
# One device a process, and programs that compile fast, as in conftest.py and quick.py.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
QUICK += " --xla_force_host_platform_device_count=1"
LATE = 600  # seconds that a run may take before it is ended, and the drill has failed: processors may be busy elsewhere
BEHIND = HEARTBEAT + 60  # seconds that the others may live on: they find out by the heartbeat, on busy processors
BALLAST = "ballast"  # the file that fills a disk


class Outcome(NamedTuple):
    """What became of the processes of a run, in their order."""

    statuses: list[int]  # as `subprocess` counts: negative for a signal
    seconds: list[float]  # from the start of the run to each one's end
    late: bool  # whether they were ended because they did not end
    out: list[str]
    err: list[str]
    seen: list[dict]  # what each one counted and measured

    @property
    def behind(self) -> float:
        """The seconds between the first end and the last."""
        return max(self.seconds) - min(self.seconds)


class Nursery:
    """Starts runs of several processes."""

    def __init__(self, folder):
        """Takes a folder for what the processes print; the program is started here."""
        self._folder, self._runs = Path(folder), 0
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, "PYTHONUNBUFFERED": "1"}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(self._folder / "programs")}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        with (self._folder / "nursery").open("w") as errors:
            self._program = subprocess.Popen([sys.executable, __file__], env=environment, stderr=errors, **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """Ends the program and whatever of its processes is left."""
        os.killpg(self._program.pid, signal.SIGKILL)
        self._program.wait()
        self._program.stdin.close()
        self._program.stdout.close()

    def run(self, arguments, *, command="train", count=4, harm=None, who=None, late=LATE, **options) -> Outcome:
        """Runs a command in so many processes, and waits for their end.

        Args:
          arguments: of the command.
          command: the name of its module, or of a function out of WORK.
          count: of processes, one device each.
          harm: the name of a function out of HARMS, None for a healthy run.
          who: the number of the process that is harmed; None for all.
          late: seconds after which all are ended.
          options: of the harm.
        """
        self._runs += 1
        files = [str(self._folder / f"run{self._runs}.{i}") for i in range(count)]
        environment = {}
        if count > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
            arguments = [*arguments, "--distributed"]
        order = {"arguments": list(map(str, arguments)), "environment": environment, "files": files, "late": late}
        order |= {"command": command, "harm": harm, "who": who, "options": options}
        self._program.stdin.write(json.dumps(order) + "\n")
        self._program.stdin.flush()
        ready, _, _ = select.select([self._program.stdout], [], [], late + 60)
        answer = self._program.stdout.readline() if ready else ""
        assert answer, (self._folder / "nursery").read_text()[-3000:]
        read = lambda file: Path(file).read_text() if os.path.exists(file) else ""
        out, err = ([read(f"{file}.{kind}") for file in files] for kind in ("out", "err"))
        seen = [json.loads(read(f"{file}.json") or "{}") for file in files]
        return Outcome(**json.loads(answer), out=out, err=err, seen=seen)


def flags(**options) -> list[str]:
    """Returns options as the words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


# What a process counts and measures. It is written down when it ends by itself.
SEEN = {"rows": {}, "written": [], "memory": {}}


def die():
    """Ends this process as a machine that is switched off does: it says nothing and tidies nothing."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, act):
    """Has something done each time before a function is called."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def replaced(*args, **kwargs):
        act(*args, **kwargs)
        return function(*args, **kwargs)

    setattr(owner, name, replaced)


def once(act, at=1):
    """Returns a function that acts the n-th time that it is called."""
    calls = []

    def count(*args, **kwargs):
        calls.append(None)
        if len(calls) == at:
            act()

    return count


def in_the_first_compilation():
    """Dies when the step goes to the compiler."""
    from jax._src import compiler

    def die_of_the_step(backend, program, *args, **kwargs):
        if "step" in str(program.operation.attributes["sym_name"]):
            die()

    before(compiler, "compile_or_get_cached", die_of_the_step)


def in_a_step(at):
    """Dies when so many steps are on their way."""
    from napo_jax.journal import Journal

    before(Journal, "step", once(die, at))


def in_a_save(at):
    """Dies in the n-th save, when this process has written its part and the save is not whole."""
    from napo_jax import checksums

    before(checksums, "_sum_own", once(die, at))


def in_a_restore():
    """Dies when the state is about to be read."""
    from napo_jax.checkpoint import Checkpoints

    before(Checkpoints, "restore", once(die))


def between_answers(at):
    """Dies when it has written so many pieces of what it said, of one answer each."""
    from napo_jax.pieces import Pieces

    make = Pieces.__init__
    Pieces.__init__ = lambda self, folder, **options: make(self, folder, **options | {"size": 1})
    before(Pieces, "flush", once(die, at + 1))


def watch_answers():
    """Notes which rows are answered here."""
    from napo_jax.pieces import Pieces

    before(Pieces, "add", lambda _, line: SEEN["rows"].setdefault(line.name, []).append([line.file, line.row]))


def slow(seconds):
    """Sleeps in each step."""
    from napo_jax.journal import Journal

    before(Journal, "step", lambda *args, **kwargs: time.sleep(seconds))


def disk_fills_up(disk):
    """Fills the disk in the first step; where none of its own could be mounted, files may not grow any more."""
    from napo_jax.journal import Journal

    def fill():
        if disk is None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return
        import jax

        if jax.process_index() == 0:
            fill_up(disk)

    before(Journal, "step", once(fill))


def fill_up(disk):
    """Writes a file that leaves no room."""
    with open(Path(disk) / BALLAST, "wb", buffering=0) as f:
        for size in (1 << 20, 1 << 12):
            try:
                while f.write(bytes(size)) == size:
                    pass
            except OSError:
                pass


def permission_goes(folder):
    """Takes away the permission to write into a folder in the first step."""
    from napo_jax.journal import Journal

    obey_permissions()
    before(Journal, "step", once(lambda: os.chmod(folder, 0o555)))


def obey_permissions():
    """Makes permissions hold for this process even if it is root's: the capabilities to go past them are given up."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    capabilities = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, capabilities):
        raise OSError(ctypes.get_errno(), "capget")
    past_permissions = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    for i in range(3):  # effective, permitted, inheritable
        capabilities[i] &= ~past_permissions
    if libc.capset(header, capabilities):
        raise OSError(ctypes.get_errno(), "capset")


@contextlib.contextmanager
def measured(name):
    """Notes how far the body of a `with` raises the memory of this process, in bytes."""
    give_back_memory()
    resident = forget_peak()
    yield
    SEEN["memory"][name] = memory("VmHWM") - resident


def give_back_memory():
    """Has the C library give back what is freed, now and from now on, so that what a peak shows was really held."""
    libc, mmap_threshold = ctypes.CDLL(None), -3
    libc.mallopt(mmap_threshold, 1 << 16)
    libc.malloc_trim(0)


def forget_peak() -> int:
    """Sets the peak of this process's memory to what it has now, and returns that."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(field) -> int:
    """Returns a field of /proc/self/status in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def watch():
    """Notes which records are read for which step, and the files of the workdir that are opened to write."""
    from napo_jax.data.loader import _Steps

    read = _Steps.__getitem__

    def counted(self, i):
        element = read(self, i)
        # By the last who reads them: what computes the reference reads all rows before.
        SEEN["rows"][str(self.start + i + 1)] = element["arrays"]["ids"].tolist()
        return element

    _Steps.__getitem__ = counted

    def opened(event, arguments):
        if event == "open" and not isinstance(arguments[0], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            _, inside, place = os.fsdecode(arguments[0]).partition("/straight/")
            SEEN["written"] += [place] if inside else []

    sys.addaudithook(opened)


HARMS = {
    function.__name__: function
    for function in (
        in_the_first_compilation,
        in_a_step,
        in_a_save,
        in_a_restore,
        between_answers,
        watch_answers,
        slow,
        disk_fills_up,
        permission_goes,
        obey_permissions,
        watch,
    )
}


def keep_a_state(arguments):
    """Restores a state of 128 MB that other processes saved, or makes it, and saves it anew.

    Arguments: the folder of the saves, and the number that the new save gets.
    """
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from napo_jax.checkpoint import Checkpoints
    from napo_jax.processes import together

    def state_of(rows):
        """Returns the shapes of eight leaves, and what makes a part of each."""
        like = {f"params/{i}": jax.ShapeDtypeStruct((rows, 2048), np.float32, sharding=spread) for i in range(8)}
        return like, lambda index, i: np.arange(rows * 2048, dtype=np.float32).reshape(rows, 2048)[index] + i

    def make(like, fill):
        return {
            name: jax.make_array_from_callback(leaf.shape, spread, functools.partial(fill, i=i))
            for i, (name, leaf) in enumerate(like.items())
        }

    folder, step = Path(arguments[0]), int(arguments[1])
    with together(insist=False):
        mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
        spread = NamedSharding(mesh, PartitionSpec("fsdp"))
        with Checkpoints(folder / "small") as checkpoints:  # so that all code is in memory that this takes
            like, fill = state_of(jax.device_count())
            checkpoints.save(step, make(like, fill), {})
            checkpoints.wait()
            checkpoints.restore(step, like)
        with Checkpoints(folder / "large", keep_last=1) as checkpoints:
            like, fill = state_of(2048)
            with measured("restore"):
                latest = checkpoints.recover(print)
                state = make(like, fill) if latest is None else checkpoints.restore(latest, like)[0]
                jax.block_until_ready(state)
            for i, leaf in enumerate(state.values()):
                (shard,) = leaf.addressable_shards
                assert (shard.data == fill(shard.index, i)).all()
            with measured("save"):
                checkpoints.save(step, state, {})
                checkpoints.wait()


def read_a_share(arguments):
    """Reads the batches of two epochs, this process's rows of them.

    Arguments: the file of the rows, the folder of the cache, and how many steps two epochs are.
    """
    from loader_run import dataset_of

    from napo_jax.processes import together

    file, cache, steps = arguments[0], arguments[1], int(arguments[2])
    with together(insist=False):
        with measured("convert"):
            dataset = dataset_of(file, cache)
        with measured("read"):
            numbers = [batch.ids.tolist() for batch in dataset.loader()(0, steps)]
    SEEN["rows"] |= {str(step): some for step, some in enumerate(numbers)}


WORK = {function.__name__: function for function in (keep_a_state, read_a_share)}


def keep_programs():
    """Lets every process keep what it compiles, and not the first alone: it compiles the same in every run."""
    from jax._src import compiler, distributed

    write, state = compiler._cache_write, distributed.global_state

    def write_as_the_first(*args, **kwargs):
        own, state.process_id = state.process_id, 0
        try:
            write(*args, **kwargs)
        finally:
            state.process_id = own

    compiler._cache_write = write_as_the_first


def be_one(order, index):
    """Is one of the processes of a run; returns its exit status."""
    file = order["files"][index]
    for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(f"{file}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream.fileno())
    os.environ |= order["environment"] | {"JAX_PROCESS_ID": str(index)}
    if not order["environment"]:
        del os.environ["JAX_PROCESS_ID"]

    faulthandler.register(signal.SIGUSR1)  # so that who does not end says where it is
    import jax

    from napo_jax.command import exit_with_one_line

    jax.distributed.initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=HEARTBEAT)
    keep_programs()
    try:
        if order["harm"] and order["who"] in (None, index):
            HARMS[order["harm"]](**order["options"])
        if order["command"] in WORK:
            WORK[order["command"]](order["arguments"])
        else:
            command = importlib.import_module(f"napo_jax.{order['command']}")
            exit_with_one_line(lambda: command.main(order["arguments"]))
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        Path(f"{file}.json").write_text(json.dumps(SEEN))
    return 0


def raise_children(order):
    """Forks the processes of a run and waits for them; returns in each of them, with None for the nursery itself."""
    began, ends, children = time.monotonic(), {}, []
    for index in range(len(order["files"])):
        if not (child := os.fork()):
            return be_one(order, index)
        children.append(child)
    late = False
    while len(ends) < len(children):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            ends[child] = os.waitstatus_to_exitcode(status), time.monotonic() - began
            continue
        if not late and time.monotonic() - began > order["late"]:
            late = True
            for how in (signal.SIGUSR1, signal.SIGKILL):
                for child in set(children) - set(ends):
                    os.kill(child, how)
                time.sleep(1)
        time.sleep(0.02)
    statuses, seconds = zip(*(ends[child] for child in children), strict=True)
    print(json.dumps({"statuses": statuses, "seconds": seconds, "late": late}), flush=True)
    return None


def main():
    """Is the nursery: a line on the standard input for each run, and one on the standard output when it is over."""
    import orbax.checkpoint  # noqa: F401
    import transformers  # noqa: F401

    import napo_jax.build_bias
    import napo_jax.evaluate
    import napo_jax.train  # noqa: F401

    # A pipe gives what was written at once; nothing is buffered that a child has too.
    while line := os.read(0, 1 << 20):
        if (status := raise_children(json.loads(line))) is not None:
            sys.exit(status)


if __name__ == "__main__":
    main()
