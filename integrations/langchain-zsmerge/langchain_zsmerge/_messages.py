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
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import InvalidToolCall, ToolCall, invalid_tool_call, tool_call, tool_call_chunk

from zsmerge_llm import Chunk, Message, Result, Usage
from zsmerge_llm.errors import InputError

PROVIDER = "zsmerge"
MARK = "<tool_call>"

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
    if isinstance(message, AIMessage):
        if calls := _calls_of(message):
            converted["tool_calls"] = calls
        if reasoning := _reasoning_of(message):
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


def _reasoning_of(message: AIMessage) -> str:
    """What a reasoning model thought before it answered; some templates show it again within a turn."""
    blocks = [block for block in message.content if isinstance(block, dict)]
    written = "".join(str(block.get("reasoning", "")) for block in blocks if block.get("type") == "reasoning")
    return written or str(message.additional_kwargs.get("reasoning_content") or "")


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
    return AIMessage(
        content=result.text,
        additional_kwargs=_extra(result),
        tool_calls=[_parsed(call) for call in result.tool_calls],
        invalid_tool_calls=[_invalid(call) for call in result.invalid_tool_calls],
        usage_metadata=usage_metadata(result.usage),
        response_metadata=response_metadata(result, model),
    )


def to_ai_message_chunk(chunk: Chunk, model: str, first_call: int) -> AIMessageChunk:
    """A piece of an answer; `first_call` is the number of tool calls already streamed."""
    read = [(call["function"]["name"], call["function"]["arguments"], call["id"]) for call in chunk.tool_calls]
    broken = [(call["name"], call["args"], call["id"]) for call in map(_invalid, chunk.invalid_tool_calls)]
    calls = [
        tool_call_chunk(name=name, args=arguments, id=call_id, index=first_call + index)
        for index, (name, arguments, call_id) in enumerate([*read, *broken])
    ]
    if chunk.finish_reason is None:
        return AIMessageChunk(content=chunk.text, additional_kwargs=_extra(chunk), tool_call_chunks=calls)
    return AIMessageChunk(
        content=chunk.text,
        additional_kwargs=_extra(chunk),
        tool_call_chunks=calls,
        usage_metadata=None if chunk.usage is None else usage_metadata(chunk.usage),
        response_metadata=response_metadata(chunk, model),
        chunk_position="last",
    )


def _extra(answer: Result | Chunk) -> dict[str, Any]:
    """The thought of a reasoning model, where LangChain looks for it (`content_blocks` of type reasoning)."""
    return {"reasoning_content": answer.reasoning} if answer.reasoning else {}


def response_metadata(answer: Result | Chunk, model: str) -> dict[str, Any]:
    """What LangChain and LangSmith show of an answer; `token_usage` holds everything `Usage` reports."""
    metadata = {"model_name": model, "model_provider": PROVIDER, "finish_reason": answer.finish_reason}
    return metadata if answer.usage is None else {**metadata, "token_usage": asdict(answer.usage)}


def usage_metadata(usage: Usage) -> UsageMetadata:
    """Tokens in LangChain's terms: `input_tokens` is the logical prompt, `cache_read` what earlier turns had read."""
    tokens = UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )
    if usage.reasoning_tokens:
        tokens["output_token_details"] = OutputTokenDetails(reasoning=usage.reasoning_tokens)
    return tokens


def _parsed(call: dict[str, Any]) -> ToolCall:
    function = call["function"]
    return tool_call(name=function["name"], args=json.loads(function["arguments"]), id=call["id"])


def _invalid(call: dict[str, Any]) -> InvalidToolCall:
    """A malformed call as it was written. LangChain mends half an object that is streamed; the mark prevents that."""
    name, text = call["function"]["name"], call["function"]["arguments"]
    written = MARK + text if text.lstrip().startswith("{") else text
    return invalid_tool_call(name=name, args=written, id=call["id"], error=call["error"])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
