"""The README and the documentation: their programs run, their commands exist, their paths exist.

The programs of a page run in one namespace, from top to bottom, as a reader would type them. In the default run every
model is a tiny random one; the slow run has SmolLM2 read and answer the README. A block behind the comment
`<!-- not executed: reason -->` is left out.
"""

from __future__ import annotations

import ast
import asyncio
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from tests.support.templates import FOLDER, template
from tests.support.tiny_models import tiny_model
from zsmerge_llm.cli.app import app
from zsmerge_llm.models import loader

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "zsmerge_llm"
TOP = ("zsmerge_llm", "tests", "examples", "benchmarks", "docs")
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?P<skip><!-- not executed: .+ -->\n+)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
TEXT = files("zsmerge_llm").joinpath("data").joinpath("marigold.txt").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """A program or commands of a page. line: of the page, where the code begins."""

    code: str
    line: int


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a language that are not excluded, in order."""
    text = page.read_text(encoding="utf-8")
    found = (match for match in FENCE.finditer(text) if match["language"] == language and not match["skip"])
    return [Block(match["code"], text.count("\n", 0, match.start("code"))) for match in found]


def page_name(page: Path) -> str:
    return page.stem


@pytest.fixture(scope="module")
def tiny_parts() -> tuple[Any, Any]:
    """A random model of two layers, and a tokenizer with SmolLM2's chat template."""
    tokenizer = template("smollm2").tokenizer
    tokenizer.chat_template = (FOLDER / "smollm2.jinja").read_text(encoding="utf-8")
    model = tiny_model(vocab=len(tokenizer))
    model.config.max_position_embeddings = 1_000_000
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


@pytest.fixture
def tiny_loader(tiny_parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model that is loaded by name is the tiny one."""
    model, tokenizer = tiny_parts
    monkeypatch.setattr(loader, "load", lambda name, **_: loader.LoadedModel(model, tokenizer, str(name), None))


@pytest.fixture
def real_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model that is loaded by name is SmolLM2."""
    load: Callable[..., loader.LoadedModel] = loader.load
    monkeypatch.setattr(loader, "load", lambda name, **settings: load("smollm2", **settings))


@pytest.fixture
def reader_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder a reader works in, with the file that the pages speak of."""
    (tmp_path / "report.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(page: Path) -> None:
    """Run a page's programs, with `await` where it stands at the top level."""
    names: dict[str, Any] = {"__name__": "__main__"}

    async def every_block() -> None:
        for block in blocks(page, "python"):
            source = "\n" * block.line + block.code  # a traceback then names the line of the page
            code = compile(source, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            waiting = eval(code, names)
            if waiting is not None:
                await waiting

    asyncio.run(every_block())


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=page_name)
@pytest.mark.usefixtures("tiny_loader", "reader_folder")
def test_the_programs_of_a_page_run(page: Path) -> None:
    run(page)


@pytest.mark.slow
@pytest.mark.usefixtures("real_loader", "reader_folder")
def test_the_readme_answers_from_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    run(README)
    assert capsys.readouterr().out.count("Stone") >= 2


def commands(page: Path) -> list[list[str]]:
    lines = (line for block in blocks(page, "bash") for line in block.code.splitlines())
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=page_name)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    for words in commands(page):
        if words[0] == "make":
            targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
            assert words[1] in targets, words
        elif words[0] == "zsmerge-llm":
            parse(words[1:])
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
        else:
            assert words[:3] == ["pip", "install", "-e"], words
            for project in (word for word in words[2:] if word != "-e"):
                assert (ROOT / project.partition("[")[0] / "pyproject.toml").is_file(), words


def parse(words: list[str]) -> None:
    """Parse a command of the command line without running it. Raises click's errors on what it does not know."""
    command: Any = typer.main.get_command(app)
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        assert words[0] in command.commands, words
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words))


def test_the_readme_is_short() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 180
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=page_name)
def test_the_links_and_paths_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    linked = [page.parent / link for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)]
    named = [ROOT / path for path in re.findall(rf"`((?:{'|'.join(TOP)})/[\w/.-]*)`", text)]
    inside = [PACKAGE / path for path in re.findall(rf"`((?:{'|'.join(folders())})/\w+\.py)`", text)]
    missing = {str(path.relative_to(ROOT)) for path in (*linked, *named, *inside) if not path.exists()}
    assert not missing


def folders() -> list[str]:
    """The folders of the package."""
    return [path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_the_folder_tree_is_the_packages() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text[text.index("```text") :]
    assert set(folders()) <= set(re.findall(r"^  (\w+)/", tree, re.M))
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert modules <= set(re.findall(r"\w+\.py", tree))


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages <= set(re.findall(r"[\w/-]+\.md", navigation))
