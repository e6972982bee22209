"""Renders docs/conformance.md. `WRITE_CONFORMANCE=1 python -m pytest -n 0 tests/server/conformance` renews it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.server.conformance.cells import Group
from tests.server.conformance.endpoints import ENDPOINTS
from tests.server.conformance.replies import EVENTS, Seen
from tests.server.conformance.vendor import versions

PAGE = Path(__file__).parents[3] / "docs" / "conformance.md"
HEAD = """# Conformance

Every field that the clients of OpenAI and Anthropic know, and what the [server](serving.md) does with it.
The names are those of {versions}.
Each cell is a request that such a client sends in the tests. A field that is in no table is an error that names it.

- **supported**: it has its effect.
- **no effect**: it is accepted, and the answer is the same without it.
- **refused**: an error that names it (status 400).

Of replies and events, the tables list all objects that are ever sent. `left out`: the vendor has the field, and here it
is never sent; `ours`: what only this server sends.
"""


def render(replies: dict[str, Seen], streams: dict[str, Seen], models: Seen) -> str:
    """Return the page. replies, streams: what answers hold, by the path of the endpoint."""
    parts = [HEAD.format(versions=versions())]
    for endpoint in ENDPOINTS:
        parts.append(f"## {endpoint.path}\n\nAgainst {endpoint.vendor}'s reference.\n")
        parts += [_requests(group) for group in endpoint.groups]
        parts.append(_replies("The reply", replies[endpoint.path]))
        if endpoint.streams:
            parts.append(_replies("Events", streams[endpoint.path]))
        if endpoint.path in EVENTS:
            never = sorted(set(EVENTS[endpoint.path]) - streams[endpoint.path].events)
            parts.append(f"Events that are never sent: {_names(never)}.\n")
    parts.append("## /v1/models\n\nEach model is described as both vendors do.\n")
    parts.append(_replies("The reply", models))
    return "\n".join(parts)


def _requests(group: Group) -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    for name, cell in sorted(group.cells.items()):
        rows.setdefault((cell.status, cell.note), []).append(name)
    order = sorted(rows, key=lambda row: ("supported", "no effect", "refused").index(row[0]))
    lines = [f"| {_names(rows[row])} | {row[0]} | {row[1]} |" for row in order]
    return "\n".join([f"### {group.title}\n", "| | | |", "|---|---|---|", *lines, ""])


def _replies(title: str, seen: Seen) -> str:
    lines = ["| object | given | null | left out | ours |", "|---|---|---|---|---|"]
    for kind, fields in sorted(seen.classes.items()):
        columns = [
            [name for name in fields if fields[name] == status] for status in ("given", "null", "left out", "ours")
        ]
        lines.append(f"| {kind} | {' | '.join(_names(sorted(names)) for names in columns)} |")
    return "\n".join([f"### {title}\n", *lines, ""])


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
