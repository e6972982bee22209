"""Tools, calls and results that tests of tool calling share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tests.support.chat import dialogue
from tests.support.templates import TOOLS
from zsmerge_llm import Result, SamplingParams

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "größe": {"enum": ["klein", "groß"]}},
            "required": ["a", "größe"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "description": "The time."}}
ALL_TOOLS = [*TOOLS, ADD, NOW]
WEATHER = ("weather", {"place": "Zürich"})
CALL = '{"name": "weather", "arguments": {"place": "Zürich"}}'
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "it", "schema": {"type": "object", "properties": {"x": {"type": "boolean"}}}},
}
SAMPLED = SamplingParams(max_tokens=80, temperature=1.0, seed=3)


def name_and_arguments(calls: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return name and parsed arguments of each call."""
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def with_results(messages: list[dict[str, Any]], result: Result, content: str = "18 degrees") -> list[dict[str, Any]]:
    """Return the messages with an answer's tool calls and their results appended, as callers send them next."""
    answers = [{"role": "tool", "tool_call_id": call["id"], "content": content} for call in result.tool_calls]
    reply = {"role": "assistant", "content": result.text or None, "tool_calls": result.tool_calls}
    return [*messages, reply, *answers]


def question_and_result() -> list[dict[str, Any]]:
    """Return a question, the tool call for it, and the call's result."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Zürich"}'}}
    reply = {"role": "assistant", "content": None, "tool_calls": [call]}
    return [*dialogue("Is it warm in Zürich?"), reply, {"role": "tool", "tool_call_id": "c1", "content": "18 degrees"}]
