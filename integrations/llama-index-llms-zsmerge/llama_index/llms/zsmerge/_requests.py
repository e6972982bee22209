"""One call as a request to zsmerge-llm: a prompt and checked options, which any thread can run."""

from __future__ import annotations

import threading
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.bridge.pydantic import BaseModel
from llama_index.llms.zsmerge._tools import to_tool_choice

from zsmerge_llm import LLM, SamplingParams
from zsmerge_llm.errors import ConfigError, did_you_mean
from zsmerge_llm.types import Chunk, Message, Result, session_name

_REASONING_OPTIONS = ("template_args", "reasoning_effort")
_CHAT_OPTIONS = ("tools", "session", "session_id", "namespace", "probe", "reread", *_REASONING_OPTIONS)
_FORMAT_OPTIONS = ("response_format", "grammar")
_REQUEST_OPTIONS = ("timeout", "priority")
OPTIONS = (
    *_CHAT_OPTIONS,
    *_FORMAT_OPTIONS,
    *_REQUEST_OPTIONS,
    "tool_choice",
    "allow_parallel_tool_calls",
    "extra_headers",  # LlamaIndex's DocumentContextExtractor sends HTTP headers to every model
)
"""Options of a call other than sampling settings."""


@dataclass(frozen=True)
class Request:
    """One request, answered whole or as a stream."""

    llm: LLM
    prompt: str | list[Message]
    """Plain text to continue, or messages for the chat template."""
    options: dict[str, Any] = field(default_factory=dict)

    def result(self, cancel: threading.Event | None = None) -> Result:
        if isinstance(self.prompt, str):
            return self.llm.complete(self.prompt, cancel=cancel, **self.options)
        return self.llm.chat(self.prompt, cancel=cancel, **self.options)

    def stream(self, cancel: threading.Event | None = None) -> Generator[Chunk, None, None]:
        if isinstance(self.prompt, str):
            yield from self.llm.stream_complete(self.prompt, cancel=cancel, **self.options)
        else:
            yield from self.llm.stream(self.prompt, cancel=cancel, **self.options)


def refuse_unknown_settings(kind: type[BaseModel], settings: Mapping[str, Any]) -> None:
    """Raise ConfigError on a setting that a class does not have: it names the nearest one."""
    fields = kind.model_fields
    known = {*fields, *(str(field.alias) for field in fields.values() if field.alias)}
    if unknown := sorted(settings.keys() - known):
        hint = did_you_mean(unknown, known) or f" It has {', '.join(sorted(known))}."
        raise ConfigError(f"{kind.__name__} has no setting {', '.join(unknown)}.{hint}")


def sampling_changes(options: Mapping[str, Any], sampling: Collection[str]) -> dict[str, Any]:
    """Return the options of a call that change its sampling. Raises ConfigError: an unknown one, with the nearest."""
    known = (*sampling, *OPTIONS)
    if unknown := sorted(options.keys() - set(known)):
        hint = did_you_mean(unknown, known)
        raise ConfigError(f"A call has no setting {', '.join(unknown)}; it has {', '.join(known)}.{hint}")
    return {name: value for name, value in options.items() if name in sampling}


def text_request(llm: LLM, text: str, sampling: SamplingParams, options: Mapping[str, Any]) -> Request:
    """Return a request that continues `text`. Raises ConfigError: an option that needs a chat."""
    for name in _CHAT_OPTIONS:
        if options.get(name):
            raise ConfigError(f"{name} needs a chat and this is plain text: use chat() with is_chat_model=True.")
    return Request(llm, text, {"sampling": sampling, **_other_options(options)})


def message_request(llm: LLM, messages: list[Message], sampling: SamplingParams, options: Mapping[str, Any]) -> Request:
    """Return a request for an answer to `messages`."""
    tools = list(options.get("tools") or ())
    return Request(
        llm,
        messages,
        {
            "sampling": sampling,
            "session": session_name(options.get("session", options.get("session_id"))),
            **({"namespace": options["namespace"]} if options.get("namespace") is not None else {}),
            "probe": options.get("probe"),
            "tools": tools or None,
            "tool_choice": to_tool_choice(options.get("tool_choice")),
            "parallel_tool_calls": options.get("allow_parallel_tool_calls", True),
            **({"reread": True} if options.get("reread") else {}),
            **{name: options[name] for name in _REASONING_OPTIONS if options.get(name) is not None},
            **_other_options(options),
        },
    )


def _other_options(options: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: options[name] for name in _REQUEST_OPTIONS if options.get(name) is not None}
    return {**{name: options.get(name) for name in _FORMAT_OPTIONS}, **given}
