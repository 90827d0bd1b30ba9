"""Key regions: where an answer's keywords are in its picture, by boxes or by the model, in the rows they belong to."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from quick import quick_jit
from speaking_model import write_speaking_model

from napo_jax import build_regions
from napo_jax.build_regions import Job, Options, build, main
from napo_jax.command import exit_with_one_line
from napo_jax.config import load_config
from napo_jax.data.dataset import open_dataset
from napo_jax.journal import StoppedError
from napo_jax.methods import mfpo
from napo_jax.metrics import Console
from napo_jax.model_source import find_model
from napo_jax.models import IMAGE_SLOT, Groups, Llava, LlavaConfig
from napo_jax.regions.evidence import image_evidence, mask_of
from napo_jax.regions.grounders import mask_of_boxes, matching_boxes
from napo_jax.sharding import make_mesh

ANSWERS = ["A dog runs.", "Two cats and a red hat.", "Yes.", "A dog <b>barks</b> at a tree.", "The man holds a cup."]


def png(number, size=(36, 24)):
    data = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def row(number, **change):
    boxes = [{"label": "dog", "box": [0.0, 0.0, 9.0, 6.0]}, {"label": "a big cat", "box": [27.0, 12.0, 36.0, 24.0]}]
    chosen = ANSWERS[number % len(ANSWERS)]
    made = {"image": png(number), "question": "What is <i>there</i>?", "chosen": chosen, "rejected": "A bus."}
    return made | {"boxes": boxes} | change


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has a model, and two files: one row has a damaged picture, one no chosen answer."""
    folder = tmp_path_factory.mktemp("regions")
    write_speaking_model(folder / "model")
    (folder / "in").mkdir()
    rows = [row(number) for number in range(13)]
    rows[5]["image"] = rows[5]["image"][:-40]
    rows[11]["chosen"] = " "
    pq.write_table(pa.Table.from_pylist(rows[:9]), folder / "in" / "a.parquet", row_group_size=4)
    pq.write_table(pa.Table.from_pylist(rows[9:]), folder / "in" / "b.parquet")
    return folder


@pytest.fixture(autouse=True)
def fast_compiles(monkeypatch):
    monkeypatch.setattr(build_regions, "make_mesh", lambda config, _: make_mesh(config, jax.devices()[:1]))


def config_of(folder, **data):
    config = load_config("configs/debug.py")
    model = dataclasses.replace(config.model, path=str(folder / "model"))
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, **data))


def run(folder, name, **options):
    """Marks regions; returns the rows of both files, the summary, and what was said."""
    options = {"batch": 4, "piece": 5} | options
    said = io.StringIO()
    whole = Options(input=(str(folder / "in"),), output=str(folder / name), **options)
    summary = build(config_of(folder), whole, Console(said))
    tables = [pq.read_table(file).to_pylist() for file in sorted((folder / name).glob("*.parquet"))]
    return [row for table in tables for row in table], summary, said.getvalue()


@pytest.fixture(scope="module")
def marked(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_regions, "make_mesh", lambda config, _: make_mesh(config, jax.devices()[:1]))
        return run(folder, "marked")


# --- evidence


@pytest.fixture(scope="module")
def asked():
    """A tiny model, one picture, and an answer of six tokens."""
    model = Llava(LlavaConfig.tiny(remat="none"))
    params = quick_jit(model.init)(jax.random.key(0))
    params["projector"]["down"]["kernel"] *= 4
    images = jax.random.normal(jax.random.key(1), (1, 1, 32, 32, 3))
    prefix = jnp.array([[[1, *[IMAGE_SLOT] * 16, 5, 9]]])
    return (
        model,
        params,
        Groups(images, prefix, jnp.array([[19]]), jnp.array([[[7, 8, 9, 10, 11, 2]]]), jnp.array([[6]])),
    )


def test_evidence_is_the_slope_of_a_words_log_prob_by_the_gate_of_a_place(asked):
    model, params, groups = asked
    weights = jnp.array([[[0, 1.0, 1.0, 0, 0, 0], [0, 0, 0, 0, 1.0, 0]]])
    got = np.asarray(quick_jit(lambda params: image_evidence(model, params, groups, weights))(params))
    assert got.shape == (1, 2, 16)
    score = quick_jit(lambda gates: model.token_logps(params, groups, (0,), gates=gates)[0, 0])
    step = 0.02
    for place in (0, 7, 15):
        open_and_shut = [score(jnp.ones((1, 1, 16)).at[0, 0, place].add(sign * step)) for sign in (1, -1)]
        slopes = np.asarray(open_and_shut[0] - open_and_shut[1]) / (2 * step)
        np.testing.assert_allclose(got[0, :, place], [slopes[1] + slopes[2], slopes[4]], rtol=0.02, atol=2e-4)
    assert np.abs(got).min() > 0
    assert not np.allclose(got[0, 0], got[0, 1])


