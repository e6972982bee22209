"""Tool calls while they are written: name and id first, then the arguments, piece by piece.

A call is followed if it is written as grammars enforce it: an object with the name before the arguments. Any other one
is passed on when it is complete.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from zsmerge_llm.types import ToolCallDelta

HEAD = re.compile(r'[\[\s,;]*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters|args)"\s*:\s*(?=\{)')
"""The beginning of a call, up to its arguments, behind what separates it from the one before."""
TAIL = re.compile(r'\s*(?:,\s*"id"\s*:\s*"[^"\\]*"\s*)?\}')
"""The end of a call, behind its arguments. Mistral's have an id."""
STRUCTURE = re.compile(r'["\\{}\[\]]')


class JsonEnd:
    """Find the end of the JSON object or list that begins at `start`, as its text arrives."""

    def __init__(self, start: int) -> None:
        self._at = start
        self._depth = 0
        self._in_string = False

    def find(self, text: str) -> int | None:
        """Return the index behind it; None while it is not closed."""
        while found := STRUCTURE.search(text, self._at):
            sign, self._at = found.group(), found.end()
            if sign == "\\":
                if self._at == len(text):
                    self._at -= 1
                    return None
                self._at += 1
            elif sign == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if sign in "{[" else -1
                if self._depth <= 0:
                    return self._at
        self._at = max(self._at, len(text))
        return None


@dataclass
class _Followed:
    id: str
    start: int
    sent: int
    end: int | None = None


class CallStream:
    """Follow the calls of one part of an answer that holds nothing else.

    Args:
        start: where the calls begin in the answer, behind a marker.
        index: of the first call.
    """

    def __init__(self, start: int, index: int) -> None:
        self._at = start
        self._index = index
        self._calls: list[_Followed] = []
        self._end: JsonEnd | None = None

    def push(self, text: str) -> list[ToolCallDelta]:
        """Return what is new of the calls in the answer so far."""
        deltas: list[ToolCallDelta] = []
        while True:
            if self._end is None:
                if (head := HEAD.match(text, self._at)) is None:
                    return deltas
                self._calls.append(_Followed(new_id(), head.end(), head.end()))
                self._end = JsonEnd(head.end())
                deltas.append(ToolCallDelta(self._last_index, "", self._calls[-1].id, head[1]))
            call = self._calls[-1]
            call.end = call.end or self._end.find(text)
            sent, call.sent = call.sent, call.end or len(text)
            if text[sent : call.sent]:
                deltas.append(ToolCallDelta(self._last_index, text[sent : call.sent]))
            tail = TAIL.match(text, call.end) if call.end else None
            if tail is None:
                return deltas
            self._at, self._end = tail.end(), None

    def finish(self, text: str, calls: Sequence[dict[str, Any]]) -> list[ToolCallDelta]:
        """Give the parsed calls of this part, in place, the ids and the texts that were passed on; return the rest."""
        deltas = list[ToolCallDelta]()
        for at, call in enumerate(calls):
            if at < len(self._calls):
                call["id"] = self._calls[at].id
                if "error" not in call and self._calls[at].end:
                    call["function"]["arguments"] = text[self._calls[at].start : self._calls[at].end]
            elif "error" not in call:
                self._calls.append(_Followed(call["id"], 0, 0))
                deltas.append(whole_call(self._last_index, call))
        return deltas

    @property
    def next_index(self) -> int:
        """The index of the first call behind this part."""
        return self._last_index + 1

    @property
    def _last_index(self) -> int:
        return self._index + len(self._calls) - 1


