"""Tool calls as model families write them: found in an answer's text, and kept out of what is shown of it.

Read are, whatever the family: `<tool_call>{...}</tool_call>` (Hermes, Qwen), `[TOOL_CALLS] [{...}]` (Mistral),
`<|python_tag|>{...}` and bare or fenced JSON at the beginning of a line (Llama 3, and small models of every family).
Bare and fenced JSON is a call only if it names one of the given tools. A call that cannot be read is reported, and
never raises.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

MARKS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
"""What announces a call wherever it stands."""
END_MARK = "</tool_call>"
FENCE = "```"
LEADS = tuple(fence + bracket for fence in ("", FENCE, f"{FENCE}json") for bracket in ("{", "[{"))
SHAPES = ('"name":{}', '"type":"function","name":{}', '"type":"function","function":{{"name":{}')
KEYS = ("arguments", "parameters", "args")
HEAD = 500
"""Characters in which the beginning of a bare call must show that it is one."""


@dataclass(frozen=True)
class ToolCallStyle:
    """How a model family writes calls: `mark` announces them, `key` holds the arguments.

    wrapped: each call has a mark of its own and an end mark. parallel: there may be several calls in one answer.
    """

    mark: str
    key: str = "arguments"
    wrapped: bool = False
    parallel: bool = True


HERMES = ToolCallStyle("<tool_call>", wrapped=True)
MISTRAL = ToolCallStyle("[TOOL_CALLS]")
LLAMA = ToolCallStyle("<|python_tag|>", key="parameters", parallel=False)
BARE = ToolCallStyle("")


def family(template: str) -> ToolCallStyle:
    """The family a chat template is of, by its Jinja text.

    One that knows no tools gets `chat.TOOL_GUIDE` into its system message, which asks for Hermes' form. One that has
    a form of its own that is not known here is taken to understand plain JSON.
    """
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" in template or not re.search(r"\btools\b", template):
        return HERMES
    return LLAMA if "<|python_tag|>" in template or '"parameters": ' in template else BARE


@dataclass
class ParsedAnswer:
    """An answer taken apart: text, calls in the OpenAI format, and calls that could not be read, with their `error`.

    bare: whether a call stood there without any mark.
    """

    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    invalid: list[dict[str, Any]] = field(default_factory=list)
    bare: bool = False


def parse(text: str, names: Collection[str]) -> ParsedAnswer:
    """Take the answer of a model that was given the tools of these names apart."""
    parsed, at, heads = ParsedAnswer(), 0, _heads(names)
    while (start := _find(text, heads, at)) is not None:
        parsed.content += text[at:start].rstrip()
        parsed.bare = parsed.bare or not text.startswith(MARKS, start)
        body, at = _body(text, start)
        for call in _calls(body):
            (parsed.invalid if "error" in call else parsed.calls).append(call)
    rest = text[at:]
    parsed.content += rest.lstrip() if at and not parsed.content else rest if rest.strip() or not at else ""
    return parsed


class ToolCallParser:
    """Lets through the text of an answer as it comes and keeps back what is, or may become, a tool call.

    Args:
        names: of the tools that were given.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._heads = _heads(names)
        self._text = ""
        self._shown = 0
        self._calling = False

    def push(self, piece: str) -> str:
        """More of the answer; what of it can be shown."""
        self._text += piece
        if self._calling:
            return ""
        start = _find(self._text, self._heads, self._shown)
        self._calling = start is not None
        end = self._undecided() if start is None else start
        return self._show(len(self._text[:end].rstrip()))

    def finish(self, broken: bool = False) -> tuple[str, ParsedAnswer]:
        """The text that was kept back and is no call, and the whole answer.

        `broken`: the answer was cut where it cannot end, so what was kept back is the beginning of a call.
        """
        parsed, held = parse(self._text, self._names), self._text[self._shown :].strip()
        if broken and held and not (parsed.calls or parsed.invalid):
            return "", ParsedAnswer(
                self._text[: self._shown], invalid=[_invalid(None, held, "The answer was cut here.")]
            )
        return parsed.content[self._shown :], parsed

    def _show(self, end: int) -> str:
        end = max(end, self._shown)
        shown, self._shown = self._text[self._shown : end], end
        return shown

    def _undecided(self) -> int:
        """Where text begins that may become a call."""
        text = self._text
        for at in range(max(self._shown, len(text) - max(map(len, MARKS))), len(text)):
            if any(mark.startswith(text[at:]) for mark in MARKS):
                break
        else:
            at = len(text)
        for line in _lines(text, self._shown):
            beginning = _compact(text[line:])
            if any(head.startswith(beginning) for head in self._heads):
                return min(at, line)
        return at


