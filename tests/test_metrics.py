"""What a run says: each step once in a file that every reader takes, rates by the clock, and no device kept waiting."""

import io
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from jax.sharding import NamedSharding, PartitionSpec

from napo_jax.metrics import (
    Console,
    Late,
    MetricsWriter,
    Pace,
    peak_flops,
    progress_line,
    to_tensorboard,
    to_wandb,
)


class Clock:
    """A clock that stands still until it is moved."""

    now = 100.0

    def __call__(self):
        """Returns seconds."""
        return self.now


class Traced:
    """An array that notes when its copy is begun and when it is read."""

    def __init__(self, name, value, log):
        self.name, self.value, self.log = name, value, log

    def copy_to_host_async(self):
        """Begins the copy."""
        self.log.append(f"begin {self.name}")

    def __array__(self, dtype=None, copy=None):
        self.log.append(f"read {self.name}")
        return np.asarray(self.value, dtype)


def test_metrics_are_read_when_the_next_step_is_on_its_way(monkeypatch):
    """All copies of a step are begun at once, and none is waited for before the next step's are begun."""
    log, fetches, device_get = [], [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetches.append(len(tree)) or device_get(tree))
    step = lambda n: {name: Traced(f"{name}{n}", n + 0.5, log) for name in ("loss", "q")}
    late = Late()
    assert late.flush() is None
    assert late.push(1, step(1)) is None
    assert log == ["begin loss1", "begin q1"]
    assert late.push(2, step(2)) == (1, {"loss": 1.5, "q": 1.5})
    assert log.index("begin q2") < log.index("read loss1")
    assert "read loss2" not in log
    assert late.flush() == (2, {"loss": 2.5, "q": 2.5})
    assert late.flush() is None
    assert late.push(3, step(3)) is None
    assert fetches == [2, 2]


def test_metrics_of_a_mesh_become_floats_without_an_implicit_transfer():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(np.arange(8, dtype=np.float32), NamedSharding(mesh, PartitionSpec("data")))
    run = jax.jit(lambda x: {"loss": x.mean(), "third": (x / 3)[1], "count": jnp.int32(3), "half": jnp.bfloat16(0.5)})
    late = Late()
    metrics = run(x)
    with jax.transfer_guard("disallow"):
        late.push(1, metrics)
        step, floats = late.flush()
    assert (step, floats) == (
        1,
        {"loss": 3.5, "third": float(np.float32(1) / np.float32(3)), "count": 3.0, "half": 0.5},
    )
    assert {type(value) for value in floats.values()} == {float}


def test_lines_are_in_the_file_at_once_and_bring_back_every_bit(tmp_path):
    writer = MetricsWriter(tmp_path / "run")
    values = [float(x) for x in np.random.default_rng(0).standard_normal(50).astype(np.float32)]
    for step, value in enumerate(values, 1):
        writer.write(step, {"loss": value, "language_bias/q": 0.1})
        last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
        assert json.loads(last) == {"step": step, "loss": value, "language_bias/q": 0.1}
    writer.close()


def test_what_is_not_finite_is_null_and_named(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": math.inf, "q": math.nan, "low": -math.inf, "margin": 0.25})
    writer.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    names = {"loss": "inf", "q": "nan", "low": "-inf"}
    assert line == {"step": 1, "loss": None, "q": None, "low": None, "margin": 0.25, "not_finite": names}


@pytest.mark.parametrize("end", ["", '{"step": 6, "lo', '{"step": 3', "\0\0\0", '{"step": 6}'])
def test_a_run_that_goes_on_has_each_step_once(tmp_path, end):
    """Steps 4 and 5 were logged after the checkpoint of step 3, and the kill may have cut the last line."""
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
    writer.close()
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + end)
    writer = MetricsWriter(tmp_path, 3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]
    assert writer.dropped == 2 + bool(end)
    for step in (4, 5):
        writer.write(step, {"loss": 10.0 * step})
    writer.close()
    assert [json.loads(line)["loss"] for line in file.read_text().splitlines()] == [1, 2, 3, 40, 50]
    assert list(tmp_path.iterdir()) == [file]


