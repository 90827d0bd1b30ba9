"""Checkpoints: bit for bit on any devices, whole or not there, and nothing kept or read that was not asked for.

Run as a program, this file is the processes that its tests start.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from napo_jax.checkpoint import Checkpoints
from napo_jax.metrics import Late, MetricsWriter
from napo_jax.step import TrainState

EXTRA = {"data": {"step": 7, "data": "0123"}, "config": {"beta": 0.1, "path": None, "names": ["a", "b"]}}


def mesh_of(*shape):
    """Returns a mesh over the first devices."""
    return jax.make_mesh(shape, ("a", "b"), devices=jax.devices()[: np.prod(shape)], axis_types=(AUTO, AUTO))


AUTO = jax.sharding.AxisType.Auto


def place(tree, mesh):
    """Puts a tree of numpy arrays on a mesh, matrices cut both ways, on any number of processes."""

    def put(x):
        sharding = NamedSharding(mesh, PartitionSpec("a", "b") if x.ndim == 2 else PartitionSpec())
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def abstract(state, sharding=None):
    """Returns the shapes of a state, with its own shardings or another one for all leaves."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state)


def bits(tree):
    """Returns every leaf as the bytes that it is made of."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def train_state():
    """Returns a state of all dtypes that occur, with values that only their bits tell apart."""
    random = np.random.default_rng(0)
    odd = np.array([np.nan, -0.0, np.inf, 1e-45, -1e-40, 3.3], np.float32)
    odd[0] = np.uint32(0x7FC12345).view(np.float32)  # a NaN with a mark of its own
    params = {
        "language/head": random.standard_normal((8, 16)).astype(np.float32),
        "language/layers/mlp/up/kernel": jnp.asarray(random.standard_normal((16, 8)), jnp.bfloat16),
        "projector/up/bias": odd,
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.bfloat16))
    moments = jax.tree.map(np.asarray, optimizer.init(jax.tree.map(jnp.asarray, params)))
    moments = jax.tree.map(lambda x: random.integers(0, 99, x.shape).astype(x.dtype), moments)
    seeds = np.array([0, 1, 2**32 - 1], np.uint32)
    return TrainState(np.int32(7), jax.tree.map(np.asarray, params), (moments, {"seeds": seeds}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one save, made on 4 x 2 devices, and what was saved."""
    state = place(train_state(), mesh_of(4, 2))
    with Checkpoints(tmp_path_factory.mktemp("saved")) as checkpoints:
        checkpoints.save(7, state, EXTRA)
    return checkpoints.folder, state


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 2), (4, 2), (2, 4), (8, 1)])
def test_a_state_comes_back_bit_for_bit_on_another_mesh(saved, shape):
    folder, state = saved
    like = abstract(place(train_state(), mesh_of(*shape)))
    checkpoints = Checkpoints(folder)
    restored, extra = checkpoints.restore(checkpoints.latest(), like)
    assert bits(restored) == bits(state) == bits(train_state())
    assert extra == EXTRA
    assert jax.tree.structure(restored) == jax.tree.structure(state)  # the NamedTuples of the optimizer among it
    assert [x.sharding for x in jax.tree.leaves(restored)] == [x.sharding for x in jax.tree.leaves(like)]


def test_a_part_can_be_read_alone(saved):
    folder, state = saved
    like = {"params": abstract(state.params, SingleDeviceSharding(jax.devices()[3]))}
    restored, _ = Checkpoints(folder).restore(7, like, partial=True)
    assert bits(restored) == bits(state.params)
    assert restored["params"]["language/head"].devices() == {jax.devices()[3]}


def test_a_state_that_does_not_fit_is_refused_by_the_name_of_a_leaf(saved):
    folder, state = saved
    like, one = abstract(state), SingleDeviceSharding(jax.devices()[0])
    struct = lambda *shape, dtype=jnp.float32, sharding=one: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    params = lambda **changes: TrainState(like.step, like.params | changes, like.opt_state)
    head = "language/head"
    wrong = {
        r"holds params/language/head as float32\[8, 16\], and not as float32\[8, 17\]": params(**{head: struct(8, 17)}),
        r"params/language/head as float32\[8, 16\], and not as bfloat16\[8, 16\]": params(
            **{head: struct(8, 16, dtype=jnp.bfloat16)}
        ),
        "holds no leaf params/lora": params(lora=struct(2)),
        "holds a leaf opt_state/0/1/0/count that is not wanted, one of 8": TrainState(like.step, like.params, ()),
        "leaf params/language/head to restore has no sharding": params(**{head: struct(8, 16, sharding=None)}),
    }
    for message, other in wrong.items():
        with pytest.raises(ValueError, match=message) as error:
            Checkpoints(folder).restore(7, other)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"holds no step 8; it holds \[7\]"):
        Checkpoints(folder).restore(8, like)
    with pytest.raises(ValueError, match="two leaves of the state have one name"):
        Checkpoints(folder).restore(7, {"a": {"b": struct(1)}, "a/b": struct(1)})


