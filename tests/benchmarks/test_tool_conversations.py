"""benchmarks/agents/tool_conversations.py on scripted answers: what it counts."""

from __future__ import annotations

import pytest
from langchain_zsmerge import ChatZSMerge

from benchmarks.agents import tool_conversations as benchmark
from zsmerge_llm.language.output_format import FIRST_RESULT_INSTRUCTION
from zsmerge_llm.testing import FakeLLM, scripted_answer

CALL = scripted_answer("", {"name": "get_weather", "arguments": '{"city": "Paris"}'})


def test_repeated_texts_are_found_whatever_their_punctuation() -> None:
    texts = benchmark.product_texts()
    assert benchmark.repeats(f"Well: **{FIRST_RESULT_INSTRUCTION.upper()}**", texts)
    assert not benchmark.repeats("The question has a full answer.", texts)


@pytest.mark.parametrize("kind", benchmark.AGENTS)
def test_turns_are_counted_as_informed_leaked_or_endless(kind: str) -> None:
    def turn(*answers: object) -> dict[str, object]:
        chat = ChatZSMerge(llm=FakeLLM(*answers))
        agent = benchmark.make_agent(kind, chat, [benchmark.get_weather])
        return benchmark.run_turn(agent, "What is the weather in Paris?", "thread", set())[0]

    good = turn(CALL, "It is 20 degrees, and sunny.")
    assert (good["informed"], good["leaked"], good["endless"], good["tool_calls"]) == (True, False, False, 1)
    assert turn(CALL, FIRST_RESULT_INSTRUCTION)["leaked"]
    if kind == "plain":
        assert turn(CALL)["endless"]