def canonical(call: dict[str, Any]) -> str:
    """A text that is the same for calls of the same function with the same arguments."""
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        with suppress(ValueError):  # one that cannot be read is the same as itself only
            arguments = json.loads(arguments)
    return json.dumps([function["name"], arguments], sort_keys=True)


def _heads(names: Collection[str]) -> list[str]:
    """How bare and fenced calls begin, without white space."""
    quoted = [json.dumps(name, ensure_ascii=False) for name in names]
    return [lead + shape.format(name) for lead in LEADS for shape in SHAPES for name in quoted]


def _find(text: str, heads: list[str], start: int) -> int | None:
    """Where the first call at or after `start` begins."""
    places = [at for mark in MARKS if (at := text.find(mark, start)) >= 0]
    first = min(places, default=len(text))
    for line in _lines(text, start):
        if line >= first:
            break
        if _compact(text[line:]).startswith(tuple(heads)):
            return line
    return first if places else None


def _lines(text: str, start: int) -> Iterator[int]:
    """Beginnings of lines from `start` on, where bare and fenced calls can begin; of the first line, if nothing but
    white space stands before `start`."""
    if not text[text.rfind("\n", 0, start) + 1 : start].strip():
        yield start
    for found in re.compile("\n").finditer(text, start):
        yield found.end()


def _compact(text: str) -> str:
    return "".join(text[:HEAD].split())


def _body(text: str, start: int) -> tuple[str, int]:
    """The JSON of the call that begins at `start`, or what stands in its place, and where the text goes on."""
    mark = next((mark for mark in MARKS if text.startswith(mark, start)), None)
    if mark == HERMES.mark:
        begin = start + len(mark)
        end = text.find(END_MARK, begin)
        return (text[begin:], len(text)) if end < 0 else (text[begin:end], end + len(END_MARK))
    fenced = re.compile(r"\s*```(?:json)?").match(text, start) if mark is None else None
    begin = fenced.end() if fenced else start + len(mark or "")
    end = begin
    while (value := _value(text, end)) is not None:
        end = value[1]
    if end == begin:
        return text[begin:], len(text)
    closing = re.compile(rf"\s*{FENCE}").match(text, end) if fenced else None
    return text[begin:end], closing.end() if closing else end


def _value(text: str, at: int) -> tuple[Any, int] | None:
    """The JSON object or list that comes next, behind separators, and where it ends."""
    begin = re.compile(r"[\s,;]*").match(text, at)
    assert begin is not None
    if text[begin.end() : begin.end() + 1] not in ("{", "["):
        return None
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, begin.end())
    except (ValueError, RecursionError):
        return None


def _calls(body: str) -> Iterator[dict[str, Any]]:
    """The calls in a body; those with an `error` cannot be made."""
    at, found = 0, False
    while (value := _value(body, at)) is not None:
        found, at = True, value[1]
        for entry in value[0] if isinstance(value[0], list) else [value[0]]:
            yield _call(entry)
    if not found or body[at:].strip(" \n\t,;"):
        yield _invalid(None, body[at:].strip(), "This is no complete JSON object.")


def _call(entry: Any) -> dict[str, Any]:
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        return _invalid(None, json.dumps(entry, ensure_ascii=False), "The call names no function.")
    arguments = next((function[key] for key in KEYS if key in function), None)
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return _invalid(name, arguments, "The arguments are no JSON.")
    if not isinstance(arguments, dict | None):
        return _invalid(name, json.dumps(arguments, ensure_ascii=False), "The arguments are no JSON object.")
    return _made(name, json.dumps(arguments or {}, ensure_ascii=False))


def _made(name: str | None, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _invalid(name: str | None, arguments: str, error: str) -> dict[str, Any]:
    return {**_made(name, arguments), "error": error}
