"""Pictures much alike: the exact nearest by a model's own features, in the rows that they are rejected for."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from quick import quick_jit
from speaking_model import write_speaking_model
from test_build_regions import config_of, row

from napo_jax import build_retrieved, building
from napo_jax.build_retrieved import Options, build, main
from napo_jax.command import exit_with_one_line
from napo_jax.data.dataset import open_dataset
from napo_jax.data.images import normalise
from napo_jax.data.loader import Pictures
from napo_jax.journal import StoppedError
from napo_jax.methods import rdpo
from napo_jax.metrics import Console
from napo_jax.model_source import find_model
from napo_jax.models import Llava, LlavaConfig
from napo_jax.models.clip import ClipTower
from napo_jax.retrieval import nearest, picture_features
from napo_jax.sharding import MeshConfig, make_mesh
from napo_jax.speaker import load_speaker

# --- the search


def by_hand(features, rank, most):
    found = []
    for number, one in enumerate(features):
        cosines = [(-float(one @ other), k) for k, other in enumerate(features) if k != number and one @ other <= most]
        found.append(sorted(cosines)[rank - 1] if len(cosines) >= rank else (np.nan, -1))
    return [k for _, k in found], [-cosine for cosine, _ in found]


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize(
    ("count", "rank", "most"), [(300, 1, 1.0), (300, 3, 0.4), (11, 2, 1.0), (3, 3, 1.0), (2, 1, 1.0)]
)
def test_the_nearest_of_all(devices, count, rank, most):
    features = np.random.default_rng(count).normal(size=(count, 6)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.devices()[:devices])
    found, cosines = nearest(features, mesh, rank=rank, most=most)
    others, want = by_hand(np.float64(features), rank, most)
    assert found.tolist() == others
    np.testing.assert_allclose(cosines, want, atol=1e-6)


def test_the_same_picture_saved_twice_is_no_other():
    features = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]
    features[2, 0] = 0.5
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert nearest(features, mesh)[0].tolist() == [1, 0, 0, 0]
    assert nearest(features, mesh, most=0.999)[0].tolist() == [2, 2, 0, 0]
    assert nearest(features, mesh, most=-0.5)[0].tolist() == [-1] * 4


def test_features_are_those_that_the_language_model_is_given():
    model = Llava(LlavaConfig.tiny(remat="none"))
    params = quick_jit(model.init)(jax.random.key(0))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    got = picture_features(model, params, pictures)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-6)
    features = ClipTower(model.config.vision).apply({"params": params["vision"]}, normalise(jnp.asarray(pictures)))
    mean = np.float64(features).mean(axis=1)
    np.testing.assert_allclose(got, mean / np.linalg.norm(mean, axis=1, keepdims=True), rtol=1e-5, atol=1e-6)


# --- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has a model, and two files: a damaged picture, and one that two rows have."""
    folder = tmp_path_factory.mktemp("retrieved")
    write_speaking_model(folder / "model")
    (folder / "in").mkdir()
    rows = [{name: value for name, value in row(number).items() if name != "boxes"} for number in range(9)]
    rows[2]["image"] = rows[2]["image"][:-40]
    rows[7]["image"] = rows[0]["image"]
    pq.write_table(pa.Table.from_pylist(rows[:5]), folder / "in" / "a.parquet", row_group_size=2)
    pq.write_table(pa.Table.from_pylist(rows[5:]), folder / "in" / "b.parquet")
    return folder


def run(folder, name, devices=1, **options):
    """Finds pictures; returns the rows of both files, the summary, and what was said."""
    said = io.StringIO()
    whole = Options(input=(str(folder / "in"),), output=str(folder / name), **{"batch": 2, "piece": 4} | options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_retrieved, "make_mesh", lambda config: make_mesh(config, jax.devices()[:devices]))
        summary = build(config_of(folder, cache=str(folder / "cache")), whole, Console(said))
    tables = [pq.read_table(file).to_pylist() for file in sorted((folder / name).glob("*.parquet"))]
    return [row for table in tables for row in table], summary, said.getvalue()


@pytest.fixture(scope="module")
def retrieved(folder):
    return run(folder, "once")