def test_a_whole_last_line_without_its_end_is_kept_and_ended(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}')
    writer = MetricsWriter(tmp_path, 2)
    writer.write(3, {"loss": 0.125})
    writer.close()
    assert [json.loads(line)["loss"] for line in file.read_text().splitlines()] == [0.5, 0.25, 0.125]


def test_a_file_that_is_something_else_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl is not an object with a step"):
        MetricsWriter(tmp_path, 3)
    assert file.read_text() == '{"step": 1}\n[2]\n{"step": 3}\n'


class Bucket(MemoryFileSystem):
    """A store like Google's: an object is written whole, and there is no appending."""

    protocol = ("gs",)

    def _open(self, path, mode="rb", **options):
        assert "a" not in mode
        return super()._open(path, mode=mode, **options)


def test_a_store_without_appending_has_the_lines_once_a_minute_and_when_flushed(monkeypatch):
    bucket = Bucket()
    monkeypatch.setattr(epath.backend.fsspec_backend, "fs", lambda path: bucket)
    file, clock = epath.Path("gs://bucket/run/metrics.jsonl"), Clock()
    steps = lambda: [json.loads(line)["step"] for line in file.read_text().splitlines()]
    writer = MetricsWriter("gs://bucket/run", clock=clock)
    for step, seconds, there in ((1, 59, []), (2, 1, [1, 2]), (3, 1, [1, 2])):
        clock.now += seconds
        writer.write(step, {"loss": 0.5})
        assert steps() == there
    writer.flush()
    assert steps() == [1, 2, 3]
    writer.write(4, {"loss": 0.5})
    writer.close()
    assert steps() == [1, 2, 3, 4]
    MetricsWriter("gs://bucket/run", 2).close()
    assert steps() == [1, 2]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    stream = io.StringIO()
    writer, console = MetricsWriter(tmp_path / "run"), Console(stream)
    for write in (writer.write, to_tensorboard(tmp_path / "run"), to_wandb(tmp_path / "run", {})):
        write(1, {"loss": 0.5})
    writer.flush()
    writer.close()
    console.progress("step 1")
    console.note("done")
    console.close()
    assert stream.getvalue() == ""
    assert not list(tmp_path.iterdir())


