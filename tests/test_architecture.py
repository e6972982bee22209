"""The layout of the packages: who may import whom, small files and classes, and names that stay what they are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import zsmerge_llm

PACKAGE = Path(zsmerge_llm.__file__).parent
INTEGRATIONS = PACKAGE.parent / "integrations"
ORDER = (
    *(
        "errors",
        "types",
        "paths",
        "config",
        "kvcache",
        "attention",
        "cpu",
        "gpu",
        "language",
        "models",
        "engine",
        "retrieval",
    ),
    *("sessions", "inspection", "generation", "planning", "runtime", "llm", "aio", "testing", "server", "cli"),
)
"""Folders and modules of the package: each may import those before it. docs/architecture.md explains them."""
NEITHER = ("engine", "sessions")
"""These do not import each other."""
DEVICES = re.compile(
    r"torch\._(inductor|dynamo|C)\b|\bis_(cuda|cpu)\b|\.type [!=]= [\"'](cpu|cuda)|torch\.cuda|CUDAGraph|_mm512"
)
DEVICE_NAMES = {"cpu", "cuda", "mps", "xpu"}
LONGEST_FILE, LONGEST_CLASS, MODULES_AT_THE_ROOT = 400, 250, 8


def modules(folder: Path, root: Path) -> dict[str, Path]:
    """Every module below a folder by its dotted name, relative to `root`."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, package: str, known: dict[str, Path]) -> Iterator[str]:
    """Modules of a package that a module imports, anywhere in it, for types too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package.split(".")[0]:
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in known else str(node.module)


def graph(folder: Path, root: Path, package: str) -> dict[str, set[str]]:
    known = modules(folder, root)
    return {name: {each for each in imports(path, package, known) if each in known} for name, path in known.items()}


OWN = graph(PACKAGE, PACKAGE.parent, "zsmerge_llm")


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_folder_and_module_has_its_place_in_the_order() -> None:
    assert {room(module) for module in OWN} - {""} <= set(ORDER)


def test_a_module_imports_only_from_rooms_before_its_own() -> None:
    against = [
        (module, other)
        for module, others in OWN.items()
        for other in others
        if room(module) and room(other) and ORDER.index(room(other)) > ORDER.index(room(module))
    ]
    assert not against


@pytest.mark.parametrize(
    ("folder", "package"),
    [
        (PACKAGE, "zsmerge_llm"),
        (INTEGRATIONS / "langchain-zsmerge" / "langchain_zsmerge", "langchain_zsmerge"),
        (INTEGRATIONS / "llama-index-llms-zsmerge" / "llama_index", "llama_index"),
    ],
)
def test_no_imports_go_in_a_circle(folder: Path, package: str) -> None:
    found = graph(folder, folder.parent, package)
    if package == "zsmerge_llm":
        found.pop(package)  # loads its public names when they are asked for
    try:
        list(TopologicalSorter(found).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {error.args[1]}")


def test_engine_and_sessions_do_not_know_each_other() -> None:
    for one, other in (NEITHER, NEITHER[::-1]):
        assert not [module for module in OWN if room(module) == one and other in map(room, OWN[module])]


def test_only_the_rooms_of_devices_name_a_device_or_a_compiler() -> None:
    free = {PACKAGE / "models" / "device.py"}
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("cpu", "gpu") or path in free:
            continue
        code = path.read_text(encoding="utf-8")
        assert not DEVICES.search(code), f"{path}: {DEVICES.search(code)}"
        constants = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
        assert not DEVICE_NAMES & {value for value in constants if isinstance(value, str)}, path


def test_the_integrations_and_benchmarks_use_public_names_only() -> None:
    public = ("zsmerge_llm", "zsmerge_llm.errors", "zsmerge_llm.types", "zsmerge_llm.testing")
    for path in INTEGRATIONS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zsmerge_llm"):
                assert node.module in public or "tests" in path.parts, f"{path}: {node.module}"
                assert not any(name.name.startswith("_") for name in node.names)


def test_public_names_are_the_ones_promised() -> None:
    assert {"LLM", "Engine", "CacheConfig", "SamplingParams", "Session"} <= set(zsmerge_llm.__all__)
    for name in zsmerge_llm.__all__:
        assert getattr(zsmerge_llm, name).__name__ == name or name == "Message"


def test_files_and_classes_stay_small() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(path for path in INTEGRATIONS.rglob("*.py") if "tests" not in path.parts)]:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= LONGEST_FILE, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert (node.end_lineno or 0) - node.lineno < LONGEST_CLASS, f"{path}: {node.name}"


def test_few_modules_stand_at_the_root() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MODULES_AT_THE_ROOT
