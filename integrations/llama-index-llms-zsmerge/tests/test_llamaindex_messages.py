"""What LlamaIndex's messages become on their way to the engine."""

from __future__ import annotations

import json

import pytest
from llama_index.core.agent.react.formatter import ReActChatFormatter
from llama_index.core.agent.react.types import ActionReasoningStep, ObservationReasoningStep
from llama_index.core.base.llms.types import (
    CacheControl,
    CachePoint,
    CitableBlock,
    ImageBlock,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.llms import ChatMessage, MessageRole
from llama_index.core.llms.llm import ToolSelection
from llama_index.llms.zsmerge import ZSMergeLLM
from llama_index.llms.zsmerge._messages import to_messages

from zsmerge_llm.errors import InputError
from zsmerge_llm.retrieval.questions import asked_at
from zsmerge_llm.testing import FakeLLM, scripted_answer

NESTED = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def one(message: ChatMessage) -> dict:
    return to_messages([message])[0]


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("system", "system"),
        ("developer", "system"),
        ("user", "user"),
        ("assistant", "assistant"),
        ("chatbot", "assistant"),
        ("model", "assistant"),
        ("tool", "tool"),
        ("function", "tool"),
    ],
)
def test_every_role_is_converted(role, expected):
    assert one(ChatMessage(role=role, content="x")) == {"role": expected, "content": "x"}
    assert {member.value for member in MessageRole} <= {
        "system", "developer", "user", "assistant", "chatbot", "model", "tool", "function"
    }  # fmt: skip


def test_text_blocks_are_joined_as_llama_index_joins_them():
    message = ChatMessage(blocks=[TextBlock(text="one"), TextBlock(text="two")])
    assert one(message)["content"] == message.content == "one\ntwo"


def test_a_message_without_content_is_empty_text():
    assert one(ChatMessage(role="assistant"))["content"] == ""


def test_citable_text_is_text_and_cache_hints_are_left_out():
    blocks = [
        ThinkingBlock(content="hm"),
        CitableBlock(title="t", source="s", content=[TextBlock(text="cited")]),
        CachePoint(cache_control=CacheControl(type="ephemeral")),
    ]
    assert one(ChatMessage(blocks=blocks))["content"] == "cited"


def test_an_image_keeps_its_block_type():
    message = ChatMessage(blocks=[TextBlock(text="Look:"), ImageBlock(url="http://example.com/a.png")])
    assert one(message)["content"] == [{"type": "text", "text": "Look:"}, {"type": "image"}]


@pytest.mark.parametrize(
    "call",
    [
        NESTED,
        {"id": "call_1", "function": {"name": "add", "arguments": {"a": 1}}},
        {"id": "call_1", "name": "add", "args": {"a": 1}},
        ToolSelection(tool_id="call_1", tool_name="add", tool_kwargs={"a": 1}),
    ],
)
def test_tool_calls_are_taken_in_every_form(call):
    message = ChatMessage(role="assistant", content="", additional_kwargs={"tool_calls": [call]})
    assert one(message)["tool_calls"] == [NESTED]


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_tool_calls_in_blocks_and_in_keywords_are_the_same_calls(arguments):
    block = ToolCallBlock(tool_call_id="call_1", tool_name="add", tool_kwargs=arguments)
    message = ChatMessage(role="assistant", blocks=[block], additional_kwargs={"tool_calls": [NESTED]})
    assert one(message) == {"role": "assistant", "content": "", "tool_calls": [NESTED]}


def test_arguments_keep_their_unicode_letters():
    call = {"id": "1", "name": "greet", "args": {"who": "Zoë"}}
    message = ChatMessage(role="assistant", additional_kwargs={"tool_calls": [call]})
    assert one(message)["tool_calls"][0]["function"]["arguments"] == '{"who": "Zoë"}'


def test_a_call_without_id_is_sent_the_same_at_every_turn():
    message = ChatMessage(role="assistant", additional_kwargs={"tool_calls": [{"name": "add", "args": {}}]})
    assert one(message) == one(message)
    assert "id" not in one(message)["tool_calls"][0]


def test_a_tool_call_without_a_name_is_refused():
    message = ChatMessage(role="assistant", additional_kwargs={"tool_calls": [{"id": "1"}]})
    with pytest.raises(InputError, match="needs a name"):
        to_messages([message])


def test_a_tool_result_names_its_call():
    message = ChatMessage(role="tool", content="3", additional_kwargs={"tool_call_id": "call_1", "name": "add", "x": 1})
    assert one(message) == {"role": "tool", "content": "3", "tool_call_id": "call_1", "name": "add"}


def test_an_answer_with_tool_calls_can_be_sent_back():
    llm = ZSMergeLLM(llm=FakeLLM(scripted_answer("Let me add.", {"name": "add", "arguments": {"a": 1}})))
    answer = llm.chat([ChatMessage(role="user", content="1 + 1?")]).message
    sent = one(answer)
    assert sent["content"] == "Let me add."
    assert json.loads(sent["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    assert sent["tool_calls"][0]["id"] == "id_0"


def test_an_observation_of_a_react_agent_is_a_result_of_its_request() -> None:
    action = ActionReasoningStep(thought="I need a page.", action="open", action_input={"page": 1})
    steps = [action, ObservationReasoningStep(observation="A page.")] * 2
    question = ChatMessage(role="user", content="Who is the captain?")
    messages = to_messages(ReActChatFormatter().format([], [question], steps))
    assert messages[-1]["role"] == "user"
    assert messages[asked_at(messages)]["content"] == "Who is the captain?"
