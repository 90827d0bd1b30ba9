"""The notebook runs from its first cell to its last, on little of everything, where only the wheel is installed."""

import os

import nbformat
import pytest
from installed import build_wheel, install
from nbclient import NotebookClient

from napo_jax.world.configs import cure

FILE = "examples/demo.ipynb"
FEW = {"PAIRS": 40, "STEPS": 2, "BATCH": 8, "HELD_OUT": 4, "BUCKETS": 1, "QUESTIONS": 6, "SHOWN": 2}


@pytest.fixture(scope="module")
def notebook(pytestconfig):
    """Returns the notebook as it lies in the repository."""
    return nbformat.read(pytestconfig.rootpath / FILE, as_version=4)


def test_it_is_kept_without_outputs(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert not [cell for cell in cells if cell.outputs or cell.execution_count is not None]


def test_its_parameters_are_those_of_the_demo(notebook):
    from napo_jax.demo import Options

    said = {}
    exec(parameters(notebook).source, said)
    config = cure()
    assert said["PAIRS"] == Options().pairs
    assert said["STEPS"] == config.train.steps
    data = (config.data.batch_size, config.data.held_out, config.data.buckets)
    assert (said["BATCH"], said["HELD_OUT"], said["BUCKETS"]) == data


def parameters(notebook):
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    return cell


# The kernel's own libraries use what Python deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_runs(notebook, tmp_path):
    install(build_wheel(tmp_path), tmp_path / "installed")
    where = nbformat.v4.new_code_cell("import napo_jax\nprint(napo_jax.__file__)")
    small = nbformat.v4.new_code_cell("\n".join(f"{name} = {value}" for name, value in FEW.items()))
    assert all(f"{name} = " in parameters(notebook).source for name in FEW)
    notebook.cells.insert(notebook.cells.index(parameters(notebook)) + 1, small)
    notebook.cells.append(where)
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources)
    client.execute(env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")})
    assert where.outputs[0].text.startswith(str(tmp_path / "installed"))
    printed = [
        "".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells if "outputs" in cell
    ]
    table = next(text for text in printed if "held-out accuracy, habit broken" in text)
    assert "before" in table
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2 * FEW["SHOWN"]
    assert any("question_only" in text and "None" not in text for text in printed)
    assert (tmp_path / "runs" / "notebook" / "run" / "report.html").exists()