def test_training_goes_on_while_a_save_is_written(tmp_path, monkeypatch):
    """The writer is held until the state was donated and has changed: the save has what was saved."""
    held, rename = threading.Event(), os.rename
    monkeypatch.setattr(os, "rename", lambda *paths: (held.wait(20), rename(*paths)))
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state), donate_argnums=0)
    state = {"weights": place(np.zeros((8, 8), np.float32), mesh_of(4, 2)), "step": jnp.int32(0)}
    with Checkpoints(tmp_path) as checkpoints:
        for number in range(2):
            checkpoints.save(number, state, {})
            assert checkpoints.steps() == list(range(number))
            state = jax.block_until_ready(step(state))
            held.set()
            checkpoints.wait()
            held.clear()
    for number in range(2):
        restored, _ = checkpoints.restore(number, abstract(state))
        assert restored["step"] == number
        np.testing.assert_array_equal(restored["weights"], np.full((8, 8), number, np.float32))


def test_a_save_that_fails_is_told_and_the_one_before_stays(tmp_path, monkeypatch):
    def fail(*paths):
        raise OSError("the disk is gone")

    state = {"x": jnp.ones(3)}
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        with monkeypatch.context() as broken:
            broken.setattr(os, "rename", fail)
            checkpoints.save(2, state, {})
            with pytest.raises(OSError, match="the disk is gone"):
                checkpoints.wait()
        assert Checkpoints(tmp_path).latest() == 1


def test_the_latest_and_the_best_are_kept(tmp_path):
    """Worked by hand; the second half by another object, which knows no more than the files."""
    losses = {1: None, 2: float("nan"), 3: 0.5, 4: 0.1, 5: None, 6: 0.3, 7: None, 8: 0.7, 9: 0.2}
    kept = {1: [1], 2: [2], 3: [3], 4: [3, 4], 5: [3, 4, 5], 6: [4, 6], 7: [4, 6, 7], 8: [4, 6, 8], 9: [4, 9]}
    options = {"keep_last": 1, "keep_best": 2, "best_metric": "eval/loss"}
    for some in (range(1, 5), range(5, 10)):
        with Checkpoints(tmp_path, **options) as checkpoints:
            for step in some:
                metrics = None if losses[step] is None else {"eval/loss": losses[step], "other": 1.0}
                checkpoints.save(step, {"x": jnp.float32(step)}, {}, metrics)
                checkpoints.wait()
                assert checkpoints.steps() == kept[step], step
    assert checkpoints.best() == 4
    assert Checkpoints(tmp_path, best_metric="eval/loss", best_mode="max").best() == 9
    assert Checkpoints(tmp_path, best_metric="another").best() is None
    with pytest.raises(ValueError, match=r"told by 'eval/loss'; the metrics are \['loss'\]"):
        Checkpoints(tmp_path, **options).save(10, {"x": jnp.float32(10)}, {}, {"loss": 1.0})
    for wrong in ({"keep_last": 0}, {"keep_best": -1}, {"best_mode": "least"}):
        with pytest.raises(ValueError, match="keep_last must be at least 1"):
            Checkpoints(tmp_path, **wrong)


def test_without_a_metric_the_latest_are_kept_and_none_is_best(tmp_path):
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        for step in range(4):
            checkpoints.save(step, {"x": jnp.float32(step)}, {}, {"loss": -step})
        assert (checkpoints.latest(), checkpoints.steps(), checkpoints.best()) == (3, [2, 3], None)


def test_a_step_is_saved_once_and_none_before_the_latest(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, {"x": jnp.float32(5)}, {})
        checkpoints.save(5, {"x": jnp.float32(99)}, {})
        with pytest.raises(ValueError, match=r"holds step 5, so step 4 is not saved there"):
            checkpoints.save(4, {"x": jnp.float32(4)}, {})
        restored, _ = checkpoints.restore(checkpoints.latest(), abstract({"x": jnp.float32(0)}))
    assert restored["x"] == 5


def test_reading_changes_nothing_and_the_first_save_clears_what_is_half_written(tmp_path):
    assert Checkpoints(tmp_path / "none").latest() is None
    assert Checkpoints(tmp_path / "none", best_metric="loss").best() is None
    assert not (tmp_path / "none").exists()
    half = tmp_path / "3.orbax-checkpoint-tmp" / "state"
    half.mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    assert half.exists()
    with checkpoints:
        checkpoints.save(2, {"x": jnp.float32(0)}, {})
    assert checkpoints.steps() == [2]
    assert not half.parent.exists()


