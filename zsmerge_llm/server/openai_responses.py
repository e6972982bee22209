"""`/v1/responses` as OpenAI describes it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Any

from zsmerge_llm.server.errors import invalid, not_found
from zsmerge_llm.server.requests import Body, ChatRequest, Context, new_id, now, own_counts, refuse
from zsmerge_llm.types import Chunk, Message, Result, ToolCallDelta, Usage


class ResponseBody(Body):
    """A request. Fields in the last group are accepted and have no effect here."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool = False
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    store: bool | None = None

    # of this server
    session_id: str | None = None
    document_id: str | None = None
    prompt_cache_key: str | None = None

    # refused where they ask for something
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    top_logprobs: int | None = None

    # without effect
    stream_options: Any = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    service_tier: str | None = None
    truncation: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_retention: str | None = None
    max_tool_calls: int | None = None


@dataclass(frozen=True)
class StoredResponse:
    """A conversation that a later request can go on from.

    Attributes:
        owner: whose it is. messages: all of it, without instructions, the answer included.
    """

    owner: str | None
    messages: list[Message]


class StoredResponses:
    """The newest answers by their ids. Safe to use from several threads.

    most: how many are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: OrderedDict[str, StoredResponse] = OrderedDict()
        self._lock = Lock()

    def put(self, name: str, response: StoredResponse) -> None:
        """Keep an answer; the oldest is forgotten where there are too many."""
        with self._lock:
            self._entries[name] = response
            if len(self._entries) > self._most:
                self._entries.popitem(last=False)

    def keeper(self, body: ResponseBody, request: ChatRequest, owner: str | None) -> Callable[[str, Message], None]:
        """Return a function that keeps an answer to a request by its id, unless the client does not want that."""
        messages = request.messages[1:] if body.instructions else request.messages

        def keep(name: str, answer: Message) -> None:
            if body.store is not False:
                self.put(name, StoredResponse(owner, [*messages, answer]))

        return keep

    def get(self, name: str, owner: str | None) -> StoredResponse:
        """Return an answer. Raises RequestError: it is not there, or somebody else's."""
        with self._lock:
            found = self._entries.get(name)
        if found is None or found.owner != owner:
            raise not_found(f"There is no response {name!r}: send the whole conversation as input.")
        return found


def parse(body: ResponseBody, context: Context, header: str | None, stored: StoredResponses) -> ChatRequest:
    """Return the request of a body.

    Raises:
        RequestError, ConfigError: fields that are not supported, or out of range; an unknown earlier response.
    """
    context.check_model(body.model)
    refuse(
        background=body.background,
        conversation=body.conversation,
        prompt=body.prompt,
        top_logprobs=body.top_logprobs,
    )
    before = stored.get(body.previous_response_id, context.owner).messages if body.previous_response_id else []
    messages = [*before, *_input_messages(body.input)]
    if body.instructions:
        messages = [{"role": "system", "content": body.instructions}, *messages]
    context.check_messages(len(messages))
    sampling = context.sampling(body.max_output_tokens, temperature=body.temperature, top_p=body.top_p)
    options = context.options(
        sampling,
        context.session(body.document_id, body.session_id, header, body.prompt_cache_key),
        tools=_tools(body.tools),
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_response_format(body.text),
    )
    return ChatRequest(body.model, messages, options)


def _input_messages(given: str | list[dict[str, Any]]) -> list[Message]:
    """Return input items as messages. Calls that follow each other are one message of the assistant's."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[Message] = []
    for item in given:
        kind = item.get("type", "message")
        if kind == "message":
            role = "system" if item.get("role") == "developer" else item.get("role")
            messages.append({"role": role, "content": _content(item.get("content"))})
        elif kind == "function_call":
            call = {"name": item.get("name"), "arguments": item.get("arguments")}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(
                {"id": item.get("call_id"), "type": "function", "function": call}
            )
        elif kind == "function_call_output":
            output = _content(item.get("output"))
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind != "reasoning":
            raise invalid(f"Input of the type {kind!r} is not supported.", "input")
    return messages


def _content(content: Any) -> Any:
    """Return text, or blocks of text in the form of messages."""
    if not isinstance(content, list):
        return content
    kinds = ("input_text", "output_text", "text")
    return [
        {"type": "text", "text": block["text"]} if isinstance(block, dict) and block.get("type") in kinds else block
        for block in content
    ]


def _tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return definitions of functions as messages have them. Raises RequestError: a tool of the vendor's own."""
    for tool in tools or ():
        if tool.get("type") != "function":
            raise invalid(f"A tool of the type {tool.get('type')!r} is not supported: give functions.", "tools")
    return [
        {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
        for tool in tools or ()
    ] or None


def _tool_choice(choice: str | dict[str, Any] | None) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _response_format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    chosen = (text or {}).get("format") or {"type": "text"}
    if chosen.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {key: chosen[key] for key in chosen if key != "type"}}
    return None if chosen.get("type") == "text" else chosen


