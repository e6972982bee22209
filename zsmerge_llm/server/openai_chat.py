"""`/v1/chat/completions` as OpenAI describes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from zsmerge_llm.server.errors import invalid
from zsmerge_llm.server.logprobs import chat_logprobs
from zsmerge_llm.server.openai_fields import GenerationBody, usage_json
from zsmerge_llm.server.requests import ChatRequest, Context, new_id, now, refuse
from zsmerge_llm.types import Chunk, Message, Result, TokenLogprob, ToolCallDelta


class ChatCompletionBody(GenerationBody):
    """A request. Fields in the last group are accepted and have no effect here."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None

    # of this server
    session_id: str | None = None
    document_id: str | None = None
    probe: str | None = None
    reread: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prompt_cache_key: str | None = None

    # refused where they ask for something
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None
    moderation: Any = None
    functions: Any = None
    function_call: Any = None

    # without effect
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    verbosity: str | None = None
    prediction: Any = None
    safety_identifier: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None


def parse(body: ChatCompletionBody, context: Context, header: str | None) -> ChatRequest:
    """Return the request of a body.

    header: that of the session (`X-Session-Id`).

    Raises:
        RequestError, ConfigError: fields that are not supported, or out of range.
    """
    body.check(context)
    context.check_messages(len(body.messages))
    refuse(
        audio=body.audio,
        web_search_options=body.web_search_options is not None,
        moderation=body.moderation,
        functions=body.functions,
        function_call=body.function_call,
    )
    if body.modalities not in (None, ["text"]):
        raise invalid("modalities must be ['text'].", "modalities")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true.", "top_logprobs")
    logprobs = body.top_logprobs or 0 if body.logprobs else None
    sampling = body.sampling(context, body.max_completion_tokens, logprobs=logprobs)
    session = context.session(body.document_id, body.session_id, header, body.prompt_cache_key)
    options = context.options(
        sampling,
        session,
        tools=body.tools or None,
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_response_format(body.response_format),
        probe=body.probe,
        reread=body.reread,
        reasoning_effort=body.reasoning_effort,
        template_args=body.chat_template_kwargs,
    )
    return ChatRequest(body.model, [_message(message) for message in body.messages], options)


def _message(message: Message) -> Message:
    """Return a message with a role that templates know."""
    return {**message, "role": "system"} if message.get("role") == "developer" else message


def _response_format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if given is None or given.get("type") == "text" else given


def response(request: ChatRequest, result: Result) -> dict[str, Any]:
    """Return a whole answer."""
    message: dict[str, Any] = {"role": "assistant", "content": result.text or None, "refusal": None}
    if result.tool_calls:
        message["tool_calls"] = result.tool_calls
    else:
        message["content"] = result.text
    if result.reasoning:
        message["reasoning_content"] = result.reasoning
    logprobs = chat_logprobs(result.logprobs, request.wants_logprobs)
    choice = {"index": 0, "message": message, "finish_reason": result.finish_reason, "logprobs": logprobs}
    return {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": now(),
        "model": request.model,
        "choices": [choice],
        "usage": usage_json(result.usage),
        "session_id": result.session,
    }


class ChatEvents:
    """Turns the chunks of an answer into OpenAI's events.

    include_usage: whether the last event is one of the usage alone.
    """

    def __init__(self, request: ChatRequest, include_usage: bool) -> None:
        self._base = {
            "id": new_id("chatcmpl-"),
            "object": "chat.completion.chunk",
            "created": now(),
            "model": request.model,
        }
        self._include_usage = include_usage
        self._wants_logprobs = request.wants_logprobs

    def start(self) -> Iterator[dict[str, Any]]:
        """Yield the events before the first chunk."""
        yield self._event({"role": "assistant", "content": ""})

    def push(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """Yield the events of a chunk."""
        if chunk.reasoning:
            yield self._event({"reasoning_content": chunk.reasoning})
        if chunk.text:
            yield self._event({"content": chunk.text}, logprobs=chunk.logprobs)
        if chunk.tool_call_deltas:
            yield self._event({"tool_calls": [_call_delta(delta) for delta in chunk.tool_call_deltas]})
        if chunk.usage is not None:
            rest = () if chunk.text else chunk.logprobs
            yield {**self._event({}, chunk.finish_reason, rest), "session_id": chunk.session}
            if self._include_usage:
                yield {**self._base, "choices": [], "usage": usage_json(chunk.usage)}

    def _event(
        self, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Sequence[TokenLogprob] = ()
    ) -> dict[str, Any]:
        written = chat_logprobs(logprobs, self._wants_logprobs and bool(logprobs))
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": written}
        return {**self._base, "choices": [choice]}


def _call_delta(delta: ToolCallDelta) -> dict[str, Any]:
    """Return a piece of a call; the first one has the id and the name."""
    function = {"name": delta.name, "arguments": delta.arguments} if delta.name else {"arguments": delta.arguments}
    first = {"id": delta.id, "type": "function"} if delta.id else {}
    return {"index": delta.index, **first, "function": function}
