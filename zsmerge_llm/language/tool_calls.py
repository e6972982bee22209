"""Parse tool calls out of an answer's text, in the formats of all model families.

Recognized, whatever the family: `<tool_call>{...}</tool_call>` (Hermes, Qwen), `[TOOL_CALLS] [{...}]` (Mistral),
`<|python_tag|>{...}` and bare or fenced JSON at the beginning of a line (Llama 3, and small models of every family).
Bare and fenced JSON is a call only if it names one of the given tools. A call that cannot be parsed is returned with an
error; nothing raises.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

MARKERS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
"""Text that begins a call anywhere."""
END_MARKER = "</tool_call>"
FENCE = "```"
LEADS = tuple(fence + bracket for fence in ("", FENCE, f"{FENCE}json") for bracket in ("{", "[{"))
SHAPES = ('"name":{}', '"type":"function","name":{}', '"type":"function","function":{{"name":{}')
"""Beginnings of unmarked calls, up to the tool's name and without spaces: one of LEADS, then one of SHAPES."""
ARGUMENT_KEYS = ("arguments", "parameters", "args")
MAX_HEAD = 500
"""Characters within which a bare call must have named its tool."""


@dataclass(frozen=True)
class ToolCallStyle:
    """How a model family writes tool calls."""

    marker: str
    """Text before the calls; "" where there is none."""
    arguments_key: str = "arguments"
    """The JSON key of a call's arguments."""
    wrapped: bool = False
    """Whether each call has a marker of its own and `END_MARKER`."""
    parallel: bool = True
    """Whether one answer may hold several calls."""


HERMES = ToolCallStyle("<tool_call>", wrapped=True)
MISTRAL = ToolCallStyle("[TOOL_CALLS]")
LLAMA = ToolCallStyle("<|python_tag|>", arguments_key="parameters", parallel=False)
BARE = ToolCallStyle("")


def tool_call_style(template_source: str) -> ToolCallStyle:
    """Return the style of a model family, by the Jinja text of its chat template.

    A template without tools is Hermes: `message_forms.TOOL_INSTRUCTIONS` in the system message asks for that. A
    template with an unknown style of its own is taken to understand plain JSON.
    """
    if "[TOOL_CALLS]" in template_source:
        return MISTRAL
    if "<tool_call>" in template_source or not re.search(r"\btools\b", template_source):
        return HERMES
    return LLAMA if "<|python_tag|>" in template_source or '"parameters": ' in template_source else BARE


@dataclass
class ParsedAnswer:
    """The text and the tool calls of an answer."""

    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """Calls in the OpenAI format, with the arguments as JSON text."""
    invalid: list[dict[str, Any]] = field(default_factory=list)
    """Calls that could not be parsed, in the same format, each with an `error`."""
    has_unmarked: bool = False
    """Whether a call had no marker."""


def parse_tool_calls(text: str, names: Collection[str]) -> ParsedAnswer:
    """Split a whole answer into text and calls. `names`: the tools that the model was given."""
    parsed, at, heads = ParsedAnswer(), 0, _heads(names)
    while (start := _find(text, heads, at)) is not None:
        parsed.content += text[at:start].rstrip()
        parsed.has_unmarked = parsed.has_unmarked or not text.startswith(MARKERS, start)
        body, at = _body(text, start)
        for call in _calls(body):
            (parsed.invalid if "error" in call else parsed.calls).append(call)
    rest = text[at:]
    parsed.content += rest.lstrip() if at and not parsed.content else rest if rest.strip() or not at else ""
    return parsed