def usage_json(usage: Usage) -> dict[str, Any]:
    """Return what a request cost, as OpenAI counts it here, and our own counts."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
        "zsmerge": own_counts(usage),
    }


class ResponseEvents:
    """Turns the chunks of an answer into a response, and into OpenAI's events on the way.

    keep: called with the id of the response and the answer as a message, before the last event.
    """

    def __init__(self, request: ChatRequest, body: ResponseBody, keep: Callable[[str, Message], None]) -> None:
        self._name = new_id("resp_")
        self._keep = keep
        self._text = self._reasoning = ""
        self._message: dict[str, Any] | None = None
        self._call: dict[str, Any] | None = None
        self._output: list[dict[str, Any]] = []
        self._number = -1
        self._base = {
            "id": self._name,
            "object": "response",
            "created_at": now(),
            "model": request.model,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "max_output_tokens": body.max_output_tokens,
            "usage": None,
        }

    def start(self) -> Iterator[dict[str, Any]]:
        """Yield the events before the first chunk."""
        yield self._event("response.created", response=self._base)
        yield self._event("response.in_progress", response=self._base)

    def push(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """Yield the events of a chunk."""
        self._reasoning += chunk.reasoning
        if chunk.text:
            yield from self._write_text(chunk.text)
        for delta in chunk.tool_call_deltas:
            yield from self._write_call(delta)
        if chunk.usage is None:
            return
        if not self._output and self._call is None:
            yield from self._write_text("")
        yield from self._end_item()
        answer: Message = {"role": "assistant", "content": self._text}
        self._keep(self._name, {**answer, "tool_calls": chunk.tool_calls} if chunk.tool_calls else answer)
        response = self._finished(chunk, chunk.usage)
        yield self._event(f"response.{response['status']}", response=response)

    def response(self, result: Result) -> dict[str, Any]:
        """Return a whole answer."""
        calls = [
            ToolCallDelta(index, call["function"]["arguments"], call["id"], call["function"]["name"])
            for index, call in enumerate(result.tool_calls)
        ]
        chunk = Chunk(
            *(result.text, result.finish_reason, result.usage, result.tool_calls),
            reasoning=result.reasoning,
            session=result.session,
            tool_call_deltas=calls,
        )
        *_, last = self.push(chunk)
        response: dict[str, Any] = last["response"]
        return response

    def _finished(self, chunk: Chunk, usage: Usage) -> dict[str, Any]:
        cut = chunk.finish_reason == "length"
        reasoning = {"id": new_id("rs_"), "type": "reasoning", "summary": [], "content": []}
        text = [{"type": "reasoning_text", "text": self._reasoning}]
        return {
            **self._base,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [*([{**reasoning, "content": text}] if self._reasoning else []), *self._output],
            "usage": usage_json(usage),
            "session_id": chunk.session,
        }

    def _write_text(self, text: str) -> Iterator[dict[str, Any]]:
        if self._message is None:
            yield from self._end_item()
            self._message = {"id": new_id("msg_"), "type": "message", "role": "assistant", "text": ""}
            item = {**self._message, "status": "in_progress", "content": []}
            del item["text"]
            yield self._event("response.output_item.added", output_index=len(self._output), item=item)
            yield self._text_event("response.content_part.added", part=_part(""))
        self._text += text
        self._message["text"] += text
        if text:
            yield self._text_event("response.output_text.delta", delta=text, logprobs=[])

    def _write_call(self, delta: ToolCallDelta) -> Iterator[dict[str, Any]]:
        if delta.id:
            yield from self._end_item()
            item = {"id": new_id("fc_"), "type": "function_call", "call_id": delta.id, "name": delta.name}
            self._call = {**item, "arguments": ""}
            begun = {**self._call, "status": "in_progress"}
            yield self._event("response.output_item.added", output_index=len(self._output), item=begun)
        if self._call is not None and delta.arguments:
            self._call["arguments"] += delta.arguments
            where = {"output_index": len(self._output), "item_id": self._call["id"]}
            yield self._event("response.function_call_arguments.delta", **where, delta=delta.arguments)

    def _end_item(self) -> Iterator[dict[str, Any]]:
        """Yield the events at the end of the text or the call that was begun, if there is one."""
        if self._message is not None:
            message, part = self._message, _part(self._message["text"])
            yield self._text_event("response.output_text.done", text=message.pop("text"), logprobs=[])
            yield self._text_event("response.content_part.done", part=part)
            yield from self._add({**message, "status": "completed", "content": [part]})
        if self._call is not None:
            done = {"name": self._call["name"], "arguments": self._call["arguments"]}
            where = {"output_index": len(self._output), "item_id": self._call["id"]}
            yield self._event("response.function_call_arguments.done", **where, **done)
            yield from self._add({**self._call, "status": "completed"})
        self._message = self._call = None

    def _add(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)

    def _text_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        assert self._message is not None
        where = {"item_id": self._message["id"], "output_index": len(self._output), "content_index": 0}
        return self._event(kind, **where, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