def test_each_row_has_the_nearest_other_picture(folder, retrieved):
    rows, summary, _ = retrieved
    config = config_of(folder)
    source = find_model(config.model)
    assert (summary["rows"], summary["pictures"], summary["retrieved"]) == (9, 7, 8)
    before = [row for name in "ab" for row in pq.read_table(folder / "in" / f"{name}.parquet").to_pylist()]
    assert [{name: one[name] for name in before[0]} for one in rows] == before
    assert rows[2]["retrieved_image"] is rows[2]["retrieved_cosine"] is None, "its picture is damaged"
    # By hand: all pictures at once, and a plain product.
    speaker = load_speaker(source, make_mesh(MeshConfig(), jax.devices()[:1]))
    look = Pictures(source.shape.vision.image_size)
    whole = [number for number in range(9) if number != 2]
    features = np.asarray(
        picture_features(speaker.model, speaker.params, np.stack([look(rows[n]["image"]) for n in whole]))
    )
    for number, one in zip(whole, features, strict=True):
        cosines = features @ one
        others = [k for k, n in enumerate(whole) if rows[n]["image"] != rows[number]["image"]]
        other = max(others, key=cosines.__getitem__)
        assert rows[number]["retrieved_image"]["bytes"] == rows[whole[other]]["image"]
        assert rows[number]["retrieved_cosine"] == pytest.approx(cosines[other], abs=1e-5)
    assert rows[0]["retrieved_image"] == rows[7]["retrieved_image"]


def test_what_is_computed_is_kept(folder, retrieved, monkeypatch):
    asked = []

    def stop(signal):
        asked.append(signal)
        if len(asked) == 3:
            raise StoppedError("asked", 143)

    monkeypatch.setattr(building, "raise_if_asked", stop)
    with pytest.raises(StoppedError):
        run(folder, "stopped")
    monkeypatch.undo()
    rows, _, said = run(folder, "stopped", devices=8, batch=1)
    assert "3 to go" in said  # of 7, in pieces of 4
    for one, other in zip(rows, retrieved[0], strict=True):
        assert one["retrieved_cosine"] == pytest.approx(other["retrieved_cosine"], abs=1e-6)
        assert one["retrieved_image"] == other["retrieved_image"]
    again, _, said = run(folder, "stopped")
    assert "all of that is done" in said
    assert again == rows
    other, _, said = run(folder, "stopped", rank=2)
    assert "0 to go" in said
    assert all(
        one["retrieved_cosine"] is None or one["retrieved_cosine"] <= before["retrieved_cosine"]
        for one, before in zip(other, rows, strict=True)
    )
    assert other != rows
    for file in (folder / "stopped" / "retrieval" / "pieces").glob("*.npy"):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="is damaged; delete it, and its pictures are computed again"):
        run(folder, "stopped")


def test_rdpo_reads_them(folder, retrieved):
    config = config_of(folder, cache=str(folder / "cache"))
    data = dataclasses.replace(config.data, path=(str(folder / "once" / "*.parquet"),), batch_size=2, buckets=1)
    source = find_model(config.model)
    dataset = open_dataset(data, rdpo(), source.tokenizer, source.shape)
    assert sum(dataset.dropped.values()) == 1
    batch = next(dataset.loader(rows=(0, 2))())
    assert batch.rejected_images.shape == batch.images.shape
    assert (batch.rejected_images != batch.images).any()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "say what to read and where to write"),
        (["--input", "{0}/in", "--output", "{0}/in"], "would be written over"),
        (["--input", "{0}/once", "--output", "{0}/other"], "has a column retrieved_image already"),
        (["--input", "{0}/in", "--output", "{0}/other", "--rank", "0"], "rank must be at least 1, got 0"),
        (["--input", "{0}/in", "--output", "{0}/other", "--most", "2"], "most is a cosine"),
    ],
)
def test_what_cannot_be_used_is_one_line(arguments, line, folder, retrieved, capsys):
    argv = ["--config", "configs/debug.py", f"--model.path={folder / 'model'}"]
    argv += [word.format(folder) for word in arguments]
    with pytest.raises(SystemExit) as ended:
        exit_with_one_line(lambda: main(argv))
    assert ended.value.code == 2
    assert line in capsys.readouterr().err


def test_one_picture_has_no_other(folder, tmp_path):
    (tmp_path / "in").mkdir()
    one = {name: value for name, value in row(1).items() if name != "boxes"}
    pq.write_table(pa.Table.from_pylist([one, one]), tmp_path / "in" / "a.parquet")
    whole = Options(input=(str(tmp_path / "in"),), output=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="all rows have one picture"):
        build(config_of(folder, cache=str(tmp_path / "cache")), whole, Console(io.StringIO()))
