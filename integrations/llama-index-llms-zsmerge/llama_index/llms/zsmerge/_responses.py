"""Conversion of results and chunks of zsmerge-llm to LlamaIndex's responses: text so far, deltas, token counts."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import asdict
from typing import Any

from llama_index.core.base.llms import types as core
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole, TextBlock
from llama_index.llms.zsmerge._messages import arguments, with_id

from zsmerge_llm.types import Chunk, Result, ToolCallDelta, Usage

_TOKEN_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens")


def chat_response(result: Result, model: str) -> ChatResponse:
    """Return a whole answer."""
    message = _message(result.text, result.reasoning, _calls(result.tool_calls))
    return ChatResponse(message=message, raw=_raw(result, model), additional_kwargs=_token_counts(result.usage))


def chat_responses(chunks: Generator[Chunk, None, None], model: str) -> Generator[ChatResponse, None, None]:
    """Yield a response per chunk, with the whole message so far. Closing it closes `chunks`.

    As from LlamaIndex's OpenAI class, the arguments of unfinished calls are the JSON text so far.
    """
    text = reasoning = ""
    calls: dict[int, dict[str, Any]] = {}
    with closing(chunks):
        for chunk in chunks:
            text, reasoning = text + chunk.text, reasoning + chunk.reasoning
            for delta in chunk.tool_call_deltas:
                calls[delta.index] = _extended(calls.get(delta.index), delta)
            ended = chunk.finish_reason is not None
            thinking = {"thinking_delta": chunk.reasoning} if chunk.reasoning else {}
            yield ChatResponse(
                message=_message(text, reasoning, _calls(chunk.tool_calls if ended else calls.values()), ended),
                delta=chunk.text,
                raw=_raw(chunk, model),
                additional_kwargs={**_token_counts(chunk.usage), **thinking},
            )


def completion_response(result: Result, model: str) -> CompletionResponse:
    """Return a whole continuation."""
    return CompletionResponse(text=result.text, raw=_raw(result, model), additional_kwargs=_token_counts(result.usage))


def completion_responses(chunks: Generator[Chunk, None, None], model: str) -> Generator[CompletionResponse, None, None]:
    """Yield a response per chunk, with the whole text so far. Closing it closes `chunks`."""
    text = ""
    with closing(chunks):
        for chunk in chunks:
            text += chunk.text
            yield CompletionResponse(
                text=text, delta=chunk.text, raw=_raw(chunk, model), additional_kwargs=_token_counts(chunk.usage)
            )


def usage_of(response: ChatResponse | CompletionResponse | None) -> dict[str, Any] | None:
    """Return the usage of an answer, or None for a model that reports none."""
    raw = response.raw if response is not None else None
    return raw.get("usage") if isinstance(raw, dict) else None


def _extended(call: dict[str, Any] | None, delta: ToolCallDelta) -> dict[str, Any]:
    """Return a call with another piece of its arguments; None: it begins."""
    begun = call or with_id({"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}})
    function = begun["function"]
    return {**begun, "function": {**function, "arguments": function["arguments"] + delta.arguments}}


def _message(text: str, reasoning: str, calls: list[dict[str, Any]], ended: bool = True) -> ChatMessage:
    """Return a message. Reasoning and calls are blocks where this version of LlamaIndex has such blocks; calls are in
    `additional_kwargs` too. Until they have ended, their arguments are text."""
    blocks: list[Any] = [TextBlock(text=text)]
    if reasoning and (thinking := getattr(core, "ThinkingBlock", None)):
        blocks.insert(0, thinking(content=reasoning))
    if block := getattr(core, "ToolCallBlock", None):
        blocks += [
            block(
                tool_call_id=call["id"],
                tool_name=call["function"]["name"],
                tool_kwargs=arguments(call) if ended else call["function"]["arguments"],
            )
            for call in calls
        ]
    return ChatMessage(
        role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs={"tool_calls": calls} if calls else {}
    )


def _calls(calls: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [with_id(call) for call in calls]


def _raw(answer: Result | Chunk, model: str) -> dict[str, Any]:
    invalid: dict[str, Any] = {"invalid_tool_calls": answer.invalid_tool_calls} if answer.invalid_tool_calls else {}
    if answer.format_error:
        invalid["format_error"] = answer.format_error
    return {"model": model, "finish_reason": answer.finish_reason, "usage": _usage(answer.usage), **invalid}


def _usage(usage: Usage | None) -> dict[str, Any] | None:
    return None if usage is None else {**asdict(usage), "total_tokens": usage.total_tokens}


def _token_counts(usage: Usage | None) -> dict[str, int]:
    return {} if usage is None else {name: getattr(usage, name) for name in _TOKEN_COUNTS}
