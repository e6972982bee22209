"""`/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import json
from typing import Any

from anthropic.types import (
    ContentBlockParam,
    DocumentBlockParam,
    OutputConfigParam,
    ThinkingConfigParam,
    ToolChoiceParam,
    ToolUnionParam,
    message_count_tokens_params,
    message_create_params,
)

from tests.server.conformance.cells import Group, no_effect, refuse_rest, refused, supported
from tests.server.conformance.openai_cells import CACHING, EFFORT, SCHEMA
from tests.server.conformance.vendor import fields, hints, kinds, members

TOOL = {"name": "weather", "description": "Weather", "input_schema": SCHEMA}
CALLED: dict[str, Any] = {
    "tools": [TOOL],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    "max_tokens": 400,
}
JSON_SCHEMA: dict[str, Any] = {
    "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    "max_tokens": 400,
}
CACHE = {"type": "ephemeral"}
USER = {"role": "user", "content": "Name a tree."}
USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}}
ANTHROPIC_ONLY = "It is about Anthropic's own service."


def said(*blocks: Any) -> dict[str, Any]:
    """Return a request with blocks of the user's."""
    return {"messages": [{"role": "user", "content": list(blocks)}]}


def answered(*blocks: Any) -> dict[str, Any]:
    """Return a request with blocks of the assistant's, behind a question."""
    return {"messages": [USER, {"role": "assistant", "content": list(blocks)}, USER]}


def calls(answer: Any) -> bool:
    """Return whether an answer is one call with arguments that keep to the schema."""
    (call,) = answer.content
    return call.input["city"] in ("Oslo", "Rome")


def is_json(answer: Any) -> bool:
    """Return whether an answer keeps to the schema."""
    return json.loads(answer.content[0].text)["city"] in ("Oslo", "Rome")


COUNTED = {
    "cache_control": no_effect(CACHING, cache_control=CACHE),
    "messages": supported(),
    "model": supported("The name of the model that is served, or an alias."),
    "output_config": supported("`effort`: as far as the model's template knows it.", output_config={"effort": "low"}),
    "speed": no_effect(ANTHROPIC_ONLY, speed="fast"),
    "system": supported(system=[{"type": "text", "text": "Be brief.", "cache_control": CACHE}]),
    "thinking": supported(EFFORT, thinking={"type": "disabled"}),
    "tool_choice": supported(tools=[TOOL], tool_choice={"type": "none"}),
    "tools": supported(tools=[TOOL]),
    "user_profile_id": no_effect("A header. Sessions belong to the API key.", user_profile_id="ann"),
    "workspace_id": no_effect("A header. Sessions belong to the API key.", workspace_id="one"),
}
FIELDS = {
    **COUNTED,
    "container": refused("", container="container_1"),
    "diagnostics": no_effect("`usage.zsmerge.reuse` says the same.", diagnostics={"previous_message_id": None}),
    "inference_geo": no_effect(ANTHROPIC_ONLY, inference_geo="us"),
    "max_tokens": supported("", lambda answer: answer.usage.output_tokens == 3, max_tokens=3),
    "metadata": no_effect("Sessions belong to the API key.", metadata={"user_id": "ann"}),
    "output_config": supported("`effort`: as far as the model's template knows it.", is_json, **JSON_SCHEMA),
    "service_tier": no_effect(ANTHROPIC_ONLY, service_tier="auto"),
    "stop_sequences": supported(
        "", lambda answer: answer.stop_reason == "stop_sequence", stop_sequences=list("aeiou .0123456789")
    ),
    "stream": supported(),
    "tool_choice": supported("", calls, **CALLED),
    "tools": supported("", calls, **CALLED),
}
BLOCK_NAMES, TOOL_NAMES = kinds(ContentBlockParam), kinds(ToolUnionParam)
BLOCKS = {
    "text": supported(**said({"type": "text", "text": "Name a tree.", "cache_control": CACHE})),
    "document": supported(
        "Of plain text.",
        **said({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Oaks."}}),
    ),
    "thinking": supported(
        "As the template does: most leave earlier reasoning out.",
        **answered({"type": "thinking", "thinking": "An oak?", "signature": ""}, {"type": "text", "text": "An oak."}),
    ),
    "redacted_thinking": no_effect(
        "It is for Anthropic's models alone.",
        messages=[
            *(
                USER,
                {
                    "role": "assistant",
                    "content": [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "An oak."}],
                },
            ),
            USER,
        ],
    ),
    "tool_use": supported(**answered(USE)),
    "tool_result": supported(
        messages=[
            *(USER, {"role": "assistant", "content": [USE]}),
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"}]},
        ]
    ),
}
CHOICES = {
    "any": supported("", calls, **CALLED),
    "auto": supported(tools=[TOOL], tool_choice={"type": "auto"}),
    "none": supported(tools=[TOOL], tool_choice={"type": "none"}),
    "tool": supported(
        "", calls, **{**CALLED, "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}}
    ),
}
THOUGHTS = kinds(ThinkingConfigParam)
SOURCES = kinds(hints(DocumentBlockParam)["source"])
GROUPS = [
    Group("Fields", fields(*members(message_create_params.MessageCreateParams)), FIELDS),
    Group(
        "Blocks of content",
        BLOCK_NAMES,
        refuse_rest(BLOCK_NAMES, BLOCKS, lambda kind: said({"type": kind, "source": {"type": "base64"}})),
    ),
    Group(
        "Sources of documents",
        SOURCES,
        refuse_rest(
            SOURCES,
            {"text": BLOCKS["document"]},
            lambda kind: said({"type": "document", "source": {"type": kind}}),
        ),
    ),
    Group(
        "Tools",
        TOOL_NAMES,
        refuse_rest(
            TOOL_NAMES,
            {"custom": supported("", calls, **CALLED)},
            lambda kind: {"tools": [{"type": kind, "name": "theirs"}]},
        ),
    ),
    Group("`tool_choice`", kinds(ToolChoiceParam), CHOICES),
    Group(
        "`thinking`",
        THOUGHTS,
        {kind: supported(EFFORT, thinking={"type": kind, "budget_tokens": 1024}) for kind in THOUGHTS},
    ),
    Group(
        "`output_config`",
        fields(OutputConfigParam),
        {
            "effort": supported(EFFORT, output_config={"effort": "low"}),
            "format": supported("", is_json, **JSON_SCHEMA),
        },
    ),
]
COUNT_GROUPS = [Group("Fields", fields(message_count_tokens_params.MessageCountTokensParams), COUNTED)]
