"""A wheel: what is in it, and that it works in a folder where nothing of the repository is."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from installed import build_wheel, install

import napo_jax
from napo_jax import config as configs
from napo_jax.config import Config, config_name, find_config, load_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Returns the wheel that pip builds of the repository."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_all_that_the_package_reads_and_nothing_else(wheel):
    assert wheel.name == f"napo_jax-{napo_jax.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as there:
        names = set(there.namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "napo_jax", "configs"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    if tracked:  # not in a source archive
        expected = {f"napo_jax/{file}" if file.startswith("configs/") else file for file in tracked}
        assert expected <= names
        others = {name for name in names - expected if ".dist-info/" not in name}
        assert not {name for name in others if (ROOT / name).suffix != ".py"}, "left lying about in the package"
    assert {f"napo_jax/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")} <= names
    assert {"napo_jax/world/base/model.safetensors", "napo_jax/world/base/pairs.parquet"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_installed_wheel_runs_where_nothing_else_is(wheel, tmp_path):
    """In one process: configs by both of their names, a command with one, and the demo's; test_notebook.py trains."""
    target, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    install(wheel, target)
    code = f"""
import napo_jax
assert napo_jax.__file__.startswith({str(target)!r}), napo_jax.__file__
from napo_jax import demo, preview
from napo_jax.config import load_config
from napo_jax.model_source import find_model
from napo_jax.world.configs import cure
for name in ("llava7b", "configs/llava7b.py"):
    assert load_config(name).model.size == "7b"
find_model(cure().model)
preview.main(["--config", "debug", "--data.cache", "cache", "--data.made-up", "32", "--html", "page.html"])
demo.main(["--help"])
"""
    environment = os.environ | {"PYTHONPATH": str(target), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--pairs" in done.stdout
    assert "32 rows, 32 kept" in done.stdout
    assert {path.name for path in empty.iterdir()} == {"cache", "page.html"}


def test_a_config_is_found_by_its_name_and_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("llava7b") == find_config("configs/llava7b.py") == ROOT / "configs" / "llava7b.py"
    assert load_config("llava7b") == load_config(ROOT / "configs" / "llava7b.py")
    assert config_name(["--config", "llava7b"]) == config_name(["--config=configs/llava7b.py"]) == "llava7b"
    # What is there goes first, and no other folder's name is taken for ours.
    (tmp_path / "configs").mkdir()
    mine = tmp_path / "configs" / "llava7b.py"
    mine.write_text("from napo_jax.config import Config\nget_config = Config\n")
    assert load_config("configs/llava7b.py") == Config()
    assert find_config("llava7b").parent == ROOT / "configs"
    for name, said in (
        ("llava8b", r"no config file llava8b; there are adavip7b, .*llava7b, "),
        ("mine/llava7b.py", r"no config file mine/llava7b.py; there are adavip7b, "),
        ("configs/llava8b.py", r"no config file configs/llava8b.py; there are configs/llava7b.py, adavip7b, "),
        ("../llava7b", "no config file"),
        ("llava7b.py", "no config file"),
    ):
        with pytest.raises(ValueError, match=re.compile(said)):
            find_config(name)


def test_configs_inside_a_package_go_before_a_folder_beside_it(tmp_path, monkeypatch):
    """Beside an installed package there may be anybody's `configs`."""
    package = tmp_path / "napo_jax"
    for folder in (package / "configs", tmp_path / "configs"):
        folder.mkdir(parents=True)
        (folder / "one.py").write_text("")
    monkeypatch.setattr(configs, "__file__", str(package / "config.py"))
    assert find_config("one") == package / "configs" / "one.py"


def test_the_version_is_one():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^version: {re.escape(napo_jax.__version__)}$", citation, re.MULTILINE)
    assert 'title: "Debiasing Multimodal Large Language Models via Noise-Aware Preference Optimization"' in citation
