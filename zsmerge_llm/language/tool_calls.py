"""Parse tool calls out of an answer's text, in the formats of all model families.

Recognized, whatever the family: `<tool_call>{...}</tool_call>` (Hermes, Qwen), `[TOOL_CALLS] [{...}]` (Mistral),
`<|python_tag|>{...}` and bare or fenced JSON at the beginning of a line (Llama 3, and small models of every family).
Bare and fenced JSON is a call only if it names one of the given tools. A call that cannot be parsed is returned with an
error; nothing raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from zsmerge_llm.language.tool_call_stream import CallStream, JsonEnd, new_id
from zsmerge_llm.types import ToolCallDelta

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
HARMONY_CALLS = ToolCallStyle("<|channel|>commentary", parallel=False)
BARE = ToolCallStyle("")


def tool_call_style(template_source: str) -> ToolCallStyle:
    """Return the style of a model family, by the Jinja text of its chat template.

    A template without tools is Hermes: `message_forms.TOOL_INSTRUCTIONS` in the system message asks for that. A
    template with an unknown style of its own is taken to understand plain JSON.
    """
    if "<|channel|>commentary" in template_source:
        return HARMONY_CALLS
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
    parser = ToolCallParser(names)
    parser.push(text)
    return parser.finish()[1]


class ToolCallParser:
    """Pass on the text and the calls of an answer as they arrive.

    Held back is what may become a call, and a call that cannot be followed, until it is complete.

    Args:
        names: the tools that the model was given.

    Attributes:
        deltas: pieces of calls; take them out once they are passed on.
        parsed: the text and the calls so far.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.deltas: list[ToolCallDelta] = []
        self.parsed = ParsedAnswer()
        self._heads = _heads(names)
        self._text = ""
        self._at = 0  # where what is not passed on begins
        self._segment = 0  # where the text behind the last call begins
        self._call: CallPart | None = None
        self._next_index = 0

    def push(self, piece: str) -> str:
        """Add a piece of the answer; return the text that is certainly no call."""
        self._text += piece
        return self._advance(ended=False)

    def finish(self, truncated: bool = False) -> tuple[str, ParsedAnswer]:
        """Return the text that was held back and is no call, and the whole answer parsed.

        `truncated`: the answer was cut where it cannot end, so what was held back is the beginning of a call.
        """
        held = self._text[self._at :].strip()
        if truncated and held and self._call is None and not (self.parsed.calls or self.parsed.invalid):
            self.parsed.invalid.append(_invalid(None, held, "The answer was cut here."))
            return "", self.parsed
        text = self._advance(ended=True)
        if self._segment == 0 or self._text[self._segment :].strip():
            text += self._pass_on(len(self._text))
        return text, self.parsed

    def _advance(self, ended: bool) -> str:
        passed_on = ""
        while True:
            if self._call is None:
                start = _find(self._text, self._heads, self._at)
                if start is None and ended:
                    return passed_on
                end = self._undecided() if start is None else start
                passed_on += self._pass_on(len(self._text[:end].rstrip()))
                if start is None:
                    return passed_on
                self._call = CallPart(self._text, start, self._next_index)
                self.parsed.has_unmarked = self.parsed.has_unmarked or not self._call.marker
            self.deltas += self._call.stream.push(self._text)
            extent = self._call.extent(self._text, ended)
            if extent is None:
                return passed_on
            calls = list(_calls(self._text[self._call.start : extent[0]]))
            self.deltas += self._call.stream.finish(self._text, calls)
            for call in calls:
                (self.parsed.invalid if "error" in call else self.parsed.calls).append(call)
            self._next_index = self._call.stream.next_index
            self._at = self._segment = extent[1]
            self._call = None

    def _pass_on(self, end: int) -> str:
        """Return the text up to `end`, without spaces between calls and the first text."""
        piece = self._text[self._at : max(end, self._at)]
        self._at += len(piece)
        if self._segment and not self.parsed.content:
            piece = piece.lstrip()
        self.parsed.content += piece
        return piece

    def _undecided(self) -> int:
        """Return the index from which on the text may become a call."""
        text = self._text
        for at in range(max(self._at, len(text) - max(map(len, MARKERS))), len(text)):
            if any(marker.startswith(text[at:]) for marker in MARKERS):
                break
        else:
            at = len(text)
        for line in _lines(text, self._at):
            beginning = _compact(text[line:])
            if any(head.startswith(beginning) for head in self._heads):
                return min(at, line)
        return at


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


class CallPart:
    """The part of an answer that holds one call, or several that follow each other.

    Args:
        text: the answer so far. begin: where the part begins in it. index: of its first call.

    Attributes:
        marker: its marker; "" for bare or fenced JSON.
        start: where its JSON begins, or should.
    """

    def __init__(self, text: str, begin: int, index: int) -> None:
        self.marker = next((marker for marker in MARKERS if text.startswith(marker, begin)), "")
        fenced = None if self.marker else re.compile(r"\s*```(?:json)?").match(text, begin)
        self.start = fenced.end() if fenced else begin + len(self.marker)
        self.stream = CallStream(self.start, index)
        self._is_fenced = fenced is not None
        self._values_end = self.start
        self._value: JsonEnd | None = None

    def extent(self, text: str, ended: bool) -> tuple[int, int] | None:
        """Return the index behind the calls, and the one behind the part; None while they are not known.

        ended: no text follows.
        """
        if not self._read_values(text, ended):
            return None
        begin = end = self._values_end
        if self.marker == HERMES.marker:
            found = text.find(END_MARKER, begin)
            if found >= 0:
                return found, found + len(END_MARKER)
            return (len(text), len(text)) if ended else None
        if begin == self.start:
            return (len(text), len(text)) if ended else None
        if self._is_fenced:
            closing = end + len(text[end:]) - len(text[end:].lstrip())
            if text.startswith(FENCE, closing):
                end = closing + len(FENCE)
            elif not ended and FENCE.startswith(text[closing:]):
                return None
        return begin, end

    def _read_values(self, text: str, ended: bool) -> bool:
        """Pass over JSON objects and lists; return whether what follows is neither."""
        while True:
            begin = _behind_separators(text, self._values_end)
            if text[begin : begin + 1] not in ("{", "["):
                return ended or begin < len(text)
            self._value = self._value or JsonEnd(begin)
            if self._value.find(text) is None:
                return ended
            if (value := _value(text, begin)) is None:
                return True
            self._values_end, self._value = value[1], None


def _behind_separators(text: str, at: int) -> int:
    found = re.compile(r"[\s,;]*").match(text, at)
    assert found is not None
    return found.end()


def _value(text: str, at: int) -> tuple[Any, int] | None:
    """Return the JSON object or list that comes next, behind separators, and the index behind it."""
    begin = _behind_separators(text, at)
    if text[begin : begin + 1] not in ("{", "["):
        return None
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, begin)
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
    return {"id": new_id(), "type": "function", "function": function}


def _invalid(name: str | None, arguments: str, error: str) -> dict[str, Any]:
    return {**_openai_call(name, arguments), "error": error}
