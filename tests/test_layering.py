"""Imports only point back along the path of the data: text, tokens, batches, model, runs, training, evaluation, experiments."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from factorization_memory.runs import names

PACKAGE = Path(__file__).parent.parent / "src" / "factorization_memory"
ROOMS = {
    "config": set(),
    "presets": {"config"},
    "data": {"config"},
    "ops": {"config"},
    "layers": {"config", "ops"},
    "models": {"config", "ops", "layers"},
    "runs": {"config", "data", "models"},
    "training": {"config", "data", "layers", "models", "runs"},
    "generation": {"config", "data", "layers", "models"},
    # The harness has text generated.
    "evaluation": {"config", "data", "layers", "models", "runs", "generation"},
    # benchmarks read and write as generation does.
    "benchmarks": {"config", "presets", "ops", "layers", "models", "runs", "generation"},
    # reports read records on disk; of models and benchmarks they take constants alone.
    "reports": {"config", "models", "runs", "benchmarks"},
    # An experiment ends with its report.
    "experiments": {
        "config", "presets", "data", "layers", "models", "runs", "training", "evaluation", "generation", "benchmarks",
        "reports",
    },
    "cli": {
        "config", "presets", "data", "ops", "layers", "models", "runs", "training", "evaluation", "generation", "experiments",
        "benchmarks", "reports",
    },
}  # fmt: skip
ROOT = {"_files", "_streams", "_text", "_version"}
"""Modules and a package beside the rooms, of the standard library alone, that every room may import."""
OUTSIDE = {
    "datasets": {"data/fetch.py"},
    "tokenizers": {"data/tokenizer.py"},
    "huggingface_hub": {"models/pretrained/export.py"},
    "pyarrow": {"data/rows.py"},
    "zstandard": {"data/rows.py", "data/fetch.py"},
    "matplotlib": {f"reports/{file}.py" for file in ("plotting", "figures", "position_figures", "benchmark_figures")},
    "transformers": {"models/huggingface/", "benchmarks/training.py", "benchmarks/inference_peers.py"},
    "lm_eval": {"evaluation/harness"},
    "triton": {
        f"ops/{folder}"
        for folder in (
            "memory/kernels/",
            "routing/kernels.py",
            "convolution/kernels.py",
            "cross_entropy/kernels.py",
            "decoding/",
            "runtime/",
        )
    },
    "numba": {"ops/runtime/"},
    "tyro": {"cli/"},
}


@cache
def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    return ".".join(("factorization_memory", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports(path: Path) -> None:
    inside = path.relative_to(PACKAGE)
    room = inside.parts[0].removesuffix(".py")
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "factorization_memory":
            # Not the package itself, whose names are for users: they come from rooms.
            other = parts[1] if len(parts) > 1 else "factorization_memory"
            allowed = ROOT | ROOMS.get(room, set()) | {room}
            assert other in allowed, f"{inside} imports {name}: {room} may import {sorted(allowed)}"
        if parts[0] in OUTSIDE:
            assert any(str(inside).startswith(home) for home in OUTSIDE[parts[0]]), f"{inside} imports {name}"
        if parts[0] == "torch" and room in ("config", "presets", "data"):
            assert str(inside) == "data/loader.py", f"{inside} imports torch"


def test_no_module_imports_itself_in_a_circle() -> None:
    """Neither at the top of modules, nor when a function is called, nor for annotations."""
    modules = {module_of(path): path for path in FILES}

    def named(name: str) -> str | None:
        return next((n for n in (name, name.rpartition(".")[0]) if n in modules), None)

    graph = {module: {named(name) for name in imports(path)} & set(modules) - {module} for module, path in modules.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


NAMES = {value for name, value in vars(names).items() if name.endswith("_NAME")}
FOLDERS = {names.CHECKPOINTS_NAME, names.CORPUS_NAME, names.PLOTS_NAME}
"""Names that are also words: wrong only as part of a path."""
OTHER_FORMATS = {"data", "models"}
"""Rooms before `runs` with names of their own: packed corpora, Hugging Face's layout."""


def file_names(path: Path) -> set[str]:
    """The names of a run folder's files that stand in strings of a file, docstrings aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]
    joined = [node.right for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)]
    parts = {node.value for node in joined if isinstance(node, ast.Constant)}
    spelled = {name for name in NAMES - FOLDERS for text in strings if re.search(rf"(?<![\w.]){re.escape(name)}", text)}
    return spelled | parts & FOLDERS


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_names_of_a_run_folders_files_are_spelled_once(path: Path) -> None:
    if path != PACKAGE / "runs" / "names.py" and path.relative_to(PACKAGE).parts[0] not in OTHER_FORMATS:
        assert file_names(path) == set()


def test_every_room_is_listed() -> None:
    assert {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in FILES} <= set(ROOMS) | ROOT


@pytest.mark.parametrize("module", sorted(ROOT))
def test_root_is_of_the_standard_library(module: str) -> None:
    files = [path for path in FILES if path.relative_to(PACKAGE).parts[0].removesuffix(".py") == module]
    assert files
    for path in files:
        own = {name for name in imports(path) if name.startswith(f"factorization_memory.{module}.")}
        assert {name.split(".")[0] for name in imports(path) - own} <= sys.stdlib_module_names


@pytest.mark.parametrize("module", ["factorization_memory", "factorization_memory.config", "factorization_memory.cli"])
def test_light_imports(module: str) -> None:
    """What the command line imports before it knows its verb pulls in nothing heavy."""
    heavy = {"torch", "numpy", "matplotlib", "tokenizers", "tyro", "rich"}
    script = f"import sys, {module}; print(','.join(sorted({heavy!r} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_public_names_have_docstrings() -> None:
    """Functions, classes and their methods; a method of a class with bases may have its base's."""
    missing = []

    def look(body: list[ast.stmt], within: str, inherits: bool) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if not ast.get_docstring(node) and not (inherits and isinstance(node, ast.FunctionDef)):
                    missing.append(f"{within}.{node.name}")
                if isinstance(node, ast.ClassDef):
                    look(node.body, f"{within}.{node.name}", bool(node.bases))

    for path in PACKAGE.rglob("*.py"):
        if "builtin" not in path.parts:  # as exported
            tree = ast.parse(path.read_text(encoding="utf-8"))
            name = path.relative_to(PACKAGE).as_posix()
            if not ast.get_docstring(tree) and path.name != "__main__.py":
                missing.append(name)
            look(tree.body, name, inherits=False)
    assert not missing
