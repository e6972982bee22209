"""Types of requests and answers: messages, usage, results, chunks. Imports nothing heavy."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from zsmerge_llm.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self

Message = dict[str, Any]
"""One chat message as in the OpenAI format: `role`, `content` (text or text blocks), `tool_calls`, `tool_call_id`."""

ToolChoice = Literal["auto", "required", "none"] | dict[str, Any]
"""As in the OpenAI format; one tool is named by `{"type": "function", "function": {"name": ...}}`."""

ResponseFormat = dict[str, Any]
"""`{"type": "json_object"}` or `{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}`."""

Progress = Callable[[int, int], None]
"""Called with (tokens read, tokens to read) during prefill."""

CONFIG_ORIGIN = ("_name_or_path", "_commit_hash", "transformers_version")
"""Keys of a transformers config that say where it is from, and nothing about the model."""

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
"""`length`: limited by `max_tokens`. With a grammar or in a tool call the answer is complete all the same, only shorter
than the model would have made it, if any complete one fits. `Result.format_error` says if none did."""


@dataclass(frozen=True)
class Usage:
    """The cost of one request: token counts, times in seconds, sizes in bytes."""

    prompt_tokens: int
    """Length of the whole logical prompt: everything before the answer, read now or by an earlier request."""
    cached_tokens: int
    """The part of `prompt_tokens` that an earlier request had read."""
    completion_tokens: int
    """Generated tokens, including the end token."""
    dropped_tokens: int
    """Tokens that the cache no longer holds in any form, mean over KV heads and layers."""
    prefill_seconds: float
    """Time to read the new tokens of the prompt."""
    decode_seconds: float
    """Time to generate the answer."""
    cache_bytes: int
    """Memory of the conversation's KV cache."""
    reuse: str = "new"
    """How the conversation was resumed: `new`, `continued`, `restored` or `reread: <reason>`."""
    reasoning_tokens: int = 0
    """The part of `completion_tokens` that is reasoning."""
    retrieved_tokens: int = 0
    """The part of `prompt_tokens` that repeats earlier text: passages the cache has dropped, the system message."""
    merged_tokens: int = 0
    """Tokens that the cache holds only as part of the mean in a residual slot, mean over KV heads and layers."""

    @property
    def total_tokens(self) -> int:
        """Tokens of prompt and answer together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer: its text, its log-probability, and the likeliest tokens in its place."""

    token: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Result:
    """One whole answer."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    """Calls in the OpenAI format, with unique ids and the arguments as JSON text."""
    invalid_tool_calls: list[dict[str, Any]] = field(default_factory=list)
    """Calls that could not be parsed, in the same format, each with an `error`. Their name may be None."""
    reasoning: str = ""
    """What a reasoning model wrote before its answer (`<think>...</think>`); not part of the text."""
    session: str = ""
    """Name of the conversation, which `session=` takes; empty for a completion or a batch, which are not kept."""
    format_error: str = ""
    """How the answer breaks the schema of its response format or its tools: it was cut, or has a value that a keyword
    forbids which cannot be enforced while decoding. "" if it is valid."""
    stop_string: str = ""
    """The one of `SamplingParams.stop` that ended the text; "" if none did."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """The tokens of the text, without reasoning and calls, where `SamplingParams.logprobs` asks for them."""


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a tool call: the first one of a call has its id and its name."""

    index: int
    """Which call of the answer it belongs to."""
    arguments: str
    """JSON text that follows the pieces before; together they are the call's `arguments`."""
    id: str = ""
    name: str = ""


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer: of its text, its reasoning or its calls.

    Only the last one has the other fields. The pieces of calls (`tool_call_deltas`) add up to its `tool_calls`, and
    `logprobs` of all of them to those of the text.
    """

    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    invalid_tool_calls: list[dict[str, Any]] = field(default_factory=list)
    reasoning: str = ""
    session: str = ""
    format_error: str = ""
    tool_call_deltas: list[ToolCallDelta] = field(default_factory=list)
    stop_string: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)


def session_name(given: Any) -> Any:
    """Return the id of a session as its name: numbers and UUIDs become text, anything else stays as it is."""
    return str(given) if isinstance(given, (int, UUID)) and not isinstance(given, bool) else given


def arguments_text(arguments: Any) -> str:
    """Return the arguments of a tool call as JSON text. Raises InputError: they hold something that is no JSON."""
    try:
        return json.dumps(arguments, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"The arguments of a tool call must be JSON values ({error}).") from error


class NamedSettings:
    """Base of what is made of settings by name: of a wrong name, the error shows the nearest one."""

    def __new__(cls, *_: Any, **settings: Any) -> Self:
        """Raises TypeError: a setting that the constructor does not take."""
        known = inspect.signature(cls.__init__).parameters.keys() if settings else ()
        if unknown := [name for name in settings if name not in known]:
            names = [name for name in known if name != "self"]
            hint = did_you_mean(unknown, names) or f" It has {', '.join(names)}."
            raise TypeError(f"{cls.__name__} has no setting {', '.join(unknown)}.{hint}")
        return super().__new__(cls)
