"""The layering: which part of vgen may import which, and what importing it must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Parts that a part may not import, at the top of a file or inside a function.
TOP = {"train", "main", "stages", "system"}
FORBIDDEN = {
    "types": {"*"},
    "platform": {"*"},
    "config": {"*"},
    "trees": {"*"},
    "hlo": {"*"},
    "layers": {"models", "tasks", "tokens", "diffusion", "edit", "adapt", "data", "metrics", "convert"} | TOP,
    "models": {"tasks", "tokens", "diffusion", "edit", "adapt", "convert"} | TOP,
    "convert": {"tasks", "tokens", "diffusion", "edit", "data"} | TOP,  # it knows networks, and nothing they are for
    "tokens": {"models", "tasks"} | TOP,
    "diffusion": {"models", "tasks"} | TOP,
    "edit": {"models", "tasks"} | TOP,
    "adapt": {"models", "tasks"} | TOP,
    "guidance": {"models", "tasks", "edit"} | TOP,
    "sample": {"models", "tasks", "edit", "tokens", "diffusion"} | TOP,
    "tasks": TOP,
    "data": {"tasks", "models", "metrics", "tokens", "edit"} | TOP,
    "metrics": {"tasks"} | TOP,
    "train": {"models", "tasks", "data", "metrics", "tokens", "diffusion", "edit", "stages", "system", "main"},
    "state": {"models", "tasks", "data"} | TOP,
    "recipes": {"*"},
    "checkpoint": {"models", "tasks", "data"} | TOP,
    "checkpoint_show": {"models", "tasks", "data"} | TOP,
    "log": {"models", "tasks"} | TOP,
    "optim": {"models", "tasks", "data"} | TOP,
    "sharding": {"models", "tasks", "data"} | TOP,
    "stages": {"models", "tasks", "main", "system"},
    "system": {"models", "tasks", "main"},
    "main": {"models", "tasks"},
    "features": {"models", "tasks", "metrics", "stages", "system", "main"},
    "automatic_masks": {"tasks", "metrics", "tokens", "diffusion", "edit"} | TOP,
    "debug": {"models", "tasks", "data", "metrics", "tokens", "diffusion", "edit"} | TOP,
    "fields": {"*"},
    "hosts": {"*"},
    "bucket": {"*"},
    "engine": {"models", "tasks", "tokens", "diffusion", "edit"} | TOP,
}
EXCEPT = {("trees", "config"), ("bucket", "config"), ("fields", "config")}  # their errors are mistakes in configs
# Whole systems: a pipeline's files become the task that samples it. `vgen.load` imports these where it needs them.
SYSTEMS = {"convert/pipelines.py", "convert/schedulers.py", "convert/single_file.py"}
HEAVY = (
    "torch", "tensorflow", "grain", "tensorflow_datasets", "transformers", "diffusers", "huggingface_hub", "matplotlib",
    "sklearn",
)  # fmt: skip
MODULES = sorted(
    ".".join(path.with_suffix("").relative_to(ROOT).parts).removesuffix(".__init__")
    for path in ROOT.glob("vgen/**/*.py")
)


def imported(path: Path) -> set[str]:
    """Parts of vgen ("models", "train", ...) that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("vgen.")}


def violations(part: str, path: Path) -> set[str]:
    forbidden = FORBIDDEN.get(part, set())
    found = imported(path) - {part}
    return {other for other in found if ("*" in forbidden or other in forbidden) and (part, other) not in EXCEPT}


def test_imports_run_one_way():
    wrong = {}
    for path in sorted(ROOT.glob("vgen/**/*.py")):
        part = path.relative_to(ROOT / "vgen").with_suffix("").parts[0]
        bad = violations(part, path)
        if str(path.relative_to(ROOT / "vgen")) in SYSTEMS:
            bad -= {"tasks", "diffusion", "data"}
        if bad:
            wrong[str(path.relative_to(ROOT))] = sorted(bad)
    assert not wrong


def test_the_rule_can_fail(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from vgen.models.muse import BaseTransformer\n    import vgen.tasks.tokens\n")
    assert violations("edit", path) == {"models", "tasks"} and violations("tasks", path) == set()


def test_every_part_has_a_rule():
    parts = {path.relative_to(ROOT / "vgen").with_suffix("").parts[0] for path in ROOT.glob("vgen/**/*.py")}
    free = {"__init__", "bench", "plan"}  # may import anything, or nothing
    assert parts - free <= set(FORBIDDEN), "name the new part in FORBIDDEN, or here if it is free"


@pytest.mark.parametrize("blocked", [False, True], ids=["installed", "not installed"])
def test_importing_every_module_loads_nothing_heavy(blocked):
    block = f"for name in {HEAVY}: sys.modules[name] = None\n" if blocked else ""
    assert {"vgen.main", "vgen.stages", "vgen.tasks.tokens", "vgen.tasks.autoencode"} < set(MODULES)
    code = (
        f"import sys\n{block}import importlib\nfor name in {MODULES}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY} if sys.modules.get(name)])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"
