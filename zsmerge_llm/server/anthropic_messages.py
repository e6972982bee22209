"""`/v1/messages` as Anthropic describes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from zsmerge_llm.server.errors import invalid
from zsmerge_llm.server.requests import Body, ChatRequest, Context, new_id, own_counts, refuse, text_of
from zsmerge_llm.types import Chunk, Message, Result, Usage

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class OutputConfig(Body):
    """Anthropic's `output_config`."""

    format: dict[str, Any] | None = None
    effort: str | None = None


class CountBody(Body):
    """What is counted of a request. Fields in the last group are accepted, and count for nothing."""

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    thinking: dict[str, Any] | None = None

    # without effect
    cache_control: dict[str, Any] | None = None
    speed: str | None = None
    betas: list[str] | None = None
    context_management: Any = None


class MessagesBody(CountBody):
    """A request. Fields in the last group are accepted and have no effect here."""

    max_tokens: int
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None

    # of this server
    session_id: str | None = None
    document_id: str | None = None
    probe: str | None = None
    reread: bool | None = None

    # refused where they ask for something
    mcp_servers: list[Any] | None = None
    container: Any = None

    # without effect
    diagnostics: Any = None
    inference_geo: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None


def parse(body: MessagesBody, context: Context, header: str | None) -> ChatRequest:
    """Return the request of a body.

    header: that of the session (`X-Session-Id`).

    Raises:
        RequestError, ConfigError: fields that are not supported, or out of range.
    """
    context.check_model(body.model)
    context.check_messages(len(body.messages))
    refuse(mcp_servers=body.mcp_servers, container=body.container)
    sampling = context.sampling(
        body.max_tokens,
        stop=body.stop_sequences,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
    )
    choice = body.tool_choice or {}
    options = context.options(
        sampling,
        context.session(body.document_id, body.session_id, header),
        tools=tools_of(body.tools),
        tool_choice=_tool_choice(choice),
        parallel_tool_calls=False if choice.get("disable_parallel_tool_use") else None,
        response_format=_response_format(body.output_config),
        reasoning_effort=_effort(body),
        probe=body.probe,
        reread=body.reread,
    )
    return ChatRequest(body.model, messages_of(body), options)


def _effort(body: MessagesBody) -> str | None:
    """Return how much the model is to reason; None: as its template does by itself."""
    kind = (body.thinking or {}).get("type")
    effort = body.output_config.effort if body.output_config is not None else None
    return "none" if kind == "disabled" else effort or ("medium" if kind == "enabled" else None)


def messages_of(body: CountBody) -> list[Message]:
    """Return the messages of a request in the OpenAI format."""
    system = text_of(body.system)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for message in body.messages:
        messages += _messages(message)
    return messages


def _messages(message: dict[str, Any]) -> Iterator[Message]:
    """Yield a message in the OpenAI format: its tool results are messages of their own, and come first."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, list):
        yield {"role": role, "content": content}
        return
    texts, calls, reasoning = [], [], ""
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result":
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": _result_text(block)}
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input")}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking":
            reasoning += str(block.get("thinking", ""))
        elif kind != "redacted_thinking":
            texts.append(_text_block(block))
    if texts or calls or role != "user":
        extra = {"reasoning_content": reasoning} if reasoning else {}
        yield {"role": role, "content": texts, **({"tool_calls": calls} if calls else {}), **extra}


def _text_block(block: Any) -> Any:
    """Return a block of text, or a document that is one, in the form of messages; others as they are.

    Raises:
        RequestError: a document that is no text.
    """
    if not isinstance(block, dict):
        return block
    if block.get("type") == "document":
        source = block.get("source")
        kind = source.get("type") if isinstance(source, dict) else None
        if not isinstance(source, dict) or kind != "text":
            raise invalid(f"A document with a source of the type {kind!r} is not supported: send its text.", "messages")
        heading = f"{block['title']}\n\n" if isinstance(block.get("title"), str) else ""
        return {"type": "text", "text": f"{heading}{source.get('data', '')}"}
    return {"type": "text", "text": block["text"]} if block.get("type") == "text" and "text" in block else block


def _result_text(block: dict[str, Any]) -> Any:
    """Return the content of a tool's result. An error is said to be one."""
    content = block.get("content")
    if not block.get("is_error"):
        return "" if content is None else content
    return f"Error: {text_of(content)}"


