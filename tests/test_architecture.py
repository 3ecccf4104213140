"""The house rules, read off the source: what may import what, and what never stands in the package."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lymph_hf"
SOURCES = sorted(PACKAGE.glob("*.py"))

# Each row may import from itself (downwards only, which Python checks) and from the rows named beside it.
MODEL = {"configuration_", "encoder", "encoders", "pooling", "fusion", "processing_", "modeling_", "chunking"}
DATA = {"images", "clinical_table", "cohort", "split_files", "splits", "augment", "bags", "cells"}
SCORES = {"metrics", "metric_modules", "calibration"}
TOOLS = {"files", "options", "precision", "sampling", "version"}
LOOP = {"checkpoints", "training", "inference", "runs", "reporting", "evaluation", "decisions"}
LAYERS = [("model", MODEL), ("data", DATA), ("scores", SCORES), ("tools", TOOLS), ("loop", LOOP)]
ALLOWED = {
    "model": {"model"},
    "data": {"data", "tools", "model"},
    "scores": {"scores"},
    "tools": {"tools", "data"},
    "loop": {"loop", "tools", "data", "scores", "model"},
}


def layer(name: str) -> str:
    for title, stems in LAYERS:
        if any(name == stem or name.startswith(stem.rstrip("_") + "_") for stem in stems):
            return title
    return "stage"


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports at run time, wherever in the file."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and id(node) not in skipped:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_imports_go_downwards_only(path):
    if path.stem in ("__init__", "cli"):
        return
    own = layer(path.stem)
    if own == "stage":
        assert "cli" not in imports(path)
        return
    for name in imports(path):
        assert layer(name) in ALLOWED[own], f"{path.stem} ({own}) imports {name} ({layer(name)})"


def test_no_import_goes_round_in_a_circle():
    graph = {path.stem: imports(path) for path in SOURCES if path.stem != "__init__"}

    def visit(name: str, above: tuple[str, ...]):
        assert name not in above, " -> ".join((*above, name))
        for other in graph.get(name, ()):
            visit(other, (*above, name))

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", [p for p in SOURCES if layer(p.stem) == "model"], ids=lambda path: path.stem)
def test_the_model_path_can_be_copied_to_the_hub(path):
    """Remote code is copied file by file: only `from .sibling import name`, no sub-package, no bare package."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1, "a parent package is not copied"
            assert not (node.level == 1 and (node.module is None or "." in node.module)), "silently not copied"
            assert node.module != "__future__", "postponed annotations switch the validation of configurations off"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "lymph_hf" for name in names)


def test_the_package_is_flat():
    assert not [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_in_the_package_prints_or_reads_a_clock_for_ages(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call != "print", "use logging"
            assert not re.fullmatch(r"(datetime\.)?(date|datetime)\.(today|now|utcnow)", call), (
                "ages drift with the clock"
            )


def test_no_file_names_a_registry_host_or_a_place_of_one_machine():
    forbidden = re.compile(r"(?<![\w.])/(work|root)/|pypi\.org|files\.pythonhosted")
    for pattern in ("lymph_hf/*.py", "scripts/*.py", "tests/*.py", "*.toml", "*.md", "Makefile"):
        for path in ROOT.glob(pattern):
            if path != Path(__file__):
                assert not forbidden.search(path.read_text()), path


def test_importing_the_package_needs_no_training_libraries():
    """Whoever only loads a model needs neither datasets nor evaluate nor matplotlib."""
    import subprocess

    heavy = ["datasets", "evaluate", "matplotlib", "gradio", "tensorboard", "pandas", "sklearn"]
    script = f"import sys, lymph_hf; sys.exit(', '.join(n for n in {heavy} if n in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, f"imported: {done.stderr}"
