"""The modules of both integrations import each other without a circle, types and imports inside functions included."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

INTEGRATIONS = Path(__file__).parents[2] / "integrations"
PACKAGES = {
    "langchain_zsmerge": INTEGRATIONS / "langchain-zsmerge" / "langchain_zsmerge",
    "llama_index.llms.zsmerge": INTEGRATIONS / "llama-index-llms-zsmerge" / "llama_index" / "llms" / "zsmerge",
}


def imported_modules(package: str, path: Path) -> set[str]:
    """Return the modules of `package` that a file imports, anywhere in it; `__init__` is the package itself."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            is_module = [(path.parent / f"{alias.name}.py").is_file() for alias in node.names]
            whole = node.module == package and all(is_module)  # `from package import _module`
            names = [f"{package}.{alias.name}" for alias in node.names] if whole else [str(node.module)]
        found |= {name.removeprefix(package).strip(".") or "__init__" for name in names if name.startswith(package)}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_the_modules_of_an_integration_import_each_other_without_a_circle(package: str) -> None:
    paths = {path.stem: path for path in PACKAGES[package].glob("*.py")}
    graph = {name: imported_modules(package, path) for name, path in paths.items()}
    assert sum(map(len, graph.values())) >= len(paths)  # the imports were found
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
