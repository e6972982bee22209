"""Conversion of LangChain messages to the OpenAI format of zsmerge-llm, and of its results to LangChain messages."""

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
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import InvalidToolCall, ToolCall, invalid_tool_call, tool_call, tool_call_chunk

from zsmerge_llm import Chunk, Message, Result, Usage
from zsmerge_llm.errors import InputError
from zsmerge_llm.types import arguments_text

PROVIDER = "zsmerge"
_CALL_TAG = "<tool_call>"

_ROLES = {
    "human": "user",
    "user": "user",
    "ai": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
}
# content blocks of an assistant's message that repeat its tool calls or its reasoning: both are converted separately
_SKIPPED_BLOCKS = frozenset(
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
    """Return messages in the OpenAI format.

    Image and audio blocks stay as they are: zsmerge-llm raises UnsupportedContentError, which names them.

    Raises:
        InputError: a message type or a role that a prompt cannot hold.
    """
    return [_to_message(message) for message in messages]


def _to_message(message: BaseMessage) -> Message:
    converted: Message = {"role": _role(message), "content": _content(message)}
    if isinstance(message, AIMessage):
        if calls := _tool_calls(message):
            converted["tool_calls"] = calls
        if reasoning := _reasoning(message):
            converted["reasoning_content"] = reasoning
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
    raise InputError(f"A prompt cannot hold a {type(message).__name__}: use human, AI, system or tool messages.")


def _content(message: BaseMessage) -> str | list[dict[str, Any]]:
    if isinstance(message.content, str):
        return message.content
    skip = _SKIPPED_BLOCKS if isinstance(message, AIMessage) else frozenset[str]()
    blocks = [_block(block) for block in message.content]
    kept = [block for block in blocks if not isinstance(block, dict) or str(block.get("type")) not in skip]
    return kept or ""


def _block(block: Any) -> dict[str, Any]:
    if isinstance(block, str):
        return {"type": "text", "text": block}
    if isinstance(block, dict) and block.get("type") in ("text", "text-plain") and "text" in block:
        return {"type": "text", "text": block["text"]}
    return block


def _reasoning(message: AIMessage) -> str:
    """Return the reasoning that preceded the answer; some templates show it again within a turn."""
    blocks = [block for block in message.content if isinstance(block, dict)]
    texts = [block.get("reasoning") for block in blocks if block.get("type") == "reasoning"]
    text = "".join(text for text in texts if isinstance(text, str)) or message.additional_kwargs.get(
        "reasoning_content"
    )
    return text if isinstance(text, str) else ""


def _tool_calls(message: AIMessage) -> list[dict[str, Any]]:
    """Return the tool calls of an assistant's message in the OpenAI format; malformed arguments stay as they are."""
    calls = [_call(call["id"], call["name"], arguments_text(call["args"])) for call in message.tool_calls]
    invalid = [(call["id"], call["name"], call["args"] or "") for call in message.invalid_tool_calls]
    calls += [_call(call_id, name, text) for call_id, name, text in invalid if name]
    known = {call["id"] for call in calls}
    for block in message.content if isinstance(message.content, list) else []:
        # messages of other providers may hold their calls in the content alone
        if isinstance(block, dict) and block.get("type") == "tool_use" and block.get("id") not in known:
            calls.append(_call(block.get("id"), block.get("name"), arguments_text(block.get("input") or {})))
    return calls


def _call(call_id: str | None, name: Any, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def to_ai_message(result: Result, model: str) -> AIMessage:
    """Return a whole answer as a message, with usage and metadata; malformed calls are in `invalid_tool_calls`."""
    return AIMessage(
        content=result.text,
        additional_kwargs=_additional_kwargs(result),
        tool_calls=[_valid_call(call) for call in result.tool_calls],
        invalid_tool_calls=[_invalid_call(call) for call in result.invalid_tool_calls],
        usage_metadata=usage_metadata(result.usage),
        response_metadata=response_metadata(result, model),
    )


def to_ai_message_chunk(chunk: Chunk, model: str) -> AIMessageChunk:
    """Return a chunk of an answer. The last one has the malformed calls, which are not streamed."""
    calls = [
        tool_call_chunk(name=delta.name or None, args=delta.arguments, id=delta.id or None, index=delta.index)
        for delta in chunk.tool_call_deltas
    ]
    calls += [
        tool_call_chunk(name=call["name"], args=call["args"], id=call["id"], index=len(chunk.tool_calls) + at)
        for at, call in enumerate(map(_invalid_call, chunk.invalid_tool_calls))
    ]
    if chunk.finish_reason is None:
        return AIMessageChunk(content=chunk.text, additional_kwargs=_additional_kwargs(chunk), tool_call_chunks=calls)
    return AIMessageChunk(
        content=chunk.text,
        additional_kwargs=_additional_kwargs(chunk),
        tool_call_chunks=calls,
        usage_metadata=None if chunk.usage is None else usage_metadata(chunk.usage),
        response_metadata=response_metadata(chunk, model),
        chunk_position="last",
    )


def _additional_kwargs(answer: Result | Chunk) -> dict[str, Any]:
    """Return the reasoning under the key from which LangChain makes `content_blocks` of type reasoning."""
    return {"reasoning_content": answer.reasoning} if answer.reasoning else {}


def response_metadata(answer: Result | Chunk, model: str) -> dict[str, Any]:
    """Return the metadata that LangChain and LangSmith show; `token_usage` has every field of `Usage`."""
    metadata = {"model_name": model, "model_provider": PROVIDER, "finish_reason": answer.finish_reason}
    if answer.format_error:
        metadata["format_error"] = answer.format_error
    return metadata if answer.usage is None else {**metadata, "token_usage": asdict(answer.usage)}


def usage_metadata(usage: Usage) -> UsageMetadata:
    """Return token counts: `input_tokens` is the logical prompt, `cache_read` the part read by earlier requests."""
    tokens = UsageMetadata(  # type: ignore[typeddict-item]  # typing of Python 3.10 has no NotRequired
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )
    if usage.reasoning_tokens:
        tokens["output_token_details"] = OutputTokenDetails(reasoning=usage.reasoning_tokens)
    return tokens


def _valid_call(call: dict[str, Any]) -> ToolCall:
    function = call["function"]
    return tool_call(name=function["name"], args=json.loads(function["arguments"]), id=call["id"])


def _invalid_call(call: dict[str, Any]) -> InvalidToolCall:
    """Return a malformed call as the model wrote it.

    LangChain completes half a JSON object in a streamed call; the tag before it prevents that.
    """
    name, text = call["function"]["name"], call["function"]["arguments"]
    raw = _CALL_TAG + text if text.lstrip().startswith("{") else text
    return invalid_tool_call(name=name, args=raw, id=call["id"], error=call["error"])
