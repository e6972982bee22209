"""LangChain messages to the OpenAI-style messages of zsmerge-llm, and its results back. No model is needed here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import InvalidToolCall, ToolCall, invalid_tool_call, tool_call, tool_call_chunk

from zsmerge_llm import Chunk, Message, Result, Usage
from zsmerge_llm.errors import InputError

PROVIDER = "zsmerge"

_ROLES = {
    "human": "user",
    "user": "user",
    "ai": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
}
# blocks of an assistant's message that repeat its tool calls or hold reasoning, which no model reads again
_NOT_TEXT = frozenset(
    {
        "tool_call",
        "tool_call_chunk",
        "invalid_tool_call",
        "tool_use",
        "input_json_delta",
        "function_call",
        "reasoning",
        "thinking",
        "redacted_thinking",
    }
)


def to_messages(messages: Sequence[BaseMessage]) -> list[Message]:
    """LangChain messages as role/content dicts.

    Images, audio and the like are handed on as they are: zsmerge-llm refuses them by name (UnsupportedContentError).

    Raises:
        InputError: a kind of message or a role that has no place in a conversation.
    """
    return [_to_message(message) for message in messages]


def _to_message(message: BaseMessage) -> Message:
    converted: Message = {"role": _role(message), "content": _content(message)}
    if isinstance(message, AIMessage) and (calls := _calls_of(message)):
        converted["tool_calls"] = calls
    if isinstance(message, ToolMessage):
        converted["tool_call_id"] = message.tool_call_id
    return converted


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        if message.role not in _ROLES:
            raise InputError(f"Role {message.role!r} is unknown: use one of {', '.join(sorted(_ROLES))}.")
        return _ROLES[message.role]
    for kind, role in (
        (HumanMessage, "user"),
        (AIMessage, "assistant"),
        (SystemMessage, "system"),
        (ToolMessage, "tool"),
    ):
        if isinstance(message, kind):
            return role
    raise InputError(f"A {type(message).__name__} has no place in a prompt: use human, AI, system or tool messages.")


def _content(message: BaseMessage) -> str | list[dict[str, Any]]:
    if isinstance(message.content, str):
        return message.content
    skip = _NOT_TEXT if isinstance(message, AIMessage) else frozenset[str]()
    blocks = [_block(block) for block in message.content]
    kept = [block for block in blocks if block.get("type") not in skip]
    return kept or ""


def _block(block: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(block, str):
        return {"type": "text", "text": block}
    if block.get("type") in ("text", "text-plain") and "text" in block:
        return {"type": "text", "text": block["text"]}
    return block


def _calls_of(message: AIMessage) -> list[dict[str, Any]]:
    """The calls of an assistant's message, in the OpenAI form: arguments as JSON text, malformed ones as written."""
    calls = [_call(call["id"], call["name"], _json(call["args"])) for call in message.tool_calls]
    written = [(call["id"], call["name"], call["args"] or "") for call in message.invalid_tool_calls]
    calls += [_call(call_id, name, text) for call_id, name, text in written if name]
    known = {call["id"] for call in calls}
    for block in message.content if isinstance(message.content, list) else []:
        # calls of other providers' messages that stand in the content alone
        if isinstance(block, dict) and block.get("type") == "tool_use" and block.get("id") not in known:
            calls.append(_call(block.get("id"), block["name"], _json(block["input"])))
    return calls


def _call(call_id: str | None, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def to_ai_message(result: Result, model: str) -> AIMessage:
    """A whole answer as a message, with usage and response metadata; malformed calls in `invalid_tool_calls`."""
    calls, invalid = _parse_calls(result.tool_calls)
    return AIMessage(
        content=result.text,
        tool_calls=calls,
        invalid_tool_calls=invalid,
        usage_metadata=usage_metadata(result.usage),
        response_metadata=response_metadata(result, model),
    )


def to_ai_message_chunk(chunk: Chunk, model: str, first_call: int) -> AIMessageChunk:
    """A piece of an answer; `first_call` is the number of tool calls already streamed."""
    calls = [
        tool_call_chunk(
            name=call["function"]["name"],
            args=_arguments(call),
            id=call.get("id"),
            index=first_call + index,
        )
        for index, call in enumerate(chunk.tool_calls)
    ]
    if chunk.finish_reason is None:
        return AIMessageChunk(content=chunk.text, tool_call_chunks=calls)
    return AIMessageChunk(
        content=chunk.text,
        tool_call_chunks=calls,
        usage_metadata=None if chunk.usage is None else usage_metadata(chunk.usage),
        response_metadata=response_metadata(chunk, model),
        chunk_position="last",
    )


def response_metadata(answer: Result | Chunk, model: str) -> dict[str, Any]:
    """What LangChain and LangSmith show of an answer; `token_usage` holds everything `Usage` reports."""
    metadata = {"model_name": model, "model_provider": PROVIDER, "finish_reason": answer.finish_reason}
    return metadata if answer.usage is None else {**metadata, "token_usage": asdict(answer.usage)}


def usage_metadata(usage: Usage) -> UsageMetadata:
    """Tokens in LangChain's terms: `input_tokens` is the logical prompt, `cache_read` what earlier turns had read."""
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )


def _parse_calls(raw_calls: Sequence[dict[str, Any]]) -> tuple[list[ToolCall], list[InvalidToolCall]]:
    calls: list[ToolCall] = []
    invalid: list[InvalidToolCall] = []
    for raw in raw_calls:
        name, text, call_id = raw["function"]["name"], _arguments(raw), raw.get("id")
        try:
            arguments = json.loads(text or "{}")
            if not isinstance(arguments, dict):
                raise ValueError(f"arguments must be a JSON object, not {type(arguments).__name__}")
        except ValueError as error:
            invalid.append(invalid_tool_call(name=name, args=text, id=call_id, error=str(error)))
        else:
            calls.append(tool_call(name=name, args=arguments, id=call_id))
    return calls, invalid


def _arguments(raw: dict[str, Any]) -> str:
    arguments = raw["function"]["arguments"]
    return arguments if isinstance(arguments, str) else _json(arguments)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
