"""The examples run as they are written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.slow


def run(name: str, *arguments: str) -> str:
    """What an example prints on SmolLM2."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_langchain_chain_answers_over_the_whole_document() -> None:
    assert "Stone" in run("langchain_document_chain.py")


def test_the_llamaindex_engine_answers_over_the_whole_document() -> None:
    assert "Stone" in run("llamaindex_document_query.py")


def test_the_chat_loop_reads_only_what_is_new() -> None:
    counts = [tuple(map(int, found)) for found in re.findall(r"\[(\d+) tokens, (\d+) of them new", run("chat_loop.py"))]
    assert len(counts) == 3
    assert counts[0][0] == counts[0][1]
    assert all(total > 2 * new for total, new in counts[1:])


def test_an_example_takes_a_file_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("The name of the dog is Rex.", encoding="utf-8")
    assert "Rex" in run("langchain_document_chain.py", "--file", str(path), "What is the name of the dog?")


def test_the_function_agent_calls_its_tools_and_reads_nothing_twice(gguf: Mapping[str, Path]) -> None:
    printed = run("llamaindex_function_agent.py", "--model", str(gguf["qwen2.5-coder-0.5b-instruct"]))
    assert all(call in printed for call in ("weather({'city': 'Paris'})", "population({'city': 'Rome'})", "-> 42"))
    counts = [tuple(map(int, found)) for found in re.findall(r"\[(\d+) tokens, (\d+) of them new", printed)]
    assert len(counts) == 6
    assert sum(new for _, new in counts) <= counts[-1][0]


def test_objects_are_extracted_from_a_long_document() -> None:
    printed = run("structured_extraction.py")
    found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [list(each) for each in found] == [["captain_name", "ship_name"], ["keeper_name"]]
    assert "Stone" in found[0]["captain_name"]
    assert "Agnes Hill" in found[1]["keeper_name"]
