"""Two processes that train together: as one would, and on from where they were, whatever ends one of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from quick import QUICK_FLAGS

STEPS = 8
RATES = ("seconds_per_step", "examples_per_second", "tokens_per_second")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


def start(folder, name, count):
    """Starts a run of two devices in one process or in two."""
    options = {"data.cache": folder / "cache", "data.made-up": 24, "data.batch-size": 4, "data.buckets": 1}
    options |= {"train.steps": STEPS, "train.checkpoint-every": 3, "workdir": folder / name}
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "napo_jax.train", "--config", "configs/debug.py", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / f"programs{count}")}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment["XLA_FLAGS"] = f"{QUICK_FLAGS} --xla_force_host_platform_device_count={2 // count}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    if count == 1:
        return [subprocess.Popen(command, env=environment, **pipes)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen([*command, "--distributed"], env=environment | {"JAX_PROCESS_ID": str(i)}, **pipes)
        for i in range(count)
    ]


def finish(processes, status=0):
    """Waits; returns what the first one printed."""
    results = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), results[0][1][-3000:]
    return results[0]


def lines(folder, name):
    """Returns {step: what was measured, without the rates}."""
    file = folder / name / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return {row.pop("step"): {key: value for key, value in row.items() if key not in RATES} for row in rows}


def wait_for(processes, folder, name, step):
    until = time.monotonic() + 200
    while max(lines(folder, name), default=0) < step:
        assert all(process.poll() is None for process in processes), processes[0].communicate()[1][-3000:]
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def straight(folder):
    """Two processes that nothing interrupts."""
    out, _ = finish(start(folder, "straight", 2))
    assert out.count("devices  2 cpu") == 1, "the first process speaks for all"
    assert list(lines(folder, "straight")) == list(range(1, STEPS + 1))
    return lines(folder, "straight")


def test_two_processes_are_one(straight, folder):
    finish(start(folder, "one", 1))
    for step, values in lines(folder, "one").items():
        for name, value in values.items():
            # Margins are differences of sums of several hundred; after some steps their rounding has grown.
            close = 1e-3 if "margin" in name or "reward" in name else 1e-4
            if not name.endswith("accuracy"):
                assert straight[step][name] == pytest.approx(value, rel=1e-4, abs=close), (step, name)
        assert straight[step]["loss"] == pytest.approx(values["loss"], rel=1e-5, abs=1e-5)


def test_whatever_ends_one_of_them_they_go_on_to_the_same_bits(straight, folder):
    # SIGTERM to one: both finish the same step and save it.
    processes = start(folder, "broken", 2)
    wait_for(processes, folder, "broken", 1)
    processes[1].send_signal(signal.SIGTERM)
    _, err = finish(processes, 143)
    stopped = int(err.rpartition("saved step ")[2].partition(";")[0])
    assert 1 <= stopped < STEPS
    # SIGKILL to one: the other notices, and ends.
    processes = start(folder, "broken", 2)
    wait_for(processes, folder, "broken", stopped + 1)
    processes[1].kill()
    began = time.monotonic()
    processes[0].communicate(timeout=120)
    assert processes[0].returncode not in (0, 143)
    assert time.monotonic() - began < 60
    processes[1].communicate()
    out, _ = finish(start(folder, "broken", 2))
    assert "goes on from step" in out
    assert lines(folder, "broken") == straight
