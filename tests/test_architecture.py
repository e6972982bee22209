"""The shape of the house: who may import whom, and that public names stay what they are."""

from __future__ import annotations

import ast
from pathlib import Path

import zsmerge_llm

PACKAGE = Path(zsmerge_llm.__file__).parent
# Each module may import those of earlier lines, and of its own line.
STOREYS = (
    {"errors", "types", "aio"},
    {"config", "quiet", "fairness", "documents", "saving", "closing", "toolcalls", "lookup"},
    {"policy", "slots", "rotary", "hardware", "lowbit", "kernels", "messages", "grammar", "reasoning"},
    {"layer", "gguf", "chat"},
    {"cache", "adapters", "hub", "forms", "probe"},
    {"attention", "sampling", "loader", "batching", "recall"},
    {"horizon", "replay", "speaker", "glance"},
    {"fusion"},
    {"engine", "session", "answer"},
    {"files", "fingerprint", "memory", "profile"},
    {"store", "memory_text"},
    {"conversation", "memory_page"},
    {"parts"},
    {"llm"},
    {"screen"},
    {"cli_sessions"},
    {"cli"},
)


def imports(module: Path) -> set[str]:
    """Modules of this package that a module imports, anywhere in it, types included."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("zsmerge_llm."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "zsmerge_llm":
            found |= {name.name for name in node.names if (PACKAGE / f"{name.name}.py").exists()}
    return found


def test_imports_go_downwards_only() -> None:
    level = {name: index for index, storey in enumerate(STOREYS) for name in storey}
    modules = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    assert set(modules) <= set(level), "a new module needs its place in the house"
    for name, path in modules.items():
        upwards = {other for other in imports(path) if level[other] > level[name]}
        assert not upwards, f"{name} imports {upwards} from above"


def test_engine_and_session_do_not_know_each_other() -> None:
    assert "session" not in imports(PACKAGE / "engine.py")
    assert "engine" not in imports(PACKAGE / "session.py")


def test_the_integrations_use_public_names_only() -> None:
    for folder in ("langchain-zsmerge/langchain_zsmerge", "llama-index-llms-zsmerge/llama_index"):
        for path in (PACKAGE.parent / "integrations" / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zsmerge_llm"):
                    assert node.module in ("zsmerge_llm", "zsmerge_llm.errors", "zsmerge_llm.types"), (
                        f"{path}: {node.module}"
                    )
                    assert not any(name.name.startswith("_") for name in node.names)


def test_public_names_are_the_ones_promised() -> None:
    assert {"LLM", "Engine", "CacheConfig", "SamplingParams", "Session"} <= set(zsmerge_llm.__all__)
    for name in zsmerge_llm.__all__:
        assert getattr(zsmerge_llm, name).__name__ == name or name == "Message"


def test_files_stay_small() -> None:
    long = {path.name: n for path in PACKAGE.glob("*.py") if (n := len(path.read_text().splitlines())) > 450}
    assert not long
