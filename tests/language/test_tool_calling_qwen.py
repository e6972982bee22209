"""A real small model chooses the right tools and answers in words after their results."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.tools import (
    name_and_arguments,
    with_results,
)
from zsmerge_llm import LLM, SamplingParams


def _tool(name: str, description: str, argument: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


REAL = [
    _tool("get_weather", "Get the current weather of a city.", "city"),
    _tool("calculator", "Evaluate an arithmetic expression.", "expression"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "name", "argument", "result", "answer"),
    [
        ("What is the weather in Paris?", "get_weather", "Paris", "18 degrees, sunny", "18"),
        ("What is 17 * 23?", "calculator", "17", "391", "391"),
    ],
)
def test_qwen_chooses_the_right_tool_and_answers_in_text_after_the_result(
    qwen_coder: LLM, question: str, name: str, argument: str, result: str, answer: str
) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    first = qwen_coder.chat(messages, tools=REAL, sampling=SamplingParams(max_tokens=100))
    assert first.finish_reason == "tool_calls"
    assert first.text == ""
    ((called, arguments),) = name_and_arguments(first.tool_calls)
    assert called == name
    assert argument in next(iter(arguments.values()))
    last, calls = first, 1
    while last.tool_calls and calls < 4:  # it has the calculator calculate its own result, too
        messages = with_results(messages, last, result)
        last, calls = qwen_coder.chat(messages, tools=REAL, sampling=SamplingParams(max_tokens=60)), calls + 1
        assert last.usage.reuse == "continued"
    assert last.tool_calls == []
    assert answer in last.text


@pytest.mark.slow
def test_qwen_makes_all_the_calls_a_question_needs_and_then_answers_in_text(qwen_coder: LLM) -> None:
    results = {"get_weather": "18 degrees, sunny", "calculator": "391"}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Paris, and what is 17 * 23?"}]
    calls: list[str] = []
    for _ in range(4):
        answer = qwen_coder.chat(messages, tools=REAL, sampling=SamplingParams(max_tokens=100))
        if not answer.tool_calls:
            break
        messages.append({"role": "assistant", "content": answer.text, "tool_calls": answer.tool_calls})
        for call in answer.tool_calls:
            calls.append(call["function"]["name"])
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": results[calls[-1]]})
    assert calls[:2] == ["get_weather", "calculator"]
    assert answer.text
    assert answer.usage.reuse == "continued"


@pytest.mark.slow
def test_qwen_needs_no_tool_for_a_greeting_and_follows_a_schema(qwen_coder: LLM) -> None:
    greeting = qwen_coder.chat("Hello, who are you?", tools=REAL, sampling=SamplingParams(max_tokens=60))
    assert (greeting.tool_calls, greeting.finish_reason) == ([], "stop")
    properties = {"city": {"type": "string"}, "country": {"type": "string"}}
    schema = {"type": "object", "properties": properties, "required": ["city", "country"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    place = qwen_coder.chat("Where is the Eiffel Tower?", response_format=wanted)
    assert json.loads(place.text) == {"city": "Paris", "country": "France"}


@pytest.mark.slow
@pytest.mark.parametrize("question", ["What time is it?", "Tell me the time please."])
def test_qwen_answers_a_bare_result_and_does_not_repeat_the_instruction_behind_it(
    qwen_coder: LLM, question: str
) -> None:
    now = {"type": "function", "function": {"name": "now", "description": "Current time."}}
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    chunks = list(qwen_coder.stream(messages, tools=[now], sampling=SamplingParams(max_tokens=60)))
    call = chunks[-1].tool_calls[0]
    deltas = [delta for chunk in chunks for delta in chunk.tool_call_deltas]
    assert [delta.name for delta in deltas if delta.name] == ["now"]
    assert "".join(delta.arguments for delta in deltas) == call["function"]["arguments"]
    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    messages.append({"role": "tool", "tool_call_id": call["id"], "content": "14:35"})
    answer = qwen_coder.chat(messages, tools=[now], sampling=SamplingParams(max_tokens=60))
    assert "14:35" in answer.text
    assert "full sentence" not in answer.text
    assert answer.usage.reuse == "continued"


@pytest.mark.slow
def test_qwen_streams_the_arguments_of_its_calls(qwen_coder: LLM) -> None:
    question = "What is the weather in Paris?"
    *pieces, last = qwen_coder.stream(question, tools=REAL, sampling=SamplingParams(max_tokens=100))
    deltas = [delta for chunk in [*pieces, last] for delta in chunk.tool_call_deltas]
    assert len([piece for piece in pieces if piece.tool_call_deltas]) > 2
    assert "".join(delta.arguments for delta in deltas) == last.tool_calls[0]["function"]["arguments"]