def state_of(step):
    """Returns what the killed run has at a step: 4 MB that do not compress, so that a save takes its time."""
    random = np.random.default_rng(step)
    draw = lambda: random.standard_normal((512, 1024), np.float32)
    return {"step": np.int32(step), "params": {"language/head": draw()}, "opt_state": (draw(),)}


def check_latest(checkpoints):
    """Returns the latest step, found equal to what it must hold; 0 if there is none."""
    latest = checkpoints.latest()
    if latest is not None:
        like = abstract(place(state_of(latest), mesh_of(2, 4)))
        restored, extra = checkpoints.restore(latest, like)
        assert (bits(restored), extra) == (bits(state_of(latest)), {"step": latest})
    return latest or 0


def start(*arguments):
    """Starts this file as a program."""
    command = [sys.executable, __file__, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_run_killed_at_any_moment_finds_a_whole_save(tmp_path):
    """T18: each process checks the latest save before it goes on, and is killed while it saves again and again."""
    moments, whole, halves = random.Random(0), 0, 0
    for _ in range(4):
        with start("save", tmp_path) as process:
            lines = [process.stdout.readline()]  # it has checked, and saved once
            assert lines[0], process.stderr.read()[-2000:]
            time.sleep(moments.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            rest, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, errors[-2000:]
        lines += rest.splitlines()
        latest = check_latest(Checkpoints(tmp_path))
        assert latest >= max(int(line) for line in lines) > whole
        whole = latest
        halves += any("tmp" in path.name for path in tmp_path.iterdir())
    assert halves  # or the test never met a save half-way


def save_for_ever(folder):
    """Goes on from the latest save and prints each step that is whole."""
    jax.config.update("jax_num_cpu_devices", 8)
    checkpoints = Checkpoints(folder, keep_last=2)
    step = check_latest(checkpoints)
    assert not step or step in checkpoints.steps()
    while True:
        step += 1
        checkpoints.save(step, place(state_of(step), mesh_of(4, 2)), {"step": step})
        if step % 2:  # every other one is waited for by the next save, as in training
            checkpoints.wait()
            print(step, flush=True)


def test_two_processes_save_and_restore_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pair = [start("pair", tmp_path, index, port) for index in range(2)]
    try:
        outputs = [process.communicate(timeout=120) for process in pair]
    finally:
        for process in pair:
            process.kill()
    for process, (_, errors) in zip(pair, outputs, strict=True):
        assert process.returncode == 0, errors[-2000:]
    assert check_latest(Checkpoints(tmp_path / "shared")) == 3  # here: one process and eight devices
    lines = (tmp_path / "shared" / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "loss": 0.5}', '{"step": 2, "loss": 0.25}']


def save_as_one_of_two(folder, index, port):
    """Is one of two processes with two devices each."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    mesh = mesh_of(2, 2)
    with Checkpoints(folder / "shared", keep_last=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 2, 3):
            checkpoints.save(step, place(state_of(step), mesh), {"step": step})
        assert (checkpoints.latest(), checkpoints.steps()) == (3, [2, 3])
        turned = place(state_of(0), jax.make_mesh((1, 4), ("a", "b"), axis_types=(AUTO, AUTO)))
        restored, extra = checkpoints.restore(3, abstract(turned))
        assert extra == {"step": 3}
        for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state_of(3)), strict=True):
            for shard in got.addressable_shards:
                np.testing.assert_array_equal(shard.data, want[shard.index])

    (folder / f"own{index}" / str(index)).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"different checkpoints.* \[0, 1\] for one after the other"):
        Checkpoints(folder / f"own{index}").latest()

    writer, late = MetricsWriter(folder / "shared"), Late()
    loss = jax.jit(lambda x: x.sum() / x.size, out_shardings=NamedSharding(mesh, PartitionSpec()))
    for step in (1, 2):
        late.push(step, {"loss": loss(place(np.full((4, 4), 0.5**step, np.float32), mesh))})
        writer.write(*late.flush())
    writer.close()


if __name__ == "__main__":
    task, folder, *numbers = sys.argv[1:]
    tasks = {"save": save_for_ever, "pair": save_as_one_of_two}
    tasks[task](Path(folder), *map(int, numbers))


def test_a_folder_may_be_named_from_here(tmp_path, monkeypatch):
    """As users name it: --workdir runs/a."""
    monkeypatch.chdir(tmp_path)
    state = {"x": jnp.arange(3)}
    with Checkpoints("runs/a/checkpoints") as checkpoints:
        checkpoints.save(1, state, {"step": 1})
        assert checkpoints.latest() == 1
        restored, extra = checkpoints.restore(1, state)
    assert restored["x"].tolist() == [0, 1, 2]
    assert extra == {"step": 1}
    assert (tmp_path / "runs/a/checkpoints/1").is_dir()
