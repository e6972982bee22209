"""One cell of a table of requests: what the server does with a field or a kind, and what is sent to show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["supported", "no effect", "refused"]
Check = Callable[[Any], bool]


@dataclass(frozen=True)
class Cell:
    """What the server does with a field.

    Attributes:
        note: for readers: why it is harmless, or what to do instead.
        request: the fields that are sent to show it; None: those that every request has.
        check: what must be so of the answer.
        named: what the error must name, where that is not the field.
    """

    status: Status
    note: str = ""
    request: Mapping[str, Any] | None = None
    check: Check = field(default=lambda answer: answer is not None)
    named: str = ""


@dataclass(frozen=True)
class Group:
    """A table of requests.

    Attributes:
        title: of the table. vendor: all names that the vendor's types have. cells: ours, by name.
    """

    title: str
    vendor: list[str]
    cells: dict[str, Cell]


def supported(note: str = "", check: Check | None = None, **request: Any) -> Cell:
    """Return a cell of what has its effect."""
    return Cell("supported", note, request, *([check] if check else []))


def no_effect(note: str, **request: Any) -> Cell:
    """Return a cell of what is accepted, and changes no answer."""
    return Cell("no effect", note, request)


def refused(note: str = "", named: str = "", **request: Any) -> Cell:
    """Return a cell of what is an error that names it."""
    return Cell("refused", note, request, named=named)


def refuse_rest(vendor: list[str], cells: dict[str, Cell], make: Callable[[str], dict[str, Any]]) -> dict[str, Cell]:
    """Return cells in which every other kind is refused. make: the fields that send a kind."""
    return {**{kind: refused(**make(kind)) for kind in vendor if kind not in cells}, **cells}
