"""The benchmarks use public names of the library only, and say how they are run."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import benchmarks

FOLDER = Path(benchmarks.__file__).parent


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_set_on_self(node: ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"


def test_benchmarks_use_no_private_name_of_the_library() -> None:
    for path in FOLDER.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_set_on_self(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zsmerge_llm"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                assert not any(map(private, names)), f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Attribute) and private(node.attr):
                on_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                allowed = on_self and node.attr in own
                assert allowed, f"{path.name}:{node.lineno} uses {node.attr}"


def test_each_script_can_be_imported_and_names_its_own_path() -> None:
    for path in FOLDER.rglob("*.py"):
        name = ".".join(path.relative_to(FOLDER.parent).with_suffix("").parts)
        module = importlib.import_module(name)
        if hasattr(module, "main"):
            assert f"python {path.relative_to(FOLDER.parent).as_posix()}" in (module.__doc__ or ""), name


def test_no_script_hides_a_module_of_the_standard_library() -> None:
    """The folder of a script comes first where modules are looked for."""
    assert not {path.stem for path in FOLDER.rglob("*.py")} & sys.stdlib_module_names
