"""Results and chunks of zsmerge-llm as LlamaIndex's responses: cumulative text, deltas, token counts."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from typing import Any

from llama_index.core.base.llms import types as core
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole, TextBlock
from llama_index.llms.zsmerge._messages import arguments, with_id

from zsmerge_llm.types import Chunk, Result, Usage

_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens")


def chat_response(result: Result, model: str, parallel: bool = True) -> ChatResponse:
    """One whole answer. Without `parallel` only the first tool call is kept."""
    message = _message(result.text, _calls(result.tool_calls, parallel))
    return ChatResponse(message=message, raw=_raw(result, model), additional_kwargs=_counts(result.usage))


def chat_responses(
    chunks: Generator[Chunk, None, None], model: str, parallel: bool = True
) -> Generator[ChatResponse, None, None]:
    """A response per chunk; each holds the whole message so far. Closing it closes `chunks`."""
    text, calls = "", list[dict[str, Any]]()
    with closing(chunks):
        for chunk in chunks:
            text += chunk.text
            calls = _calls([*calls, *chunk.tool_calls], parallel)
            yield ChatResponse(
                message=_message(text, calls),
                delta=chunk.text,
                raw=_raw(chunk, model),
                additional_kwargs=_counts(chunk.usage),
            )


def completion_response(result: Result, model: str) -> CompletionResponse:
    """One whole continuation."""
    return CompletionResponse(text=result.text, raw=_raw(result, model), additional_kwargs=_counts(result.usage))


def completion_responses(chunks: Generator[Chunk, None, None], model: str) -> Generator[CompletionResponse, None, None]:
    """A response per chunk; each holds the whole text so far. Closing it closes `chunks`."""
    text = ""
    with closing(chunks):
        for chunk in chunks:
            text += chunk.text
            yield CompletionResponse(
                text=text, delta=chunk.text, raw=_raw(chunk, model), additional_kwargs=_counts(chunk.usage)
            )


def _message(text: str, calls: list[dict[str, Any]]) -> ChatMessage:
    """The calls are in `additional_kwargs` for every version of the core, and in blocks where it has such blocks."""
    block = getattr(core, "ToolCallBlock", None)
    blocks: list[Any] = [TextBlock(text=text)]
    if block is not None:
        blocks += [
            block(tool_call_id=call["id"], tool_name=call["function"]["name"], tool_kwargs=arguments(call))
            for call in calls
        ]
    return ChatMessage(
        role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs={"tool_calls": calls} if calls else {}
    )


def _calls(calls: list[dict[str, Any]], parallel: bool) -> list[dict[str, Any]]:
    return [with_id(call) for call in (calls if parallel else calls[:1])]


def _raw(answer: Result | Chunk, model: str) -> dict[str, Any]:
    return {"model": model, "finish_reason": answer.finish_reason, "usage": _usage(answer.usage)}


def _usage(usage: Usage | None) -> dict[str, Any] | None:
    return None if usage is None else {**asdict(usage), "total_tokens": usage.total_tokens}


def _counts(usage: Usage | None) -> dict[str, int]:
    return {} if usage is None else {name: getattr(usage, name) for name in _COUNTS}
