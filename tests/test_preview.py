"""The preview tells the truth about the data, and its page is safe to open."""

import html.parser
import io
import json
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import browse, only_with_browser
from PIL import Image

from napo_jax import config, preview
from napo_jax.command import exit_with_one_line
from napo_jax.config import DataConfig, load_config, parse

RUN_ANSWERS = ("chosen", "rejected", "question_only", "image_only")
SCRIPT = "<script>document.title='owned'</script>"


def png(number):
    data = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def file(tmp_path):
    """Ten rows: one dropped, one twice, one with markup in each of its texts."""
    row = lambda i: {
        "image": png(i),
        "question": f"Which? {i}",
        "chosen": "A b.",
        "rejected": "C.",
        "question_only": "D e.",
        "image_only": "F.",
    }
    rows = [row(0), row(0), *map(row, range(1, 7)), row(7) | {"chosen": ""}]
    rows.append({name: value if name == "image" else f"{SCRIPT} & {name}" for name, value in row(9).items()})
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def run(file, *more, source="configs/debug.py"):
    """Runs the command in this process."""
    cache = str(file.parent / "cache")
    argv = ["--config", str(source), "--data.path", str(file), "--data.cache", cache, "--data.batch-size", "2"]
    preview.main([*argv, *more])


def test_json_holds_what_was_counted(file, capsys):
    run(file, "--json")
    summary = json.loads(capsys.readouterr().out)
    assert summary["rows"] == 10
    assert summary["kept"] == 9
    assert summary["dropped"] == {"empty_chosen": 1}
    assert summary["duplicate_rows"] == 1
    assert summary["steps_per_epoch"] == 4
    assert summary["left_over_per_epoch"] == 1
    assert summary["tokens"]["rejected"] == {"min": 4, "median": 4, "95%": 33, "max": 52}
    assert sum(bucket["groups"] for bucket in summary["buckets"]) == 9
    assert sum(bucket["batches"] for bucket in summary["buckets"]) == 4
    assert sum(count for *_, count in summary["histogram"]) == 9
    assert summary["histogram"][-1][1] == summary["tokens"]["group"]["max"]
    computed = sum(bucket["tokens"] * bucket["groups"] for bucket in summary["buckets"])
    assert summary["padding"] == pytest.approx(1 - 9 * _mean_tokens(file) / computed, abs=1e-4)


def _mean_tokens(file):
    """Counts tokens by hand: a byte is one, the picture 16, and every answer has a space and EOS."""
    system = "A chat between a curious human and an artificial intelligence assistant. "
    system += "The assistant gives helpful, detailed, and polite answers to the human's questions."
    total = 0
    for row in pq.read_table(file).to_pylist():
        if row["chosen"]:
            total += 1 + len(f"{system} USER: ") + 16 + len(f"\n{row['question']} ASSISTANT:")
            total += sum(len(row[name]) + 2 for name in ("chosen", "rejected", "question_only", "image_only"))
    return total / 9


def test_text_says_the_same(file, capsys):
    run(file)
    said = capsys.readouterr().out
    assert "10 rows, 9 kept, 1 dropped" in said
    assert "dropped        1  empty_chosen" in said
    assert "kept           1  repeat another row" in said
    assert "4 steps of 2 groups in an epoch, 1 groups left over" in said


