"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import json
from typing import Any

from openai.types import completion_create_params as text_params
from openai.types.chat import (
    ChatCompletionContentPartParam,
    ChatCompletionMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionToolChoiceOptionParam,
    ChatCompletionToolUnionParam,
)
from openai.types.chat import completion_create_params as chat_params

from tests.server.conformance.cells import Group, no_effect, refuse_rest, refused, supported
from tests.server.conformance.vendor import fields, kinds, members

USER = {"role": "user", "content": "Name a tree."}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "Weather", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
CALLED: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 400}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
OPENAI_ONLY = "It is about OpenAI's own service."
CACHING = "What was read is kept anyway."
EFFORT = "As far as the model's template knows it."
ONE = "Ask again for another answer."
ENGINE = "The sampler has nothing like it."


def message(answer: Any) -> Any:
    """Return the message of an answer."""
    return answer.choices[0].message


def calls(answer: Any) -> bool:
    """Return whether an answer is one call with arguments that keep to the schema."""
    (call,) = message(answer).tool_calls
    return json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")


def is_json(answer: Any) -> bool:
    """Return whether an answer keeps to the schema."""
    return json.loads(message(answer).content)["city"] in ("Oslo", "Rome")


SHARED = {
    "frequency_penalty": refused("`repetition_penalty` does something like it. 0 is taken.", frequency_penalty=0.5),
    "logit_bias": refused(ENGINE, logit_bias={"5": 1}),
    "max_tokens": supported("", lambda answer: answer.usage.completion_tokens == 3, max_tokens=3),
    "model": supported("The name of the model that is served, or an alias."),
    "n": refused(f"1 is taken. {ONE}", n=2),
    "presence_penalty": refused("`repetition_penalty` does something like it. 0 is taken.", presence_penalty=0.5),
    "seed": supported("", seed=3, temperature=1.0),
    "stop": supported("", lambda answer: answer.choices[0].finish_reason == "stop", stop=list("aeiou \n.0123456789")),
    "stream": supported(""),
    "stream_options": supported("", stream=True, stream_options={"include_usage": True}),
    "temperature": supported("0, greedy, where none is given.", temperature=0.5),
    "top_p": supported("", top_p=0.5, temperature=1.0),
    "user": no_effect("Sessions belong to the API key.", user="ann"),
}
CHAT = {
    **SHARED,
    "audio": refused("", audio={"format": "wav", "voice": "alloy"}),
    "function_call": refused("Use `tool_choice`.", function_call="auto"),
    "functions": refused("Use `tools`.", functions=[FUNCTION]),
    "logprobs": supported(
        "The model's own, before temperature and grammars; without those of reasoning and calls.",
        lambda answer: len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens,
        logprobs=True,
    ),
    "max_completion_tokens": supported(
        "Goes before `max_tokens`.", lambda answer: answer.usage.completion_tokens == 3, max_completion_tokens=3
    ),
    "messages": supported(),
    "metadata": no_effect("It labels what OpenAI stores.", metadata={"topic": "trees"}),
    "modalities": refused("`['text']` is taken.", modalities=["text", "audio"]),
    "moderation": refused("", moderation={"model": "omni-moderation-latest"}),
    "parallel_tool_calls": supported("", calls, **CALLED),
    "prediction": no_effect(
        "It is for speed alone; repeated text is found anyway.", prediction={"type": "content", "content": "Oak."}
    ),
    "prompt_cache_key": supported(
        "Names the session, where it is free.", lambda answer: answer.session_id == "a key", prompt_cache_key="a key"
    ),
    "prompt_cache_options": no_effect(CACHING, prompt_cache_options={"mode": "implicit"}),
    "prompt_cache_retention": no_effect(CACHING, prompt_cache_retention="24h"),
    "reasoning_effort": supported(EFFORT, reasoning_effort="low"),
    "response_format": supported("", is_json, response_format=JSON_SCHEMA, max_tokens=400),
    "safety_identifier": no_effect("Sessions belong to the API key.", safety_identifier="ann"),
    "service_tier": no_effect(OPENAI_ONLY, service_tier="flex"),
    "store": no_effect("The reply has all of it; it is not kept to be looked up.", store=True),
    "tool_choice": supported("", calls, **CALLED),
    "tools": supported("", calls, **CALLED),
    "top_logprobs": supported(
        "At most 20.",
        lambda answer: {len(each.top_logprobs) for each in answer.choices[0].logprobs.content} == {3},
        logprobs=True,
        top_logprobs=3,
    ),
    "verbosity": no_effect("Say it in the prompt.", verbosity="low"),
    "web_search_options": refused("The model cannot search.", web_search_options={}),
}
COMPLETIONS = {
    **SHARED,
    "best_of": refused(f"1 is taken. {ONE}", best_of=2),
    "echo": refused("", echo=True),
    "logprobs": supported(
        "At most 20.",
        lambda answer: len(answer.choices[0].logprobs.token_logprobs) == answer.usage.completion_tokens,
        logprobs=1,
    ),
    "prompt": supported("One text."),
    "suffix": refused("", suffix="The end."),
}
ROLES = {
    "developer": supported("As `system`.", messages=[{"role": "developer", "content": "Be brief."}, USER]),
    "system": supported(messages=[{"role": "system", "content": "Be brief."}, USER]),
    "user": supported(),
    "assistant": supported(messages=[USER, {"role": "assistant", "content": "Oak."}, USER]),
    "tool": supported(
        messages=[
            *(USER, {"role": "assistant", "tool_calls": [CALL]}),
            {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        ]
    ),
    "function": refused("Use `tool`.", messages=[USER, {"role": "function", "name": "weather", "content": "rain"}]),
}
PARTS = {"text": supported(messages=[{"role": "user", "content": [{"type": "text", "text": "Name a tree."}]}])}
ROLE_NAMES, PART_NAMES = kinds(ChatCompletionMessageParam, "role"), kinds(ChatCompletionContentPartParam)
CHOICES = {
    "none": supported(tools=TOOLS, tool_choice="none"),
    "auto": supported(tools=TOOLS, tool_choice="auto"),
    "required": supported("", calls, **CALLED),
    "function": supported(
        "", calls, **{**CALLED, "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    ),
    "custom": refused("", "tool_choice", **CALLED | {"tool_choice": {"type": "custom", "custom": {"name": "sql"}}}),
    "allowed_tools": refused(
        "Send only those tools.",
        "tool_choice",
        **CALLED
        | {
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function"}]}}
        },
    ),
}
FORMATS = {
    "text": supported(response_format={"type": "text"}),
    "json_object": supported(
        "", lambda answer: json.loads(message(answer).content) is not None, response_format={"type": "json_object"}
    ),
    "json_schema": supported("", is_json, response_format=JSON_SCHEMA, max_tokens=400),
}
STREAM_OPTIONS = {
    "include_usage": supported("", stream=True, stream_options={"include_usage": True}),
    "include_obfuscation": no_effect(
        "Events are never padded.", stream=True, stream_options={"include_obfuscation": False}
    ),
}


def part(kind: str) -> dict[str, Any]:
    """Return a request with a kind of content."""
    block = {"type": kind, kind: {"url": "https://example.org", "data": "AAAA", "format": "wav"}}
    return {"messages": [{"role": "user", "content": [block]}]}


CHAT_GROUPS = [
    Group("Fields", fields(*members(chat_params.CompletionCreateParams)), CHAT),
    Group("Roles of messages", ROLE_NAMES, ROLES),
    Group("Parts of content", PART_NAMES, refuse_rest(PART_NAMES, PARTS, part)),
    Group(
        "Tools",
        kinds(ChatCompletionToolUnionParam),
        {
            "function": supported("", calls, **CALLED),
            "custom": refused("Use a function.", "tools", tools=[{"type": "custom", "custom": {"name": "sql"}}]),
        },
    ),
    Group("`tool_choice`", kinds(ChatCompletionToolChoiceOptionParam), CHOICES),
    Group("`response_format`", kinds(chat_params.ResponseFormat), FORMATS),
    Group("`stream_options`", fields(ChatCompletionStreamOptionsParam), STREAM_OPTIONS),
]
COMPLETION_GROUPS = [
    Group("Fields", fields(*members(text_params.CompletionCreateParams)), COMPLETIONS),
]
