"""A wheel of the repository, built and installed as pip does it, into a folder of its own."""

import subprocess
import sys
from pathlib import Path

_PIP = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]


def build_wheel(folder):
    """Returns the wheel, built into a folder; what builds it is of this environment, so that nothing is fetched."""
    root = Path(__file__).parents[1]
    _run([*_PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(root)])
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel, target):
    """Installs a wheel, without what it depends on, into a folder that then has to come first in PYTHONPATH."""
    _run([*_PIP, "install", "--no-deps", "--target", str(target), str(wheel)])


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
