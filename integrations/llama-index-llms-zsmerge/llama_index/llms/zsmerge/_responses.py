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


def chat_response(result: Result, model: str) -> ChatResponse:
    """One whole answer."""
    message = _message(result.text, result.reasoning, _calls(result.tool_calls))
    return ChatResponse(message=message, raw=_raw(result, model), additional_kwargs=_counts(result.usage))


def chat_responses(chunks: Generator[Chunk, None, None], model: str) -> Generator[ChatResponse, None, None]:
    """A response per chunk; each holds the whole message so far. Closing it closes `chunks`."""
    text = thought = ""
    with closing(chunks):
        for chunk in chunks:
            text, thought = text + chunk.text, thought + chunk.reasoning
            thinking = {"thinking_delta": chunk.reasoning} if chunk.reasoning else {}
            yield ChatResponse(
                message=_message(text, thought, _calls(chunk.tool_calls)),
                delta=chunk.text,
                raw=_raw(chunk, model),
                additional_kwargs={**_counts(chunk.usage), **thinking},
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


def usage_of(response: ChatResponse | None) -> dict[str, Any] | None:
    """What an answer cost, where its model says so."""
    raw = response.raw if response is not None else None
    return raw.get("usage") if isinstance(raw, dict) else None


def _message(text: str, thought: str, calls: list[dict[str, Any]]) -> ChatMessage:
    """Thoughts and calls are blocks where the core has such blocks; calls are in `additional_kwargs` too, for all."""
    blocks: list[Any] = [TextBlock(text=text)]
    if thought and (thinking := getattr(core, "ThinkingBlock", None)):
        blocks.insert(0, thinking(content=thought))
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
    broken = {"invalid_tool_calls": answer.invalid_tool_calls} if answer.invalid_tool_calls else {}
    return {"model": model, "finish_reason": answer.finish_reason, "usage": _usage(answer.usage), **broken}


def _usage(usage: Usage | None) -> dict[str, Any] | None:
    return None if usage is None else {**asdict(usage), "total_tokens": usage.total_tokens}


def _counts(usage: Usage | None) -> dict[str, int]:
    return {} if usage is None else {name: getattr(usage, name) for name in _COUNTS}
