"""The examples run as they are written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import pytest

from tests.server.conftest import serving
from tests.support.programs import run_program
from zsmerge_llm import LLM
from zsmerge_llm.retrieval.selection import token_limit
from zsmerge_llm.server.settings import ServerSettings

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.slow


def run(name: str, *arguments: str) -> str:
    """Return what an example prints: with SmolLM2, if the arguments name no other model."""
    return run_program(EXAMPLES / name, *arguments)


def run_command(name: str, *arguments: str) -> str:
    """Return what an example prints that is started from the command line."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def counts_in(printed: str) -> list[tuple[int, int]]:
    """Return the tokens of each prompt, and how many of them were new."""
    return [(int(total), int(new)) for total, new in re.findall(r"\[(\d+) tokens, (\d+) of them new", printed)]


def test_the_langchain_chain_answers_over_the_whole_document() -> None:
    assert "Stone" in run("langchain_document_chain.py", "Who is the captain of the Marigold?")


def test_the_llamaindex_engine_answers_over_the_whole_document() -> None:
    assert "Agnes Hill" in run("llamaindex_document_query.py", "Who is the keeper of the lighthouse?")


def test_the_chat_loop_reads_only_new_messages() -> None:
    counts = counts_in(run("chat_loop.py"))
    assert len(counts) == 3
    assert counts[0][0] == counts[0][1]
    assert all(total > 2 * new for total, new in counts[1:])


def test_an_example_takes_a_file_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("The name of the dog is Rex.", encoding="utf-8")
    assert "Rex" in run("langchain_document_chain.py", "--file", str(path), "What is the name of the dog?")


def test_the_function_agent_calls_its_tools_and_reads_nothing_twice(gguf: Mapping[str, Path]) -> None:
    printed = run("llamaindex_function_agent.py", "--model", str(gguf["qwen2.5-coder-0.5b-instruct"]))
    calls = re.findall(r"^  (\w+\(.*\)) -> ", printed, re.MULTILINE)
    assert calls == ["weather({'city': 'Paris'})", "population({'city': 'Rome'})", "add({'a': 17, 'b': 25})"]
    answers = [part.strip().splitlines()[-1] for part in printed.split("\n> ")]
    assert ["21" in answers[0], "2,800,000" in answers[1], "42" in answers[2]] == [True] * 3
    counts = counts_in(printed)
    assert len(counts) == 6
    assert all(total - new >= before for (before, _), (total, new) in pairwise(counts))


def test_the_langchain_agent_calls_its_tools_and_reads_only_what_is_new(gguf: Mapping[str, Path]) -> None:
    turns = ("What is the weather in Paris?", "What is 17 * 23?")
    printed = run("langchain_agent.py", *turns, "--model", str(gguf["qwen2.5-coder-0.5b-instruct"]))
    assert "18 degrees" in printed
    assert "391" in printed
    first, *others = counts_in(printed)
    assert first[0] == first[1]
    assert len(others) >= 3
    assert all(new < 60 for _, new in others)


def test_a_question_about_documents_reads_its_own_tokens_only() -> None:
    printed = run("langchain_documents.py")
    assert "Agnes Hill" in printed
    assert len(counts_in(printed)) == 2
    most = token_limit("auto", length=10**6, slots=1024)
    assert all(new < 30 + most for _, new in counts_in(printed))  # the question, and the text retrieved for it


def test_a_chatbot_continues_where_another_process_stopped(tmp_path: Path) -> None:
    once = counts_in(run_command("langchain_long_memory_chatbot.py", "--folder", str(tmp_path)))
    again = counts_in(run("langchain_long_memory_chatbot.py", "--folder", str(tmp_path)))
    assert len(once) == len(again) == 3
    assert again[0][0] > once[-1][0] > 100  # the whole conversation so far
    assert all(new < 30 for _, new in [*once[1:], *again])


def test_objects_are_extracted_from_a_long_document() -> None:
    printed = run("structured_extraction.py")
    found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [list(each) for each in found] == [["ship_name", "captain_name"], ["keeper_name"]]
    assert "Marigold" in found[0]["ship_name"]
    assert "Stone" in found[0]["captain_name"]
    assert "Agnes Hill" in found[1]["keeper_name"]


