"""Biased answers, built: what the model says to masked prompts, in the rows that they belong to, whatever happens."""

import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from quick import quick_jit
from speaking_model import write_speaking_model
from test_torture import GOOD, ROWS

from napo_jax.bias import work
from napo_jax.bias.masks import Recipe
from napo_jax.build_bias import Options, build, main
from napo_jax.command import exit_with_one_line
from napo_jax.config import DataConfig, load_config
from napo_jax.data.prompts import Prompter, load_tokenizer
from napo_jax.data.records import open_records
from napo_jax.decoding import Decoding
from napo_jax.generate import Generator, Prompt
from napo_jax.metrics import Console
from napo_jax.sharding import MeshConfig, make_mesh
from napo_jax.weights import load_pretrained

DECODING = Decoding(beams=3, max_tokens=20)
NAMES = ("question_only", "image_only")


@pytest.fixture(autouse=True)
def fast_compiles(monkeypatch):
    monkeypatch.setattr(jax, "jit", quick_jit)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has a model, and a file of eleven good rows."""
    folder = tmp_path_factory.mktemp("bias")
    write_speaking_model(folder / "model")
    (folder / "in").mkdir()
    pq.write_table(pa.Table.from_pylist([row(i) for i in range(11)]), folder / "in" / "a.parquet", row_group_size=4)
    return folder


def row(number, **change):
    data = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    words = " ".join(np.random.default_rng(number).choice(["bear", "red", "is", "how", "many", "dogs"], 2 + number % 4))
    return {"image": data.getvalue(), "question": f"{words}?", "chosen": "A dog.", "rejected": "A cat."} | change


def config_of(folder, **data):
    config = load_config("configs/debug.py")
    model = dataclasses.replace(config.model, path=str(folder / "model"))
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, **data))


def run(folder, name, devices=1, mesh=None, source="in", model=None, data=None, **options):
    """Builds into a folder; returns the rows of the first file that it wrote, and the summary."""
    options = {"decoding": DECODING, "slots": 4, "piece": 5} | options
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "make_mesh", lambda config, _: make_mesh(config, jax.devices()[:devices]))
        config = dataclasses.replace(config_of(model or folder, **data or {}), mesh=mesh or MeshConfig())
        everything = Options(input=(str(folder / source),), output=str(folder / name), **options)
        summary = build(config, everything, Console(said))
    files = sorted((folder / name).glob("*.parquet"))
    return (pq.read_table(files[0]).to_pylist() if files else None), summary, said.getvalue()


@pytest.fixture(scope="module")
def whole(folder):
    """What an uninterrupted build on one device writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick_jit)
        return run(folder, "whole")


def test_answers_are_what_the_model_says_to_masked_prompts(folder, whole, tmp_path):
    """Prompts by hand and one at a time, against the builder's."""
    model, params = load_pretrained(folder / "model", dtype=jnp.float32, remat="none")
    tokenizer = load_tokenizer(folder / "model")
    prompter = Prompter(tokenizer, "llava_v1", model.config.vision.image_tokens)
    records = open_records(folder / "in", cache=tmp_path)
    pictures = DataConfig().image_rule
    from napo_jax.data.images import decode, fit, normalise

    generator = Generator(model, params, DECODING, eos=tokenizer.eos_token_id, slots=1, prompt_tokens=300)
    rows, summary, _ = whole
    assert len(rows) == len(records) == 11
    for i, built in enumerate(rows):
        record = records[i]
        picture = np.asarray(normalise(fit(decode(record.image), model.config.vision.image_size, pictures)))
        asked = {
            "question_only": Prompt(0, np.array(prompter.prefix(record.question, image=False), np.int32)),
            "image_only": Prompt(0, np.array(prompter.prefix(""), np.int32), picture),
        }
        for name, prompt in asked.items():
            (answer,) = generator([prompt])
            text = tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
            assert (built[name], built[f"{name}_fault"]) == ((text, None) if answer.ended else (None, "cut")), (i, name)
    for name in NAMES:
        kept = [built[name] for built in rows if built[name] is not None]
        assert summary["answers"][name]["kept"] == len(kept)
        assert len(set(kept)) > 2, "all answers are the same"


def test_every_row_says_how_it_was_made(whole):
    rows, _, _ = whole
    made_by = {name: json.loads(rows[0][f"{name}_made_by"]) for name in NAMES}
    assert made_by["question_only"]["image"] == "no_image"
    assert made_by["question_only"]["question"] == "kept"
    assert made_by["image_only"]["question"] == "empty"
    assert made_by["image_only"]["decoding"] == json.loads(json.dumps(dataclasses.asdict(DECODING)))
    assert len(made_by["image_only"]["weights"]) == 32
    assert made_by["image_only"]["model"].endswith("/model")


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [(2, MeshConfig(data=2, fsdp=1)), (8, MeshConfig(data=2, fsdp=4)), (8, MeshConfig(data=1, fsdp=8))],
    ids=["2", "8", "8 fsdp"],
)
def test_any_devices_write_the_same(folder, whole, devices, mesh):
    rows, _, _ = run(folder, f"on{devices}{mesh.fsdp}", devices, mesh, slots=1)
    assert rows == whole[0]