def test_gates_that_are_open_change_nothing_and_closed_ones_leave_no_place_apart(asked):
    model, params, groups = asked
    whole = quick_jit(lambda gates: model.token_logps(params, groups, (0,), gates=gates))
    np.testing.assert_allclose(whole(jnp.ones((1, 1, 16))), model.token_logps(params, groups, (0,)), rtol=1e-5)
    turned = groups._replace(images=groups.images[..., ::-1, :, :])
    shut = jnp.zeros((1, 1, 16))
    assert not np.allclose(whole(shut), whole(jnp.ones((1, 1, 16))))
    other = model.token_logps(params, turned, (0,), gates=shut)
    assert not np.allclose(other, model.token_logps(params, groups, (0,)))


def test_as_few_places_as_hold_the_share():
    evidence = np.array([4.0, -3.0, 2.0, 1.0])  # of size 10 in all
    assert mask_of(evidence, 0.3).tolist() == [[True, False], [False, False]]
    assert mask_of(evidence, 0.5).tolist() == [[True, True], [False, False]]
    assert mask_of(evidence, 0.75).tolist() == [[True, True], [True, False]]
    assert mask_of(evidence, 1.0).all()
    assert not mask_of(np.zeros(4)).any()
    assert not mask_of(np.full(4, np.nan)).any()


# --- boxes


def test_a_box_is_meant_by_the_kind_of_thing():
    boxes = [{"label": "dog", "box": 1}, {"label": "two small dogs", "box": 2}, {"label": "hot dog stand", "box": 3}]
    assert matching_boxes("a brown dog", boxes) == [1, 2]
    assert matching_boxes("dogs", boxes) == [1, 2]
    assert matching_boxes("stand", boxes) == [3]
    assert matching_boxes("cat", boxes) == []


def test_boxes_lie_where_the_picture_lies_in_its_square():
    """A picture of 40 x 20: padded by 10 above and below, or cropped by 10 on the left and on the right."""
    left_half = [(0, 0, 20, 20)]
    padded = mask_of_boxes(left_half, 40, 20, "pad", 4)
    assert padded.astype(int).tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    cropped = mask_of_boxes(left_half, 40, 20, "crop", 4)
    assert cropped.astype(int).tolist() == [[1, 1, 0, 0]] * 4
    assert not mask_of_boxes([(0, 0, 8, 20)], 40, 20, "crop", 4).any(), "cropped away"
    tall = mask_of_boxes([(0, 0, 20, 10)], 20, 40, "pad", 4)
    assert tall.astype(int).tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    # A box of 3 x 3 covers no cell of 10 x 10 by a quarter, and is seen all the same; one of 6 x 10 covers its cell.
    assert np.argwhere(mask_of_boxes([(33, 4, 36, 7)], 40, 20, "pad", 4)).tolist() == [[1, 3]]
    assert np.argwhere(mask_of_boxes([(8, 0, 16, 10)], 40, 20, "pad", 4)).tolist() == [[1, 1]]


def test_regions_by_boxes(folder):
    rows, summary, said = run(folder, "boxes", grounder="boxes")
    assert summary == {
        "rows": 13,
        "regions": {"marked": 6, "not_found": 2, "no_keyword": 3, "image_truncated": 1, "no_chosen": 1},
    }
    assert "marked 6" in said
    assert rows[0]["keywords"] == ["dog"]
    dog = np.unpackbits(np.frombuffer(rows[0]["region"]["bits"], np.uint8)).reshape(4, 4)
    assert dog.tolist() == mask_of_boxes([(0, 0, 9, 6)], 36, 24, "pad", 4).astype(int).tolist()
    assert rows[0]["region"] | {"bits": 0} == {"rule": "pad", "exif": False, "side": 4, "bits": 0}
    assert (rows[2]["keywords"], rows[2]["region_fault"]) == ([], "no_keyword")
    assert (rows[4]["keywords"], rows[4]["region_fault"]) == (["man", "cup"], "not_found")
    assert rows[2]["region"]["bits"] == rows[4]["region"]["bits"] == b"\xff\xff", "the whole picture"
    assert rows[5]["region"] is None
    assert rows[11]["region"] is None
    page = (folder / "boxes" / "regions.html").read_text()
    assert "<script" not in page
    assert "&lt;i&gt;there" in page
    assert "<b>barks" not in page


# --- by the model


