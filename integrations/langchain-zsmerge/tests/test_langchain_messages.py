"""Messages to and from LangChain."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_zsmerge._messages import to_ai_message, to_ai_message_chunk, to_messages

from zsmerge_llm import Chunk, Result, ToolCallDelta, Usage
from zsmerge_llm.errors import InputError

USAGE = Usage(10, 4, 3, 0, 0.1, 0.2, 1024, "continued")


def one(message: BaseMessage) -> dict[str, Any]:
    (converted,) = to_messages([message])
    return converted


def test_each_kind_of_message_gets_its_role() -> None:
    messages = [SystemMessage("be brief"), HumanMessage("hi"), AIMessage("hello"), ToolMessage("4", tool_call_id="c1")]
    assert to_messages(messages) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
    ]


@pytest.mark.parametrize(
    ("role", "expected"), [("human", "user"), ("ai", "assistant"), ("developer", "system"), ("user", "user")]
)
def test_a_chat_message_names_its_role(role: str, expected: str) -> None:
    assert one(ChatMessage("x", role=role))["role"] == expected


@pytest.mark.parametrize(
    "message", [ChatMessage("x", role="narrator"), RemoveMessage(id="1"), FunctionMessage("x", name="f")]
)
def test_a_message_type_that_a_prompt_cannot_hold_is_refused(message: BaseMessage) -> None:
    with pytest.raises(InputError, match="use"):
        to_messages([message])


def test_text_blocks_become_text_and_image_blocks_stay() -> None:
    image = {"type": "image", "url": "https://example.org/a.png"}
    message = HumanMessage(["see", {"type": "text", "text": "this", "index": 0}, image])
    assert one(message)["content"] == [{"type": "text", "text": "see"}, {"type": "text", "text": "this"}, image]


def test_a_plain_text_document_block_is_read_as_text() -> None:
    block = {"type": "text-plain", "text": "once upon a time", "mime_type": "text/plain"}
    assert one(HumanMessage([block]))["content"] == [{"type": "text", "text": "once upon a time"}]


def test_tool_calls_become_openai_calls_with_raw_unicode_arguments() -> None:
    call = {"name": "weather", "args": {"city": "Köln"}, "id": "c1", "type": "tool_call"}
    assert one(AIMessage("", tool_calls=[call])) == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
        ],
    }


def test_a_malformed_call_stays_as_written_in_the_history() -> None:
    message = AIMessage("", invalid_tool_calls=[{"name": "f", "args": "{oops", "id": "c1", "error": "bad"}])
    assert one(message)["tool_calls"][0]["function"] == {"name": "f", "arguments": "{oops"}


def test_blocks_that_repeat_tool_calls_or_hold_reasoning_are_left_out() -> None:
    call = {"name": "f", "args": {}, "id": "c1", "type": "tool_call"}
    message = AIMessage(
        [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "a"}, call], tool_calls=[call]
    )
    converted = one(message)
    assert converted["content"] == [{"type": "text", "text": "a"}]
    assert len(converted["tool_calls"]) == 1


def test_a_call_in_the_content_alone_is_converted() -> None:
    message = AIMessage([{"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}}])
    assert one(message)["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": 1}'}


def test_an_answer_carries_usage_and_response_metadata() -> None:
    message = to_ai_message(Result("blue", "stop", USAGE), "smollm2")
    assert message.text == "blue"
    assert message.usage_metadata == {
        "input_tokens": 10,
        "output_tokens": 3,
        "total_tokens": 13,
        "input_token_details": {"cache_read": 4},
    }
    assert message.response_metadata["model_name"] == "smollm2"
    assert message.response_metadata["finish_reason"] == "stop"
    assert message.response_metadata["token_usage"]["reuse"] == "continued"


CALLS = [
    {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
    {"id": "b", "type": "function", "function": {"name": "g", "arguments": '{"y": "ü"}'}},
]
BROKEN = [
    {"id": "c", "type": "function", "function": {"name": "h", "arguments": "oops"}, "error": "no JSON"},
    {"id": "d", "type": "function", "function": {"name": None, "arguments": '{"name": "f", "ar'}, "error": "cut"},
]


def test_calls_of_an_answer_are_parsed_and_malformed_ones_are_invalid_tool_calls() -> None:
    message = to_ai_message(Result("", "tool_calls", USAGE, CALLS, BROKEN), "m")
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [("f", {"x": 1}), ("g", {"y": "ü"})]
    assert [(call["id"], call["error"]) for call in message.invalid_tool_calls] == [("c", "no JSON"), ("d", "cut")]


def test_streamed_calls_add_up_to_the_same_message() -> None:
    deltas = [ToolCallDelta(0, "", "a", "f"), ToolCallDelta(0, '{"x"'), ToolCallDelta(0, ": 1}")]
    begun = [to_ai_message_chunk(Chunk("", tool_call_deltas=[delta]), "m") for delta in deltas]
    held = [ToolCallDelta(1, '{"y": "ü"}', "b", "g")]
    last = to_ai_message_chunk(Chunk("", "tool_calls", USAGE, CALLS, BROKEN, tool_call_deltas=held), "m")
    whole = sum([*begun, last], AIMessageChunk(content=""))
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("f", {"x": 1}), ("g", {"y": "ü"})]
    assert [call["id"] for call in whole.invalid_tool_calls] == ["c", "d"]  # half an object is not mended
    assert whole.usage_metadata is not None
    assert json.loads(whole.model_dump_json())["response_metadata"]["finish_reason"] == "tool_calls"


def test_reasoning_is_a_reasoning_block_in_both_directions() -> None:
    usage = dataclasses.replace(USAGE, reasoning_tokens=2)
    whole = to_ai_message(Result("4", "stop", usage, reasoning="2 and 2"), "m")
    streamed = to_ai_message_chunk(Chunk("", reasoning="2 and"), "m")
    streamed += to_ai_message_chunk(Chunk("", reasoning=" 2"), "m")
    streamed += to_ai_message_chunk(Chunk("4", "stop", usage), "m")
    for message in (whole, streamed):
        assert message.text == "4"
        assert [block["type"] for block in message.content_blocks] == ["reasoning", "text"]
        assert message.content_blocks[0].get("reasoning") == "2 and 2"
        assert message.usage_metadata is not None
        assert message.usage_metadata["output_token_details"] == {"reasoning": 2}
        assert one(message) == {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    assert one(AIMessage(whole.content_blocks))["reasoning_content"] == "2 and 2"
