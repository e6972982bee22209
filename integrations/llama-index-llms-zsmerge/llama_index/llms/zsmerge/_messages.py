"""Conversion of LlamaIndex's messages and blocks to the OpenAI format of zsmerge-llm."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from pydantic_core import from_json

from zsmerge_llm.errors import InputError
from zsmerge_llm.types import arguments_text

_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}
# Blocks that are no content: reasoning and calls, which are converted separately, and cache hints for hosted models.
_SKIPPED_BLOCKS = ("thinking", "tool_call", "cache")


def to_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages in the OpenAI format.

    Of a block that a text model cannot take, such as an image, the type stays: zsmerge-llm raises
    UnsupportedContentError, which names it.

    Raises:
        InputError: a tool call in `additional_kwargs` that has no name.
    """
    return [_to_message(message) for message in messages]


def _to_message(message: ChatMessage) -> dict[str, Any]:
    converted: dict[str, Any] = {"role": _ROLES[message.role], "content": _content(message.blocks)}
    if calls := tool_calls(message):
        converted["tool_calls"] = calls
    if converted["role"] == "assistant" and (reasoning := _reasoning(message)):
        converted["reasoning_content"] = reasoning
    if converted["role"] == "tool":
        converted |= {
            key: message.additional_kwargs[key] for key in ("tool_call_id", "name") if key in message.additional_kwargs
        }
    return converted


def _reasoning(message: ChatMessage) -> str:
    """Return the reasoning that preceded the answer; some templates show it again within a turn."""
    return "\n".join(block.content or "" for block in message.blocks if block.block_type == "thinking")


def _content(blocks: Iterable[Any]) -> str | list[dict[str, Any]]:
    """Return the text, joined as `ChatMessage.content` joins it, or a list of blocks if one of them is not text."""
    parts = list(_parts(blocks))
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _parts(blocks: Iterable[Any]) -> Iterable[dict[str, Any]]:
    for block in blocks:
        kind = block.block_type
        if kind == "text":
            yield {"type": "text", "text": block.text}
        elif kind == "citable":
            yield from _parts(block.content)
        elif kind not in _SKIPPED_BLOCKS:
            yield {"type": kind}


def tool_calls(message: ChatMessage) -> list[dict[str, Any]]:
    """Return the tool calls of a message in the OpenAI format.

    They are in its blocks, in `additional_kwargs["tool_calls"]`, or in both; then the blocks count. A call without an
    id gets none: zsmerge-llm numbers it, the same at every turn, which a random id would not be.

    Raises:
        InputError: a call without a name.
    """
    blocks = [
        {"id": block.tool_call_id, "name": block.tool_name, "arguments": block.tool_kwargs}
        for block in message.blocks
        if block.block_type == "tool_call"
    ]
    calls = blocks or message.additional_kwargs.get("tool_calls") or ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InputError(f"tool_calls must be a list, not a {type(calls).__name__}.")
    return [_call(call) for call in calls]


def _call(call: Any) -> dict[str, Any]:
    """Convert one call: a dictionary, nested or flat, or an object (OpenAI's, or a `ToolSelection`)."""
    given = call.model_dump() if hasattr(call, "model_dump") else getattr(call, "__dict__", call)
    function = given.get("function") or {} if isinstance(given, dict) else None
    if not isinstance(function, dict):
        raise InputError(f"A tool call must be a dictionary or an object of its parts, not a {type(call).__name__}.")
    flat = {**given, **function}
    name = flat.get("name") or flat.get("tool_name")
    if not name:
        raise InputError("A tool call needs a name, as in {'function': {'name': ...}}; one has none.")
    value: Any = next((flat[key] for key in ("arguments", "args", "tool_kwargs") if flat.get(key) is not None), {})
    call_id = flat.get("id") or flat.get("tool_id")
    return ({"id": call_id} if call_id else {}) | {
        "type": "function",
        "function": {
            "name": name,
            "arguments": value if isinstance(value, str) else arguments_text(value),
        },
    }


def with_id(call: dict[str, Any]) -> dict[str, Any]:
    """Return `call` with a unique id if it has none: agents match results to calls by it."""
    return call if call.get("id") else {**call, "id": f"call_{uuid.uuid4().hex}"}


def arguments(call: dict[str, Any], unfinished: bool = False) -> dict[str, Any]:
    """Return the arguments of a call in the OpenAI format; {} if they are no JSON object.

    The tool then reports missing arguments, and an agent passes that to the model, which can try again.
    `unfinished`: the JSON is still being written.
    """
    given = call["function"].get("arguments") or {}
    if isinstance(given, str):
        try:
            given = from_json(given, allow_partial="trailing-strings") if unfinished else json.loads(given)
        except ValueError:
            return {}
    return given if isinstance(given, dict) else {}