def test_regions_are_those_of_each_row_alone(folder, marked):
    """Whatever batch a row was in: evidence of its own words, and the places that hold half of it."""
    rows, summary, _ = marked
    assert summary["regions"]["marked"] == 8
    job = Job(config_of(folder), Options(input=(str(folder / "in"),), output=str(folder / "alone")))
    ground = job._by_model()
    (asked,) = [job.marker.ask(record) for record in [_record(rows[1])]]
    alone = ground({1: asked}, lambda: None)[1]
    assert (alone.keywords, bytes.fromhex(alone.bits)) == (rows[1]["keywords"], rows[1]["region"]["bits"])
    text = rows[1]["chosen"]
    for word in asked.words:
        covered = [text[start:end] for start, end in asked.spans if start < word.end and word.start < end]
        assert word.text in "".join(covered), "bytes are tokens here"
    assert 0 < sum(map(int.bit_count, rows[1]["region"]["bits"])) < 16


def _record(row):
    from napo_jax.data.records import Record

    return Record("0" * 48, row["image"], row["question"], {"chosen": row["chosen"]})


def test_regions_are_the_same_on_a_mesh(folder, marked, monkeypatch):
    monkeypatch.setattr(build_regions, "make_mesh", lambda config, _: make_mesh(config, jax.devices()[:4]))
    assert run(folder, "mesh", batch=1)[:2] == marked[:2]


def test_it_goes_on_where_it_was(folder, marked, monkeypatch):
    write, written = build_regions.RowPieces.write, []

    def stop(self, number, rows, found):
        if len(written) == 1:
            raise StoppedError("asked to stop", 143)
        written.append((number, rows))
        write(self, number, rows, found)

    monkeypatch.setattr(build_regions.RowPieces, "write", stop)
    with pytest.raises(StoppedError):
        run(folder, "stopped")
    monkeypatch.setattr(build_regions.RowPieces, "write", write)
    rows, summary, said = run(folder, "stopped")
    assert "13 in 2 file(s); 8 to go" in said
    assert (rows, summary) == marked[:2]
    assert "all of that is done" in run(folder, "stopped")[2]
    with pytest.raises(ValueError, match=r"was begun with share 0\.5, and not 0\.3"):
        run(folder, "stopped", share=0.3)
    piece = next((folder / "stopped" / "regions" / "pieces").glob("*.json"))
    piece.write_text("[[")
    (folder / "stopped" / "regions.html").unlink()
    with pytest.raises(ValueError, match="is damaged; delete it, and its rows are done again"):
        run(folder, "stopped")


def test_the_first_rows_alone(folder, marked):
    rows, summary, _ = run(folder, "few", limit=6)
    assert summary["rows"] == 6
    assert rows == marked[0][:6]
    assert not (folder / "few" / "b.parquet").exists()


def test_training_reads_what_was_marked(folder, marked):
    rows, _, _ = marked
    config = config_of(folder, path=(str(folder / "marked" / "*.parquet"),), cache=str(folder / "cache"), batch_size=11)
    source = find_model(config.model)
    dataset = open_dataset(config.data, mfpo(), source.tokenizer, source.shape)
    assert dataset.dropped == {"image_truncated": 1, "empty_chosen": 1} or dataset.dropped == {
        "image_truncated": 1,
        "no_region": 1,
    }
    batch = next(dataset.loader(dataset.order(shuffle=False, keep_rest=True), rows=(0, 11))())
    regions = [row["region"]["bits"] for row in rows if row["region"] is not None]
    packed = {np.packbits(mask).tobytes() for mask in batch.masks}
    assert packed == set(regions)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "say what to read and where to write: --input"),
        (["--input", "{}/in", "--output", "{}/in"], "would be written over"),
        (["--input", "{}/marked", "--output", "{}/x"], "has a column region already"),
        (["--input", "{}/in", "--output", "{}/x", "--share", "0"], "share must be above 0"),
        (["--input", "{}/in", "--output", "{}/x", "--ranking.count", "-1"], "count must be 0 or more"),
        (["--input", "{}/bare.parquet", "--output", "{}/x", "--grounder", "boxes"], "has no column boxes for 'boxes'"),
        (["--input", "{}/mute.parquet", "--output", "{}/x"], "has no column chosen"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(folder, marked, argv, message, capsys):
    bare = {name: value for name, value in row(0).items() if name != "boxes"}
    pq.write_table(pa.Table.from_pylist([bare]), folder / "bare.parquet")
    pq.write_table(pa.Table.from_pylist([{n: v for n, v in bare.items() if n != "chosen"}]), folder / "mute.parquet")
    argv = ["--config", "configs/debug.py", "--model.path", str(folder / "model"), *argv]
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line(lambda: main([word.format(folder) for word in argv]))
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert json.loads((folder / "marked" / "regions" / "report.json").read_text())["rows"] == 13