def test_rotten_rows_are_counted_and_shift_nothing(folder):
    """Beside each good row, what is said to it must be what is said without its rotten neighbours."""
    schema = pa.schema([("image", pa.binary()), *((name, pa.string()) for name in ("question", "chosen", "rejected"))])
    rotten = [{key: change.get(key, GOOD[key]) for key in schema.names} for change, _ in ROWS]
    good = [row(100 + i) for i in range(len(rotten))]
    mixed = [each for pair in zip(rotten, good, strict=True) for each in pair]
    for name, rows in (("mixed", mixed), ("good", good)):
        (folder / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / name / "a.parquet")
    options = {"decoding": Decoding(max_tokens=8), "slots": 16, "filters": ("empty",)}
    among, summary, _ = run(folder, "out mixed", source="mixed", **options)
    alone, _, _ = run(folder, "out good", source="good", **options)
    assert [each["image"] for each in among] == [each["image"] for each in mixed]
    for name in NAMES:
        assert [each[name] for each in among[1::2]] == [each[name] for each in alone]
        reasons = {}
        for (change, reason), built in zip(ROWS, among[::2], strict=True):
            if not change.keys() <= set(schema.names):
                reason = None  # of a column that is not there
            # What is wrong with an answer does not matter here, nor what is wrong with a question that is not asked.
            if reason in ("no_chosen", "empty_rejected"):
                reason = None
            if name == "image_only" and reason in ("several_image_markers", "prefix_too_long"):
                reason = None
            fault = built[f"{name}_fault"]
            assert fault in ((reason,) if reason else (None, "empty")), (change, name)
            assert (built[name] is None) == (fault is not None)
            if fault:
                reasons[fault] = reasons.get(fault, 0) + 1
        assert {k: v for k, v in summary["answers"][name]["faults"].items() if k != "empty"} == {
            k: v for k, v in reasons.items() if k != "empty"
        }
        assert len(reasons) >= 6


def test_filters_are_switched_without_saying_anything_again(folder, monkeypatch):
    first, summary, _ = run(folder, "filters", decoding=Decoding(max_tokens=8))
    assert summary["answers"]["question_only"]["faults"]["cut"] > 2
    monkeypatch.setattr(work, "load_speaker", None)
    every, summary, said = run(folder, "filters", decoding=Decoding(max_tokens=8), filters=())
    assert summary["answers"]["question_only"]["faults"] == {}
    assert "filters                   none" in (folder / "filters" / "report.txt").read_text()
    for before, after in zip(first, every, strict=True):
        assert after["question_only"] is not None
        assert before["question_only"] in (None, after["question_only"])
    _, _, said = run(folder, "filters", decoding=Decoding(max_tokens=8), filters=())
    assert "all of that is done" in said
    (folder / "filters" / "a.parquet").unlink()
    again, _, said = run(folder, "filters", decoding=Decoding(max_tokens=8), filters=())
    assert again == every


def test_some_rows_first_and_then_the_rest(folder, whole):
    few, summary, _ = run(folder, "limit", limit=3)
    assert few == whole[0][:3]
    assert summary["rows"] == 3
    before = {file.name for file in (folder / "limit" / "build" / "pieces").iterdir()}
    rows, _, said = run(folder, "limit")
    assert rows == whole[0]
    assert "16 answers to go" in said
    assert before < {file.name for file in (folder / "limit" / "build" / "pieces").iterdir()}


def test_a_dry_run_writes_nothing(folder, monkeypatch):
    monkeypatch.setattr(work, "load_speaker", None)
    rows, _, said = run(folder, "dry", dry_run=True)
    assert rows is None
    assert not (folder / "dry").exists()
    for words in ("question_only: image no_image", "3 beams, 20 tokens at most", "rows     11 in 1 file; 22 answers"):
        assert words in said


def test_other_masks_and_another_answer(folder):
    options = {"also": {"noisy": "diffusion"}, "image_mask": "black", "question_mask": "generic"}
    options |= {"decoding": Decoding(max_tokens=8, temperature=1.0, seed=1), "filters": (), "limit": 3}
    rows, _, _ = run(folder, "also", **options)
    assert len({tuple(each[name] for each in rows) for name in (*NAMES, "noisy")}) == 3
    made_by = {name: json.loads(rows[0][f"{name}_made_by"]) for name in (*NAMES, "noisy")}
    masks = {name: (made["image"], made["question"]) for name, made in made_by.items()}
    assert masks == {
        "question_only": ("black", "kept"),
        "image_only": ("kept", "generic"),
        "noisy": ("diffusion", "kept"),
    }
    again, _, _ = run(folder, "also again", slots=1, piece=1, **options)
    assert again == rows, "what is drawn does not repeat itself"


def test_a_folder_that_was_begun_in_another_way_is_refused(folder, whole):
    with pytest.raises(ValueError, match=r"whole/build was begun with decoding.beams 3, and not 1"):
        run(folder, "whole", decoding=Decoding(max_tokens=20))
    with pytest.raises(ValueError, match=r'begun with answers.question_only.image "no_image", and not "black"'):
        run(folder, "whole", image_mask="black")


