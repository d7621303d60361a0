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


def executed(name, runs, folder, monkeypatch):
    """(the notebook after its last cell, its pictures) on copies of trained runs, in which nothing was trained.

    runs: one, or those of the folder's sub-folders by name.
    """
    for copy, run in runs.items() if isinstance(runs, dict) else [("", runs)]:
        shutil.copytree(run.workdir, folder / copy)
        (folder / copy / "config.json").unlink()  # shared runs leave the evaluation of their stages out
    monkeypatch.setenv("VGEN_COLAB_SCALE", "tiny")
    monkeypatch.setenv("VGEN_COLAB_WORKDIR", str(folder))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # see `quick_compilation`
    path = next(path for path in COLABS if path.stem == name)
    notebook = nbformat.read(path, as_version=4)
    before = {file.parent for file in folder.glob("**/checkpoints/*")}
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}}).execute()
    assert {file.parent for file in folder.glob("**/checkpoints/*")} == before
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return notebook, [output for output in outputs if "image/png" in output.get("data", {})]


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_muse_runs(tiny_run, tmp_path, monkeypatch):
    """On a trained run of scale tiny, where training has nothing left to do."""
    notebook, pictures = executed("muse", tiny_run, tmp_path / "run", monkeypatch)
    assert len(pictures) >= 9  # curves, reconstructions, samples, guidance, steps, seeds, negative, two edits
    table = printed(notebook.cells[-1])
    assert all(name in table for name in (*METRICS, "base", "superres", "base_guidance_off"))


def test_diffusion_runs(tiny_runs, tmp_path, monkeypatch):
    run = tiny_runs(COLABS[0].parents[1] / "configs" / "ldm.py")
    notebook, pictures = executed("diffusion", run, tmp_path / "run", monkeypatch)
    assert len(pictures) == 7  # curves, samples, guidance, maps, Prompt-to-Prompt, SDEdit, a mask
    assert all(name in printed(notebook.cells[-1]) for name in (*METRICS, "unet", "unet_guidance_off"))


def test_encoders_run(tiny_runs, tmp_path, monkeypatch):
    configs = COLABS[0].parents[1] / "configs"
    runs = {name: tiny_runs(configs / f"{name}.py") for name in ("clip", "mae", "sam")}
    _, pictures = executed("encoders", runs, tmp_path / "runs", monkeypatch)
    assert len(pictures) == 7  # curves, search, classes, reconstructions, clicks, clicks of one's own, all masks
    assert len(list((tmp_path / "runs" / "clip" / "folder").glob("*.png"))) == 64
