"""Run a request's work in a thread and deliver its result, whole or as server-sent events.

Where the client is gone, the work is cancelled: decoding stops within one token, reading within one chunk.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from threading import Event
from typing import Any, Protocol, TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response

from zsmerge_llm import aio
from zsmerge_llm.server.errors import ErrorReply, anthropic_error, openai_error, reply_to
from zsmerge_llm.types import Chunk

T = TypeVar("T")

SETTLE_SECONDS = 2.0
"""How long a stream waits for its first chunk before it sends headers: an error until then has a status of its own."""
PING_SECONDS = 15
"""Between two comments that keep a connection open while a prompt is read."""
LINE_END = "\n"
SEND_SECONDS = 60
"""How long a client may read nothing of a stream before it is cut off."""
CLIENT_GONE = 499
"""Status for the log: nobody reads it."""


class Events(Protocol):
    """Turns the chunks of an answer into a dialect's events."""

    def start(self) -> Iterator[dict[str, Any]]: ...

    def push(self, chunk: Chunk) -> Iterator[dict[str, Any]]: ...


@dataclass(frozen=True)
class EventForm:
    """How a dialect writes events.

    Attributes:
        named: whether each has its type as its name. end: what is sent after the last one. error: body of an error.
    """

    named: bool
    end: str | None
    error: Callable[[ErrorReply], dict[str, Any]]

    def write(self, event: dict[str, Any]) -> ServerSentEvent:
        """Return an event as it is sent."""
        return ServerSentEvent(json.dumps(event), event=event.get("type") if self.named else None, sep=LINE_END)

    def write_error(self, reply: ErrorReply) -> ServerSentEvent:
        """Return an error as it is sent within a stream."""
        body = self.error(reply)
        return self.write({"type": "error", **body} if self.named else body)


def json_reply(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response. What is not ASCII is escaped, so that any text can be sent."""
    return Response(json.dumps(content), status, headers, media_type="application/json")


async def error_response(request: Request, error: Exception) -> Response:
    """Return an error in the form of the dialect that was used."""
    if isinstance(error, ClientDisconnectedError):
        return Response(status_code=CLIENT_GONE)
    reply = reply_to(error)
    body = anthropic_error if request.url.path.startswith("/v1/messages") else openai_error
    return json_reply(body(reply), reply.status, {**reply.headers, **(getattr(error, "headers", None) or {})})


async def run(request: Request, work: Callable[[Event], T]) -> T:
    """Return `work(cancel)`, run in a thread.

    Raises:
        ClientDisconnectedError: the client is gone, and `cancel` was set.
    """
    return await while_connected(request, aio.call(work))


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`, which is cancelled where the client is gone. The request's body has been read.

    Raises:
        ClientDisconnectedError: the client is gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


class ClientDisconnectedError(Exception):
    """The client closed the connection before its answer was complete."""


async def _disconnect(request: Request) -> None:
    """Return when the client is gone. Its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def stream(chunks: AsyncGenerator[Chunk, None], events: Events, form: EventForm) -> Response:
    """Return a response that sends the events of an answer.

    Raises:
        Whatever the answer raises before its first chunk, within `SETTLE_SECONDS`.
    """
    first = asyncio.ensure_future(anext(chunks))
    try:
        await asyncio.wait({first}, timeout=SETTLE_SECONDS)
    except asyncio.CancelledError:
        first.cancel()
        raise
    if first.done():
        first.result()
    return EventSourceResponse(
        _events(first, chunks, events, form), ping=PING_SECONDS, sep=LINE_END, send_timeout=SEND_SECONDS
    )


async def _events(
    first: asyncio.Future[Chunk], chunks: AsyncGenerator[Chunk, None], events: Events, form: EventForm
) -> AsyncGenerator[ServerSentEvent, None]:
    try:
        for event in events.start():
            yield form.write(event)
        for event in events.push(await first):
            yield form.write(event)
        async for chunk in chunks:
            for event in events.push(chunk):
                yield form.write(event)
    except Exception as error:  # the headers are sent: it can only be told within the stream
        yield form.write_error(reply_to(error))
    finally:
        first.cancel()
        await chunks.aclose()
    if form.end is not None:
        yield ServerSentEvent(form.end, sep=LINE_END)
