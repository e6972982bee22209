"""Anthropic's own client against the server."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest

from tests.support.scripted_model import scripted_answers
from zsmerge_llm import LLM

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}}, "required": ["city"]}
TOOL: Any = {"name": "weather", "description": "Weather", "input_schema": SCHEMA}
ASK: list[Any] = [{"role": "user", "content": "Name a tree."}]


def ask(claude: anthropic.Anthropic, messages: list[Any], **options: Any) -> Any:
    return claude.messages.create(**{"model": "tiny", "max_tokens": 12, "messages": messages, **options})


def test_a_conversation_continues_by_its_content(claude: anthropic.Anthropic) -> None:
    first = ask(claude, ASK, system="Be brief.")
    second = ask(
        claude,
        [*ASK, {"role": "assistant", "content": first.content}, {"role": "user", "content": "And a river?"}],
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    )
    assert first.stop_reason == "max_tokens"
    assert second.usage.cache_read_input_tokens > first.usage.input_tokens
    assert second.usage.zsmerge["reuse"] == "continued"


@pytest.mark.parametrize("tools", [False, True])
def test_a_stream_says_what_a_whole_answer_says(claude: anthropic.Anthropic, tools: bool) -> None:
    choice = {"type": "any", "disable_parallel_tool_use": True}
    options: Any = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 400} if tools else {"max_tokens": 12}
    whole = ask(claude, ASK, **options)
    with claude.messages.stream(model="tiny", messages=ASK, **options) as events:
        streamed = events.get_final_message()

    without_ids = [
        [block.model_dump(exclude={"id", "parsed_output"}) for block in each.content] for each in (whole, streamed)
    ]
    assert without_ids[0] == without_ids[1]
    assert whole.stop_reason == streamed.stop_reason
    assert whole.usage.output_tokens == streamed.usage.output_tokens


def test_a_tools_result_is_read(claude: anthropic.Anthropic) -> None:
    choice = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    first = ask(claude, ASK, tools=[TOOL], tool_choice=choice, max_tokens=400)
    (call,) = first.content
    assert call.input["city"] in ("Oslo", "Rome")
    for extra in ({}, {"is_error": True}):
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}], **extra}
        after = ask(
            claude,
            [*ASK, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}],
            tools=[TOOL],
            tool_choice={"type": "none"},
        )
        assert after.usage.zsmerge["reuse"] in ("continued", "restored")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_that_ended_an_answer_is_named(claude: anthropic.Anthropic, llm: LLM, stream: bool) -> None:
    options: Any = {"model": "tiny", "messages": ASK, "stop_sequences": ["river", "END"], "max_tokens": 40}
    with scripted_answers(llm, "A tree. END and more", "A tree."):
        for sequence, reason in (("END", "stop_sequence"), (None, "end_turn")):
            if stream:
                with claude.messages.stream(**options) as events:
                    answer = events.get_final_message()
            else:
                answer = claude.messages.create(**options)
            assert (answer.stop_reason, answer.stop_sequence) == (reason, sequence)
            assert answer.content[0].text.strip() == "A tree."


def test_a_json_schema_holds(claude: anthropic.Anthropic) -> None:
    answer = ask(claude, ASK, output_config={"format": {"type": "json_schema", "schema": SCHEMA}}, max_tokens=400)
    assert json.loads(answer.content[0].text)["city"] in ("Oslo", "Rome")


def test_tokens_are_counted_as_they_are_read(claude: anthropic.Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": "Something that nobody has asked before."}]
    counted = claude.messages.count_tokens(model="tiny", messages=messages)
    assert ask(claude, messages).usage.input_tokens == counted.input_tokens


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"extra_body": {"sampler": "best"}}, "sampler"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"),
        ({"tool_choice": {"type": "some"}}, "tool_choice"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    claude: anthropic.Anthropic, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(claude, **{"messages": ASK, **options})
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert named in body["error"]["message"]


def test_another_model_is_not_found(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="tiny"):
        ask(claude, ASK, model="claude-9")