def tools_of(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return definitions of tools in the OpenAI format. Raises RequestError: tools of the vendor's own."""
    converted = []
    for tool in tools or ():
        kind = tool.get("type") or "custom"
        if kind != "custom" or "input_schema" not in tool:
            what = f"The tool {tool.get('name')!r} of the type {kind!r} is none of the client's"
            raise invalid(f"{what}: give name and input_schema.", "tools")
        function = {"name": tool.get("name"), "parameters": tool["input_schema"]}
        if tool.get("description"):
            function["description"] = tool["description"]
        converted.append({"type": "function", "function": function})
    return converted or None


def _tool_choice(choice: dict[str, Any]) -> str | dict[str, Any] | None:
    if not choice:
        return None
    if choice.get("type") == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") in CHOICES:
        return CHOICES[choice["type"]]
    raise invalid("tool_choice.type must be auto, any, tool or none.", "tool_choice")


def _response_format(config: OutputConfig | None) -> dict[str, Any] | None:
    if config is None or config.format is None:
        return None
    if config.format.get("type") != "json_schema":
        raise invalid("output_config.format.type must be json_schema.", "output_config")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": config.format.get("schema")}}


def usage_json(usage: Usage) -> dict[str, Any]:
    """Return what a request cost, as Anthropic counts it: cached tokens are no input tokens; and our own counts."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        "zsmerge": own_counts(usage),
    }


def response(request: ChatRequest, result: Result) -> dict[str, Any]:
    """Return a whole answer."""
    blocks: list[dict[str, Any]] = []
    if result.reasoning:
        blocks.append({"type": "thinking", "thinking": result.reasoning, "signature": ""})
    if result.text or not result.tool_calls:
        blocks.append({"type": "text", "text": result.text})
    for call in result.tool_calls:
        function = call["function"]
        arguments = json.loads(function["arguments"])
        blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
    return {
        **_base(request.model),
        "content": blocks,
        **_end(result),
        "usage": usage_json(result.usage),
        "session_id": result.session,
    }


def _end(last: Result | Chunk) -> dict[str, Any]:
    """Return why an answer ended."""
    reason = "stop_sequence" if last.stop_string else STOP_REASONS[str(last.finish_reason)]
    return {"stop_reason": reason, "stop_sequence": last.stop_string or None, "stop_details": None}


def _base(model: str) -> dict[str, Any]:
    return {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model}


class MessageEvents:
    """Turns the chunks of an answer into Anthropic's events."""

    def __init__(self, request: ChatRequest) -> None:
        self._model = request.model
        self._index = -1
        self._open: str | None = None

    def start(self) -> Iterator[dict[str, Any]]:
        """Yield the events before the first chunk."""
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "stop_details": None}
        message = {**_base(self._model), **empty, "usage": {"input_tokens": 0, "output_tokens": 0}}
        yield {"type": "message_start", "message": message}

    def push(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """Yield the events of a chunk."""
        if chunk.reasoning:
            yield from self._open_block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": chunk.reasoning})
        if chunk.text:
            yield from self._open_block("text", {"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": chunk.text})
        for delta in chunk.tool_call_deltas:
            if delta.id:
                yield from self._close_block()
                block = {"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}}
                yield from self._open_block("tool_use", block)
            yield self._delta({"type": "input_json_delta", "partial_json": delta.arguments})
        if chunk.usage is not None and chunk.finish_reason is not None:
            yield from self._end(chunk, chunk.usage)

    def _end(self, chunk: Chunk, usage: Usage) -> Iterator[dict[str, Any]]:
        if self._index < 0:  # an answer without any text
            yield from self._open_block("text", {"type": "text", "text": ""})
        yield from self._close_block()
        yield {"type": "message_delta", "delta": _end(chunk), "usage": usage_json(usage), "session_id": chunk.session}
        yield {"type": "message_stop"}

    def _open_block(self, kind: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self._open != kind:
            yield from self._close_block()
            self._open, self._index = kind, self._index + 1
            yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _close_block(self) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self._index}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}
