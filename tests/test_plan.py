"""Plans: programs whose costs are known, steps that fit and do not, and what the command says."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jax.sharding import PartitionSpec
from PIL import Image

from napo_jax import costs, plan
from napo_jax.chips import find_topology
from napo_jax.command import exit_with_one_line
from napo_jax.compiled import compile_step
from napo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from napo_jax.data.buckets import Bucket
from napo_jax.data.byte_tokenizer import byte_tokenizer
from napo_jax.hlo import Program
from napo_jax.model_source import random_shape
from napo_jax.optim import OptimizerConfig
from napo_jax.plan_report import Part, Plan, State, advice
from napo_jax.sharding import MeshConfig, make_mesh
from napo_jax.start import abstract_parts, make_model

ROOT = Path(__file__).parents[1]
KEYS = {"topology", "devices", "hbm_bytes", "peak_bytes", "state_bytes", "fits", "flops_per_step", "compile_seconds"}


def run(*command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=os.environ.copy())
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def tpu_runs():
    status, out, err = run("tests/plan_runs.py")
    assert status == 0, err
    return [json.loads(line) for line in out.splitlines()]


def test_a_loop_counts_as_often_as_it_runs():
    """Two loops in one another, 3 and 5 times round; a ring of 4 sends B (n - 1) / n of what it gathers."""
    mesh = jax.make_mesh((2, 4), ("outer", "ring"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    n = 4

    def local(x):
        def inner(x, _):
            whole = jax.lax.all_gather(x, "ring", tiled=True)  # [32, 16]
            return x + jax.lax.psum_scatter(jnp.sin(whole), "ring", scatter_dimension=0, tiled=True), None

        def outer(x, _):
            x, _ = jax.lax.scan(inner, x, length=5)
            x = jax.lax.ppermute(x, "ring", [(i, (i + 1) % n) for i in range(n)])
            return jax.lax.psum(x, ("outer", "ring")) @ jnp.ones((16, 16)) + x, None

        return jax.lax.all_to_all(jax.lax.scan(outer, x, length=3)[0], "ring", 0, 0, tiled=True)

    spec = PartitionSpec(("outer", "ring"))
    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    program = compile_step(step.lower(floats(64, 16))).program
    mine = 8 * 16 * 4  # bytes of a device's rows
    assert costs.collectives(program) == {
        "all-gather": (15, 15 * mine * (n - 1)),
        "reduce-scatter": (15, 15 * mine * (n - 1)),
        "all-reduce": (3, 3 * 2 * mine * 7 / 8),
        "collective-permute": (3, 3 * mine),
        "all-to-all": (1, mine * 3 / 4),
    }
    assert sum(costs.matrix_flops(program).values()) == 3 * 2 * 8 * 16 * 16
    assert not program.unknown_loops
    # With each ring in a slice of its own, a sum over all is one in the ring, and one of a fourth between two slices.
    assert costs.collectives(program, slices=2) == costs.collectives(program) | {
        "all-reduce": (3, 3 * 2 * mine * 3 / 4),
        "all-reduce between slices": (3, 3 * 2 * (mine / 4) * 1 / 2),
    }


def test_a_counter_may_be_copied_on_its_way():
    """As a TPU's program does between its memories: from 1 by 2 up to 9."""
    text = """HloModule jit_step

%body (carry: (u32[])) -> (u32[]) {
  %carry = (u32[]) parameter(0)
  %counter = u32[] get-tuple-element(%carry), index=0
  %two = u32[] constant(2)
  %grown = u32[]{:S(6)} add(%counter, %two)
  %back = u32[] copy(%grown)
  ROOT %next = (u32[]) tuple(%back)
}

%condition (carry.1: (u32[])) -> pred[] {
  %carry.1 = (u32[]) parameter(0)
  %counter.1 = u32[] get-tuple-element(%carry.1), index=0
  %nine = u32[] constant(9)
  ROOT %less = pred[] compare(%counter.1, %nine), direction=LT
}

ENTRY %main () -> (u32[]) {
  %one = u32[] constant(1)
  %start = u32[] copy(%one)
  %first = (u32[]) tuple(%start)
  ROOT %loop = (u32[]) while(%first), condition=%condition, body=%body
}
"""
    program = Program(text)
    assert program.runs["body"] == 4
    assert not program.unknown_loops


