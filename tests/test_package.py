"""The package as a stranger meets it: what an import costs, and what the README promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("flax", "transformers", "orbax", "grain", "torch", "optax", "pyarrow", "PIL", "safetensors", "tyro")


def run(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_importing_the_loss_imports_nothing_heavy():
    loaded = f"[name for name in {HEAVY} if name in sys.modules], 'jax' in sys.modules"
    done = run(f"import sys; from napo_jax import napo_loss; print({loaded})")
    assert (done.returncode, done.stdout.strip()) == (0, "[] True"), done.stderr


def test_the_public_names_are_there():
    import napo_jax

    assert all(hasattr(napo_jax, name) for name in napo_jax.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", napo_jax.__version__)


@pytest.mark.parametrize("page", ["README.md", "docs/method.md", "docs/objectives.md"])
def test_the_code_on_a_page_runs_and_prints_what_it_says(page):
    """A ```python block runs; a ```text block right after it is what it prints."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", text, re.DOTALL)
    assert blocks
    for code, printed in blocks:
        done = run(code)
        assert done.returncode == 0, done.stderr
        assert done.stdout == printed
    listed = set(re.findall(r"\]\(((?!http)[^)#]+)", text))
    assert not [link for link in listed if not (ROOT / page).parent.joinpath(link).exists()]


def test_the_tree_in_the_readme_is_the_tree():
    """Every file of the package stands in the README's picture, and nothing that is not there."""
    tree = re.search(r"```text\nnapo_jax/\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    pictured, folder = set(), ""
    for indent, name in re.findall(r"^( +)([\w/.]+) ", tree, re.MULTILINE):
        if name.endswith("/"):
            folder = name
        else:
            pictured.add(folder + name if len(indent) > 2 else name)
    package = {str(path.relative_to(ROOT / "napo_jax")) for path in (ROOT / "napo_jax").rglob("*.py")}
    assert pictured == {name for name in package if not name.endswith("__init__.py")}
