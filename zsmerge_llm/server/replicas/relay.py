"""Pass a request on to a replica and its reply back: whole, or as events while they come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from zsmerge_llm.server.chat_routes import ANTHROPIC, OPENAI, RESPONSES
from zsmerge_llm.server.delivery import EventForm, while_connected
from zsmerge_llm.server.errors import ErrorReply, RequestError
from zsmerge_llm.server.replicas.pool import Replica, ReplicaPool

NOT_PASSED_ON = frozenset(
    [
        "connection",
        "content-length",
        "host",
        "keep-alive",
        "transfer-encoding",
        "accept-encoding",
        "upgrade",
        "te",
        "date",
        "server",
    ]
)
"""Headers of one connection only, and those that each server writes itself."""
EVENT_END = b"\n\n"
LAST_EVENTS = (
    b"data: [DONE]",
    b"event: message_stop",
    b"event: response.completed",
    b"event: response.incomplete",
    b"event: error",
)
"""How the last event of a complete stream begins, in any dialect."""
LOST = ErrorReply(
    503,
    "api_error",
    "The replica that worked on this request has ended. Send it again: the conversation goes on from its last answer.",
    "replica_lost",
    headers={"Retry-After": "1"},
)
NONE_ANSWERS = ErrorReply(
    503,
    "overloaded_error",
    "No replica answers now. Try again in a moment.",
    "no_replica",
    headers={"Retry-After": "5"},
)


async def relay(request: Request, body: bytes, pool: ReplicaPool, key: str) -> Response:
    """Return the reply of the replica that a conversation belongs to or, where that is gone, of the next one.

    A request goes to another replica only where none has begun to work on it, or where it only reads: what ended one
    replica may end all.

    Raises:
        RequestError: no replica answers, or the one that worked on the request has ended.
        ClientDisconnectedError: the client is gone.
    """
    for replica in pool.ranked(key):
        try:
            return await while_connected(request, _ask(request, body, pool, replica))
        except httpx.TransportError as error:
            replica.answers = False  # until it passes a check
            has_begun = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            if has_begun and request.method != "GET":
                raise RequestError(LOST) from error
    raise RequestError(NONE_ANSWERS)


async def _ask(request: Request, body: bytes, pool: ReplicaPool, replica: Replica) -> Response:
    """Return a replica's reply: an event stream from its first byte on, any other one whole. Raises TransportError."""
    headers = [(name, value) for name, value in request.headers.raw if name.decode("latin-1") not in NOT_PASSED_ON]
    query = request.scope["query_string"]
    target = request.scope["raw_path"] + (b"?" + query if query else b"")
    url = httpx.URL(replica.address or "", raw_path=target)
    upstream = await pool.client.send(
        pool.client.build_request(request.method, url, headers=headers, content=body), stream=True
    )
    kept = {name: value for name, value in upstream.headers.items() if name not in NOT_PASSED_ON}
    if upstream.headers.get("content-type", "").startswith("text/event-stream"):
        return _Relay(upstream, _whole_events(upstream, _form(request.url.path), replica), kept)
    try:
        content = b"".join([part async for part in upstream.aiter_raw()])
    finally:
        await upstream.aclose()
    return Response(content, upstream.status_code, kept)


def _form(path: str) -> EventForm:
    """Return how the dialect of a path writes events."""
    if path.startswith("/v1/messages"):
        return ANTHROPIC
    return RESPONSES if path.startswith("/v1/responses") else OPENAI


class _Relay(StreamingResponse):
    """Sends a replica's events as they come. Where the client is gone, the replica is told by a closed connection."""

    def __init__(self, upstream: httpx.Response, events: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        super().__init__(events, upstream.status_code, headers)
        self._upstream = upstream

    async def __call__(self, *connection: Any) -> None:
        try:
            await super().__call__(*connection)
        finally:
            with anyio.CancelScope(shield=True):
                await self._upstream.aclose()


async def _whole_events(upstream: httpx.Response, form: EventForm, replica: Replica) -> AsyncIterator[bytes]:
    """Yield whole events as they come, and an error where the replica ends before its answer."""
    rest, is_complete = b"", False
    try:
        async for part in upstream.aiter_raw():
            whole, end, rest = (rest + part).rpartition(EVENT_END)
            is_complete = is_complete or any(event.startswith(LAST_EVENTS) for event in whole.split(EVENT_END))
            if end:
                yield whole + end
    except httpx.TransportError:
        replica.answers = False  # until it passes a check: the next turn may come before its port is closed
    if not is_complete:
        yield form.write_error(LOST).encode()
        if form.end is not None:
            yield f"data: {form.end}\n\n".encode()