class RedundancyGate:
    """Hold back calls until one is new: an answer that only repeats calls of its turn is generated again.

    Args:
        previous: the calls of the turn, as `canonical_call` writes them.
    """

    def __init__(self, previous: Collection[str]) -> None:
        self._previous = previous
        self._texts: dict[str, list[str | None]] = {}
        for name, arguments in map(json.loads, previous):
            self._texts.setdefault(name, []).append(_only_text(arguments))
        self._held: list[ToolCallDelta] = []
        self._calls: dict[int, tuple[str, str]] = {}
        self._is_open = not previous

    def push(self, deltas: Sequence[ToolCallDelta]) -> list[ToolCallDelta]:
        """Add what is new of the calls; return what may be passed on."""
        self._held += deltas
        for delta in () if self._is_open else deltas:
            name, arguments = self._calls.get(delta.index, (delta.name, ""))
            self._calls[delta.index] = (name, arguments + delta.arguments)
            self._is_open = self._is_open or self._is_new(*self._calls[delta.index])
        return self.flush() if self._is_open else []

    def flush(self) -> list[ToolCallDelta]:
        """Return what was held back."""
        held, self._held = self._held, []
        return held

    def _is_new(self, name: str, arguments: str) -> bool:
        texts, written = self._texts.get(name, ()), _squashed(arguments)
        if "\\" not in written and all(text is not None and not text.startswith(written) for text in texts):
            return True
        try:
            value = json.loads(arguments)
        except ValueError:
            return False  # not complete
        return canonical_call({"function": {"name": name, "arguments": value}}) not in self._previous


class RepetitionGate:
    """Hold back a call while it may repeat an earlier one of its answer, and drop it if it does.

    Attributes:
        repeats: whether one does. Small models go on so without end.
    """

    def __init__(self) -> None:
        self.repeats = False
        self._passed_on: list[ToolCallDelta] = []
        self._earlier: set[str] = set()
        self._index = -1
        self._gate = RedundancyGate(())
        self._name = self._arguments = ""

    def push(self, deltas: Iterable[ToolCallDelta]) -> list[ToolCallDelta]:
        """Add what is new of the calls; return what may be passed on."""
        passed_on = list[ToolCallDelta]()
        for delta in deltas:
            if delta.index != self._index:
                self._begin(delta)
            self._arguments += delta.arguments
            new = self._gate.push([delta])
            passed_on += new
            self.repeats = self.repeats or (not new and _is_complete(self._arguments))
        self._passed_on += passed_on
        return passed_on

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The calls that were passed on, in the OpenAI format."""
        return [
            {"id": each.id, "type": "function", "function": {"name": each.name, "arguments": each.arguments}}
            for each in merge_deltas(self._passed_on)
        ]

    def _begin(self, delta: ToolCallDelta) -> None:
        if _is_complete(self._arguments):
            self._earlier.add(canonical_call({"function": {"name": self._name, "arguments": self._arguments}}))
        self._index, self._name, self._arguments = delta.index, delta.name, ""
        self._gate = RedundancyGate(self._earlier)


def _is_complete(arguments: str) -> bool:
    try:
        json.loads(arguments)
    except ValueError:
        return False
    return True


def _only_text(arguments: Any) -> str | None:
    """Return the only way to write these arguments, but for spaces and escapes; None if there are several."""
    values = list(arguments.values()) if isinstance(arguments, dict) else [arguments]
    is_single = len(values) < 2 and all(isinstance(value, str) for value in values)
    return _squashed(json.dumps(arguments, ensure_ascii=False)) if is_single else None


def _squashed(text: str) -> str:
    return "".join(text.split())


def canonical_call(call: Mapping[str, Any]) -> str:
    """Return a text that is equal for calls of the same function with the same arguments."""
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        with suppress(ValueError):  # invalid JSON is compared as text
            arguments = json.loads(arguments)
    return json.dumps([function["name"], arguments], sort_keys=True)


def merge_deltas(deltas: Iterable[ToolCallDelta]) -> list[ToolCallDelta]:
    """Return one delta for each call."""
    merged: dict[int, ToolCallDelta] = {}
    for delta in deltas:
        first = merged.get(delta.index)
        merged[delta.index] = replace(first, arguments=first.arguments + delta.arguments) if first else delta
    return list(merged.values())


def whole_call(index: int, call: Mapping[str, Any]) -> ToolCallDelta:
    """Return a call in the OpenAI format as one delta."""
    function = call["function"]
    return ToolCallDelta(index, function["arguments"], call.get("id", ""), function["name"])


def new_id() -> str:
    """Return a unique id of a call."""
    return f"call_{uuid.uuid4().hex[:24]}"
