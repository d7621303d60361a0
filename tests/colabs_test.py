"""The notebooks run from the first cell to the last, and hold no code of their own."""

import ast
import shutil
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

from vgen.metrics.scenes import METRICS

COLABS = sorted((Path(__file__).parents[1] / "colabs").glob("*.ipynb"))


@pytest.mark.parametrize("path", COLABS, ids=lambda path: path.stem)
def test_defines_nothing_and_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    sources = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, "clear the outputs before committing"
            sources.append(TransformerManager().transform_cell(cell.source))  # magics become calls
    nodes = list(ast.walk(ast.parse("\n".join(sources))))
    assert not [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))]
    assert {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)} >= {"vgen"}


def test_muse_runs(tiny_run, tmp_path, monkeypatch):
    """On a trained run of scale tiny, where training has nothing left to do."""
    shutil.copytree(tiny_run.workdir, tmp_path / "run")
    monkeypatch.setenv("VGEN_COLAB_SCALE", "tiny")
    monkeypatch.setenv("VGEN_COLAB_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    path = next(path for path in COLABS if path.stem == "muse")
    notebook = nbformat.read(path, as_version=4)
    before = {file.parent.name for file in (tmp_path / "run").glob("*/checkpoints/*")}

    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}}).execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 9  # curves, reconstructions, samples, guidance, steps, seeds, negative, two edits
    printed = "".join(output.text for output in notebook.cells[-1].outputs if output.output_type == "stream")
    assert all(name in printed for name in (*METRICS, "base", "superres", "base_guidance_off"))
    assert {file.parent.name for file in (tmp_path / "run").glob("*/checkpoints/*")} == before
