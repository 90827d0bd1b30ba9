"""Two processes that train together: as one would, and on from where they were, whatever ends one of them."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from quick import QUICK_FLAGS

from napo_jax import processes
from napo_jax.processes import together

STEPS = 8
# Seconds after which a process that should have ended by itself has failed: processors may be busy elsewhere.
LATE = 600
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
    environment |= {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": str(count)}
    return [subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(i)}, **pipes) for i in range(count)]


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def finish(started, status=0):
    """Waits; returns what the first one printed."""
    results = [process.communicate(timeout=LATE) for process in started]
    assert [process.returncode for process in started] == [status] * len(started), results[0][1][-3000:]
    return results[0]


def lines(folder, name):
    """Returns {step: what was measured, without the rates}."""
    file = folder / name / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return {row.pop("step"): {key: value for key, value in row.items() if key not in RATES} for row in rows}


def wait_for(started, folder, name, step):
    until = time.monotonic() + LATE
    while max(lines(folder, name), default=0) < step:
        assert all(process.poll() is None for process in started), started[0].communicate()[1][-3000:]
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def straight(folder):
    """Two processes that nothing interrupts."""
    out, _ = finish(start(folder, "straight", 2))
    assert out.count("devices  2 cpu") == 1, "the first process speaks for all"
    assert out.startswith("place    set by hand, process 0 of 2, which meet at localhost:")
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
    started = start(folder, "broken", 2)
    wait_for(started, folder, "broken", 1)
    started[1].send_signal(signal.SIGTERM)
    _, err = finish(started, 143)
    stopped = int(err.rpartition("saved step ")[2].partition(";")[0])
    assert 1 <= stopped < STEPS
    # SIGKILL to one: the other notices, and ends.
    started = start(folder, "broken", 2)
    wait_for(started, folder, "broken", stopped + 1)
    started[1].kill()
    began = time.monotonic()
    started[0].communicate(timeout=120)
    assert started[0].returncode not in (0, 143)
    assert time.monotonic() - began < 60
    started[1].communicate()
    out, _ = finish(start(folder, "broken", 2))
    assert "goes on from step" in out
    assert lines(folder, "broken") == straight


JOIN = "from napo_jax.processes import together\nwith together(say=print): print('joined')"


def join(address, count, process, seconds=3):
    """Starts a process that does nothing but join."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "NAPO_JAX_JOIN_SECONDS": str(seconds)}
    environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": process}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", JOIN], env=environment, **pipes)


def test_whoever_does_not_find_the_others_says_where_it_looked_and_may_be_started_again():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        busy = f"localhost:{taken.getsockname()[1]}"
        nobody, alone = free_address(), free_address()
        ends = {
            "nobody listens": (join(nobody, "2", "1"), nobody, "no answer from"),
            "nobody comes": (join(alone, "2", "0"), alone, "not all of them came"),
            "the port is taken": (join(busy, "2", "0"), busy, "cannot listen at"),
            "no such host": (join("nowhere.invalid:1234", "2", "1"), "nowhere.invalid:1234", "no answer from"),
        }
        for what, (process, address, says) in ends.items():
            out, err = process.communicate(timeout=LATE)
            assert process.returncode == os.EX_TEMPFAIL, (what, err)
            assert out.startswith("place    set by hand, process "), what
            assert "joined" not in out, what
            (line,) = (line for line in err.splitlines() if line.startswith("error: "))
            assert says in line, what
            assert address in line, what
            assert "Traceback" not in err, what
            assert "stack trace" not in err, what


def test_a_wrong_variable_is_one_line_and_no_reason_to_try_again(folder):
    wrong = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "x", "JAX_PROCESS_ID": "0"}
    command = [sys.executable, "-m", "napo_jax.train", "--config", "configs/debug.py", "--workdir", folder / "none"]
    done = subprocess.run(command, env=os.environ | wrong, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: JAX_NUM_PROCESSES must be a number, got 'x'\n"


def test_who_insists_on_others_is_not_alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("JAX_COORD", "JAX_NUM_P", "JAX_PROCESS", "SLURM", "OMPI", "TPU_ML")):
            monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="nothing in the environment says which"), together():
        pass
    said = []
    with together(insist=False, say=said.append):
        assert said == ["place    one process"]
    monkeypatch.setenv("NAPO_JAX_JOIN_SECONDS", "soon")
    with pytest.raises(ValueError, match="NAPO_JAX_JOIN_SECONDS must be a number of seconds, got 'soon'"), together():
        pass


def test_the_metadata_server_is_asked_until_it_answers(monkeypatch):
    waits, answers = [], iter([503, 200, 404])

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.path == "/computeMetadata/v1/instance/attributes/key" and self.headers["Metadata-Flavor"]
            self.send_response(next(answers) if asked == "Google" else 400)
            self.end_headers()
            self.wfile.write(b"value")

        def log_message(self, *_):
            pass

    monkeypatch.setattr(processes.time, "sleep", waits.append)
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        assert processes._ask_metadata("key") == "value"
        assert len(waits) == 1
        assert processes._ask_metadata("key") is None  # there is no such key, and no use in asking again
        assert len(waits) == 1
        server.shutdown()
    assert processes._ask_metadata("key") is None  # there is no server
    assert len(waits) == 5
