"""Tools bound to `ChatZSMerge`, and the calls that come back."""

from __future__ import annotations

import asyncio
import json
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


def test_arguments_of_calls_are_streamed_as_they_are_written(llm: Any) -> None:
    functions = [{"name": "weather", "arguments": json.dumps({"city": city})} for city in ("X", "Zürich")]
    llm.answers = [scripted_answer("Let me see.", *functions)]
    chat = ChatZSMerge(llm=llm).bind_tools([weather])
    chunks = list(chat.stream("weather in X and Zürich?"))
    pieces = [piece for chunk in chunks for piece in chunk.tool_call_chunks]
    begun = [(piece["index"], piece["id"], piece["name"]) for piece in pieces if piece["name"]]
    assert begun == [(0, "id_0", "weather"), (1, "id_1", "weather")]
    assert len(pieces) > 4
    for index, function in enumerate(functions):
        assert "".join(piece["args"] or "" for piece in pieces if piece["index"] == index) == function["arguments"]
    whole, invoked = sum(chunks[1:], chunks[0]), chat.invoke("weather in X and Zürich?")
    assert whole.tool_calls == invoked.tool_calls
    assert whole.content == invoked.content


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_events_have_the_pieces_of_calls(llm: Any, version: Any) -> None:
    llm.answers = [scripted_answer("", {"name": "weather", "arguments": '{"city": "Zürich"}'})]
    chat = ChatZSMerge(llm=llm).bind_tools([weather])

    async def pieces() -> list[str]:
        if version == "v2":
            events = [event async for event in chat.astream_events("Where?", version="v2")]
            chunks = [event["data"]["chunk"] for event in events if event["event"] == "on_chat_model_stream"]
            return [piece["args"] for chunk in chunks for piece in chunk.tool_call_chunks if piece["args"]]
        deltas = [event["delta"] for event in chat.stream_events("Where?", version="v3") if "delta" in event]
        return [delta["args"] for delta in deltas if delta["type"] == "tool-call-delta"]

    found = asyncio.run(pieces())
    assert len(found) > 2
    assert "".join(found) == '{"city": "Zürich"}'


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
