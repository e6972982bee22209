"""What goes in and comes out: messages, usage, results, chunks. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, Any]
"""One chat message as in the OpenAI format: `role`, `content` (text or text blocks), `tool_calls`, `tool_call_id`."""

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class Usage:
    """What one request cost. Times in seconds, sizes in bytes, the rest in tokens."""

    prompt_tokens: int
    """Logical length of the prompt: everything the answer is based on, read now or earlier."""
    cached_tokens: int
    """The part of `prompt_tokens` that an earlier request had read already."""
    completion_tokens: int
    """Tokens generated, the end token included."""
    merged_tokens: int
    """Tokens of this conversation that are no longer held verbatim (merged or dropped), mean over heads and layers."""
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int
    reuse: str = "new"
    """Where the conversation was taken up: `new`, `continued`, `restored` or `reread: <reason>`."""

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


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. Only the last one carries `finish_reason` and `usage`."""

    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
