"""OpenAI's own client against the server: chat completions, completions and responses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from zsmerge_llm.server.requests import served_name

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": WEATHER}}
ASK: list[Any] = [{"role": "user", "content": "Name a tree."}]


def chat(oai: openai.OpenAI, messages: list[Any], **options: Any) -> Any:
    return oai.chat.completions.create(model="tiny", messages=messages, **options)


def test_a_conversation_continues_by_its_content(oai: openai.OpenAI) -> None:
    first = chat(oai, ASK)
    messages = [*ASK, first.choices[0].message.model_dump(), {"role": "user", "content": "And a river?"}]
    second = chat(oai, messages)

    assert first.choices[0].finish_reason == "length"
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens
    assert second.usage.zsmerge["reuse"] == "continued"
    assert second.session_id == first.session_id


def test_a_stream_says_what_a_whole_answer_says(oai: openai.OpenAI) -> None:
    whole = chat(oai, ASK, seed=1, temperature=0.7)
    events = list(chat(oai, ASK, seed=1, temperature=0.7, stream=True, stream_options={"include_usage": True}))

    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-2].choices[0].finish_reason == "length"
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert events[-2].session_id


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_tool_is_called_with_valid_arguments_and_its_result_is_read(
    oai: openai.OpenAI, stream: bool
) -> None:
    options = {"tools": [TOOL], "parallel_tool_calls": False, "max_tokens": 400}
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    if stream:
        with oai.chat.completions.stream(model="tiny", messages=ASK, tool_choice=choice, **options) as events:
            answer = events.get_final_completion().choices[0]
    else:
        answer = chat(oai, ASK, tool_choice=choice, **options).choices[0]
    (call,) = answer.message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")

    given: Any = {"role": "assistant", "tool_calls": [call.model_dump(include={"id", "type", "function"})]}
    given["tool_calls"][0]["function"] = {"name": "weather", "arguments": call.function.arguments}
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    after = chat(oai, [*ASK, given, result], tools=[TOOL], tool_choice="none")
    assert after.usage.zsmerge["reuse"] in ("continued", "restored")


def test_a_json_schema_holds(oai: openai.OpenAI) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    answer = chat(oai, ASK, response_format=schema, max_tokens=400)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Oslo", "Rome")


def test_the_developers_messages_are_the_systems(oai: openai.OpenAI) -> None:
    counts = [
        chat(oai, [{"role": role, "content": "Be brief."}, *ASK]).usage.prompt_tokens
        for role in ("system", "developer")
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"n": 2}, "n"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"extra_body": {"sampler": "best"}}, "sampler"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"session_id": "../../etc/passwd"}}, "session"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "owner", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": "x"}] * 51}, "51 messages"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(oai: openai.OpenAI, options: dict[str, Any], named: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        oai.chat.completions.create(**{"model": "tiny", "messages": ASK, **options})
    assert caught.value.type == "invalid_request_error"
    assert named in str(caught.value.body)


def test_another_model_is_not_found_and_an_alias_is(oai: openai.OpenAI) -> None:
    assert [model.id for model in oai.models.list()] == ["tiny", "gpt-tiny"]
    assert oai.models.retrieve("gpt-tiny").id == "gpt-tiny"
    assert oai.chat.completions.create(model="gpt-tiny", messages=ASK).model == "gpt-tiny"
    with pytest.raises(openai.NotFoundError, match="tiny"):
        oai.chat.completions.create(model="gpt-9", messages=ASK)


def test_where_a_model_is_kept_is_not_told(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for model, name in (
        ("smollm2", "smollm2"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        (f"{tmp_path}/qwen.gguf", "qwen"),
        ("models/qwen-1.5b.gguf", "qwen-1.5b"),
        (f"{tmp_path}/folder/", "folder"),
    ):
        assert served_name(model) == name


def test_a_text_is_continued_whole_or_as_a_stream(oai: openai.OpenAI) -> None:
    whole = oai.completions.create(model="tiny", prompt="Once upon", max_tokens=8)
    events = list(oai.completions.create(model="tiny", prompt="Once upon", max_tokens=8, stream=True))
    assert "".join(event.choices[0].text for event in events) == whole.choices[0].text
    assert events[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="echo"):
        oai.completions.create(model="tiny", prompt="Once", echo=True)


def test_a_response_goes_on_from_an_earlier_one(oai: openai.OpenAI) -> None:
    first = oai.responses.create(model="tiny", input="Name a tree.", instructions="Be brief.")
    second = oai.responses.create(
        model="tiny", input="Another.", instructions="Be brief.", previous_response_id=first.id
    )
    assert (first.status, first.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert second.usage.zsmerge["reuse"] == "continued"
    assert second.previous_response_id == first.id


def test_responses_that_are_old_or_were_not_to_be_stored_are_not_found(oai: openai.OpenAI) -> None:
    first = oai.responses.create(model="tiny", input="Name a tree.")
    unstored = oai.responses.create(model="tiny", input="Name a tree.", store=False)
    for number in range(3):
        oai.responses.create(model="tiny", input=f"Name {number} trees.")
    for each in (first, unstored):
        with pytest.raises(openai.NotFoundError, match="send the whole conversation"):
            oai.responses.create(model="tiny", input="Another.", previous_response_id=each.id)


@pytest.mark.parametrize("tools", [False, True])
def test_a_streamed_response_is_the_whole_one(oai: openai.OpenAI, tools: bool) -> None:
    function: Any = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
    options: Any = {"tools": [function], "tool_choice": "required", "parallel_tool_calls": False} if tools else {}
    options |= {"model": "tiny", "input": "Where?", "max_output_tokens": 400 if tools else 12}
    whole = oai.responses.create(**options)
    events = list(oai.responses.create(stream=True, **options))

    last: Any = events[-1]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert last.type == f"response.{whole.status}"
    assert last.response.output_text == whole.output_text
    assert [item.type for item in last.response.output] == [item.type for item in whole.output]
    if tools:
        (call,) = last.response.output
        done: Any = next(event for event in events if event.type == "response.function_call_arguments.done")
        assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
        assert done.arguments == call.arguments
        result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
        after = oai.responses.create(
            model="tiny", input=result, previous_response_id=last.response.id, tools=[function], tool_choice="none"
        )
        assert after.usage.zsmerge["reuse"] == "continued"