def test_other_weights_are_refused_also_when_all_is_said(folder, whole):
    other = folder / "other model"
    shutil.copytree(folder / "model", other / "model")
    weights = other / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start::4] = bytes(byte ^ 1 for byte in data[start::4])  # the last bit of every number
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"whole/build was begun with source "):
        run(folder, "whole", model=other)


def test_inputs_that_changed_are_refused(folder):
    """Another order of rows, or another folder of pictures: what was said would stand beside other rows."""
    (folder / "changing").mkdir()
    rows = [row(i) for i in range(4)]
    file = folder / "changing" / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    run(folder, "out changing", source="changing", limit=2, decoding=Decoding(max_tokens=8))
    pq.write_table(pa.Table.from_pylist(rows[::-1]), file)
    with pytest.raises(ValueError, match=r"begun with inputs.a.parquet."):
        run(folder, "out changing", source="changing", decoding=Decoding(max_tokens=8))
    pq.write_table(pa.Table.from_pylist(rows), file)
    with pytest.raises(ValueError, match=r"begun with image_root null, and not "):
        run(
            folder, "out changing", source="changing", decoding=Decoding(max_tokens=8), data={"image_root": "elsewhere"}
        )


def test_files_without_rows_and_files_of_others(folder):
    (folder / "three").mkdir()
    table = pa.Table.from_pylist([row(i) for i in range(2)])
    for name, rows in (("a", table), ("b", table.slice(0, 0)), ("c", table)):
        pq.write_table(rows, folder / "three" / f"{name}.parquet")
    options = {"source": "three", "decoding": Decoding(max_tokens=8)}
    (folder / "taken").mkdir()
    (folder / "taken" / "c.parquet").write_text("of somebody else")
    with pytest.raises(ValueError, match=r"c.parquet is there, and no build of it"):
        run(folder, "taken", **options)
    _, summary, _ = run(folder, "out three", **options)
    assert summary["rows"] == 4
    assert [pq.read_metadata(folder / "out three" / f"{name}.parquet").num_rows for name in "abc"] == [2, 0, 2]
    _, _, said = run(folder, "out three", **options)
    assert "all of that is done" in said
    with pytest.raises(ValueError, match="has 4 rows already; name another output for the first 2"):
        run(folder, "out three", limit=2, **options)


def test_pictures_by_their_paths_are_shown(folder):
    (folder / "paths" / "pictures").mkdir(parents=True)
    rows = [row(i) for i in range(3)]
    for i, each in enumerate(rows):
        (folder / "paths" / "pictures" / f"{i}.png").write_bytes(each["image"])
        each["image"] = f"pictures/{i}.png" if i else "pictures/none.png"
    pq.write_table(pa.Table.from_pylist(rows), folder / "paths" / "a.parquet")
    built, _, _ = run(folder, "out paths", source="paths", decoding=Decoding(max_tokens=8))
    assert [each["image_only_fault"] == "image_missing" for each in built] == [True, False, False]
    assert (folder / "out paths" / "report.html").read_text().count("<img") == 2


def test_the_files_are_what_training_reads(folder, whole):
    records = open_records(folder / "whole", cache=folder / "cache", answers=("chosen", "rejected", *NAMES))
    assert len(records) == 11
    said = [dict(answers) for _, _, answers in records.texts()]
    assert [each.get("image_only") for each in said] == [each["image_only"] for each in whole[0]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "say what to read and where to write"),
        (["--input", "nothing.parquet", "--output", "x"], "nothing.parquet names no file"),
        (["--input", "IN", "--output", "x", "--image-mask", "grey"], "there is no image mask 'grey'"),
        (["--input", "IN", "--output", "x", "--also", "image_only", "noise"], "also names image_only"),
        (["--input", "IN", "--output", "x", "--also", "image_only_fault", "noise"], "two columns the name"),
        (["--input", "IN", "--output", "x", "--limit", "0"], "limit must be at least 1"),
        (["--input", "IN", "--output", "x", "--decoding.max-tokens", "5000"], "lower it"),
        (["--input", "IN", "--output", "x", "--filters", "long"], "filters"),
        (["--input", "IN", "--output", "x", "--decodin.beams", "2"], "--decoding.beams"),
    ],
)
def test_wrong_usage_is_one_line(folder, tmp_path, capsys, monkeypatch, flags, message):
    flags = [str(folder / "in") if flag == "IN" else str(tmp_path / "x") if flag == "x" else flag for flag in flags]
    with pytest.raises(SystemExit) as error:
        exit_with_one_line(lambda: main(["--config", "configs/debug.py", *flags]))
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "x").exists()


def test_recipes_keep_masks_apart_from_decoding():
    options = Options(image_mask="noise", also={"noisy": "diffusion"})
    assert options.recipes == {
        "question_only": Recipe(image="noise"),
        "image_only": Recipe(question="empty"),
        "noisy": Recipe(image="diffusion"),
    }
    assert Options().decoding == Decoding(beams=3, max_tokens=1024), "as the released script decodes"
