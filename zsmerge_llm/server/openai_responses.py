"""`/v1/responses` as OpenAI describes it."""

from __future__ import annotations

from typing import Any

from zsmerge_llm.server.errors import invalid
from zsmerge_llm.server.requests import Body, ChatRequest, Context, refuse
from zsmerge_llm.server.stored_responses import StoredResponses
from zsmerge_llm.types import Message

LOGPROBS = "message.output_text.logprobs"
"""What `include` says to get log-probabilities."""


class ResponseBody(Body):
    """A request. Fields in the last group are accepted and have no effect here."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    store: bool | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None

    # of this server
    session_id: str | None = None
    document_id: str | None = None
    prompt_cache_key: str | None = None

    # refused where they ask for something
    background: bool | None = None
    background_options: Any = None
    conversation: Any = None
    prompt: Any = None
    moderation: Any = None

    # without effect
    access_programs: Any = None
    context_management: Any = None
    image: Any = None
    prompt_cache_options: Any = None
    stream_options: Any = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    truncation: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_retention: str | None = None
    max_tool_calls: int | None = None


def parse(body: ResponseBody, context: Context, header: str | None, stored: StoredResponses) -> ChatRequest:
    """Return the request of a body.

    Raises:
        RequestError, ConfigError: fields that are not supported, or out of range; an unknown earlier response.
    """
    context.check_model(body.model)
    refuse(
        background=body.background,
        background_options=body.background_options,
        conversation=body.conversation,
        prompt=body.prompt,
        moderation=body.moderation,
    )
    before = stored.get(body.previous_response_id, context.owner).messages if body.previous_response_id else []
    messages = [*before, *_input_messages(body.input)]
    if body.instructions:
        messages = [{"role": "system", "content": body.instructions}, *messages]
    context.check_messages(len(messages))
    wants_logprobs = body.top_logprobs or LOGPROBS in (body.include or ())
    sampling = context.sampling(
        body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        logprobs=body.top_logprobs or 0 if wants_logprobs else None,
    )
    options = context.options(
        sampling,
        context.session(body.document_id, body.session_id, header, body.prompt_cache_key),
        tools=_tools(body.tools),
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_response_format(body.text),
        reasoning_effort=(body.reasoning or {}).get("effort"),
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
    if isinstance(choice, dict):
        raise invalid(f"A tool_choice of the type {choice.get('type')!r} is not supported.", "tool_choice")
    return choice


def _response_format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    chosen = (text or {}).get("format") or {"type": "text"}
    if chosen.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {key: chosen[key] for key in chosen if key != "type"}}
    return None if chosen.get("type") == "text" else chosen
