"""What replies and events hold of the fields that the vendors' clients know: seen in answers of all kinds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from anthropic.types import RawMessageStreamEvent
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel

from tests.server.conformance.vendor import kinds

Fields = dict[str, str]
"""What became of each field of a class: `given`, `null` or `left out`; `ours` for those that are this server's own."""
RANK = ("left out", "null", "given", "ours")


@dataclass(frozen=True)
class Seen:
    """The classes of which an answer consists.

    Attributes:
        classes: their fields, by the name of the class. required: names of the fields that a vendor always sends.
        events: kinds of events, if it was a stream of several kinds.
    """

    classes: dict[str, Fields]
    required: set[str]
    events: set[str]


def look_at(answers: Iterable[Any]) -> Seen:
    """Return what answers hold: whole ones, or events."""
    seen = Seen({}, set(), set())
    for answer in answers:
        _look_into(answer, seen)
        if isinstance(kind := getattr(answer, "type", None), str):
            seen.events.add(kind)
    return seen


def _look_into(value: Any, seen: Seen) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            _look_into(each, seen)
    if not isinstance(value, BaseModel):
        return
    kind = type(value)
    fields = seen.classes.setdefault(kind.__name__, dict.fromkeys(kind.model_fields, "left out"))
    for name in kind.model_fields:
        content = getattr(value, name, None)
        status = "left out" if name not in value.model_fields_set else "null" if content is None else "given"
        fields[name] = max(fields[name], status, key=RANK.index)
        if kind.model_fields[name].is_required():
            seen.required.add(f"{kind.__name__}.{name}")
        _look_into(content, seen)
    fields |= dict.fromkeys(value.model_extra or (), "ours")


def missing(seen: Seen) -> set[str]:
    """Return the fields that a vendor always sends, and that were in no answer."""
    given = {f"{kind}.{name}" for kind, fields in seen.classes.items() for name in fields if fields[name] != "left out"}
    return seen.required - given


EVENTS = {"/v1/responses": kinds(ResponseStreamEvent), "/v1/messages": kinds(RawMessageStreamEvent)}
"""All kinds of events that the vendors' clients know."""
