"""`/v1/responses`."""

from __future__ import annotations

import json
from typing import Any

from openai.types.responses import (
    ResponseFormatTextConfigParam,
    ResponseIncludable,
    ResponseInputItemParam,
    ResponseTextConfigParam,
    ToolParam,
    response_create_params,
)
from openai.types.responses.response_input_message_content_list_param import ResponseInputContentParam

from tests.server.conformance.cells import Group, no_effect, refuse_rest, refused, supported
from tests.server.conformance.openai_cells import CACHING, EFFORT, OPENAI_ONLY, SCHEMA
from tests.server.conformance.vendor import fields, kinds, members

FUNCTION = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
CALLED: dict[str, Any] = {
    "tools": [FUNCTION],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_output_tokens": 400,
}
JSON_SCHEMA = {"format": {"type": "json_schema", "name": "city", "schema": SCHEMA, "strict": True}}
USER = {"role": "user", "content": "Name a tree."}
CALL = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Oslo"}'}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "rain"}
VENDORS = "It belongs to OpenAI's own tools, which are refused."


def calls(answer: Any) -> bool:
    """Return whether an answer is one call with arguments that keep to the schema."""
    (call,) = answer.output
    return json.loads(call.arguments)["city"] in ("Oslo", "Rome")


def is_json(answer: Any) -> bool:
    """Return whether an answer keeps to the schema."""
    return json.loads(answer.output_text)["city"] in ("Oslo", "Rome")


