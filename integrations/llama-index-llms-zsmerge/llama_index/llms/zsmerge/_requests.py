"""What one call asks of zsmerge-llm: a prompt and options, checked, ready to run in any thread."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llama_index.llms.zsmerge._tools import to_choice

from zsmerge_llm import LLM, SamplingParams
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.types import Chunk, Message, Result

_CHAT_ONLY = ("tools", "session", "session_id", "probe", "reread")
_FORM = ("response_format", "grammar")
OPTIONS = (
    *_CHAT_ONLY,
    *_FORM,
    "tool_choice",
    "allow_parallel_tool_calls",
    "extra_headers",  # LlamaIndex's DocumentContextExtractor sends HTTP headers to every model
)
"""Options of a call that are no sampling settings."""


@dataclass(frozen=True)
class Request:
    """One request: whole or streamed, in this thread or in another."""

    engine: LLM
    prompt: str | list[Message]
    """Plain text to continue, or messages for the chat template."""
    options: dict[str, Any] = field(default_factory=dict)

    def whole(self, cancel: threading.Event | None = None) -> Result:
        if isinstance(self.prompt, str):
            return self.engine.complete(self.prompt, cancel=cancel, **self.options)
        return self.engine.chat(self.prompt, cancel=cancel, **self.options)

    def stream(self, cancel: threading.Event | None = None) -> Generator[Chunk, None, None]:
        if isinstance(self.prompt, str):
            yield from self.engine.stream_complete(self.prompt, cancel=cancel, **self.options)
        else:
            yield from self.engine.stream(self.prompt, cancel=cancel, **self.options)


def text_request(engine: LLM, text: str, sampling: SamplingParams, options: Mapping[str, Any]) -> Request:
    """A request that continues `text`. Raises ConfigError on an option that needs a chat."""
    for name in _CHAT_ONLY:
        if options.get(name):
            raise ConfigError(f"{name} needs a chat; this continues plain text. Use chat() with is_chat_model=True.")
    return Request(engine, text, {"sampling": sampling, **_form(options)})


def message_request(
    engine: LLM, messages: list[Message], sampling: SamplingParams, options: Mapping[str, Any]
) -> Request:
    """A request for an answer to `messages`."""
    tools = list(options.get("tools") or ())
    return Request(
        engine,
        messages,
        {
            "sampling": sampling,
            "session": options.get("session", options.get("session_id")),
            "probe": options.get("probe"),
            "tools": tools or None,
            "tool_choice": to_choice(options.get("tool_choice")),
            "parallel_tool_calls": options.get("allow_parallel_tool_calls", True),
            **({"reread": True} if options.get("reread") else {}),
            **_form(options),
        },
    )


def _form(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options.get(name) for name in _FORM}