class ToolCallParser:
    """Pass on the text of an answer as it arrives, and hold back what is, or may become, a tool call.

    Args:
        names: the tools that the model was given.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._heads = _heads(names)
        self._text = ""
        self._emitted = 0
        self._in_call = False

    def push(self, piece: str) -> str:
        """Add a piece of the answer; return the text that is certainly no call."""
        self._text += piece
        if self._in_call:
            return ""
        start = _find(self._text, self._heads, self._emitted)
        self._in_call = start is not None
        end = self._undecided() if start is None else start
        return self._emit(len(self._text[:end].rstrip()))

    def finish(self, truncated: bool = False) -> tuple[str, ParsedAnswer]:
        """Return the text that was held back and is no call, and the whole answer parsed.

        `truncated`: the answer was cut where it cannot end, so what was held back is the beginning of a call.
        """
        parsed, held = parse_tool_calls(self._text, self._names), self._text[self._emitted :].strip()
        if truncated and held and not (parsed.calls or parsed.invalid):
            return "", ParsedAnswer(
                self._text[: self._emitted], invalid=[_invalid(None, held, "The answer was cut here.")]
            )
        return parsed.content[self._emitted :], parsed

    def _emit(self, end: int) -> str:
        end = max(end, self._emitted)
        piece, self._emitted = self._text[self._emitted : end], end
        return piece

    def _undecided(self) -> int:
        """Return the index from which on the text may become a call."""
        text = self._text
        for at in range(max(self._emitted, len(text) - max(map(len, MARKERS))), len(text)):
            if any(marker.startswith(text[at:]) for marker in MARKERS):
                break
        else:
            at = len(text)
        for line in _lines(text, self._emitted):
            beginning = _compact(text[line:])
            if any(head.startswith(beginning) for head in self._heads):
                return min(at, line)
        return at


def canonical_call(call: dict[str, Any]) -> str:
    """Return a text that is equal for calls of the same function with the same arguments."""
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        with suppress(ValueError):  # invalid JSON is compared as text
            arguments = json.loads(arguments)
    return json.dumps([function["name"], arguments], sort_keys=True)


def _heads(names: Collection[str]) -> list[str]:
    """Return the ways in which bare and fenced calls begin, without spaces."""
    quoted = [json.dumps(name, ensure_ascii=False) for name in names]
    return [lead + shape.format(name) for lead in LEADS for shape in SHAPES for name in quoted]


def _find(text: str, heads: list[str], start: int) -> int | None:
    """Return the index at which the first call at or after `start` begins."""
    found = [at for marker in MARKERS if (at := text.find(marker, start)) >= 0]
    first = min(found, default=len(text))
    for line in _lines(text, start):
        if line >= first:
            break
        if _compact(text[line:]).startswith(tuple(heads)):
            return line
    return first if found else None


def _lines(text: str, start: int) -> Iterator[int]:
    """Yield the indices from `start` on at which a line, and so a bare or fenced call, can begin.

    `start` itself is one if only spaces come before it in its line.
    """
    if not text[text.rfind("\n", 0, start) + 1 : start].strip():
        yield start
    for found in re.compile("\n").finditer(text, start):
        yield found.end()


def _compact(text: str) -> str:
    return "".join(text[:MAX_HEAD].split())


def _body(text: str, start: int) -> tuple[str, int]:
    """Return the JSON of the call that begins at `start`, or what is in its place, and the index behind the call."""
    marker = next((marker for marker in MARKERS if text.startswith(marker, start)), None)
    if marker == HERMES.marker:
        begin = start + len(marker)
        end = text.find(END_MARKER, begin)
        return (text[begin:], len(text)) if end < 0 else (text[begin:end], end + len(END_MARKER))
    fenced = re.compile(r"\s*```(?:json)?").match(text, start) if marker is None else None
    begin = fenced.end() if fenced else start + len(marker or "")
    end = begin
    while (value := _value(text, end)) is not None:
        end = value[1]
    if end == begin:
        return text[begin:], len(text)
    closing = re.compile(rf"\s*{FENCE}").match(text, end) if fenced else None
    return text[begin:end], closing.end() if closing else end


def _value(text: str, at: int) -> tuple[Any, int] | None:
    """Return the JSON object or list that comes next, behind separators, and the index behind it."""
    begin = re.compile(r"[\s,;]*").match(text, at)
    assert begin is not None
    if text[begin.end() : begin.end() + 1] not in ("{", "["):
        return None
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, begin.end())
    except (ValueError, RecursionError):
        return None


def _calls(body: str) -> Iterator[dict[str, Any]]:
    """Yield the calls of a body; invalid ones have an `error`."""
    at, found = 0, False
    while (value := _value(body, at)) is not None:
        found, at = True, value[1]
        for entry in value[0] if isinstance(value[0], list) else [value[0]]:
            yield _call(entry)
    if not found or body[at:].strip(" \n\t,;"):
        yield _invalid(None, body[at:].strip(), "This is not a complete JSON object.")


def _call(entry: Any) -> dict[str, Any]:
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        return _invalid(None, json.dumps(entry, ensure_ascii=False), "The call names no function.")
    arguments = next((function[key] for key in ARGUMENT_KEYS if key in function), None)
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return _invalid(name, arguments, "The arguments are not JSON.")
    if not isinstance(arguments, dict | None):
        return _invalid(name, json.dumps(arguments, ensure_ascii=False), "The arguments are not a JSON object.")
    return _openai_call(name, json.dumps(arguments or {}, ensure_ascii=False))


def _openai_call(name: str | None, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _invalid(name: str | None, arguments: str, error: str) -> dict[str, Any]:
    return {**_openai_call(name, arguments), "error": error}
