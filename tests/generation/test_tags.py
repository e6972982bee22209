"""Tags around calls and results, which templates or zsmerge-llm put into a prompt, are no part of an answer."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.chat import LARGE_CACHE, make_llm
from tests.support.scripted_model import scripted_answers

CALL = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
RESULT = "<tool_response>\nrain in Oslo\n</tool_response>"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": CITY}}
FUNCTION = {"name": "weather", "arguments": "{}"}


def after_a_call(question: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": FUNCTION}]},
        {"role": "tool", "tool_call_id": "1", "content": "rain in Oslo"},
        {"role": "user", "content": question},
    ]


@pytest.mark.parametrize("family", ["smollm2", "qwen2.5"])
@pytest.mark.parametrize("echo", [CALL, RESULT])
def test_an_answer_that_repeats_a_tag_is_given_again_without_it(family: str, echo: str) -> None:
    llm = make_llm(family, cache=LARGE_CACHE)
    with scripted_answers(llm, echo, "It rains."):
        assert llm.chat(after_a_call("So?")).text == "It rains."


def test_a_tag_that_the_user_asks_for_is_given() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    with scripted_answers(llm, RESULT):
        assert llm.chat(after_a_call("How is a <tool_response> written?")).text == RESULT


def test_with_tools_a_call_remains_a_call() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    with scripted_answers(llm, CALL.replace("{}", '{"city": "Rome"}')):
        answer = llm.chat(after_a_call("And now?"), tools=[WEATHER])
    assert [call["function"]["name"] for call in answer.tool_calls] == ["weather"]
