"""Tools bound to `ChatZSMerge`, and the calls that come back."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import AIMessageChunk
from langchain_core.tools import tool
from langchain_zsmerge import ChatZSMerge

from zsmerge_llm import Grammar
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.testing import scripted_answer


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return "sunny"


def test_bound_tools_reach_the_model_and_its_calls_come_back(llm: Any) -> None:
    llm.answers = [scripted_answer("", {"name": "weather", "arguments": '{"city": "X"}'})]
    chat = ChatZSMerge(llm=llm).bind_tools([weather])
    answer = chat.invoke("weather in X?")
    assert llm.requests[0].tools[0]["function"]["name"] == "weather"
    assert answer.tool_calls == [{"name": "weather", "args": {"city": "X"}, "id": "id_0", "type": "tool_call"}]
    streamed = list(chat.stream("weather in X?"))
    assert [call["args"] for chunk in streamed for call in chunk.tool_calls] == [{"city": "X"}]


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        (None, None),
        (False, None),
        ("auto", "auto"),
        ("none", "none"),
        ("any", "required"),
        ("required", "required"),
        (True, "required"),
        ("weather", {"type": "function", "function": {"name": "weather"}}),
        ({"type": "function", "function": {"name": "weather"}}, {"type": "function", "function": {"name": "weather"}}),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
        ({"type": "any"}, "required"),
    ],
)
def test_every_form_of_tool_choice_is_converted(llm: Any, choice: Any, wanted: Any) -> None:
    ChatZSMerge(llm=llm).bind_tools([weather], tool_choice=choice).invoke("hi")
    assert llm.requests[0].tool_choice == wanted
    ChatZSMerge(llm=llm).invoke("hi", tools=[weather], tool_choice=choice)
    assert llm.requests[1].tool_choice == wanted


def test_an_unknown_choice_is_refused(chat: ChatZSMerge) -> None:
    with pytest.raises(ConfigError, match="none of the tools"):
        chat.bind_tools([weather], tool_choice="wether")


def test_options_of_calls_reach_the_model(llm: Any) -> None:
    tools = ChatZSMerge(llm=llm).bind_tools([weather], parallel_tool_calls=False, strict=True, temperature=0.5)
    tools.invoke("hi")
    assert llm.requests[0].parallel_tool_calls is False
    assert llm.requests[0].tools[0]["function"]["strict"] is True
    assert llm.requests[0].sampling.temperature == 0.5
    yes = Grammar.choice("yes", "no")
    ChatZSMerge(llm=llm).invoke("hi", grammar=yes)
    assert llm.requests[1].grammar is yes


def test_malformed_calls_are_invalid_tool_calls_in_answers_and_streams(llm: Any) -> None:
    function = {"name": None, "arguments": '{"name": "weather", "argu'}
    invalid = {"id": "c1", "type": "function", "function": function, "error": "cut"}
    llm.answers = [scripted_answer("", invalid_tool_calls=[invalid])]
    chat = ChatZSMerge(llm=llm).bind_tools([weather])
    chunks = list(chat.stream("hi"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert isinstance(whole, AIMessageChunk)
    for answer in (chat.invoke("hi"), whole):
        assert answer.tool_calls == []
        assert [call["id"] for call in answer.invalid_tool_calls] == ["c1"]
