"""The answer to a request of `/v1/responses`: a response, and OpenAI's events on the way to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from zsmerge_llm.server.logprobs import entries
from zsmerge_llm.server.openai_responses import ResponseBody
from zsmerge_llm.server.requests import ChatRequest, new_id, now, own_counts
from zsmerge_llm.types import Chunk, Message, Result, ToolCallDelta, Usage

Keep = Callable[[dict[str, Any], Message], None]
"""Called with a response and the answer as a message."""
EVENT_NAMES = {"message": "output_text", "reasoning": "reasoning_text"}
"""How the events of an item's text are named, by the type of the item."""


def usage_json(usage: Usage) -> dict[str, Any]:
    """Return what a request cost, as OpenAI counts it here, and our own counts."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.prompt_tokens - usage.cached_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
        "zsmerge": own_counts(usage),
    }


class ResponseEvents:
    """Turns the chunks of an answer into a response, and into OpenAI's events on the way.

    keep: called before the last event.
    """

    def __init__(self, request: ChatRequest, body: ResponseBody, keep: Keep) -> None:
        self._keep = keep
        self._answer = ""
        self._item: dict[str, Any] | None = None
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []
        self._output: list[dict[str, Any]] = []
        self._number = -1
        self._base = _response(request.model, body)

    def start(self) -> Iterator[dict[str, Any]]:
        """Yield the events before the first chunk."""
        yield self._event("response.created", response=self._base)
        yield self._event("response.in_progress", response=self._base)

    def push(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """Yield the events of a chunk."""
        if chunk.reasoning:
            yield from self._write("reasoning", {"summary": []}, chunk.reasoning)
        if chunk.text:
            yield from self._write("message", {"role": "assistant"}, chunk.text, entries(chunk.logprobs))
        for delta in chunk.tool_call_deltas:
            yield from self._write_call(delta)
        if chunk.usage is None:
            return
        if not self._answer and not chunk.tool_calls:
            yield from self._write("message", {"role": "assistant"}, "")
        yield from self._end_item()
        answer: Message = {"role": "assistant", "content": self._answer}
        response = self._finished(chunk, chunk.usage)
        self._keep(response, {**answer, "tool_calls": chunk.tool_calls} if chunk.tool_calls else answer)
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
            logprobs=result.logprobs,
            tool_call_deltas=calls,
        )
        *_, last = self.push(chunk)
        response: dict[str, Any] = last["response"]
        return response

    def _finished(self, chunk: Chunk, usage: Usage) -> dict[str, Any]:
        cut = chunk.finish_reason == "length"
        return {
            **self._base,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": now(),
            "output": self._output,
            "usage": usage_json(usage),
            "session_id": chunk.session,
        }

    def _write(
        self, kind: str, fields: dict[str, Any], text: str, logprobs: Sequence[dict[str, Any]] = ()
    ) -> Iterator[dict[str, Any]]:
        """Yield the events of a piece of a message's or the reasoning's text."""
        if self._item is None or self._item["type"] != kind:
            item = {"id": new_id("rs_" if kind == "reasoning" else "msg_"), "type": kind, **fields, "content": []}
            yield from self._begin(item)
            yield self._event("response.content_part.added", content_index=0, part=_part(kind, "", []), **self._where())
        self._text += text
        if kind == "message":
            self._answer += text
        self._logprobs += logprobs
        if text:
            yield self._text_event(kind, "delta", logprobs, delta=text)

    def _write_call(self, delta: ToolCallDelta) -> Iterator[dict[str, Any]]:
        """Yield the events of a piece of a call."""
        if delta.id:
            item = {"id": new_id("fc_"), "type": "function_call", "call_id": delta.id, "name": delta.name}
            yield from self._begin({**item, "arguments": ""})
        if delta.arguments:
            self._text += delta.arguments
            yield self._event("response.function_call_arguments.delta", delta=delta.arguments, **self._where())

    def _begin(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._end_item()
        self._item = {**item, "status": "in_progress"}
        index = len(self._output)
        yield self._event("response.output_item.added", output_index=index, item=self._item)

    def _end_item(self) -> Iterator[dict[str, Any]]:
        """Yield the events at the end of the item that was begun, if there is one."""
        if self._item is None:
            return
        kind, item = self._item["type"], {**self._item, "status": "completed"}
        if kind == "function_call":
            item["arguments"] = self._text
            done = {"name": item["name"], "arguments": self._text}
            yield self._event("response.function_call_arguments.done", **done, **self._where())
        else:
            part = _part(kind, self._text, self._logprobs)
            item["content"] = [part]
            yield self._text_event(kind, "done", self._logprobs, text=self._text)
            yield self._event("response.content_part.done", content_index=0, part=part, **self._where())
        yield self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._item, self._text, self._logprobs = None, "", []

    def _text_event(self, kind: str, name: str, logprobs: Sequence[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        where = {"content_index": 0, **self._where()}
        if kind == "message":
            fields["logprobs"] = list(logprobs)
        return self._event(f"response.{EVENT_NAMES[kind]}.{name}", **where, **fields)

    def _where(self) -> dict[str, Any]:
        assert self._item is not None
        return {"output_index": len(self._output), "item_id": self._item["id"]}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}


def _response(model: str, body: ResponseBody) -> dict[str, Any]:
    """Return a response before its answer."""
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": now(),
        "completed_at": None,
        "model": model,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "metadata": body.metadata or {},
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": body.reasoning or {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": body.temperature or 0.0,
        "text": body.text or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "usage": None,
        "user": body.user,
    }


def _part(kind: str, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of a message or of the reasoning."""
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