class _Page(html.parser.HTMLParser):
    """Collects what a browser would see of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.pictures, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        """Notes a tag, and that nothing comes from elsewhere."""
        self.tags.append(tag)
        attributes = dict(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        assert "href" not in attributes
        if tag == "img":
            self.pictures.append(attributes["src"])

    def handle_data(self, data):
        """Notes text."""
        self.text += data


def test_the_page_shows_text_from_data_as_text(file, capsys):
    page = file.parent / "page.html"
    run(file, "--html", str(page), "--groups", "8")
    read = _Page()
    read.feed(page.read_text())
    assert "script" not in read.tags
    assert len(read.pictures) == 8
    assert all(source.startswith("data:image/png;base64,") for source in read.pictures)
    if f"{SCRIPT} & chosen" not in read.text:  # it was the group left over
        run(file, "--html", str(page), "--groups", "8", "--data.batch-size", "1")
        read.feed(page.read_text())
    for name in ("question", "chosen", "rejected", "question_only", "image_only"):
        assert f"{SCRIPT} & {name}" in read.text
    assert "://" not in page.read_text()
    assert "wrote" in capsys.readouterr().out


@only_with_browser
def test_a_browser_runs_nothing_and_shows_it_all(file):
    page = file.parent / "page.html"
    run(file, "--html", str(page), "--groups", "9", "--data.batch-size", "1")
    shown = browse(file.parent, page.as_uri(), "--dump-dom")
    assert "<title>What the trainer will see</title>" in shown
    assert shown.count("<img") == 9
    assert "&lt;script&gt;" in shown
    assert "<script" not in shown


def test_image_variants_are_shown(file, tmp_path):
    """Every variant of the objective has its picture, and they differ."""
    source = tmp_path / "config.py"
    source.write_text(
        "from napo_jax.config import Config, DataConfig, ModelConfig\n"
        "from napo_jax.losses import dpo_loss\n"
        "from napo_jax import Objective, Term\n"
        "def get_config():\n"
        "    terms = [Term('text', dpo_loss, 'chosen', 'rejected')]\n"
        "    terms += [Term(v, dpo_loss, 'chosen', f'chosen@{v}') for v in ('black', 'diffusion')]\n"
        "    return Config(ModelConfig(), DataConfig(batch_size=2, attention_multiple=8), objective=Objective(terms))\n"
    )
    page = tmp_path / "page.html"
    run(file, "--html", str(page), "--groups", "2", source=source)
    read = _Page()
    read.feed(page.read_text())
    assert len(read.pictures) == 6
    assert len(set(read.pictures[:3])) == 3
    assert "chosen under diffusion" in read.text


def test_a_config_is_read_and_overridden():
    default = load_config("configs/debug.py")
    read, options = parse(preview.Options, ["--config", "configs/debug.py"], description="")
    assert read == default
    assert options == preview.Options()
    argv = ["--json", "--data.batch-size", "3", "--config=configs/debug.py", "--data.path", "a", "b"]
    argv += ["--data.columns", "question", "prompt", "--model.path", "m"]
    read, options = parse(preview.Options, argv, description="")
    assert read.data.batch_size == 3
    assert read.data.path == ("a", "b")
    assert read.data.columns == {"question": "prompt"}
    assert read.model.path == "m"
    assert options.json
    assert read.objective == default.objective


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "say which config to use: --config"),
        (["--config", "configs/debg.py"], r"no config file configs/debg.py; there are .*debug, densedpo7b"),
        (["--config", "tests/quick.py"], "must define get_config"),
        (["--config", "configs/debug.py", "--data.batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--config", "configs/debug.py", "--data.workers", "-1"], "must not be negative"),
        (
            ["--config", "configs/debug.py", "--data.bach-size", "1"],
            "bach-size, 1; perhaps you meant --data.batch-",
        ),
        (["--config", "configs/debug.py", "--data.batch-size", "x"], r"--data.batch-size: .*'x'"),
        (["--config", "configs/debug.py", "--data.batch-size"], "Missing value for argument '--data.batch-size'"),
        (["--config", "configs/debug.py", "--model.dtype", "int8"], r"'int8' .*'--model.dtype'.*'bfloat16', 'float32'"),
    ],
)
def test_a_bad_command_line_is_one_line_and_exit_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line(lambda: preview.main(argv))
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("def get_config(:", "SyntaxError"),
        ("import nothing_like_that", "line 1 fails: ModuleNotFoundError"),
        (
            "from napo_jax.config import *; get_config = lambda: Config(data=DataConfig(batchsize=3))",
            "TypeError.*batchsize",
        ),
        ("from napo_jax.config import *; get_config = lambda: Config(data=DataConfig(identical='Drop'))", "keep, drop"),
        ("from napo_jax.config import *; get_config = lambda: Config(data=DataConfig(long_answers='c'))", "cut, drop"),
        ("from napo_jax.config import *; get_config = lambda: Config(data=DataConfig(image_rule='p'))", "pad, crop"),
        ("from napo_jax.config import *; get_config = lambda: Config(ModelConfig(remat='all'))", "dots, mlp, full"),
        ("from napo_jax.config import *; get_config = lambda: Config(data=DataConfig(batch_size=2.5))", "whole number"),
        ("from napo_jax.config import *; get_config = lambda: Config(data=DataConfig(exif='no'))", "true or false"),
        ("from napo_jax.config import *; get_config = lambda: Config(data=DataConfig(seed=2**32))", "below 2"),
        ("from napo_jax.config import *; get_config = lambda: Config(data=DataConfig(columns=None))", "dict of names"),
        ("from napo_jax.config import *; get_config = lambda: Config(data=DataConfig(path=[]))", "path is empty"),
    ],
)
def test_a_config_file_gone_wrong_is_one_line(tmp_path, line, message):
    """A mistake in a file is no flag that tyro would look at: `identical="Drop"` must not quietly mean "keep"."""
    file = tmp_path / "config.py"
    file.write_text(line)
    with pytest.raises(ValueError, match=message):
        load_config(file)


def run_wrong(capsys, *argv):
    """Runs the command, which has to end with status 2 and one line; returns that."""
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line(lambda: preview.main(list(map(str, argv))))
    assert stop.value.code == 2
    *reports, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not any("rror" in report for report in reports)
    return line


def test_paths_that_lead_nowhere_are_one_line(file, tmp_path, capsys):
    debug = ["--config", "configs/debug.py"]
    data = [*debug, "--data.path", file, "--data.batch-size", "2", "--data.cache", tmp_path / "cache"]
    assert "nodir" in run_wrong(capsys, *data, "--html", tmp_path / "nodir" / "page.html")
    assert "directory" in run_wrong(capsys, *data, "--html", tmp_path)
    assert "rows.parquet" in run_wrong(capsys, *debug, "--data.cache", file)
    (tmp_path / "dangling.parquet").symlink_to("nowhere")
    assert "names no file" in run_wrong(capsys, *debug, "--data.path", tmp_path / "dangling.parquet")
    assert "neither local nor" in run_wrong(capsys, *debug, "--data.path", "http://a/b.parquet")
    assert "given twice" in run_wrong(capsys, *debug, "--config", "configs/llava7b.py")
    assert "say which config" in run_wrong(capsys, "--config=")


def test_names_of_files_and_columns_cannot_break_the_line(tmp_path, capsys):
    path = tmp_path / "a\nb.parquet"
    pq.write_table(pa.table({"i\n\x1b[2J": [1]}), path)
    line = run_wrong(capsys, "--config", "configs/debug.py", "--data.path", path, "--data.cache", tmp_path)
    assert r"a\nb.parquet" in line
    assert r"i\n\x1b[2J" in line
    twice = pa.table([pa.array(["x"])] * 3, names=["image", "question", "image"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    argv = ["--config", "configs/debug.py", "--data.path", tmp_path / "twice.parquet", "--data.cache", tmp_path]
    assert "no column chosen" in run_wrong(capsys, *argv)
    pq.write_table(
        pa.table([pa.array(["x"])] * 7, names=[*twice.column_names, *RUN_ANSWERS]), tmp_path / "twice.parquet"
    )
    assert "several columns called image" in run_wrong(capsys, *argv)


def test_what_the_model_cannot_take_is_said_before_files_are_converted(file, tmp_path, capsys):
    data = ["--config", "configs/debug.py", "--data.path", file, "--data.cache", tmp_path / "cache"]
    assert "2048 positions" in run_wrong(capsys, *data, "--data.max-tokens", "4096")
    assert not (tmp_path / "cache").exists()


def test_every_field_has_its_line_of_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(preview.Options, ["--config", "configs/debug.py", "--help"], description="What it does.")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    import dataclasses

    for group in (config.ModelConfig, DataConfig):
        for field in dataclasses.fields(group):
            assert f".{field.name.replace('_', '-')}" in said


def test_it_is_a_command():
    command = [sys.executable, "-m", "napo_jax.preview", "--config", "configs/debug.py", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert json.loads(done.stdout)["kept"] == 256