@pytest.mark.parametrize(
    "spelling",
    [
        "{{0,4},{1,5},{2,6},{3,7}}",
        "[4,2]<=[2,4]T(1,0)",
        "mesh['data'=2,'fsdp'=4] {'data'}",
        "mesh['data'=8] {'data':(1)2}",
    ],
)
def test_who_sends_across_slices_is_read(spelling):
    """The same four pairs, each of one device in either half."""
    text = f"""HloModule jit_step, num_partitions=8

ENTRY %main (a: f32[4]) -> f32[8] {{
  %a = f32[4]{{0}} parameter(0)
  ROOT %b = f32[8]{{0}} all-gather(%a), channel_id=1, replica_groups={spelling}, dimensions={{0}}
}}
"""
    assert costs.collectives(Program(text)) == {"all-gather": (1, 16)}
    assert costs.collectives(Program(text), slices=2) == {"all-gather between slices": (1, 16)}
    assert costs.collectives(Program(text), slices=4) == {"all-gather between slices": (1, 16)}


def test_a_loop_that_does_not_say_how_often_it_runs_is_named():
    def until(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: x @ x, x)

    compiled = jax.jit(until).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile()
    program = Program(compiled.as_text())
    assert len(program.unknown_loops) == 1
    assert sum(costs.matrix_flops(program).values()) == 2 * 8**3


def test_what_a_tpu_hands_to_the_network_is_read():
    """Its program is that of one slice: a sum over all is one of the slice, and one that the hosts do."""
    text = """HloModule jit_step, num_partitions=4

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = f32[8]{0} all-reduce(%a), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %after = token[] after-all()
  %send = (f32[8]{0}, u32[]{:S(2)}, token[]) send(%b, %after), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %recv = (f32[8]{0}, u32[]{:S(2)}, token[]) recv(%after), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""
    found = costs.collectives(Program(text), slices=2)
    assert found == {"all-reduce": (1, 2 * 32 * 3 / 4), "all-reduce between slices": (1, 2 * 32 / 2)}


@pytest.mark.parametrize(
    ("window", "labels", "sizes", "expected"),
    [
        # Four products of [6, 5] by [5, 7], as a TPU writes them: the axis of the batch is a window.
        ("{size=4 stride=3 lhs_dilate=4}", "0bf_0oi->0bf", [(4, 6, 5), (4, 7, 5), (4, 6, 7)], 2 * 4 * 6 * 5 * 7),
        ("{size=3 pad=1_1}", "b0f_0io->b0f", [(2, 8, 5), (3, 5, 7), (2, 8, 7)], 2 * 2 * 5 * 7 * (3 * 8 - 2)),
    ],
)
def test_products_that_are_written_as_convolutions(window, labels, sizes, expected):
    left, right, out = (f"f32[{','.join(map(str, shape))}]" for shape in sizes)
    text = f"""HloModule jit_step, num_partitions=2