def test_a_langgraph_agent_waits_for_approval_and_continues_from_an_earlier_turn(gguf: Mapping[str, Path]) -> None:
    printed = run("langgraph_time_travel.py", "--model", str(gguf["qwen2.5-coder-0.5b-instruct"]))
    decisions = re.findall(r"waits for approval: .*: (\w+)$", printed, re.MULTILINE)
    assert decisions == ["approve", "reject", "approve"]
    before, after = printed.split("-- back to the first turn")
    assert "No mail to Eve today." in before
    assert "Lunch at noon" in after
    assert "Eve" not in after
    assert "Sent to" in after[after.index("Dinner at eight") :]
    for conversation in (before[before.index("reject") :], after):
        first, *others = counts_in(conversation)
        assert len(others) == 3
        assert all(new < first[0] / 2 for _, new in others)


def test_a_deep_agent_reads_its_long_instructions_once(gguf: Mapping[str, Path]) -> None:
    printed = run("deepagents_notes.py", "--model", str(gguf["qwen2.5-coder-0.5b-instruct"]))
    assert re.findall(r"(\w+)\(\{'file_path'", printed) == ["write_file", "read_file"]
    assert "'content': 'The keeper is Agnes Hill" in printed[printed.index("files:") :]
    first, *others = counts_in(printed)
    assert first[0] > 2000
    assert len(others) == 2
    assert all(new < 100 for _, new in others)


def test_an_agent_hands_off_to_another_one(gguf: Mapping[str, Path]) -> None:
    printed = run("llamaindex_handoff.py", "--model", str(gguf["qwen2.5-coder-0.5b-instruct"]))
    assert re.findall(r"^(\w+): ", printed, re.MULTILINE) == ["reception", "meteorologist", "meteorologist"]
    assert "handoff({'to_agent': 'meteorologist'" in printed
    assert "weather({'city': 'Paris'}) -> It is sunny in Paris" in printed
    assert counts_in(printed)[-1][1] < counts_in(printed)[-1][0] / 2


def test_an_agent_calls_the_tool_of_an_mcp_server(gguf: Mapping[str, Path]) -> None:
    printed = run("llamaindex_mcp_agent.py", "--model", str(gguf["qwen2.5-coder-0.5b-instruct"]))
    assert "tide({'harbour': 'Dover', 'hour': 9})" in printed
    assert "is_error=False" in printed
    assert "3 metres" in printed.splitlines()[-1]
    assert counts_in(printed)[-1][1] < counts_in(printed)[-1][0] / 2


def test_router_sub_question_and_citation_engines_answer(gguf: Mapping[str, Path]) -> None:
    printed = run("llamaindex_query_engines.py", "--model", str(gguf["qwen2.5-coder-0.5b-instruct"]))
    router, asked, cited = re.split(r"^sub-questions: |^citation: ", printed, flags=re.MULTILINE)
    assert router.startswith("router: lighthouses: ")
    assert "Agnes Hill" in router
    assert asked.count("Sub question: ") == 2
    assert "[1]" in cited.splitlines()[0]
    assert re.findall(r"^  Source (\d): ", cited, re.MULTILINE) == ["1", "2"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server of SmolLM2."""
    with LLM("smollm2", session_memory="512MiB") as llm, serving(llm, ServerSettings(max_tokens=64)) as address:
        yield address


@pytest.mark.parametrize(
    ("name", "path", "number"),
    [("server_openai.py", "/v1", 5), ("server_anthropic.py", "", 2), ("server_langchain.py", "/v1", 2)],
)
def test_clients_of_the_server_read_each_conversation_once(name: str, path: str, number: int, server: str) -> None:
    printed = run(name, "--url", server + path)
    _, second, *others = counts_in(printed)
    assert "Paris" in printed
    assert second[1] < second[0] / 2
    assert len(others) == number - 2
    if name == "server_openai.py":
        assert "get_weather('Paris')" in printed or "get_weather('Oslo')" in printed
        # The document is read already: the question is new, and what is looked up for it.
        assert all(total > 3000 and new < 50 + token_limit("auto", total, slots=1024) for total, new in others[1:])


def test_openai_like_calls_a_tool_on_the_server(server: str) -> None:
    pytest.importorskip("llama_index.llms.openai_like", reason="llama-index-llms-openai-like is optional")
    printed = run("server_llamaindex.py", "--url", f"{server}/v1")
    assert printed.count("weather({'city'") >= 2
    assert all(new < total / 2 for total, new in counts_in(printed)[1:])