FIELDS = {
    "access_programs": no_effect(OPENAI_ONLY, access_programs={"cyber": "standard"}),
    "background": refused("Keep the connection open.", background=True),
    "background_options": refused("", background_options={"completion_window": "2h"}),
    "context_management": no_effect(
        "The cache does not grow, so that nothing is compacted.",
        context_management=[{"type": "compaction", "compact_threshold": 1000}],
    ),
    "conversation": refused("Use `previous_response_id`.", conversation="conv_1"),
    "image": no_effect("Images are refused.", image={"context_compression": "auto"}),
    "include": supported(
        "Log-probabilities; the rest is in the reply, or never there.", include=["reasoning.encrypted_content"]
    ),
    "input": supported(),
    "instructions": supported("", lambda answer: answer.instructions == "Be brief.", instructions="Be brief."),
    "max_output_tokens": supported("", lambda answer: answer.usage.output_tokens == 3, max_output_tokens=3),
    "max_tool_calls": no_effect(VENDORS, max_tool_calls=3),
    "metadata": no_effect("It is given back.", metadata={"topic": "trees"}),
    "model": supported("The name of the model that is served, or an alias."),
    "moderation": refused("", moderation={"model": "omni-moderation-latest"}),
    "parallel_tool_calls": supported("", calls, **CALLED),
    "previous_response_id": supported("Of a response with `store`; also after a restart."),
    "prompt": refused("Send its text.", prompt={"id": "pmpt_1"}),
    "prompt_cache_key": supported(
        "Names the session, where it is free.",
        lambda answer: answer.session_id == "another key",
        prompt_cache_key="another key",
    ),
    "prompt_cache_options": no_effect(CACHING, prompt_cache_options={"mode": "implicit"}),
    "prompt_cache_retention": no_effect(CACHING, prompt_cache_retention="24h"),
    "reasoning": supported(EFFORT, reasoning={"effort": "low"}),
    "safety_identifier": no_effect("Sessions belong to the API key.", safety_identifier="ann"),
    "service_tier": no_effect(OPENAI_ONLY, service_tier="flex"),
    "store": supported("On, where it is not given.", lambda answer: answer.store is False, store=False),
    "stream": supported(),
    "stream_options": no_effect("Events are never padded.", stream_options={"include_obfuscation": False}, stream=True),
    "temperature": supported("0, greedy, where none is given.", temperature=0.5),
    "text": supported("", is_json, text=JSON_SCHEMA, max_output_tokens=400),
    "tool_choice": supported("", calls, **CALLED),
    "tools": supported("", calls, **CALLED),
    "top_logprobs": supported(
        "At most 20.",
        lambda answer: {len(each.top_logprobs) for each in answer.output[0].content[0].logprobs} == {3},
        top_logprobs=3,
    ),
    "top_p": supported("", top_p=0.5, temperature=1.0),
    "truncation": no_effect("The conversation has no largest length, so that nothing is left out.", truncation="auto"),
    "user": no_effect("Sessions belong to the API key.", user="ann"),
}
ITEM_NAMES, TOOL_NAMES = kinds(ResponseInputItemParam), kinds(ToolParam)
CHOICE_NAMES, PART_NAMES = kinds(response_create_params.ToolChoice), kinds(ResponseInputContentParam)
ITEMS = {
    "message": supported(input=[{"type": "message", **USER}]),
    "function_call": supported(input=[USER, CALL, OUTPUT]),
    "function_call_output": supported(input=[USER, CALL, OUTPUT]),
    "reasoning": no_effect(
        "Earlier reasoning is not read again.", input=[USER, {"type": "reasoning", "id": "rs_1", "summary": []}]
    ),
}
CHOICES = {
    "none": supported(tools=[FUNCTION], tool_choice="none"),
    "auto": supported(tools=[FUNCTION], tool_choice="auto"),
    "required": supported("", calls, **CALLED),
    "function": supported("", calls, **{**CALLED, "tool_choice": {"type": "function", "name": "weather"}}),
}
INCLUDED = {
    **{name: no_effect(VENDORS, include=[name]) for name in kinds(ResponseIncludable)},
    "message.input_image.image_url": no_effect("Images are refused.", include=["message.input_image.image_url"]),
    "message.output_text.logprobs": supported(
        "", lambda answer: len(answer.output[0].content[0].logprobs) > 0, include=["message.output_text.logprobs"]
    ),
    "reasoning.encrypted_content": no_effect("The reasoning is in the reply.", include=["reasoning.encrypted_content"]),
}
GROUPS = [
    Group("Fields", fields(*members(response_create_params.ResponseCreateParams)), FIELDS),
    Group(
        "Items of `input`",
        ITEM_NAMES,
        refuse_rest(ITEM_NAMES, ITEMS, lambda kind: {"input": [USER, {"type": kind}]}),
    ),
    Group(
        "Parts of content",
        PART_NAMES,
        refuse_rest(
            PART_NAMES,
            {"input_text": supported(input=[{"role": "user", "content": [{"type": "input_text", "text": "Why?"}]}])},
            lambda kind: {"input": [{"role": "user", "content": [{"type": kind}]}]},
        ),
    ),
    Group(
        "Tools",
        TOOL_NAMES,
        refuse_rest(TOOL_NAMES, {"function": supported("", calls, **CALLED)}, lambda kind: {"tools": [{"type": kind}]}),
    ),
    Group(
        "`tool_choice`",
        CHOICE_NAMES,
        refuse_rest(CHOICE_NAMES, CHOICES, lambda kind: {**CALLED, "tool_choice": {"type": kind}}),
    ),
    Group(
        "`text`",
        fields(ResponseTextConfigParam),
        {
            "format": supported("", is_json, text=JSON_SCHEMA, max_output_tokens=400),
            "verbosity": no_effect("Say it in the prompt.", text={"verbosity": "low"}),
        },
    ),
    Group(
        "`text.format`",
        kinds(ResponseFormatTextConfigParam),
        {
            "text": supported(text={"format": {"type": "text"}}),
            "json_object": supported(
                "", lambda answer: json.loads(answer.output_text) is not None, text={"format": {"type": "json_object"}}
            ),
            "json_schema": supported("", is_json, text=JSON_SCHEMA, max_output_tokens=400),
        },
    ),
    Group("`include`", kinds(ResponseIncludable), INCLUDED),
]