ENTRY %main (a: {left}, b: {right}) -> {out} {{
  %a = {left}{{2,1,0:T(8,128)}} parameter(0)
  %b = {right}{{2,1,0:T(8,128)}} parameter(1)
  ROOT %c = {out}{{2,1,0:T(8,128)S(1)}} convolution(%a, %b), window={window}, dim_labels={labels}
}}
"""
    program = Program(text)
    assert sum(costs.matrix_flops(program).values()) == expected
    read = sum(4 * jnp.zeros(shape).size for shape in sizes[:2])
    assert sum(costs.hbm_bytes(program).values()) == read  # the result stays on the chip


def test_the_same_is_counted_of_a_tpu(tpu_runs):
    known = tpu_runs[0]
    assert known["collectives"] == {"all-gather": [5, 5 * 512 * 512 * 2 * 3 / 4]}
    assert known["flops"] == 5 * 2 * (1024 / 4) * 512 * 512


def test_a_step_that_fits(tpu_runs):
    found = tpu_runs[1]
    assert set(found) >= KEYS
    assert (found["topology"], found["devices"], found["estimate"]) == ("v5e:2x2", 4, False)
    assert found["fits"]
    assert found["hbm_bytes"] == 15.75 * 2**30
    assert not found["advice"]
    # Of 134,976 parameters a quarter, and two moments: three numbers of 4 bytes; norms and biases are whole.
    assert 3 * 134_976 < found["state"]["parameters"] + found["state"]["optimizer"] < 1.02 * 3 * 134_976
    assert found["state_bytes"] < found["peak_bytes"] < found["hbm_bytes"]
    # All is computed once, and plain attention computes the other half of its squares.
    assert 1 < found["flops_done_per_device"] * 4 / found["flops_per_step"] < 1.2
    assert found["notes"][0].startswith("lengths are assumed: 24 tokens of a prefix")


def test_each_device_computes_the_pictures_of_its_own_rows(tpu_runs):
    """What the tower sends is its weights, once: three of four parts of what is frozen and never an activation."""
    found = tpu_runs[1]
    vision, frozen = found["parts"]["vision, forward"], found["state"]["frozen"]
    assert 0 < vision["sent"] < 1.02 * 3 * frozen
    assert found["parts"].keys() >= {"language/layers/mlp, backward", "logps, backward", "projector, backward"}
    for field, total in (("flops", "flops_done_per_device"), ("moved", "hbm_traffic_bytes")):
        assert sum(part[field] for part in found["parts"].values()) == pytest.approx(found[total])
    sent = sum(kind["bytes"] for kind in found["collectives"].values())
    assert sum(part["sent"] for part in found["parts"].values()) == pytest.approx(sent)


def test_a_step_that_the_compiler_refuses_is_a_verdict(tpu_runs):
    stores, recomputes = tpu_runs[2:4]
    assert not stores["fits"]
    assert not recomputes["fits"]
    assert stores["peak_bytes"] > 1.2 * recomputes["peak_bytes"] > stores["hbm_bytes"]
    assert any("--model.remat full" in line for line in stores["advice"])
    assert not any("--model.remat full" in line for line in recomputes["advice"])
    # What is stored of two layers is the largest, and says what it is.
    assert stores["largest_buffers"][0]["shape"].startswith("f32[2,262144,")
    assert "language" in stores["largest_buffers"][0]["what"]


def test_between_two_slices_goes_the_sum_of_gradients(tpu_runs):
    """Of a chip's quarter of each, to its like in the other slice: half of its own, and half of the sum."""
    found = tpu_runs[4]
    assert (found["devices"], found["slices"], found["mesh"]) == (8, 2, {"data": 2, "fsdp": 4, "tensor": 1})
    between = {kind: sent for kind, sent in found["collectives"].items() if kind.endswith("between slices")}
    sent = sum(kind["bytes"] for kind in between.values())
    # 4 bytes of a fourth, and norms and matrices that are not cut; whole ones would be 4 times it.
    assert 134_976 < sent < 3 * 134_976
    assert found["seconds"]["network"] == pytest.approx(sent / 3.125e9)


def test_a_config_with_much_in_it_compiles_for_a_tpu(tpu_runs):
    """All of them take minutes: `make configs`."""
    found = tpu_runs[5]
    assert found["fits"]
    assert not found["estimate"]
    assert (found["groups"], found["accumulate"]) == (32, 8)
    assert found["state"]["reference"] == found["state"]["parameters"] // 2, "in bfloat16"
    assert not any("do not say how often they run" in note for note in found["notes"])


def test_for_gpus_it_is_an_estimate():
    command = ["-m", "napo_jax.plan", "--config", "configs/debug.py", "--topology", "h100:2"]
    status, out, err = run(*command, "--prefix-tokens", "24", "--answer-tokens", "8", "--data.attention-multiple", "8")
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("ESTIMATE")
    assert lines[2].startswith("h100:2: fits, ")
    assert "on each of 2 devices" in lines[2]
    assert any("attention is planned as xla, and not as auto" in line for line in lines)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "say what to plan for: --topology v5e:4x4"),
        (("--topology", "v5e:3x5"), "no topology v5e:3x5: of v5e there are 1x1, 2x2"),
        (("--topology", "v5e:32x32"), "no topology v5e:32x32: of v5e there are"),
        (("--topology", "v9:2x2"), "no topology v9:2x2: write a kind of chip (v5e, v6e"),
        (("--topology", "v5p:4x4"), "the shape of v5p is written as in v5p:4x4x4"),
        (("--topology", "h100:0"), "the shape of h100 is written as in h100:8"),
    ],
)
def test_no_such_topology_is_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        exit_with_one_line(lambda: plan.main(["--config", str(ROOT / "configs/debug.py"), *argv]))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--mesh.data", "3"), "takes 6 devices, and there are 8"),
        (("--data.batch-size", "12"), "data.batch_size 12 does not divide into 1 micro-batches on 8 devices"),
        (("--prefix-tokens", "16"), "--prefix-tokens must be more than the 16 of an image"),
        (("--model.path", "/nowhere"), "/nowhere is not here; to plan without it, say how large it is"),
    ],
)
def test_what_cannot_be_planned_is_one_line(argv, message, monkeypatch):
    monkeypatch.setattr(plan, "planned_devices", lambda topology: jax.devices())
    with pytest.raises(ValueError, match=message):
        plan.main(["--config", str(ROOT / "configs/debug.py"), "--topology", "h100:8", *argv])