def test_rates_are_of_the_steps_since_the_last_line_and_of_nothing_else():
    """By hand: compilation, evaluation and the first step are in no number."""
    clock = Clock()
    pace = Pace(peak=1000.0, clock=clock)

    def done(seconds, **counts):
        clock.now += seconds
        pace.done(**{"examples": 8, "tokens": 100, "flops": 500.0} | counts)

    assert pace.rates() == {}
    done(60.0)  # the first step, compiled
    assert pace.rates() == {}
    done(1.0)
    done(3.0, tokens=300, flops=1500.0)
    assert pace.rates() == {
        "seconds_per_step": 2.0,
        "examples_per_second": 4.0,
        "tokens_per_second": 100.0,
        "mfu": 0.5,
    }
    assert pace.rates() == {}  # an interval of its own each time
    done(2.0)
    pace.interrupted()  # the step that follows was compiled
    done(40.0, tokens=10**9)
    done(2.0)
    assert pace.rates() == {
        "seconds_per_step": 2.0,
        "examples_per_second": 4.0,
        "tokens_per_second": 50.0,
        "mfu": 0.25,
    }
    done(2.0, flops=math.nan)
    assert "mfu" not in pace.rates()
    unknown = Pace(peak=None, clock=clock)
    for _ in range(2):
        clock.now += 2.0
        unknown.done(examples=8, tokens=100, flops=500.0)
    assert list(unknown.rates()) == ["seconds_per_step", "examples_per_second", "tokens_per_second"]


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", None),
        ("TPU v4 lite", None),
        ("TPU7x", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_devices_is_known_by_their_whole_name(kind, tera):
    device = types.SimpleNamespace(device_kind=kind)
    assert peak_flops([device] * 4) == (None if tera is None else 4e12 * tera)
    assert peak_flops([device, types.SimpleNamespace(device_kind="a stranger")]) is None
    assert peak_flops() is None  # fake devices


def test_the_line_says_where_a_run_is():
    rates = {"seconds_per_step": 0.5, "examples_per_second": 3.14159, "tokens_per_second": 2.5e6, "mfu": 0.4567}
    metrics = {"loss": 0.69314, "text/margin": 0.125, "text/loss": 9.0, "anchor/margin": -12.5}
    assert progress_line(8, 100, metrics, rates) == (
        "step 8/100  3.14 examples/s  2.5M tokens/s  MFU 45.7%  ETA 0:00:46  loss 0.6931  "
        "margins text +0.125 anchor -12.500"
    )
    assert progress_line(8, 100, {"loss": math.nan}, {}) == "step 8/100  loss nan"
    days = progress_line(0, 1000, {"loss": 1.0}, rates | {"seconds_per_step": 100.0})
    assert "ETA 1 day, 3:46:40" in days


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        """Says so."""
        return True


def test_a_file_has_a_line_each_and_a_terminal_one_that_is_redrawn(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    for stream, want in (
        (io.StringIO(), "step 1, a line that is long\nstep 2\nsaved\nstep 3\n"),
        (Terminal(), "\rstep 1, a line that\x1b[K\rstep 2\x1b[K\nsaved\n\rstep 3\x1b[K\n"),
    ):
        console = Console(stream)
        console.progress("step 1, a line that is long")
        console.progress("step 2")
        console.note("saved")
        console.progress("step 3")
        console.close()
        console.close()
        assert stream.getvalue() == want


def test_tensorboard_and_wandb_get_all_that_is_written(tmp_path, monkeypatch):
    """Both packages are stood in for: they are extras, and tests reach no network."""
    scalars, logged, starts = [], [], []

    class Events:
        def __init__(self, folder):
            assert folder == str(tmp_path)

        def add_scalar(self, tag, data, step):
            scalars.append((tag, data, step))

        def flush(self):
            pass

    def init(**options):
        starts.append(options)
        return types.SimpleNamespace(define_metric=lambda *names, step_metric: None, log=logged.append)

    monkeypatch.setitem(sys.modules, "tensorboard.summary", types.SimpleNamespace(Writer=Events))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (1, 2):  # two runs, the second goes on from the first
        also = to_tensorboard(tmp_path), to_wandb(tmp_path, {"beta": 0.1})
        writer = MetricsWriter(tmp_path, step - 1, also=also)
        writer.write(step, {"loss": 0.5 * step, "text/q": 1.0})
        writer.close()
    assert scalars == [("loss", 0.5, 1), ("text/q", 1.0, 1), ("loss", 1.0, 2), ("text/q", 1.0, 2)]
    assert logged == [{"step": 1, "loss": 0.5, "text/q": 1.0}, {"step": 2, "loss": 1.0, "text/q": 1.0}]
    assert starts[0] == starts[1]
    assert starts[0]["config"] == {"beta": 0.1}
    assert starts[0]["resume"] == "allow"


@pytest.mark.parametrize(
    ("package", "log_to"), [("tensorboard", to_tensorboard), ("wandb", lambda folder: to_wandb(folder, {}))]
)
def test_a_package_that_is_missing_is_one_line(tmp_path, monkeypatch, package, log_to):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{package}.summary", raising=False)
    with pytest.raises(ValueError, match=rf"{package} is not installed: pip install 'napo-jax\[logging\]'"):
        log_to(tmp_path)
