"""Conversion of results and chunks of zsmerge-llm to LlamaIndex's responses: text so far, deltas, token counts."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from typing import Any

from llama_index.core.base.llms import types as core
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole, TextBlock
from llama_index.llms.zsmerge._messages import arguments, with_id

from zsmerge_llm.types import Chunk, Result, Usage

_TOKEN_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens")


def chat_response(result: Result, model: str) -> ChatResponse:
    """Return a whole answer."""
    message = _message(result.text, result.reasoning, _calls(result.tool_calls))
    return ChatResponse(message=message, raw=_raw(result, model), additional_kwargs=_token_counts(result.usage))


def chat_responses(chunks: Generator[Chunk, None, None], model: str) -> Generator[ChatResponse, None, None]:
    """Yield a response per chunk, with the whole message so far. Closing it closes `chunks`."""
    text = reasoning = ""
    with closing(chunks):
        for chunk in chunks:
            text, reasoning = text + chunk.text, reasoning + chunk.reasoning
            thinking = {"thinking_delta": chunk.reasoning} if chunk.reasoning else {}
            yield ChatResponse(
                message=_message(text, reasoning, _calls(chunk.tool_calls)),
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


def usage_of(response: ChatResponse | None) -> dict[str, Any] | None:
    """Return the usage of an answer, or None for a model that reports none."""
    raw = response.raw if response is not None else None
    return raw.get("usage") if isinstance(raw, dict) else None


def _message(text: str, reasoning: str, calls: list[dict[str, Any]]) -> ChatMessage:
    """Return a message. Reasoning and calls are blocks where this version of LlamaIndex has such blocks; calls are in
    `additional_kwargs` too."""
    blocks: list[Any] = [TextBlock(text=text)]
    if reasoning and (thinking := getattr(core, "ThinkingBlock", None)):
        blocks.insert(0, thinking(content=reasoning))
    if block := getattr(core, "ToolCallBlock", None):
        blocks += [
            block(tool_call_id=call["id"], tool_name=call["function"]["name"], tool_kwargs=arguments(call))
            for call in calls
        ]
    return ChatMessage(
        role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs={"tool_calls": calls} if calls else {}
    )


def _calls(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