def test_lengths_are_those_of_the_data_where_they_are_here(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    answers = ("chosen", "rejected", "question_only", "image_only")
    rows = [
        {"image": {"bytes": picture.getvalue()}, "question": "what?", **dict.fromkeys(answers, "a" * length)}
        for length in (3, 301)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data = DataConfig(path=(str(tmp_path / "*.parquet"),), cache=str(tmp_path / "cache"), attention_multiple=8)
    config, shape, notes = Config(data=data), random_shape("tiny"), []
    bucket = plan._bucket(config, shape, byte_tokenizer(), 64, 32, notes)
    assert not notes
    assert 301 < bucket.answer <= 304  # a token a byte, and what stands around them
    assert 4 * 301 < bucket.answers <= 4 * 304
    for missing, tokenizer in (("gone.parquet", byte_tokenizer()), ("rows.parquet", None)):
        away = dataclasses.replace(config, data=dataclasses.replace(data, path=(str(tmp_path / missing),)))
        assert plan._bucket(away, shape, tokenizer, 64, 32, notes) == Bucket(192, 64, 32, 128)
    assert len(notes) == 2


def test_what_is_advised_is_what_it_saves():
    """Two copies of the model, float32 moments, two groups at a time, and a device of 1 GiB."""
    config = Config(
        model=ModelConfig(size="tiny", remat="dots"),
        optimizer=OptimizerConfig(moment_dtype="float32"),
        train=TrainConfig(reference="live"),
    )
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    model = make_model(config, random_shape("tiny"))
    trained = abstract_parts(config, model, mesh).trained
    topology = find_topology("h100:8")
    topology = dataclasses.replace(topology, chip=topology.chip._replace(hbm_bytes=2**30))
    found = Plan(
        topology=topology,
        mesh=dict(mesh.shape),
        bucket=Bucket(64, 24, 8, 32),
        groups=16,
        accumulate=1,
        notes=(),
        state=State(2**29, 2**30, 0, 2**28),
        peak_bytes=2**31,
        buffers=(),
        flops_per_step=8.0,
        parts={"all": Part(flops=1.0, moved=1.0)},
        collectives={},
        compile_seconds=1.0,
    )
    assert not found.fits
    assert found.bound == "memory"
    lines = list(advice(config, model, trained, found))
    own = sum(leaf.size for leaf in trained.values()) / 4
    assert lines[0] == "1.00 GiB too much:"
    assert lines[1] == "--mesh.data 1 --mesh.fsdp 8: cut the state among all devices, saves 0.88 GiB"
    assert lines[2].startswith("--train.accumulate 2: one group at a time on a device, saves at least 0.0 MiB, takes ")
    assert lines[3].startswith("--model.remat full")
    assert lines[4] == "--train.reference cache: saves 0.25 GiB"
    assert lines[5].startswith("--optimizer.moment-dtype bfloat16: saves ")
    assert float(lines[5].split()[3]) == pytest.approx(2 * own / 2**20, abs=0.06)
    assert lines[6].startswith("--optimizer.second-moment factored: saves ")
    assert lines[7].startswith("--optimizer.param-dtype bfloat16: saves ")
    # Room for 0.75 GiB of state beside 0.25 of all else, and 1.75 GiB on each of four.
    assert lines[8] == "a larger topology: about 20 devices"


def test_no_table_of_the_page_is_empty():
    """They are written by `benchmarks/plan_table.py` and `scaling.py`."""
    page = (ROOT / "docs" / "plan.md").read_text()
    blocks = re.findall(r"<!-- (\w+): begin -->\n(.*?)<!-- \1: end -->", page, re.DOTALL)
    assert {name for name, _ in blocks} == {"plan_table", "plan_scale", "plan_lean", "scaling"}
    assert all(block.count("\n") > 5 for _, block in blocks)
