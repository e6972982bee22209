"""What goes in and comes out: messages, usage, results, chunks. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, Any]
"""One chat message as in the OpenAI format: `role`, `content` (text or text blocks), `tool_calls`, `tool_call_id`."""

ToolChoice = Literal["auto", "required", "none"] | dict[str, Any]
"""As in the OpenAI format; one tool is named by `{"type": "function", "function": {"name": ...}}`."""

ResponseFormat = dict[str, Any]
"""`{"type": "json_object"}` or `{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}`."""

Progress = Callable[[int, int], None]
"""Told (tokens read, tokens to read) while a prompt is read."""

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
"""`length`: cut by `max_tokens`. Where a grammar or a tool call is at work the answer is complete all the same, only
shorter than the model would have it, if any complete one fits."""


@dataclass(frozen=True)
class Usage:
    """What one request cost. Times in seconds, sizes in bytes, the rest in tokens."""

    prompt_tokens: int
    """Logical length of the prompt: everything the answer is based on, read now or earlier."""
    cached_tokens: int
    """The part of `prompt_tokens` that an earlier request had read already."""
    completion_tokens: int
    """Tokens generated, the end token included."""
    dropped_tokens: int
    """Tokens read that the cache no longer holds in any form, mean over KV heads and layers."""
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int
    reuse: str = "new"
    """Where the conversation was taken up: `new`, `continued`, `restored` or `reread: <reason>`."""
    reasoning_tokens: int = 0
    """The part of `completion_tokens` in which a reasoning model thought."""
    retrieved_tokens: int = 0
    """The part of `prompt_tokens` that repeats what was said: passages that the cache lost, the system message."""
    merged_tokens: int = 0
    """Tokens read that are held only as a part of a residual slot's mean, mean over KV heads and layers."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Result:
    """One whole answer."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    """Calls in the OpenAI format, with ids of their own and the arguments as JSON text."""
    invalid_tool_calls: list[dict[str, Any]] = field(default_factory=list)
    """Calls that could not be read, in the same form, each with an `error`. Their name may be None."""
    reasoning: str = ""
    """What a reasoning model thought before it answered (`<think>...</think>`); no part of the text."""


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer, thought or said. Only the last one carries `finish_reason`, `usage` and calls."""

    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    invalid_tool_calls: list[dict[str, Any]] = field(default_factory=list)
    reasoning: str = ""
